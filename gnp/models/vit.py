"""Vision transformer.

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition
at Scale", ICLR 2021 (arXiv:2010.11929).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.errors import UserError

# The patch that each usual image size is cut into: 64 tokens at 32 and 64 pixels, 196 at 224.
PATCH_SIZES = {8: 2, 16: 2, 32: 4, 64: 8, 224: 16}

Dtype = Any


def _xavier_per_projection(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """Xavier-uniform for each of the query, key and value kernels that lie in one matrix."""
    init = nn.initializers.xavier_uniform()
    width = shape[1] // 3
    keys = jax.random.split(key, 3)
    return jnp.concatenate([init(k, (shape[0], width), dtype) for k in keys], axis=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention: [B, tokens, width] to the same shape."""

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        qkv = dense(3 * width, kernel_init=_xavier_per_projection, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        x = jax.nn.dot_product_attention(query, key, value).reshape(batch, tokens, width)
        return dense(width, kernel_init=nn.initializers.xavier_uniform(), name="proj")(x)


class Mlp(nn.Module):
    """Two dense layers with an exact GELU between them."""

    hidden: int
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(
            nn.Dense,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
            dtype=self.dtype,
        )
        width = x.shape[-1]
        x = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(width, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block.

    Each of its two residual branches is dropped as a whole, per example, with probability
    `stochastic_depth` in training (Huang et al., 2016).
    """

    num_heads: int
    mlp_ratio: float
    dropout: float
    stochastic_depth: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def residual(branch: jax.Array) -> jax.Array:
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            # One mask an example: the same for all its tokens and features.
            drop = nn.Dropout(self.stochastic_depth, broadcast_dims=(1, 2))
            return drop(branch, deterministic=not train)

        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        x = x + residual(SelfAttention(self.num_heads, self.dtype, name="attn")(y))
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        hidden = round(self.mlp_ratio * x.shape[-1])
        return x + residual(Mlp(hidden, self.dropout, self.dtype, name="mlp")(y, train))


class VisionTransformer(nn.Module):
    """A vision transformer with a class token and a learned position embedding.

    Images float32[B, H, W, C] to logits float32[B, num_classes]. Initialised as published: the
    patch embedding LeCun-normal, positions normal with deviation 0.02, attention and MLP kernels
    Xavier-uniform, class token and head zero.

    Attributes:
      num_classes: the number of logits.
      patch_size: pixels on a patch's side; it must divide the images' height and width.
      width: features of a token.
      depth: blocks.
      num_heads: attention heads; they divide `width`.
      mlp_ratio: the MLP's hidden features over `width`.
      dropout: rate after the embedding, the attention and in the MLP.
      stochastic_depth: rate of the last block; the others' grows linearly from 0.
      dtype: of the arithmetic; parameters and logits are float32.
    """

    num_classes: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "VisionTransformer":
        """The model with the usual patch for the image size, its sizes checked."""
        if "patch_size" not in fields:
            if image_size not in PATCH_SIZES:
                raise UserError(
                    f"no usual patch size for images of {image_size} pixels; set model.patch_size"
                )
            fields["patch_size"] = PATCH_SIZES[image_size]
        patch, width, heads = fields["patch_size"], fields["width"], fields["num_heads"]
        if image_size % patch:
            raise UserError(
                f"model.patch_size {patch} does not divide the images' {image_size} pixels"
            )
        if width % heads:
            raise UserError(f"model.num_heads {heads} does not divide model.width {width}")
        mlp_ratio = fields.get("mlp_ratio", cls.mlp_ratio)
        if round(mlp_ratio * width) < 1:
            raise UserError(
                f"model.mlp_ratio {mlp_ratio} leaves no features of model.width {width}"
            )
        return cls(**fields)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = _patches(images.astype(self.dtype), self.patch_size)
        # A convolution whose stride is its kernel's size is a matrix product over patches.
        x = nn.Dense(self.width, dtype=self.dtype, name="patch_embed")(x)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("pos_embed", nn.initializers.normal(0.02), shape).astype(x.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(self.depth):
            x = Block(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                dropout=self.dropout,
                stochastic_depth=self.stochastic_depth * i / max(self.depth - 1, 1),
                dtype=self.dtype,
                name=f"blocks_{i}",
            )(x, train)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, 0])
        zeros = nn.initializers.zeros
        return nn.Dense(self.num_classes, kernel_init=zeros, dtype=jnp.float32, name="head")(x)


def _patches(images: jax.Array, size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into rows of patches [B, H/size · W/size, size · size · C]."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
