"""Densely connected network.

Reference: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017 (arXiv:1608.06993).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.errors import UserError
from gnp.models import layers
from gnp.models.layers import Dtype

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseLayer(nn.Module):
    """Adds features to those of all layers before it: [B, H, W, C] to [B, H, W, C + growth_rate].

    The new ones are norm, ReLU and a 1×1 convolution to `bottleneck_size · growth_rate` features,
    then norm, ReLU and a 3×3 convolution, of the old ones, which are passed on before them.
    """

    growth_rate: int
    bottleneck_size: int
    batch_norm_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(layers.conv, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, self.batch_norm_groups, dtype=self.dtype)
        y = nn.relu(norm(name="norm1")(x, train))
        y = conv(self.bottleneck_size * self.growth_rate, 1, name="conv1")(y)
        y = nn.relu(norm(name="norm2")(y, train))
        y = conv(self.growth_rate, 3, name="conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Norm, ReLU, 1×1 convolution, 2×2 mean: [B, H, W, C] to [B, H/2, W/2, features]."""

    features: int
    batch_norm_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = layers.BatchNorm(self.batch_norm_groups, dtype=self.dtype, name="norm")(x, train)
        x = nn.relu(x)
        x = layers.conv(self.features, 1, kernel_init=he_normal, dtype=self.dtype, name="conv")(x)
        return nn.avg_pool(x, (2, 2), (2, 2))


class DenseNet(nn.Module):
    """A densely connected network with bottlenecks and compression (DenseNet-BC).

    Images float32[B, H, W, C] to logits float32[B, num_classes]. Convolutions are He-normal over
    their inputs, as published; the head's kernel is uniform within ±1/√features, its bias 0.

    Attributes:
      num_classes: the number of logits.
      depths: layers of each dense block; a transition lies between each two blocks.
      stem: both give twice `growth_rate` features: "imagenet" by a 7×7 convolution, norm, ReLU and
        a max pool, convolution and pool of stride 2; "cifar" by one 3×3 convolution of stride 1.
      growth_rate: features that each layer adds.
      bottleneck_size: features between a layer's two convolutions over `growth_rate`.
      compression: the part of the features that a transition keeps, rounded down.
      batch_norm_groups: parts of the batch that are normalised apart; see `layers.BatchNorm`.
      dtype: of the arithmetic; parameters and logits are float32.
    """

    num_classes: int
    depths: tuple[int, ...]
    stem: str
    growth_rate: int = 32
    bottleneck_size: int = 4
    compression: float = 0.5
    batch_norm_groups: int = 1
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "DenseNet":
        """The model with the usual stem for the image size, its sizes checked."""
        model = cls(**layers.stem_fields(image_size, fields))
        layers.check_positive(
            depths=model.depths,
            growth_rate=model.growth_rate,
            bottleneck_size=model.bottleneck_size,
        )
        if not 0 < model.compression <= 1:
            raise UserError(f"model.compression is {model.compression}, not in (0, 1]")
        size = image_size if model.stem == "cifar" else -(-image_size // 4)
        if size < 2 ** (len(model.depths) - 1):
            raise UserError(
                f"model.depths has {len(model.depths)} blocks, and the images are halved between "
                f"each two: {image_size} pixels are too few for the {model.stem!r} stem"
            )
        return model

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        norm = functools.partial(layers.BatchNorm, self.batch_norm_groups, dtype=self.dtype)
        x = images.astype(self.dtype)
        size, stride = layers.STEMS[self.stem]
        x = layers.conv(
            2 * self.growth_rate,
            size,
            stride,
            kernel_init=he_normal,
            dtype=self.dtype,
            name="conv0",
        )(x)
        if self.stem == "imagenet":
            x = nn.relu(norm(name="norm0")(x, train))
            x = layers.max_pool(x, 3, 2, padding=1)
        for block, depth in enumerate(self.depths, start=1):
            for i in range(1, depth + 1):
                x = DenseLayer(
                    self.growth_rate,
                    self.bottleneck_size,
                    self.batch_norm_groups,
                    self.dtype,
                    name=f"denseblock{block}_denselayer{i}",
                )(x, train)
            if block < len(self.depths):
                # At least one: a transition without features would end the network.
                features = max(int(self.compression * x.shape[-1]), 1)
                x = Transition(
                    features, self.batch_norm_groups, self.dtype, name=f"transition{block}"
                )(x, train)
        x = nn.relu(norm(name="norm5")(x, train)).mean(axis=(1, 2))
        return nn.Dense(
            self.num_classes,
            kernel_init=layers.uniform(x.shape[-1] ** -0.5),
            dtype=jnp.float32,
            name="classifier",
        )(x)
