"""GoogLeNet, with batch normalisation and without auxiliary heads.

References: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015 (arXiv:1409.4842); batch
normalisation: Ioffe & Szegedy, ICML 2015 (arXiv:1502.03167).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.errors import UserError
from gnp.models import layers
from gnp.models.layers import Dtype

# The features of each branch at a width of 64, layer after layer: 1×1; 1×1 and 3×3; 1×1 and 5×5;
# pool and 1×1. Source: the paper's Table 1.
INCEPTIONS = {
    "inception3a": ((64,), (96, 128), (16, 32), (32,)),
    "inception3b": ((128,), (128, 192), (32, 96), (64,)),
    "inception4a": ((192,), (96, 208), (16, 48), (64,)),
    "inception4b": ((160,), (112, 224), (24, 64), (64,)),
    "inception4c": ((128,), (128, 256), (24, 64), (64,)),
    "inception4d": ((112,), (144, 288), (32, 64), (64,)),
    "inception4e": ((256,), (160, 320), (32, 128), (128,)),
    "inception5a": ((256,), (160, 320), (32, 128), (128,)),
    "inception5b": ((384,), (192, 384), (48, 128), (128,)),
}


class ConvNorm(nn.Module):
    """A convolution, batch normalisation and ReLU: [B, H, W, C] to [B, H/stride, W/stride, C']."""

    features: int
    size: int
    stride: int = 1
    use_bias: bool = False
    epsilon: float = 1e-5
    batch_norm_groups: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = layers.conv(
            self.features,
            self.size,
            self.stride,
            use_bias=self.use_bias,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            name="conv",
        )(x)
        norm = layers.BatchNorm(
            self.batch_norm_groups, epsilon=self.epsilon, dtype=self.dtype, name="bn"
        )
        return nn.relu(norm(x, train))


class Inception(nn.Module):
    """Four branches side by side, one after another in the result's features.

    They are a 1×1 convolution; 1×1, then 3×3; 1×1, then the "5×5"; a 3×3 max pool of stride 1,
    then 1×1.

    Attributes:
      features: of each branch's convolutions.
      third: the sizes of the convolutions that make the "5×5"; all have the features of the last.
      conv: a `ConvNorm` but for its features, size and name.
    """

    features: tuple[tuple[int, ...], ...]
    third: tuple[int, ...]
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        (one,), (before_three, three), (before_five, five), (after_pool,) = self.features
        branch1 = self.conv(one, 1, name="branch1")(x, train)
        branch2 = self.conv(before_three, 1, name="branch2_0")(x, train)
        branch2 = self.conv(three, 3, name="branch2_1")(branch2, train)
        branch3 = self.conv(before_five, 1, name="branch3_0")(x, train)
        for i, size in enumerate(self.third, start=1):
            branch3 = self.conv(five, size, name=f"branch3_{i}")(branch3, train)
        branch4 = layers.max_pool(x, 3, 1, padding=1)
        branch4 = self.conv(after_pool, 1, name="branch4")(branch4, train)
        return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


class GoogLeNet(nn.Module):
    """GoogLeNet: a stem, nine inception modules in three stages, the mean and a linear layer.

    Images float32[B, H, W, C] to logits float32[B, num_classes]. Its two kinds are those of the
    usual implementations, which differ in more than the stem:

                              "imagenet" (torchvision's)       "cifar"
        stem                  7×7/2, pool, 1×1, 3×3, pool      3×3
        "5×5"                 3×3                              3×3, 3×3
        pools between stages  3×3/2, then 2×2/2, cut off at    3×3/2 with a border of 1
                              the border
        biases before norms   no                               yes
        ε of the norms        1e-3                             1e-5

    Kernels are normal with deviation 0.01, as in torchvision (whose truncation, at ±2, is 200
    deviations away); the head's bias is uniform within ±1/√features, the convolutions' are 0.

    Attributes:
      num_classes: the number of logits.
      stem: "imagenet" or "cifar".
      width: features of the "imagenet" stem's first convolution; all others are in proportion.
      dropout: rate before the head.
      batch_norm_groups: parts of the batch that are normalised apart; see `layers.BatchNorm`.
      dtype: of the arithmetic; parameters and logits are float32.
    """

    num_classes: int
    stem: str
    width: int = 64
    dropout: float = 0.0
    batch_norm_groups: int = 1
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "GoogLeNet":
        """The model with the usual stem and dropout for the image size, its sizes checked."""
        fields = layers.stem_fields(image_size, fields)
        if fields["stem"] == "imagenet":
            fields = {"dropout": 0.2} | fields
            # Smaller ones are a single pixel before the last of the pools without a border.
            if image_size < 15:
                raise UserError(
                    f"model.stem 'imagenet' wants images of 15 pixels or more, not {image_size}"
                )
        model = cls(**fields)
        layers.check_positive(width=model.width)
        return model

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        cifar = self.stem == "cifar"
        conv = functools.partial(
            ConvNorm,
            use_bias=cifar,
            epsilon=1e-5 if cifar else 1e-3,
            batch_norm_groups=self.batch_norm_groups,
            dtype=self.dtype,
        )

        def scaled(features: int) -> int:
            return max(round(features * self.width / 64), 1)

        def pool(x: jax.Array, size: int) -> jax.Array:
            if cifar:
                return layers.max_pool(x, 3, 2, padding=1)
            return layers.max_pool(x, size, 2, ceil=True)

        x = images.astype(self.dtype)
        if cifar:
            x = conv(scaled(192), 3, name="conv1")(x, train)
        else:
            x = pool(conv(scaled(64), 7, 2, name="conv1")(x, train), 3)
            x = conv(scaled(64), 1, name="conv2")(x, train)
            x = pool(conv(scaled(192), 3, name="conv3")(x, train), 3)
        for name, branches in INCEPTIONS.items():
            if name == "inception4a":
                x = pool(x, 3)
            elif name == "inception5a":
                x = pool(x, 2)
            features = tuple(tuple(scaled(n) for n in branch) for branch in branches)
            x = Inception(features, (3, 3) if cifar else (3,), conv, name=name)(x, train)
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=layers.uniform(x.shape[-1] ** -0.5),
            dtype=jnp.float32,
            name="fc",
        )(x)
