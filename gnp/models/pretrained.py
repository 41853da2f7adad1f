"""timm's weights: `.safetensors` files read into our models' variables, and variables written.

Both directions follow one list: `_all_parts` names, for every array of a model, the tensors that
timm has in its place, and their shapes. Names follow from a family's table, layouts from shapes.
"""

import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from itertools import filterfalse
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from gnp import models
from gnp.errors import UserError, unknown

# {"params": nested dictionaries of arrays, and "batch_stats" where the model has them}
Variables = dict[str, Any]
T = TypeVar("T")


class _Family(NamedTuple):
    """How timm names what a file of ours has.

    Attributes:
      mark: a tensor that timm's models of this family have, and those of later families have not.
      head: the layer that gives the logits.
      names: patterns of paths and what takes their place, of which the first that matches holds;
        then "/" becomes ".". {i}, {even} and {odd} are i, 2 · i and 2 · i + 1, where i runs over
        the array's leading axis.
      convolutions: the dense layers that timm has as convolutions, and the sides of their square
        windows; None for that of a patch, which follows from the array's shape.
    """

    mark: str
    head: str
    names: tuple[tuple[str, str], ...]
    convolutions: Mapping[str, int | None] = {}


_PATCH = (r"patch_embed/(.*)", r"patch_embed.proj/\1")

# By the file in gnp/models.
_FAMILIES = {
    "cait": _Family(
        mark="blocks_token_only.0.gamma_1",
        head="head",
        names=(_PATCH, (r"(blocks|blocks_token_only)/(.*)", r"\1/{i}/\2")),
        convolutions={"patch_embed": None},
    ),
    "vit": _Family(
        mark="blocks.0.attn.qkv.weight",
        head="head",
        names=(_PATCH, (r"blocks/(.*)", r"blocks/{i}/\1")),
        convolutions={"patch_embed": None},
    ),
    "swin": _Family(
        mark="layers.0.blocks.0.attn.qkv.weight",
        head="head",
        names=(
            _PATCH,
            (r"patch_norm/(.*)", r"patch_embed.norm/\1"),
            (r"layers_(\d+)/blocks/regular/(.*)", r"layers.\1.blocks/{even}/\2"),
            (r"layers_(\d+)/blocks/shifted/(.*)", r"layers.\1.blocks/{odd}/\2"),
            (r"layers_(\d+)/(.*)", r"layers.\1/\2"),
            (r"head/(.*)", r"head.fc/\1"),
        ),
        convolutions={"patch_embed": None},
    ),
    "resnet": _Family(
        mark="layer1.0.conv1.weight",
        head="fc",
        names=(
            (r"layer(\d+)_(\d+)/downsample_(\d+)/(.*)", r"layer\1.\2.downsample.\3/\4"),
            (r"layer(\d+)_(\d+)/(.*)", r"layer\1.\2/\3"),
        ),
    ),
    "vgg": _Family(
        mark="features.0.weight",
        head="head_fc",
        names=(
            (r"features_(\d+)/(.*)", r"features.\1/\2"),
            (r"pre_logits_(.*)", r"pre_logits.\1"),
            (r"head_fc/(.*)", r"head.fc/\1"),
        ),
        convolutions={"pre_logits_fc1": 7, "pre_logits_fc2": 1},
    ),
    "densenet": _Family(
        mark="features.conv0.weight",
        head="classifier",
        names=(
            (r"denseblock(\d+)_denselayer(\d+)/(.*)", r"features.denseblock\1.denselayer\2/\3"),
            (r"(conv0|norm0|transition\d+|norm5)/(.*)", r"features.\1/\2"),
        ),
    ),
}

# The last part of a path and what timm calls it, where that differs.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# What timm's models, or older ones, keep beside weights, and ours can do without.
_BUFFERS = ("num_batches_tracked", "relative_position_index", "attn_mask")
# Tables over a square grid, with at most one row before it: resized where the grid is another.
_TABLES = ("pos_embed", "relative_position_bias_table")
# As the format calls them.
_DTYPES = ("F64", "F32", "F16", "BF16")
_STEM = "timm's is the model with model.stem 'imagenet', for images of 224 pixels"
# What to try where a tensor is missing or left over.
_HINTS = {
    "cls_token": "set model.pool to 'token' with a class token, to 'mean' without",
    "pre_logits.fc1.weight": _STEM,
    "features.norm0.weight": _STEM,
}


# --- Reading ------------------------------------------------------------------------------------


def load_pretrained(
    name: str,
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    image_size: int = 224,
    channels: int = 3,
    seed: int = 0,
    **overrides: Any,
) -> Variables:
    """Reads a `.safetensors` file of timm's for a model.

    Position embeddings are resized to the model's grid of patches as timm does it, Swin's relative
    position biases to its windows likewise. The weights want images that are normalised as timm's
    configuration of the model says, which is not in the file.

    Args:
      name: one of `models.list_models()` that has a counterpart in timm.
      path: the file.
      num_classes: of the model; by default as many as the file's head has. With another number the
        head is not read but left as the model initialises it.
      image_size: the height and width of the model's images in pixels.
      channels: the images' channels.
      seed: of the head's initialisation.
      **overrides: fields of the model's module, as for `models.create`.

    Returns:
      The variables of `models.create(name, num_classes, image_size=image_size, **overrides)`:
      {"params": …} and, where the model has them, "batch_stats", with float32 NumPy arrays.

    Raises:
      UserError: if the file cannot be read, or its tensors are not the model's, each and all.
    """
    family = _family(name)
    tensors = _read(path)
    head = _name(family, f"{family.head}/bias")
    if head not in tensors:
        _check_family(name, tensors, str(path))
        raise UserError(f"{path} has no {head}: its model is without a head")
    if tensors[head].ndim != 1 or not tensors[head].size:
        raise UserError(
            f"{path}: {head} has the shape {tensors[head].shape}; it must be one number a class"
        )
    num_classes = len(tensors[head]) if num_classes is None else num_classes
    model = models.create(name, num_classes, image_size=image_size, **overrides)
    shape = (1, image_size, image_size, channels)

    def init() -> Any:
        return model.init(jax.random.key(seed), jnp.zeros(shape))

    variables = from_timm(name, tensors, jax.eval_shape(init), where=str(path))
    flat = flatten_dict(variables, sep="/")
    # Compiled for these alone, as all else would take long.
    left = [key for key, value in flat.items() if not isinstance(value, np.ndarray)]
    if left:
        initial = jax.jit(lambda: {key: flatten_dict(init(), sep="/")[key] for key in left})()
        flat |= jax.device_get(initial)
    return unflatten_dict(flat, sep="/")


def from_timm(
    name: str, tensors: Mapping[str, np.ndarray], like: Variables, *, where: str = "the file"
) -> Variables:
    """A model's variables with the values of timm's tensors: the inverse of `to_timm`.

    Args:
      name: the model's.
      tensors: by timm's names; buffers, such as the number of batches BatchNorm has seen, may be
        among them.
      like: the model's variables, or their shapes (`jax.ShapeDtypeStruct` leaves).
      where: names the tensors in errors.

    Returns:
      `like` with NumPy arrays, of the tensors' dtypes, in place of its leaves; a head that has
      another number of classes than the tensors' stays as it is in `like`.

    Raises:
      UserError: if a tensor is missing, left over or of the wrong shape.
    """
    tensors, flat = _current(tensors), flatten_dict(like, sep="/")
    shapes = {key: np.shape(tensor) for key, tensor in tensors.items()}
    for path, parts in _match(name, shapes, flat, where).items():
        arrays = [_to_ours(tensors[part.name], part) for part in parts]
        array = arrays[0] if parts[0].block is None else np.stack(arrays)
        flat[path] = np.ascontiguousarray(array.reshape(flat[path].shape))
    return unflatten_dict(flat, sep="/")


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """A file's tensors in float32, without buffers, by timm's present names."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        file = safe_open(path, framework="numpy")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except SafetensorError as error:
        with open(path, "rb") as raw:
            start = raw.read(4)
        # A zip archive, as PyTorch writes it, or a pickle, as it did before.
        if start.startswith((b"PK\x03\x04", b"\x80\x02")):
            raise UserError(f"{path} is a file of PyTorch's; {_conversion(path)}") from None
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    tensors = {}
    with file:
        for key in filterfalse(_is_buffer, file.keys()):
            dtype = file.get_slice(key).get_dtype()
            if dtype not in _DTYPES:
                raise UserError(
                    f"{path}: {key} is of type {dtype}; readable are {', '.join(_DTYPES)}"
                )
            # NumPy knows bfloat16 since JAX is imported.
            tensors[key] = file.get_tensor(key).astype(np.float32)
    return _current(tensors)


def _conversion(path: str | os.PathLike[str]) -> str:
    """How to make a `.safetensors` file of one of PyTorch's."""
    source, target = str(path), str(pathlib.Path(path).with_suffix(".safetensors"))
    return (
        'convert it where PyTorch is installed: python -c "import torch, safetensors.torch as s; '
        f"d = torch.load({source!r}, map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone() for k, v in d.get('model', d).items()}}, {target!r})\""
    )


def _is_buffer(key: str) -> bool:
    return key.rpartition(".")[2] in _BUFFERS


def _current(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors without buffers, by timm's present names."""
    kept = {key: value for key, value in tensors.items() if not _is_buffer(key)}
    if "layers.0.downsample.reduction.weight" not in kept:
        return kept

    # Swin's original files have the downsampling at a stage's end, timm has it at the next's start.
    def rename(key: str) -> str:
        if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.*)", key):
            return f"layers.{int(match[1]) + 1}.downsample.{match[2]}"
        return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)

    return {rename(key): value for key, value in kept.items()}


# --- Writing ------------------------------------------------------------------------------------


def check_counterpart(name: str) -> None:
    """Raises a `UserError` for a model that timm does not have."""
    _family(name)


def to_timm(name: str, variables: Variables) -> dict[str, np.ndarray]:
    """A model's variables as timm's tensors: the inverse of `from_timm`, exactly.

    A model for small images, with the stem "cifar", has timm's names too, but timm itself has no
    model that takes all of its tensors.

    Args:
      name: the model's.
      variables: {"params": …, and "batch_stats" where the model has them}; arrays.

    Returns:
      The state dictionary of timm's model: contiguous arrays of the variables' dtypes, and for each
      BatchNorm the number of batches it has seen (0, as it is unknown).

    Raises:
      UserError: for a model that timm does not have.
    """
    flat = flatten_dict(variables, sep="/")
    tensors = {}
    for path, parts in _all_parts(_family(name), flat).items():
        array = np.asarray(flat[path])
        for part in parts:
            value = array if part.block is None else array[part.block]
            tensors[part.name] = np.ascontiguousarray(_to_theirs(value, part))
            layer, _, leaf = part.name.rpartition(".")
            if leaf == "running_var":
                tensors[f"{layer}.num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


# --- What is where ------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A tensor of timm's that has the values of one of our arrays, or of one block's part of it.

    Attributes:
      path: the array's, without its collection.
      block: the block's number, on the array's leading axis; None if the array is one tensor.
      name: the tensor's.
      shape: the tensor's.
    """

    path: str
    block: int | None
    name: str
    shape: tuple[int, ...]


def _family(name: str) -> _Family:
    """The family of one of our models."""
    known = models.list_models()
    if name not in known:
        raise unknown("model", name, known)
    if known[name].file not in _FAMILIES:
        raise UserError(f"timm has no counterpart of model {name!r}")
    return _FAMILIES[known[name].file]


def _name(family: _Family, path: str) -> str:
    """The tensor's name; {i}, {even} or {odd} in it stands for a block's number."""
    for pattern, place in family.names:
        if match := re.fullmatch(pattern, path):
            path = match.expand(place)
            break
    layer, slash, leaf = path.rpartition("/")
    return (layer + slash + _LEAVES.get(leaf, leaf)).replace("/", ".")


def _all_parts(family: _Family, flat: Mapping[str, Any]) -> dict[str, list[_Part]]:
    """The tensors for each array, by its path with its collection."""
    if "params/pre_logits_fc1/kernel" in flat:
        _check_positions(flat)
    parts = {}
    for key, array in flat.items():
        path, shape = key.partition("/")[2], tuple(array.shape)
        name = _name(family, path)
        if "{" in name:
            shape_of_block = _their_shape(family, path, shape[1:])
            names = [name.format(i=i, even=2 * i, odd=2 * i + 1) for i in range(shape[0])]
            parts[key] = [_Part(path, i, each, shape_of_block) for i, each in enumerate(names)]
        else:
            parts[key] = [_Part(path, None, name, _their_shape(family, path, shape))]
    return parts


def _check_positions(flat: Mapping[str, Any]) -> None:
    """Raises a `UserError` unless a VGG's first hidden layer is over 7 × 7 positions."""
    features = max(x.shape[-1] for key, x in flat.items() if key.startswith("params/features_"))
    inputs = flat["params/pre_logits_fc1/kernel"].shape[0]
    if inputs != 49 * features:
        raise UserError(
            "timm's VGG has a layer over 7 × 7 positions, for images of 224 pixels; this model's "
            f"is over {inputs // features}"
        )


def _their_shape(family: _Family, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The tensor's shape: a kernel's outputs come first there, then its inputs, then its window."""
    layer, _, leaf = path.rpartition("/")
    if leaf != "kernel":
        return shape
    *window, inputs, outputs = shape
    if layer in family.convolutions:
        side = family.convolutions[layer] or _patch_side(inputs)
        window, inputs = [side, side], inputs // side**2
    return (outputs, inputs, *window)


def _patch_side(size: int) -> int:
    """The side of a square patch of `size` values, with 3 channels or 1."""
    side = math.isqrt(size // 3)  # no size is a square and three times a square
    return side if 3 * side**2 == size else math.isqrt(size)


def _to_theirs(array: np.ndarray, part: _Part) -> np.ndarray:
    if len(part.shape) == 4:
        outputs, inputs, height, width = part.shape
        return array.reshape(height, width, inputs, outputs).transpose(3, 2, 0, 1)
    return array.T if part.path.endswith("/kernel") else array


def _to_ours(tensor: np.ndarray, part: _Part) -> np.ndarray:
    """The inverse, but for the shape of a convolution that is a dense layer of ours."""
    if part.path.endswith("/kernel"):
        return tensor.transpose(*range(2, tensor.ndim), 1, 0)
    return tensor if tensor.shape == part.shape else _resize(tensor, part.shape[-2])


def _resize(table: np.ndarray, rows: int) -> np.ndarray:
    """A table [..., rows, features] over a square grid, for a grid of another size.

    The grid is resized as an image, bicubic, and antialiased where it shrinks. A row before it, a
    class token's, stays.
    """
    *leading, old_rows, features = table.shape
    table = table.reshape(old_rows, features)
    (old, extra), (new, _) = _grid(old_rows), _grid(rows)
    image = table[extra:].reshape(old, old, features)
    image = jax.image.resize(image, (new, new, features), "cubic", antialias=True)
    grid = np.asarray(image).reshape(-1, features)
    return np.concatenate([table[:extra], grid]).reshape(*leading, rows, features)


def _grid(rows: int) -> tuple[int, int]:
    """The side of the largest square grid with so many points or fewer, and how many are left."""
    side = math.isqrt(rows)
    return side, rows - side**2


# --- Whether it fits ----------------------------------------------------------------------------


def _match(
    name: str, shapes: Mapping[str, tuple[int, ...]], flat: Mapping[str, Any], where: str
) -> dict[str, list[_Part]]:
    """The tensors for each array that is to be read; that is all but a head of other classes.

    Raises:
      UserError: if a tensor is missing, left over or of the wrong shape.
    """
    family = _family(name)
    _check_family(name, shapes, where)
    parts = _all_parts(family, flat)
    _check_names(
        name, shapes, {part.name for of_array in parts.values() for part in of_array}, where
    )
    head = {f"params/{family.head}/{leaf}" for leaf in ("kernel", "bias")}
    if all(_other_classes(part.shape, shapes[part.name]) for key in head for part in parts[key]):
        parts = {key: of_array for key, of_array in parts.items() if key not in head}
    _check_shapes(name, shapes, [part for of_array in parts.values() for part in of_array], where)
    return parts


def _other_classes(needed: tuple[int, ...], found: tuple[int, ...]) -> bool:
    return needed[:1] != found[:1] and needed[1:] == found[1:] and len(needed) == len(found)


def _check_family(name: str, found: Iterable[str], where: str) -> None:
    """Raises a `UserError` if the tensors are those of another family."""
    found = set(found)
    marked = [file for file, family in _FAMILIES.items() if family.mark in found]
    if not marked:
        raise UserError(
            f"{where} holds none of timm's models that are known here; its tensors are "
            f"{_some(found)}"
        )
    known = models.list_models()
    if marked[0] != known[name].file:
        near = [other for other in known if known[other].file == marked[0]]
        raise UserError(f"{where} holds no {name} but a model as {' or '.join(near)}")


def _check_names(name: str, found: Iterable[str], needed: set[str], where: str) -> None:
    """Raises a `UserError` if tensors are missing or left over."""
    missing, left = needed - set(found), set(found) - needed
    if "dist_token" in left:
        raise UserError(
            f"{where} holds a distilled model (with a dist_token), which has no counterpart here; "
            "take one that was trained without distillation"
        )
    if missing or left:
        what = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        what += [f"{len(left)} left over ({_some(left)})"] if left else []
        what += [hint for key, hint in _HINTS.items() if key in missing | left]
        raise UserError(f"the tensors in {where} are not those of {name}: {'; '.join(what)}")


def _check_shapes(
    name: str, shapes: Mapping[str, tuple[int, ...]], parts: Iterable[_Part], where: str
) -> None:
    """Raises a `UserError` if a tensor's shape does not fit."""
    wrong = [part for part in parts if not _fits(part, shapes[part.name])]
    if not wrong:
        return
    part, found = wrong[0], shapes[wrong[0].name]
    message = f"{where}: {part.name} has the shape {found}, but this {name} needs {part.shape}"
    if len(wrong) > 1:
        message += f" (and {len(wrong) - 1} more do not fit)"
    if found[:2] == part.shape[:2] and len(found) == 4:  # another window
        if part.path == "patch_embed/kernel":
            message += f"; set model.patch_size to {found[-1]}"
        elif part.name == "conv1.weight":
            message += f"; {_STEM}"
    raise UserError(message)


def _fits(part: _Part, found: tuple[int, ...]) -> bool:
    """Whether a tensor of the shape `found` can be read, resized if it is a table, as this part."""
    if found == part.shape:
        return True
    if part.path.rpartition("/")[2] not in _TABLES or len(found) != len(part.shape):
        return False
    (*leading, rows, features), (*our_leading, our_rows, our_features) = found, part.shape
    same = (leading, features) == (our_leading, our_features)
    return same and _grid(rows)[1] == _grid(our_rows)[1] and rows > 0


def _some(names: Iterable[str]) -> str:
    """The first few names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
