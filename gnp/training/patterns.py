"""Which parameters a configuration means: regular expressions over paths, and layers in order.

A parameter's path is its keys joined by "/", as "blocks/attn/qkv/kernel"; a pattern that is found
anywhere in it matches. Trees of parameters are trees of arrays or of their shapes.
"""

import bisect
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gnp.errors import UserError


def matches(field: str, patterns: Sequence[Any], params: Any) -> Any:
    """A tree of booleans: whether any of the patterns matches a parameter.

    Raises:
      UserError: if a pattern is no regular expression or matches nothing; it names `field`.
    """
    paths = _paths(params)
    matched = set[str]().union(*(_matched(field, str(pattern), paths) for pattern in patterns))
    return _tree(params, [path in matched for path in paths])


def multipliers(field: str, rules: Sequence[Any], params: Any) -> Any:
    """A tree of factors: that of the first rule "PATTERN=FACTOR" that matches a parameter, or 1.

    Raises:
      UserError: if a rule is none, or decides nothing; it names `field`.
    """
    paths = _paths(params)
    factors: dict[str, float] = {}
    for rule in map(str, rules):
        pattern, factor = _parse(field, rule)
        undecided = _matched(field, pattern, paths) - factors.keys()
        if not undecided:
            raise UserError(
                f"{field}: {rule!r} decides nothing, as the rules before it match all that it "
                "matches, and the first decides; put it before them"
            )
        factors |= dict.fromkeys(undecided, factor)
    return _tree(params, [factors.get(path, 1.0) for path in paths])


def layer_multipliers(decay: float, params: Any) -> Any:
    r"""A tree of factors :math:`d^{L - l}` for layer l of L; see `layers`.

    Reference:
      Clark et al., "ELECTRA", ICLR 2020, for fine-tuning; of images, Bao et al., "BEiT", ICLR 2022.
    """
    numbers = layers(params)
    last = max(np.max(number) for number in jax.tree.leaves(numbers))
    return jax.tree.map(lambda number: decay ** (last - number), numbers)


# Where layers lie between the input and the head: the first pattern that a path begins with gives
# the place, whose parts are compared in turn. Stacked blocks' paths have the block's number in
# them, as in "blocks/0/attn".
_PLACES = (
    (r"patch_|pos_embed|cls_token|embedding|conv\d|bn\d|norm0", "0"),
    (r"blocks/(\d+)/", r"1/\1"),  # ViT, CaiT
    (r"blocks_token_only/(\d+)/", r"2/\1"),
    (r"layers_(\d+)/downsample/", r"1/\1/0/regular"),  # Swin: with the block after it
    (r"layers_(\d+)/blocks/(\d+)/(regular|shifted)/", r"1/\1/\2/\3"),
    (r"layers_(\d+)/", r"1/\1"),  # LSTM
    (r"layer(\d+)_(\d+)/", r"1/\1/\2"),  # ResNet
    (r"features_(\d+)/", r"1/\1"),  # VGG
    (r"pre_logits_fc(\d+)/", r"2/\1"),
    (r"denseblock(\d+)_denselayer(\d+)/", r"1/\1/\2"),  # DenseNet
    (r"transition(\d+)/", r"1/\1/last"),
    (r"inception(\d)(\w)/", r"1/\1/\2"),  # GoogLeNet
    (r"", "3"),  # the last norm and the head
)
_BLOCKS = re.compile(r"(?:^|/)blocks\w*/")


def layers(params: Any) -> Any:
    """A tree of the numbers of the parameters' layers, in the order of the forward pass.

    Embeddings, or a convolutional network's stem, are layer 0. Then every block is a layer, and so
    is every convolution or dense layer outside of blocks. The last norm and the head are the last.

    Returns:
      Integers; for stacked blocks, arrays with one for each along the leading axis, of the
      parameter's rank.
    """
    named = list(zip(_paths(params), (x.shape for x in jax.tree.leaves(params)), strict=True))
    # A norm by itself is no layer: it belongs to the one before it.
    matrices = [(path, shape) for path, shape in named if len(shape) > 1]
    starts = sorted({place for path, shape in matrices for place in _places(path, shape)})

    def number(path: str, shape: tuple[int, ...]) -> Any:
        numbers = [bisect.bisect(starts, place) - 1 for place in _places(path, shape)]
        if not _is_stacked(path):
            return numbers[0]
        return np.reshape(numbers, (-1, *(1,) * (len(shape) - 1)))

    return _tree(params, [number(path, shape) for path, shape in named])


def _is_stacked(path: str) -> bool:
    """Whether `models.layers.repeat` made the parameter, which has a leading axis of blocks."""
    return _BLOCKS.search(path) is not None


def _places(path: str, shape: tuple[int, ...]) -> list[tuple[tuple[int, str], ...]]:
    """The place of a parameter, or of each block's part of it, to be compared."""
    if not _is_stacked(path):
        return [_place(path)]
    return [_place(_BLOCKS.sub(rf"\g<0>{i}/", path)) for i in range(shape[0])]


def _place(path: str) -> tuple[tuple[int, str], ...]:
    found = ((re.match(pattern, path), place) for pattern, place in _PLACES)
    place = next(match.expand(place) for match, place in found if match)
    # Longer numbers are larger.
    return tuple((len(part), part) for part in place.split("/"))


def _paths(params: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def _tree(params: Any, leaves: list[Any]) -> Any:
    """The tree of the parameters' structure with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _matched(field: str, pattern: str, paths: Sequence[str]) -> set[str]:
    """The paths that a pattern matches; a `UserError` if there are none."""
    try:
        matched = {path for path in paths if re.search(pattern, path)}
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from None
    if not matched:
        names = {*paths, *(part for path in paths for part in path.split("/"))}
        near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0)
        raise UserError(
            f"{field}: {pattern!r} matches no parameter; the nearest are "
            f"{', '.join(map(repr, near))}"
        )
    return matched


def _parse(field: str, rule: str) -> tuple[str, float]:
    """A rule's pattern and factor."""
    pattern, equals, factor = rule.rpartition("=")
    try:
        if not equals or not 0 <= float(factor) < math.inf:
            raise ValueError
        return pattern, float(factor)
    except ValueError:
        raise UserError(
            f"{field}: {rule!r} is no rule; write PATTERN=FACTOR with a factor of 0 or more, as "
            "head=10"
        ) from None
