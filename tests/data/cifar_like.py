"""Small data sets in the on-disk format of CIFAR, made by TFDS's own builder and writer."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}


def write_cifar(
    data_dir: str | Path,
    num_train: int,
    num_test: int,
    name: str = "cifar10",
    *,
    seed: int = 0,
    num_shards: int = 1,
    file_format: str = "array_record",
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Prepares a small `cifar10` or `cifar100` in `data_dir`, as TFDS does with the genuine one.

    Each class has its own colours under noise, so that a model can learn it. Neither a network nor
    TensorFlow is needed, except for the file format "tfrecord".

    Returns:
      For each split, uint8[N, 32, 32, 3] images and int32[N] labels, numbered as in the records'
      ids ("train_00000", ...). TFDS stores the records in another order.
    """
    num_classes = NUM_CLASSES[name]
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 192, (num_classes, 1, 1, 3))
    written = {}
    for split, size in {"train": num_train, "test": num_test}.items():
        labels = np.arange(size, dtype=np.int32) % num_classes
        noise = rng.integers(0, 64, (size, 32, 32, 3))
        written[split] = (colours[labels] + noise).astype(np.uint8), labels

    def records(split: str) -> Any:
        for i, (image, label) in enumerate(zip(*written[split], strict=True)):
            # As PNG, since TFDS leaves encoding an array to TensorFlow.
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            png.seek(0)
            record = {"id": f"{split}_{i:05d}", "image": png, "label": label}
            if name == "cifar100":
                record["coarse_label"] = label // 5
            yield i, record

    _prepare(name, data_dir, {split: records(split) for split in written}, num_shards, file_format)
    return written


def write_imagenet(data_dir: str | Path, sizes: dict[str, list[tuple[int, int]]]) -> None:
    """Prepares a small `imagenet2012`: for each split, an image of each (height, width).

    The upper half of an image is of the colour (200, 40, 40), the lower of (40, 40, 200).
    """

    def records(split: str) -> Any:
        for i, (height, width) in enumerate(sizes[split]):
            image = np.full((height, width, 3), (200, 40, 40), np.uint8)
            image[height // 2 :] = (40, 40, 200)
            jpeg = io.BytesIO()
            Image.fromarray(image).save(jpeg, "JPEG", quality=95)
            jpeg.seek(0)
            name = f"{split}_{i}.JPEG"
            yield name, {"image": jpeg, "label": i, "file_name": name}

    _prepare("imagenet2012", data_dir, {split: records(split) for split in sizes})


def _prepare(
    name: str,
    data_dir: str | Path,
    records: dict[str, Any],
    num_shards: int = 1,
    file_format: str = "array_record",
) -> None:
    builder = tfds.builder_cls(name)(data_dir=str(data_dir))
    builder._split_generators = lambda _: records
    tfds.disable_progress_bar()
    builder.download_and_prepare(
        file_format=file_format,
        download_config=tfds.download.DownloadConfig(
            num_shards=num_shards, manual_dir=str(data_dir)
        ),
    )
