"""Batches as the model sees them, made inside the compiled step.

Every batch is a pure function of (seed, step): a resumed run sees what it would have seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gnp.data.augment import Operation, augment, fit
from gnp.data.order import traced_example_at

# "input" and "label", with the examples along the first axis; in evaluation also "weight".
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From images and labels to what the model and the loss take.

    A label below 0 is that of a damaged or a filling example: the complement, −1 − label, of the
    class of the image that stands in its place. Training takes it as it is; evaluation weighs it 0.

    Attributes:
      operations: augmentations of training images, in order.
      image_size: pixels on a side of what the model sees.
      num_classes: the labels are smaller than this.
      mean, std: [C] of the training images over 255.
      seed: of the augmentation.
    """

    operations: tuple[Operation, ...]
    image_size: int
    num_classes: int
    mean: np.ndarray
    std: np.ndarray
    seed: int

    def train(self, images: jax.Array, labels: jax.Array, step: jax.Array) -> Batch:
        """The augmented, normalised batch of a step.

        Args:
          images: uint8[B, H, W, C].
          labels: int32[B].
          step: a scalar, the updates made before this one.

        Returns:
          "input" float32[B, image_size, image_size, C], and "label" int32[B], or float32[B,
          num_classes] if an operation mixes labels.
        """
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), 1), step)
        images, labels = augment(
            key,
            images,
            jnp.where(labels < 0, ~labels, labels),
            self.operations,
            size=self.image_size,
            num_classes=self.num_classes,
        )
        return {"input": normalise(images, self.mean, self.std), "label": labels}

    def evaluate(self, images: jax.Array, labels: jax.Array) -> Batch:
        """The normalised middles of images, with a "weight" float32[B], 0 for filling."""
        return {
            "input": normalise(fit(images, self.image_size), self.mean, self.std),
            "label": jnp.where(labels < 0, ~labels, labels),
            "weight": (labels >= 0).astype(jnp.float32),
        }


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Shuffled training batches of a data set that lives on the device.

    The epochs' permutations follow each other without a gap and are cut into batches: each
    example comes exactly once in an epoch, and no remainder is dropped. A batch may therefore
    hold the end of one epoch and the beginning of the next.

    Attributes:
      num_examples: N, the size of the training set.
      batch_size: B, at most N.
      seed: of the order.
      preprocessing: augmentation and normalisation.
    """

    num_examples: int
    batch_size: int
    seed: int
    preprocessing: Preprocessing

    @property
    def examples_per_step(self) -> int:
        """The images that a step learns from."""
        return self.batch_size

    def order(self, first_step: jax.Array, num_steps: int) -> jax.Array:
        """The examples of `num_steps` (static) successive batches, int32[num_steps, B]."""
        places = first_step * self.batch_size + jnp.arange(num_steps * self.batch_size)
        picked = traced_example_at(self.seed, places, self.num_examples)
        return picked.reshape(num_steps, self.batch_size)

    def batch(self, data: Batch, indices: jax.Array, step: jax.Array) -> Batch:
        """The batch of `step`.

        Args:
          data: the whole training set, uint8[N, H, W, C] images and int32[N] labels.
          indices: the batch's row of `order`, int32[B].
          step: a scalar, the updates made before this one.
        """
        images, labels = data["image"][indices], data["label"][indices]
        return self.preprocessing.train(images, labels, step)


@dataclasses.dataclass(frozen=True)
class StreamedTrainBatches:
    """Training batches that the host has put together already.

    Attributes:
      batch_size: B.
      preprocessing: what is left to do.
    """

    batch_size: int
    preprocessing: Preprocessing

    @property
    def examples_per_step(self) -> int:
        """The images that a step learns from."""
        return self.batch_size

    def order(self, first_step: jax.Array, num_steps: int) -> jax.Array:
        """Nothing to be known of a batch, int32[num_steps]."""
        return jnp.zeros(num_steps, jnp.int32)

    def batch(self, data: Batch, indices: jax.Array, step: jax.Array) -> Batch:
        """The batch of `step`: all of `data`, uint8[B, H, W, C] images and int32[B] labels."""
        return self.preprocessing.train(data["image"], data["label"], step)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Batches of a data set in its own order, every example in exactly one of them.

    The last batch is filled up with examples of weight 0.

    Attributes:
      num_examples: N, the size of the data set.
      batch_size: B; it may exceed N.
      preprocessing: as for training, of which augmentation is no part.
    """

    num_examples: int
    batch_size: int
    preprocessing: Preprocessing

    @property
    def num_batches(self) -> int:
        """The number of batches that hold all examples."""
        return -(-self.num_examples // self.batch_size)

    def batch(self, data: Batch, i: jax.Array) -> Batch:
        """Batch `i` of the whole data set: uint8[N, H, W, C] images and int32[N] labels."""
        indices = i * self.batch_size + jnp.arange(self.batch_size)
        filling = indices >= self.num_examples
        indices = jnp.minimum(indices, self.num_examples - 1)
        labels = data["label"][indices]
        labels = jnp.where(filling & (labels >= 0), ~labels, labels)
        return self.preprocessing.evaluate(data["image"][indices], labels)


@dataclasses.dataclass(frozen=True)
class StreamedEvalBatches:
    """Batches of a data set in its own order that the host has put together already.

    Attributes:
      num_examples: N, the size of the data set.
      batch_size: B.
      preprocessing: what is left to do.
    """

    num_examples: int
    batch_size: int
    preprocessing: Preprocessing

    @property
    def num_batches(self) -> int:
        """The number of batches that hold all examples."""
        return -(-self.num_examples // self.batch_size)

    def batch(self, data: Batch, i: jax.Array) -> Batch:
        """Batch `i`, which is all of `data`: uint8[B, H, W, C] images and int32[B] labels."""
        return self.preprocessing.evaluate(data["image"], data["label"])


def normalise(images: jax.Array, mean: np.ndarray, std: np.ndarray) -> jax.Array:
    """uint8[..., C] pixels to float32: (x / 255 − mean) / std, for each channel."""
    scale = (1 / (255 * std)).astype(np.float32)
    shift = (-mean / std).astype(np.float32)
    return images.astype(jnp.float32) * scale + shift
