"""Augmentation of batches inside the compiled step: what there is, by name, and in what order."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from gnp.data.augment_color import color_jitter
from gnp.data.augment_crop import cutout, fit, flip, pad_crop, random_erasing, random_resized_crop
from gnp.data.augment_mix import cutmix, label_smoothing, mixup, mixup_or_cutmix
from gnp.data.augment_policy import auto_augment, rand_augment
from gnp.errors import UserError, unknown

# An operation takes (key, images [B, H, W, C], *arguments) to images, or one of MIXING takes
# (key, images, labels float32[B, K], *arguments) to both. The dtype of the images is kept, and but
# for random_resized_crop the shape. The arguments that a text may give are the positional ones.
IMAGE: dict[str, Callable] = {
    "pad_crop": pad_crop,
    "flip": flip,
    "random_resized_crop": random_resized_crop,
    "color_jitter": color_jitter,
    "rand_augment": rand_augment,
    "auto_augment": auto_augment,
    "cutout": cutout,
    "random_erasing": random_erasing,
}
MIXING: dict[str, Callable] = {
    "mixup": mixup,
    "cutmix": cutmix,
    "mixup_or_cutmix": mixup_or_cutmix,
    "label_smoothing": label_smoothing,
}
OPERATIONS = IMAGE | MIXING
COLOR_OPERATIONS = ("color_jitter", "rand_augment", "auto_augment")  # of 1 or 3 channels

POLICIES = {
    "none": "",
    "basic": "pad_crop:4,flip",
    "heavy": "pad_crop:4,flip,rand_augment:2:9,random_erasing:0.25,"
    "mixup_or_cutmix:0.8:1.0,label_smoothing:0.1",
}


class _Limit(NamedTuple):
    holds: Callable[[float], bool]
    meaning: str


def _between(low: float, high: float) -> _Limit:
    return _Limit(lambda x: low <= x <= high, f"between {low} and {high}")


# What an argument of this name may be. It is a whole number if its default is.
_LIMITS = {
    "padding": _between(0, 10_000),
    "min_area": _Limit(lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "brightness": _between(0, 10),
    "contrast": _between(0, 10),
    "saturation": _between(0, 10),
    "hue": _between(0, 0.5),
    "num_layers": _between(1, 10),
    "magnitude": _between(0, 30),
    "size": _between(1, 10_000),
    "probability": _between(0, 1),
    "alpha": _between(0.01, 1000),
    "mixup_alpha": _between(0.01, 1000),
    "cutmix_alpha": _between(0.01, 1000),
    "epsilon": _Limit(lambda x: 0 <= x < 1, "at least 0 and below 1"),
}


class Operation(NamedTuple):
    """An augmentation and all the arguments that a text may give, hashable.

    Attributes:
      name: one of `OPERATIONS`.
      args: in its function's order; whole ones are of type int.
    """

    name: str
    args: tuple[float, ...] = ()


def arguments(name: str) -> dict[str, float]:
    """The arguments that a text may give to an operation, in order, with their defaults."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(OPERATIONS[name]).parameters.values()
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        and parameter.default is not parameter.empty
    }


def parse_augment(text: str) -> tuple[Operation, ...]:
    """The operations of a text, in order.

    A text is a list with commas. An item is an operation, with arguments after colons
    ("rand_augment:2:9"), those left out being the defaults; or a policy, which stands for its own
    list ("basic,cutout:8"). "none" stands alone.

    Raises:
      UserError: for a name that is neither; for arguments that are too many, no numbers, or out of
        range; and for an order that cannot be: images change before labels are mixed, and
        random_resized_crop comes first.
    """
    if text.strip() == "none":
        return ()
    operations: list[Operation] = []
    for item in text.split(","):
        name, *given = (part.strip() for part in item.split(":"))
        if name == "none":
            raise UserError(
                f"augmentation {text!r}: 'none' is for no augmentation at all; "
                "leave it out of a list"
            )
        if name in POLICIES:
            if given:
                raise UserError(
                    f"augmentation {item.strip()!r}: a policy takes no arguments; "
                    f"write {POLICIES[name]} with other numbers instead"
                )
            operations += parse_augment(POLICIES[name])
        elif name in OPERATIONS:
            operations.append(Operation(name, _parse_arguments(name, given)))
        else:
            raise unknown("augmentation", name, [*POLICIES, *OPERATIONS])
    _check_order(operations)
    return tuple(operations)


def _parse_arguments(name: str, given: list[str]) -> tuple[float, ...]:
    """The values of all arguments of an operation, of which the first are given as texts."""
    values = arguments(name)
    item = ":".join([name, *given])
    if len(given) > len(values):
        form = ":".join([name, *values])
        raise UserError(f"augmentation {item!r} has too many arguments; its form is {form}")
    for argument, text in zip(values, given, strict=False):
        whole, limit = isinstance(values[argument], int), _LIMITS[argument]
        kind = "a whole number" if whole else "a number"
        try:
            value = float(text)
        except ValueError:
            value = math.nan  # which is in no range
        if not limit.holds(value) or (whole and not value.is_integer()):
            raise UserError(
                f"augmentation {item!r}: {argument} is {text!r}; it must be {kind} {limit.meaning}"
            )
        values[argument] = int(value) if whole else value
    return tuple(values.values())


def _check_order(operations: Sequence[Operation]) -> None:
    """Raises a UserError for an order of operations that cannot be."""
    mixing = ""
    for i, (name, _) in enumerate(operations):
        if name in MIXING:
            mixing = mixing or name
        elif mixing:
            raise UserError(f"augmentation {name!r} changes images; it must come before {mixing!r}")
        if name == "random_resized_crop" and i > 0:
            raise UserError(f"augmentation {name!r} must come first, and only once")


def mixes_labels(operations: Sequence[Operation]) -> bool:
    """Whether `augment` returns probabilities, and not the labels that it was given."""
    return any(name in MIXING for name, _ in operations)


def augment(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    operations: Sequence[Operation],
    *,
    size: int,
    num_classes: int,
) -> tuple[jax.Array, jax.Array]:
    """Applies operations in order, each with its own key.

    Args:
      key: a JAX random key; the result is a pure function of it.
      images: [B, H, W, C], of values from 0 to 255 in any dtype, which is kept; some operations
        take uint8 only.
      labels: int32[B].
      operations: as `parse_augment` returns them.
      size: pixels on a side of the result.
      num_classes: K.

    Returns:
      Images [B, size, size, C], and the labels, as they are or, if `mixes_labels(operations)`, as
      float32[B, K] probabilities.

    Raises:
      TypeError: if an operation does not take images of this dtype or number of channels.
    """
    keys = [jax.random.fold_in(key, i) for i in range(len(operations))]
    steps = list(zip(keys, operations, strict=True))
    if images.shape[1] > size and "random_resized_crop" not in [name for name, _ in operations]:
        images = fit(images, size)  # nothing is done to what is cut off anyway
    for key, (name, args) in steps:
        if name == "random_resized_crop":
            images = random_resized_crop(key, images, *args, size=size)
        elif name in IMAGE:
            images = IMAGE[name](key, images, *args)
    images = fit(images, size)
    if mixes_labels(operations):
        labels = jax.nn.one_hot(labels, num_classes)
    for key, (name, args) in steps:
        if name in MIXING:
            images, labels = MIXING[name](key, images, labels, *args)
    return images, labels
