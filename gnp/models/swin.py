"""Swin transformer: attention within windows, which every second block shifts.

Reference: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
ICCV 2021 (arXiv:2103.14030).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gnp.errors import UserError
from gnp.models import layers
from gnp.models.layers import Dtype

# The patch that each usual image size is cut into: 16 × 16 at 32 and 64 pixels, 56 × 56 at 224.
PATCH_SIZES = {8: 1, 16: 2, 32: 2, 64: 4, 224: 4}

# The published truncated normal is cut at −2 and 2, a hundred deviations away: it is a normal.
NORMAL = nn.initializers.normal(0.02)

dense = functools.partial(nn.Dense, kernel_init=NORMAL)


def relative_position_index(window: int) -> np.ndarray:
    """The bias table's row for each query and key: int[window², window²].

    The key that lies dy rows and dx columns before the query has the row
    (dy + window − 1) · (2 window − 1) + dx + window − 1.
    """
    position = np.stack(np.divmod(np.arange(window**2), window), axis=-1)
    offset = position[:, None] - position[None] + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """Which pairs in each window were neighbours before the shift: bool[windows, T, T].

    A cyclic shift brings the image's first `shift` rows and columns next to the last ones. In a
    window that has both, those from either end do not attend to the other's.
    """
    wrapped = np.arange(side) + shift >= side
    region = 2 * wrapped[:, None] + wrapped[None]
    region = region.reshape(side // window, window, side // window, window).swapaxes(1, 2)
    region = region.reshape(-1, window**2)
    return region[:, :, None] == region[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention within windows of T = window² pixels: [B, H, H, C] to the same shape.

    Scores have a learned bias for each relative position and head. Windows lie on a grid that is
    displaced by `shift` rows and columns; those that it cuts at the border are smaller.
    """

    num_heads: int
    window: int
    shift: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, side, _, width = x.shape
        window, heads = self.window, self.num_heads
        rows = (2 * window - 1) ** 2
        table = self.param("relative_position_bias_table", NORMAL, (rows, heads))
        bias = table[relative_position_index(window)].transpose(2, 0, 1)[None]
        mask = None
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            mask = jnp.asarray(shift_mask(side, window, self.shift))[:, None]

        x = layers.patches(x, window)
        qkv = dense(3 * width, dtype=self.dtype, name="qkv")(x.reshape(batch, -1, window**2, width))
        qkv = qkv.reshape(*qkv.shape[:-1], 3, heads, width // heads)
        # Mapped over the images, so that they share one bias and one mask.
        attention = functools.partial(jax.nn.dot_product_attention, bias=bias, mask=mask)
        x = jax.vmap(attention)(qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :])

        x = x.reshape(batch, side // window, side // window, window, window, width)
        x = x.swapaxes(2, 3).reshape(batch, side, side, width)
        x = dense(width, dtype=self.dtype, name="proj")(x)
        return jnp.roll(x, (self.shift, self.shift), axis=(1, 2)) if self.shift else x


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)).

    Each of its two residual branches is dropped as a whole, per example, with probability `rate`
    in training.
    """

    num_heads: int
    window: int
    shift: int
    mlp_ratio: float
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None, train: bool) -> jax.Array:
        def residual(branch: jax.Array) -> jax.Array:
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            return layers.StochasticDepth()(branch, rate, train)

        attention = WindowAttention(
            self.num_heads, self.window, self.shift, self.dtype, name="attn"
        )
        mlp = layers.Mlp(
            hidden=round(self.mlp_ratio * x.shape[-1]),
            dropout=self.dropout,
            kernel_init=NORMAL,
            bias_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="mlp",
        )
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm1")(x)
        x = x + residual(attention(y))
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm2")(x)
        return x + residual(mlp(y, train))


class Pair(nn.Module):
    """A block with regular windows, then one with windows shifted by half their side.

    Neither shifts where one window holds the whole feature map.
    """

    num_heads: int
    window_size: int
    mlp_ratio: float
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, rates: jax.Array | None, train: bool) -> jax.Array:
        side = x.shape[1]
        window = min(self.window_size, side)
        shift = 0 if window == side else window // 2
        for i, (name, shift_of_block) in enumerate((("regular", 0), ("shifted", shift))):
            block = Block(
                num_heads=self.num_heads,
                window=window,
                shift=shift_of_block,
                mlp_ratio=self.mlp_ratio,
                dropout=self.dropout,
                dtype=self.dtype,
                name=name,
            )
            x = block(x, None if rates is None else rates[i], train)
        return x


class PatchMerging(nn.Module):
    """Joins 2 × 2 neighbours: [B, H, H, C] to [B, H/2, H/2, 2C], through a norm of their 4C."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, side, _, width = x.shape
        x = x.reshape(batch, side // 2, 2, side // 2, 2, width)
        # Published weights have the upper left, lower left, upper right, lower right neighbour.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, side // 2, side // 2, 4 * width)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return dense(2 * width, use_bias=False, dtype=self.dtype, name="reduction")(x)


class Stage(nn.Module):
    """`depth` blocks at one resolution, after a patch merging in all stages but the first."""

    merge: bool
    depth: int
    num_heads: int
    window_size: int
    mlp_ratio: float
    dropout: float
    scan: bool
    remat: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, rates: jax.Array | None, train: bool) -> jax.Array:
        if self.merge:
            x = PatchMerging(self.dtype, name="downsample")(x)
        pair = Pair(
            num_heads=self.num_heads,
            window_size=self.window_size,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            dtype=self.dtype,
            name="blocks",
        )
        pairs = self.depth // 2
        rates = None if rates is None else rates.reshape(pairs, 2)
        return layers.repeat(pair, x, pairs, rates, train, scan=self.scan, remat=self.remat)


class SwinTransformer(nn.Module):
    """A Swin transformer.

    Images float32[B, H, H, channels] to logits float32[B, num_classes]. Initialised as published:
    kernels and position biases normal with deviation 0.02, other biases zero, the patch embedding
    uniform within 1/√n of 0 for its n inputs.

    Attributes:
      num_classes: the number of logits.
      patch_size: pixels on a patch's side; it must divide the images' sides.
      window_size: patches on a window's side. It must divide the feature map's side in each stage
        where that is larger; where it is not, one window holds the whole map.
      width: features of a patch in the first stage; each later stage has twice as many, for a
        quarter of the patches.
      depths: blocks of each stage; even, as every second one shifts its windows.
      num_heads: attention heads of the first stage, which divide `width`; they double with it.
      mlp_ratio: the MLP's hidden features over the width.
      dropout: rate after the embedding, the attention and in the MLP.
      stochastic_depth: rate of the last block; the others' grows linearly from 0.
      scan: compile each stage's pair of blocks once, in a loop; see `layers.repeat`.
      remat: what the backward pass computes again: "none", "full" or "dots"; `layers.REMAT`.
      dtype: of the arithmetic; parameters and logits are float32.
    """

    num_classes: int
    patch_size: int
    window_size: int
    width: int
    depths: tuple[int, ...]
    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "SwinTransformer":
        """The model with the usual patch and window for the image size, its sizes checked."""
        fields.setdefault("patch_size", PATCH_SIZES.get(image_size))
        fields.setdefault("window_size", 4 if image_size <= 64 else 7)
        model = cls(**fields)
        layers.check_transformer(model, image_size)
        _check_depths(model.depths)
        _check_maps(image_size, model.patch_size, model.window_size, len(model.depths))
        return model

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = layers.patches(images.astype(self.dtype), self.patch_size)
        uniform = layers.uniform(x.shape[-1] ** -0.5)
        embed = nn.Dense(
            self.width,
            kernel_init=uniform,
            bias_init=uniform,
            dtype=self.dtype,
            name="patch_embed",
        )
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="patch_norm")(embed(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        rates = layers.linear_rates(self.stochastic_depth, sum(self.depths))
        first = 0
        for i, depth in enumerate(self.depths):
            stage = Stage(
                merge=i > 0,
                depth=depth,
                num_heads=self.num_heads * 2**i,
                window_size=self.window_size,
                mlp_ratio=self.mlp_ratio,
                dropout=self.dropout,
                scan=self.scan,
                remat=self.remat,
                dtype=self.dtype,
                name=f"layers_{i}",
            )
            x = stage(x, None if rates is None else rates[first : first + depth], train)
            first += depth
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x).mean(axis=(1, 2))
        return dense(self.num_classes, dtype=jnp.float32, name="head")(x)


def _check_depths(depths: tuple[int, ...]) -> None:
    """Raises a `UserError` unless each stage has whole pairs of blocks."""
    if not depths or any(depth < 2 or depth % 2 for depth in depths):
        raise UserError(
            f"model.depths {tuple(depths)}: each stage must have an even number of blocks, at "
            "least 2, as every second one shifts its windows"
        )


def _check_maps(image_size: int, patch_size: int, window_size: int, stages: int) -> None:
    """Raises a `UserError` if a feature map cannot be halved or cut into windows."""
    side, multiple = image_size // patch_size, 2 ** (stages - 1)
    if side % multiple:
        raise UserError(
            f"model.patch_size {patch_size} leaves {side} patches on a side of the images' "
            f"{image_size} pixels, which cannot be halved before each later stage of model.depths; "
            f"a multiple of {multiple} can"
        )
    sides = [side // 2**stage for stage in range(stages)]

    def fits(window: int) -> bool:
        return all(side <= window or side % window == 0 for side in sides)

    if window_size < 1 or not fits(window_size):
        raise UserError(
            f"model.window_size {window_size} does not divide the stages' feature maps of "
            f"{', '.join(map(str, sides))} on a side; valid are: "
            f"{', '.join(str(window) for window in range(1, side + 1) if fits(window))}"
        )
