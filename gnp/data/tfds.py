"""Image data sets that TensorFlow Datasets (TFDS) has prepared, read without TensorFlow.

ArrayRecord and TFRecord files are both read by record number. Only downloading and preparing, in
`gnp.data.prepare_tfds`, needs TensorFlow.
"""

import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gnp.data.prepare_tfds import prepare_tfds
from gnp.data.records import MAX_CLASSES, DamagedError, Record, Source, fingerprint, first_line
from gnp.data.tfrecord import TFRecords
from gnp.errors import UserError

_VERSION = re.compile(r"\d+\.\d+\.\d+")


def open_tfds(name: str, data_dir: str | None, others: list[str]) -> Source:
    """Finds an image-classification data set of TFDS, and downloads it if that is possible.

    Args:
      name: as TFDS has it: "cifar10", with a configuration "imagenet_resized/32x32", with a version
        "cifar10:3.0.2". Without one, the newest that is there.
      data_dir: the folder of all data sets; None means `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`. The data set's own folder does too.
      others: names of data sets that are not TFDS's, to be suggested for one that nobody knows.

    Raises:
      UserError: if there is no such data set or version, if it cannot be had, is damaged, or does
        not hold images (uint8) with one label each.
    """
    import tensorflow_datasets as tfds

    base, _, version = name.partition(":")
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser().absolute()
    with _quiet():
        try:
            folder = _find(root, base, version)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        if folder is None:
            known = tfds.list_builders(with_community_datasets=False)
            if base.partition("/")[0] not in known:
                raise _unknown(name, root, others, known)
            folder = prepare_tfds(name, root)
        try:
            _check_files(folder)
            with _own_features_only():
                info = tfds.builder_from_directory(folder).info
            _check_name(info, folder, base, version)
            image_key, label_key, shape = _keys(info)
            splits = {
                split: _records(info, split, image_key, label_key, folder)
                for split in info.splits
                if info.splits[split].num_examples
            }
            if not splits:
                raise ValueError("it holds no examples")
        except UserError:
            raise
        except Exception as error:  # whatever makes TFDS, protobuf and the readers stumble
            raise _unreadable(folder, error) from error
    names = info.features[label_key].names
    files = [folder / "dataset_info.json"]
    files += [Path(path) for split in splits for path in info.splits[split].filepaths]
    labelled = (split for split in ("test", "validation") if split in splits)
    if base == "imagenet2012":  # its test set has no labels
        labelled = (split for split in ("validation",) if split in splits)
    return Source(
        name=name,
        classes=tuple(names),
        image_shape=shape,
        same_size=bool(shape[0]),
        splits=splits,
        test_split=next(labelled, None),
        key=lambda: f"{info.version}-{fingerprint(files)}",
        where=str(folder),
    )


def _find(root: Path, name: str, version: str) -> Path | None:
    """The folder of a prepared data set, None if there is none."""
    if (root / "dataset_info.json").exists():
        return root
    parts = Path(name).parts  # of "imagenet_resized/32x32" the folder may be either
    own = [root.joinpath(*parts[i + 1 :]) for i in range(len(parts)) if root.name == parts[i]]
    for folder in (root / name, *own):
        if not folder.is_dir():
            continue
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
        versions = [path for path in inside if _VERSION.fullmatch(path.name)]
        versions.sort(key=lambda path: tuple(map(int, path.name.split("."))))
        prepared = [path for path in versions if (path / "dataset_info.json").exists()]
        if version:
            wanted = [path for path in prepared if path.name == version]
            if not wanted and prepared:
                raise UserError(
                    f"{name} is in {folder} in version {', '.join(p.name for p in prepared)}, not "
                    f"{version}; set config.data.name={name}:{prepared[-1].name}, or prepare the "
                    f"other"
                )
            prepared = wanted
        if prepared:
            return prepared[-1]
        if versions and not version:
            raise UserError(f"{versions[-1]} holds no prepared data set: remove it")
        configs = [path.name for path in inside if any(path.glob("*/dataset_info.json"))]
        if configs:
            raise UserError(
                f"{name} in {folder} has the configurations {', '.join(configs)}; set "
                f"config.data.name={name}/{configs[0]}"
            )
    return None


def _unknown(name: str, root: Path, others: list[str], known: list[str]) -> UserError:
    """The error for a data set that nobody knows, or a configuration that is not there."""
    base = root / name.partition("/")[0]
    if configs := sorted(path.parts[-3] for path in base.glob("*/*/dataset_info.json")):
        return UserError(
            f"{base} has no {name}, but the configurations {', '.join(configs)}; set "
            f"config.data.name={base.name}/{configs[0]}"
        )
    if close := difflib.get_close_matches(name, [*others, *known], n=1):
        return UserError(f"unknown data set {name!r}; did you mean {close[0]!r}?")
    return UserError(
        f"unknown data set {name!r}; valid are {', '.join(others)}, what is prepared in {root}, "
        "and the names in https://www.tensorflow.org/datasets/catalog"
    )


def _check_name(info: Any, folder: Path, name: str, version: str) -> None:
    """Says it if a folder that the user named holds another data set, or another version."""
    full, _, held = info.full_name.rpartition("/")  # NAME/VERSION or NAME/CONFIGURATION/VERSION
    if name not in (info.name, full) or (_VERSION.fullmatch(version) and version != held):
        wanted = f"{name}:{version}" if version else name
        raise UserError(
            f"{folder} holds {full}:{held}, not {wanted}; set config.data.name={full}, or "
            "config.data.data_dir to the folder of all data sets"
        )


def _keys(info: Any) -> tuple[str, str, tuple[int, int, int]]:
    """The features that are the image and its label, and the images' shape (0 where it varies)."""
    import tensorflow_datasets as tfds

    keys = info.supervised_keys or ("image", "label")
    features = dict(info.features)
    if len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
        image, label = (features[key] for key in keys)
        if (
            isinstance(image, tfds.features.Image)
            and isinstance(label, tfds.features.ClassLabel)
            and image.np_dtype == np.uint8
            and 0 < (label.num_classes or 0) <= MAX_CLASSES
            and image.shape[2] in (None, 1, 3, 4)
        ):
            height, width, channels = image.shape
            return keys[0], keys[1], (height or 0, width or 0, channels or 3)
    raise UserError(
        f"{info.name} is no data set of images (uint8) with one label each: it has "
        f"{', '.join(f'{name} ({type(feature).__name__})' for name, feature in features.items())}"
    )


@dataclasses.dataclass(frozen=True)
class _TFDSRecords:
    """A split of a prepared data set: serialised examples by number, and how to read them."""

    examples: Sequence[bytes]
    features: Any
    image_key: str
    label_key: str
    name: str

    labels = None  # not known before all are read

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Record:
        import tensorflow_datasets as tfds

        name = f"record {i} of {self.name}"
        try:
            example = self.features.deserialize_example_np(
                self.examples[i], decoders={self.image_key: tfds.decode.SkipDecoding()}
            )
            image, label = example[self.image_key], int(example[self.label_key])
        except Exception as error:  # of the file, of protobuf, of TFDS
            raise DamagedError(f"{name} is damaged: {first_line(error)}") from error
        num_classes = self.features[self.label_key].num_classes
        if not 0 <= label < num_classes:
            raise DamagedError(f"{name} has the label {label} of {num_classes} classes")
        return Record(image, label, name)


def _records(info: Any, split: str, image_key: str, label_key: str, folder: Path) -> _TFDSRecords:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    paths = [Path(os.path.normpath(path)) for path in info.splits[split].filepaths]
    for path in paths:
        if not path.is_relative_to(os.path.normpath(folder)):
            raise ValueError(f"its file {path} is outside of it")
        if not path.is_file():
            raise UserError(f"{path} is missing: remove {folder} and prepare {info.name} again")
    is_tfrecord = info.file_format.value == "tfrecord"
    examples: Sequence[bytes] = (
        TFRecords(paths) if is_tfrecord else ArrayRecordDataSource([str(path) for path in paths])
    )
    if len(examples) != info.splits[split].num_examples:
        raise ValueError(
            f"{split} has {len(examples)} records, not {info.splits[split].num_examples}"
        )
    # Of the example no more is read than that.
    features = tfds.features.FeaturesDict(
        {key: info.features[key] for key in (image_key, label_key)}
    )
    return _TFDSRecords(examples, features, image_key, label_key, f"{split} in {folder}")


def _check_files(folder: Path) -> None:
    """Raises a `ValueError` for anything that is no file: opening a pipe would wait for ever."""
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.name} in it is no plain file")


@contextlib.contextmanager
def _own_features_only() -> Iterator[None]:
    """Keeps TFDS from importing whatever module `features.json` names as that of a feature."""
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    original = connector.__dict__["cls_from_name"]

    def cls_from_name(cls: Any, name: str) -> Any:
        if not name.startswith("tensorflow_datasets."):
            raise ValueError(f"it has a feature {name!r}, which is not one of TFDS's own")
        return original.__get__(None, cls)(name)

    connector.cls_from_name = classmethod(cls_from_name)
    try:
        yield
    finally:
        connector.cls_from_name = original


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read the data set in {folder}: {first_line(error)} "
        f"(if it is damaged, remove it and prepare it again)"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the logging of TFDS, which warns of what is an error here and of what is none."""
    import absl.logging

    logger = absl.logging.get_absl_logger()
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
