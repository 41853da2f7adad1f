"""Residual network.

Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016
(arXiv:1512.03385).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.models import layers
from gnp.models.layers import Dtype

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Block(nn.Module):
    """A residual block: relu(branch(x) + shortcut(x)), [B, H, W, C] to [B, H/stride, W/stride, C'].

    The branch is two 3×3 convolutions of `features`; as a bottleneck it is 1×1, 3×3 and 1×1, the
    last with four times the features. The first 3×3 convolution has the stride: in a bottleneck
    the published network had it in the 1×1 before, and published implementations since have it
    here. The shortcut is x, or a 1×1 convolution of it where the shape changes.
    """

    features: int
    stride: int
    bottleneck: bool
    batch_norm_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(layers.conv, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        branch = [(3, self.features, self.stride), (3, self.features, 1)]
        if self.bottleneck:
            branch = [(1, self.features, 1), branch[0], (1, 4 * self.features, 1)]
        y = x
        for i, (size, features, stride) in enumerate(branch, start=1):
            y = conv(features, size, stride, name=f"conv{i}")(y)
            y = norm(name=f"bn{i}")(y, train)
            if i < len(branch):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, self.stride, name="downsample_0")(x)
            x = norm(name="downsample_1")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network.

    Images float32[B, H, W, C] to logits float32[B, num_classes]. Convolutions are He-normal over
    their outputs, as in published implementations; the head's kernel and bias are uniform within
    ±1/√features.

    Attributes:
      num_classes: the number of logits.
      depths: blocks of each stage; the stages after the first halve height and width.
      bottleneck: the kind of the blocks; see `Block`.
      stem: "imagenet", a 7×7 convolution and a max pool, each of stride 2, or "cifar", one 3×3
        convolution of stride 1.
      width: features of the stem and the first stage; each further stage has twice those of the
        one before.
      batch_norm_groups: parts of the batch that are normalised apart; see `layers.BatchNorm`.
      dtype: of the arithmetic; parameters and logits are float32.
    """

    num_classes: int
    depths: tuple[int, ...]
    bottleneck: bool
    stem: str
    width: int = 64
    batch_norm_groups: int = 1
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "ResNet":
        """The model with the usual stem for the image size, its sizes checked."""
        model = cls(**layers.stem_fields(image_size, fields))
        layers.check_positive(depths=model.depths, width=model.width)
        return model

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.astype(self.dtype)
        size, stride = layers.STEMS[self.stem]
        x = layers.conv(
            self.width, size, stride, kernel_init=he_normal, dtype=self.dtype, name="conv1"
        )(x)
        x = layers.BatchNorm(self.batch_norm_groups, dtype=self.dtype, name="bn1")(x, train)
        x = nn.relu(x)
        if self.stem == "imagenet":
            x = layers.max_pool(x, 3, 2, padding=1)
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = Block(
                    self.width * 2**stage,
                    stride=2 if stage and not i else 1,
                    bottleneck=self.bottleneck,
                    batch_norm_groups=self.batch_norm_groups,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )(x, train)
        x = x.mean(axis=(1, 2))
        uniform = layers.uniform(x.shape[-1] ** -0.5)
        return nn.Dense(
            self.num_classes, kernel_init=uniform, bias_init=uniform, dtype=jnp.float32, name="fc"
        )(x)
