"""Small data sets as TFDS prepares CIFAR and others, made by its own builders and writers."""

import io
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
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
    TensorFlow is needed.

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
            record = {"id": f"{split}_{i:05d}", "image": png(image), "label": label}
            if name == "cifar100":
                record["coarse_label"] = label // 5
            yield i, record

    _prepare(name, data_dir, {split: records(split) for split in written}, num_shards)
    if file_format == "tfrecord":
        as_tfrecord(Path(data_dir) / name / "3.0.2")
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


def png(image: np.ndarray) -> io.BytesIO:
    """An image as a PNG file, since TFDS leaves encoding an array to TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def write_custom(
    data_dir: str | Path,
    features: dict[str, Any],
    splits: dict[str, Sequence[dict[str, Any]]],
    *,
    name: str = "some_set",
    configs: Sequence[str] = (),
    version: str = "1.0.0",
    supervised_keys: Any = ("image", "label"),
    disable_shuffling: bool = True,
    num_shards: int = 1,
) -> None:
    """Prepares a data set that TFDS does not know, in each of its configurations.

    Arrays among the examples' values are written as PNG.
    """

    def encode(examples: Sequence[dict[str, Any]]) -> Any:
        for i, example in enumerate(examples):
            yield (
                i,
                {
                    key: png(value) if isinstance(value, np.ndarray) else value
                    for key, value in example.items()
                },
            )

    def info(self: Any) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=supervised_keys,
            disable_shuffling=disable_shuffling,
        )

    builder_configs = [tfds.core.BuilderConfig(name=config) for config in configs]
    with tfds.core.registered.skip_registration():
        builder = type(
            "".join(word.capitalize() for word in name.split("_")),
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": __name__,
                "VERSION": tfds.core.Version(version),
                "BUILDER_CONFIGS": builder_configs,
                "_info": info,
                "_split_generators": lambda *_: {
                    split: encode(examples) for split, examples in splits.items()
                },
                "_generate_examples": None,
            },
        )
    for config in configs or [None]:
        _run(builder(data_dir=str(data_dir), config=config), data_dir, num_shards)


def as_tfrecord(folder: Path) -> None:
    """Turns a prepared data set into one of TFRecord files, TFDS's default format."""
    for path in folder.glob("*.array_record-*"):
        records = ArrayRecordDataSource([str(path)])
        write_tfrecord(
            folder / path.name.replace("array_record", "tfrecord"),
            [records[i] for i in range(len(records))],
        )
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))


def write_tfrecord(path: Path, records: Iterable[bytes]) -> None:
    def masked(content: bytes) -> bytes:
        crc = google_crc32c.value(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    with path.open("wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + masked(length) + record + masked(record))


def _prepare(name: str, data_dir: str | Path, records: dict[str, Any], num_shards: int = 1) -> None:
    builder = tfds.builder_cls(name)(data_dir=str(data_dir))
    builder._split_generators = lambda _: records
    _run(builder, data_dir, num_shards)


def _run(builder: Any, data_dir: str | Path, num_shards: int) -> None:
    tfds.disable_progress_bar()
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(
            num_shards=num_shards, manual_dir=str(data_dir)
        ),
    )
