"""Batches of a data set that lives on the device, made inside the compiled step.

Every batch is a pure function of (seed, step): a resumed run sees what it would have seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gnp.data.augment import augment, fit

Batch = dict[str, jax.Array]  # "input" and "label", both with the examples along the first axis


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Shuffled, augmented, normalised training batches.

    The epochs' permutations follow each other without a gap and are cut into batches: each
    example comes exactly once in an epoch, and no remainder is dropped. A batch may therefore
    hold the end of one epoch and the beginning of the next.

    Attributes:
      num_examples: N, the size of the training set.
      batch_size: B, at most N.
      seed: of the order and of the augmentation.
      operations: names of augmentations (`augment.OPERATIONS`), in order.
      padding: pixels on each side, for `pad_crop`.
      image_size: pixels on a side of what the model sees.
      mean, std: [C] of the training images over 255.
    """

    num_examples: int
    batch_size: int
    seed: int
    operations: tuple[str, ...]
    padding: int
    image_size: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def examples_per_step(self) -> int:
        """The images that a step learns from."""
        return self.batch_size

    def order(self, first_step: jax.Array, num_steps: int) -> jax.Array:
        """The examples of `num_steps` (static) successive batches, int32[num_steps, B]."""
        key = jax.random.fold_in(jax.random.key(self.seed), 0)
        count = num_steps * self.batch_size
        position = first_step * self.batch_size
        epoch, offset = position // self.num_examples, position % self.num_examples
        # The batches touch at most so many epochs, wherever in an epoch they begin.
        num_epochs = -(-(count - 1) // self.num_examples) + 1
        permutations = jnp.concatenate(
            [
                jax.random.permutation(jax.random.fold_in(key, epoch + i), self.num_examples)
                for i in range(num_epochs)
            ]
        )
        picked = jax.lax.dynamic_slice(permutations, (offset,), (count,))
        return picked.reshape(num_steps, self.batch_size)

    def batch(self, data: Batch, indices: jax.Array, step: jax.Array) -> Batch:
        """The batch of `step`.

        Args:
          data: the whole training set, uint8[N, H, W, C] images and int32[N] labels.
          indices: the batch's row of `order`, int32[B].
          step: a scalar, the updates made before this one.

        Returns:
          float32[B, image_size, image_size, C] images and int32[B] labels.
        """
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), 1), step)
        images = augment(
            key, data["image"][indices], self.operations, self.padding, self.image_size
        )
        return {"input": normalise(images, self.mean, self.std), "label": data["label"][indices]}


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Normalised batches of a data set in its own order, every example in exactly one of them.

    The last batch is filled up with examples of weight 0.

    Attributes:
      num_examples: N, the size of the data set.
      batch_size: B; it may exceed N.
      image_size: pixels on a side of what the model sees.
      mean, std: [C], those of the training images.
    """

    num_examples: int
    batch_size: int
    image_size: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def num_batches(self) -> int:
        """The number of batches that hold all examples."""
        return -(-self.num_examples // self.batch_size)

    def batch(self, data: Batch, i: jax.Array) -> Batch:
        """Batch `i` with a "weight" float32[B], 1 for an example and 0 for filling."""
        indices = i * self.batch_size + jnp.arange(self.batch_size)
        weight = (indices < self.num_examples).astype(jnp.float32)
        indices = jnp.minimum(indices, self.num_examples - 1)
        images = normalise(fit(data["image"][indices], self.image_size), self.mean, self.std)
        return {"input": images, "label": data["label"][indices], "weight": weight}


def normalise(images: jax.Array, mean: np.ndarray, std: np.ndarray) -> jax.Array:
    """uint8[..., C] pixels to float32: (x / 255 − mean) / std, for each channel."""
    scale = (1 / (255 * std)).astype(np.float32)
    shift = (-mean / std).astype(np.float32)
    return images.astype(jnp.float32) * scale + shift


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of uint8[N, H, W, C] images over 255: two float64[C].

    Exact, from the histogram of each channel, block by block, so that a large memory map is read
    only once and never held. A channel that does not vary has the deviation 1.
    """
    values = np.arange(256) / 255
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 1024):
        block = images[start : start + 1024]
        for c in range(channels):
            counts[c] += np.bincount(block[..., c].ravel(), minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(axis=1)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)
