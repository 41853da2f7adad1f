"""Class-attention image transformer (CaiT): deep, with the class token in the last layers only.

Reference: Touvron et al., "Going deeper with Image Transformers", ICCV 2021 (arXiv:2103.17239).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.errors import UserError
from gnp.models import layers
from gnp.models.layers import Dtype

# The patch that each usual image size is cut into: 64 tokens at 32 and 64 pixels, 196 at 224.
PATCH_SIZES = {8: 2, 16: 2, 32: 4, 64: 8, 224: 16}

# The published truncated normal is cut at −2 and 2, a hundred deviations away: it is a normal.
NORMAL = nn.initializers.normal(0.02)

dense = functools.partial(nn.Dense, kernel_init=NORMAL)


class TalkingHeadsAttention(nn.Module):
    """Self-attention whose heads are mixed before and after the softmax.

    [B, tokens, width] to the same shape. Source: Shazeer et al., "Talking-Heads Attention", 2020
    (arXiv:2003.02436).
    """

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        heads, features = self.num_heads, width // self.num_heads
        qkv = dense(3 * width, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, heads, features)
        query, key, value = qkv[:, :, 0] * features**-0.5, qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bqkh", query, key)
        scores = dense(heads, dtype=self.dtype, name="proj_l")(scores)
        # A sum over the tokens needs more digits than bfloat16 has.
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = jax.nn.softmax(scores, axis=2).astype(self.dtype)
        weights = dense(heads, dtype=self.dtype, name="proj_w")(weights)
        x = jnp.einsum("bqkh,bkhd->bqhd", weights, value).reshape(batch, tokens, width)
        return dense(width, dtype=self.dtype, name="proj")(x)


class ClassAttention(nn.Module):
    """Attention from the first token, to all: [B, tokens, width] to [B, 1, width]."""

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]

        def heads(name: str, x: jax.Array) -> jax.Array:
            x = dense(width, dtype=self.dtype, name=name)(x)
            return x.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        query, key, value = heads("q", x[:, :1]), heads("k", x), heads("v", x)
        x = jax.nn.dot_product_attention(query, key, value).reshape(-1, 1, width)
        return dense(width, dtype=self.dtype, name="proj")(x)


class Block(nn.Module):
    """A pre-norm block with LayerScale, of patches alone or of a class token beside them.

    Of patches, [B, tokens, width] to the same shape:

        x ← x + γ₁ attention(norm(x)),    x ← x + γ₂ MLP(norm(x))

    where each branch is dropped as a whole, per example, with probability `rate` in training. With
    `class_token` the first token alone is updated, by attention from it to all tokens; the others
    are returned as they are.
    """

    class_token: bool
    num_heads: int
    mlp_ratio: float
    layer_scale: float
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None, train: bool) -> jax.Array:
        width = x.shape[-1]

        def residual(branch: jax.Array, name: str) -> jax.Array:
            gamma = self.param(name, nn.initializers.constant(self.layer_scale), (width,))
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            return layers.StochasticDepth()(gamma.astype(branch.dtype) * branch, rate, train)

        attention = ClassAttention if self.class_token else TalkingHeadsAttention
        mlp = layers.Mlp(
            hidden=round(self.mlp_ratio * width),
            dropout=self.dropout,
            kernel_init=NORMAL,
            bias_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="mlp",
        )
        updated, kept = (x[:, :1], x[:, 1:]) if self.class_token else (x, None)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        y = attention(self.num_heads, self.dtype, name="attn")(y)
        updated = updated + residual(y, "gamma_1")
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(updated)
        updated = updated + residual(mlp(y, train), "gamma_2")
        return updated if kept is None else jnp.concatenate([updated, kept], axis=1)


class CaiT(nn.Module):
    """A class-attention image transformer with learned position embeddings.

    Images float32[B, H, W, C] to logits float32[B, num_classes]. Patches go through `depth` blocks
    by themselves; a class token then reads them in `class_depth` layers, and the head reads it.
    Initialised as published: kernels, positions and class token normal with deviation 0.02, biases
    zero, the patch embedding uniform within 1/√n of 0 for its n inputs.

    Attributes:
      num_classes: the number of logits.
      patch_size: pixels on a patch's side; it must divide the images' height and width.
      width: features of a token.
      depth: blocks of the patches.
      num_heads: attention heads; they divide `width`.
      mlp_ratio: the MLP's hidden features over `width`.
      class_depth: layers of the class token.
      layer_scale: initial value of the factors on each residual branch's features.
      dropout: rate after the embedding, the attention and in the MLP; not in the class token's
        layers.
      stochastic_depth: rate of every block; not of the class token's layers.
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
    class_depth: int = 2
    layer_scale: float = 1e-5
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "CaiT":
        """The model with the usual patch for the image size, its sizes checked."""
        fields.setdefault("patch_size", PATCH_SIZES.get(image_size))
        model = cls(**fields)
        layers.check_transformer(model, image_size)
        if model.class_depth < 1:
            raise UserError(
                f"model.class_depth {model.class_depth} lets the class token read nothing; it must "
                "be at least 1"
            )
        return model

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = layers.patches(images.astype(self.dtype), self.patch_size)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        uniform = layers.uniform(x.shape[-1] ** -0.5)
        embed = nn.Dense(
            self.width,
            kernel_init=uniform,
            bias_init=uniform,
            dtype=self.dtype,
            name="patch_embed",
        )
        x = embed(x)
        positions = self.param("pos_embed", NORMAL, (1, x.shape[1], self.width))
        x = nn.Dropout(self.dropout, deterministic=not train)(x + positions.astype(x.dtype))

        repeat = functools.partial(layers.repeat, train=train, scan=self.scan, remat=self.remat)
        block = functools.partial(
            Block,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            dtype=self.dtype,
        )
        rate = self.stochastic_depth
        rates = jnp.full(self.depth, rate) if rate else None
        x = repeat(
            block(class_token=False, dropout=self.dropout, name="blocks"), x, self.depth, rates
        )
        token = self.param("cls_token", NORMAL, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = repeat(
            block(class_token=True, dropout=0.0, name="blocks_token_only"),
            x,
            self.class_depth,
            None,
        )
        # The class token alone is normalised, as it alone is read.
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, 0])
        return dense(self.num_classes, dtype=jnp.float32, name="head")(x)
