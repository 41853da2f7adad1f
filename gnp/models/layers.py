"""What several of the models are made of."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from gnp.errors import UserError, unknown

Dtype = Any

# What the backward pass finds in memory, by `remat`; it computes the rest of a block again.
# "full": only the block's input. "dots": also the results of its dense layers.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def repeat(
    block: nn.Module,
    x: jax.Array,
    depth: int,
    rates: jax.Array | None,
    train: bool,
    *,
    scan: bool,
    remat: str,
) -> jax.Array:
    """Applies `depth` blocks of one kind in turn, each with parameters of its own.

    The parameters lie under the block's name with a leading axis of length `depth`, whether the
    blocks are compiled once and run in a loop (`scan`) or one after another: the choice changes
    neither a checkpoint nor what is computed, only compile time, speed and memory.

    Args:
      block: called as `block(x, rate, train)`; must keep the shape and dtype of x.
      x: the first block's input.
      depth: the number of blocks.
      rates: of each block's stochastic depth, with the leading axis `depth`; None for none.
      train: whether dropout and stochastic depth act.
      scan: whether the block is compiled once.
      remat: a key of `REMAT`.
    """

    def body(block: nn.Module, x: jax.Array, rate: jax.Array | None) -> tuple[jax.Array, None]:
        return block(x, rate, train), None

    if remat != "none":
        # A loop's body is not merged with its own repetition; one that is unrolled would be.
        body = nn.remat(body, policy=REMAT[remat], prevent_cse=not scan)
    # Random initial values are slow to compile, so they are always drawn in a loop.
    loop = scan or block.is_initializing()
    scanned = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=depth,
        unroll=1 if loop else depth,
    )
    return scanned(block, x, rates)[0]


def linear_rates(last: float, depth: int) -> jax.Array | None:
    """Stochastic depth's rates, which grow linearly from 0 to `last`; None if that is 0."""
    return jnp.linspace(0, last, depth) if last else None


class StochasticDepth(nn.Module):
    """Drops a residual branch as a whole, for each example with probability `rate`, in training.

    What is kept is divided by 1 − rate. A rate of None drops nothing. Source: Huang et al.,
    "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    @nn.compact
    def __call__(self, branch: jax.Array, rate: jax.Array | None, train: bool) -> jax.Array:
        if rate is None or not train:
            return branch
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        return jnp.where(kept, branch / (1 - rate).astype(branch.dtype), 0)


class Mlp(nn.Module):
    """Two dense layers with an exact GELU between them: [..., width] to the same shape."""

    hidden: int
    dropout: float
    kernel_init: Initializer
    bias_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(
            nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init, dtype=self.dtype
        )
        width = x.shape[-1]
        x = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(width, name="fc2")(x)


def patches(images: jax.Array, size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into patches [B, H/size, W/size, size · size · C].

    A dense layer over them is a convolution whose stride is its kernel's size.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)


def uniform(bound: float) -> Callable[..., jax.Array]:
    """The initialiser U(−bound, bound); with 1/√n for n inputs, that of PyTorch's layers."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# The (size, stride) of a convolutional network's first convolution. The one of "imagenet" is
# followed by a pool of stride 2, so that 224 pixels become 56; the one of "cifar" keeps 32.
STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}


def stem_fields(image_size: int, fields: dict[str, Any]) -> dict[str, Any]:
    """A convolutional network's fields with the usual stem for the images, and checked."""
    fields = {"stem": "cifar" if image_size <= 64 else "imagenet"} | fields
    if fields["stem"] not in STEMS:
        raise unknown("model.stem", fields["stem"], STEMS)
    check_positive(batch_norm_groups=fields.get("batch_norm_groups", 1))
    return fields


def conv(features: int, size: int, stride: int = 1, **fields: Any) -> nn.Conv:
    """A size × size convolution, without a bias unless `use_bias` asks for one.

    Zeros lie around the image on all sides alike, as in PyTorch's models. At stride 2, Flax's
    "SAME" would put more of them below and to the right.
    """
    fields = {"use_bias": False} | fields
    return nn.Conv(features, (size, size), strides=stride, padding=size // 2, **fields)


def max_pool(
    x: jax.Array, size: int, stride: int, *, padding: int = 0, ceil: bool = False
) -> jax.Array:
    """The maximum over windows of size × size pixels, one every `stride` pixels.

    There are `padding` pixels of −∞ on all sides of the image. A last window that begins inside
    but does not end there is left out, or with `ceil` it is cut off at the border.
    """

    def pool(x: jax.Array) -> jax.Array:
        # The maximum of slices, down and then across. The gradient of XLA's own operation over
        # windows (`nn.max_pool`) takes ten times as long on a CPU, 40 % of GoogLeNet's step.
        for axis in (1, 2):
            rest = -(x.shape[axis] + 2 * padding - size) % stride
            sides = [(0, 0)] * x.ndim
            sides[axis] = (padding, padding + rest if ceil else padding)
            x = jnp.pad(x, sides, constant_values=-jnp.inf)
            last = (x.shape[axis] - size) // stride * stride
            x = functools.reduce(
                jnp.maximum,
                [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(size)],
            )
        return x

    # The backward pass takes the maxima again: a quarter of GoogLeNet's memory, for no time.
    return jax.checkpoint(pool)(x)


class BatchNorm(nn.Module):
    """Batch normalisation of [B, …, C] over all axes but the last (Ioffe & Szegedy, 2015).

        y = (x − μ)/√(σ² + ε) · scale + bias

    In training μ and σ² are the batch's, and the running ones (collection "batch_stats") move
    towards them: running ← momentum · running + (1 − momentum) · batch. In evaluation they are the
    running ones. Statistics are computed in float32 at least; σ² is the mean of (x − μ)², which is
    exact where |μ| ≫ σ, as the mean of x² less μ² is not.

    Under `jax.jit` a batch is one array wherever its parts lie, so with `groups=1` the statistics
    are those of the whole batch across all devices. With `groups=m` the batch is cut into m
    successive parts, each normalised with its own statistics (running ones move towards the parts'
    mean): on m devices that is what each computes alone, without communication. The result depends
    on `groups`, never on the number of devices.

    Attributes:
      groups: m; it must divide the batch in training.
      momentum: the part of the running statistics that a step keeps.
      epsilon: ε.
      dtype: of the result.
    """

    groups: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))

        def normalize(x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
            y = (x - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
            return y.astype(self.dtype)

        if not train:
            return normalize(x, running_mean.value, running_var.value)
        if x.shape[0] % self.groups:
            raise UserError(
                f"model.batch_norm_groups is {self.groups}, which does not divide a batch of "
                f"{x.shape[0]}"
            )
        # The axis of the parts costs a few percent of a step, so there is none for one part.
        parts = x if self.groups == 1 else x.reshape(self.groups, -1, *x.shape[1:])
        parts = parts.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(parts.ndim - x.ndim, parts.ndim - 1))
        mean = parts.mean(axes, keepdims=True)
        var = jnp.square(parts - mean).mean(axes, keepdims=True)
        if not self.is_initializing():
            for running, batch in ((running_mean, mean), (running_var, var)):
                batch = batch.reshape(self.groups, channels).mean(axis=0)
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
        return normalize(parts, mean, var).reshape(x.shape)


def check_transformer(model: Any, image_size: int) -> None:
    """Checks the fields that vit, swin and cait have in common.

    Raises:
      UserError: if there is no patch size, or it does not divide the images, the heads do not
        divide the width, the MLP would have no hidden features, or `remat` is no key of `REMAT`.
    """
    if model.patch_size is None:
        raise UserError(
            f"no usual patch size for images of {image_size} pixels; set model.patch_size"
        )
    check_positive(patch_size=model.patch_size, width=model.width, num_heads=model.num_heads)
    if hasattr(model, "depth"):
        check_positive(depth=model.depth)
    if image_size % model.patch_size:
        raise UserError(
            f"model.patch_size {model.patch_size} does not divide the images' {image_size} pixels"
        )
    if model.width % model.num_heads:
        raise UserError(
            f"model.num_heads {model.num_heads} does not divide model.width {model.width}"
        )
    if round(model.mlp_ratio * model.width) < 1:
        raise UserError(
            f"model.mlp_ratio {model.mlp_ratio} leaves no features of model.width {model.width}"
        )
    if model.remat not in REMAT:
        raise unknown("model.remat", model.remat, REMAT)


def check_positive(**fields: int | Sequence[int]) -> None:
    """Raises a `UserError` for a field, or a part of one, that is below 1, and for an empty one."""
    for name, value in fields.items():
        parts = value if isinstance(value, Sequence) else (value,)
        if min(parts, default=0) < 1:
            raise UserError(f"model.{name} is {value}; use numbers from 1 up")
