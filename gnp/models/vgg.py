"""VGG: a plain deep network of 3×3 convolutions.

Reference: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015 (arXiv:1409.1556).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.errors import UserError
from gnp.models import layers
from gnp.models.layers import Dtype

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class VGG(nn.Module):
    """A VGG network, of 16 layers by default.

    Images float32[B, H, W, C] to logits float32[B, num_classes]. Stages of 3×3 convolutions, each
    with a ReLU, and a 2×2 max pool after each stage. Convolutions are He-normal over their outputs
    and dense kernels normal with deviation 0.01, as in published implementations; biases are 0.

    Attributes:
      num_classes: the number of logits.
      stem: "imagenet", whose head is two hidden layers over all positions of the last stage, or
        "cifar", whose head is one layer over their mean: the one position that is left of 32×32.
        The convolutions are the same.
      depths: convolutions of each stage.
      width: features of the first stage; the next three have twice those of the one before, and
        from then on they stay.
      batch_norm: whether each convolution is followed by batch normalisation. It keeps its bias.
      hidden_size: features of the hidden layers of the "imagenet" head.
      dropout: rate after each of these layers, and before the "cifar" head.
      batch_norm_groups: parts of the batch that are normalised apart; see `layers.BatchNorm`.
      dtype: of the arithmetic; parameters and logits are float32.
    """

    num_classes: int
    stem: str
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    width: int = 64
    batch_norm: bool = True
    hidden_size: int = 4096
    dropout: float = 0.0
    batch_norm_groups: int = 1
    dtype: Dtype = jnp.float32

    @classmethod
    def for_images(cls, *, image_size: int, **fields: Any) -> "VGG":
        """The model with the usual head and dropout for the image size, its sizes checked."""
        fields = layers.stem_fields(image_size, fields)
        if fields["stem"] == "imagenet":
            fields = {"dropout": 0.5} | fields
        model = cls(**fields)
        layers.check_positive(depths=model.depths, width=model.width, hidden_size=model.hidden_size)
        if image_size < 2 ** len(model.depths):
            raise UserError(
                f"model.depths has {len(model.depths)} stages, each of which halves the images: "
                f"{2 ** len(model.depths)} pixels or more, not {image_size}"
            )
        return model

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.astype(self.dtype)
        # A layer's number is its place among convolutions, norms, activations and pools.
        place = 0
        for stage, depth in enumerate(self.depths):
            for _ in range(depth):
                x = layers.conv(
                    self.width * min(2**stage, 8),
                    3,
                    use_bias=True,
                    kernel_init=he_normal,
                    dtype=self.dtype,
                    name=f"features_{place}",
                )(x)
                if self.batch_norm:
                    place += 1
                    x = layers.BatchNorm(
                        self.batch_norm_groups, dtype=self.dtype, name=f"features_{place}"
                    )(x, train)
                x = nn.relu(x)
                place += 2
            x = layers.max_pool(x, 2, 2)
            place += 1
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        if self.stem == "imagenet":
            x = x.reshape(x.shape[0], -1)
            for name in ("pre_logits_fc1", "pre_logits_fc2"):
                x = nn.relu(dense(self.hidden_size, dtype=self.dtype, name=name)(x))
                x = dropout()(x)
        else:
            x = dropout()(x.mean(axis=(1, 2)))
        return dense(self.num_classes, dtype=jnp.float32, name="head_fc")(x)
