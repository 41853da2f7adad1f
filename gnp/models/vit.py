"""Vision transformer.

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition
at Scale", ICLR 2021 (arXiv:2010.11929).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.errors import unknown
from gnp.models import layers
from gnp.models.layers import Dtype

# The patch that each usual image size is cut into: 64 tokens at 32 and 64 pixels, 196 at 224.
PATCH_SIZES = {8: 2, 16: 2, 32: 4, 64: 8, 224: 16}
POOLS = ("token", "mean")


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


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)).

    Each of its two residual branches is dropped as a whole, per example, with probability `rate`
    in training.
    """

    num_heads: int
    mlp_ratio: float
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None, train: bool) -> jax.Array:
        def residual(branch: jax.Array) -> jax.Array:
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            return layers.StochasticDepth()(branch, rate, train)

        mlp = layers.Mlp(
            hidden=round(self.mlp_ratio * x.shape[-1]),
            dropout=self.dropout,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
            dtype=self.dtype,
            name="mlp",
        )
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        x = x + residual(SelfAttention(self.num_heads, self.dtype, name="attn")(y))
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        return x + residual(mlp(y, train))


class VisionTransformer(nn.Module):
    """A vision transformer with learned position embeddings.

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
      pool: what the head sees: "token", a class token beside the patches, or "mean", of the
        patches (then there is no class token).
      dropout: rate after the embedding, the attention and in the MLP.
      stochastic_depth: rate of the last block; the others' grows linearly from 0.
      scan: compile the block once, in a loop; see `layers.repeat`.
      remat: what the backward pass computes again: "none", "full" or "dots"; `layers.REMAT`.
      dtype: of the arithmetic; parameters and logits are float32.
    """

    num_classes: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    pool: str = "token"
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "VisionTransformer":
        """The model with the usual patch for the image size, its sizes checked."""
        fields.setdefault("patch_size", PATCH_SIZES.get(image_size))
        model = cls(**fields)
        layers.check_transformer(model, image_size)
        if model.pool not in POOLS:
            raise unknown("model.pool", model.pool, POOLS)
        return model

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = layers.patches(images.astype(self.dtype), self.patch_size)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = nn.Dense(self.width, dtype=self.dtype, name="patch_embed")(x)
        if self.pool == "token":
            token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("pos_embed", nn.initializers.normal(0.02), shape).astype(x.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = Block(self.num_heads, self.mlp_ratio, self.dropout, self.dtype, name="blocks")
        rates = layers.linear_rates(self.stochastic_depth, self.depth)
        x = layers.repeat(block, x, self.depth, rates, train, scan=self.scan, remat=self.remat)
        norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")
        # The class token alone is normalised where it alone is read.
        x = norm(x[:, 0]) if self.pool == "token" else norm(x).mean(axis=1)
        zeros = nn.initializers.zeros
        return nn.Dense(self.num_classes, kernel_init=zeros, dtype=jnp.float32, name="head")(x)
