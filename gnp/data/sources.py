"""Data sets by name, from what is on disk to arrays in memory.

`digits` comes with the package, `ptb` is plain text. The others are read through TensorFlow
Datasets (TFDS): a data set prepared as ArrayRecord needs no TensorFlow; reading TFRecord files
needs it, and so does downloading. What TFDS decodes is kept under `$XDG_CACHE_HOME/gnp` (by default
`~/.cache/gnp`), which may be deleted at any time.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.resources
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gnp.data.text import TextSource, open_ptb
from gnp.errors import UserError, unknown

_log = logging.getLogger(__name__)

# Names of TFDS, and what each calls its test set. Any can be added that has the features image
# (uint8) and label: mnist, fashion_mnist, kmnist, svhn_cropped, ...
_TFDS_NAMES = {"cifar10": "test", "cifar100": "test", "imagenet2012": "validation"}


Records = Callable[[str], Iterable[dict[str, Any]]]  # of a split: "image" and "label"


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, in the order in which they are stored.

    Attributes:
      images: uint8[N, H, W, C]; may be a read-only memory map.
      labels: int32[N], from 0 to the number of classes - 1.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of an image data set before anything is decoded.

    Attributes:
      name: as `list_sources` has it.
      num_classes: the labels are smaller than this.
      image_shape: (height, width, channels).
      num_examples: for each split.
      load: gives all splits; slow the first time, and never twice in a process. Raises `UserError`
        if the files are damaged.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    num_examples: Mapping[str, int]
    load: Callable[[], dict[str, Split]]

    holds = "images"
    unit = "image"


def list_sources() -> list[str]:
    """The names that `open_source` knows."""
    return ["digits", *_TFDS_NAMES, "ptb"]


def holds(name: str) -> str:
    """What a data set of `list_sources` holds: "images" or "tokens"."""
    return "tokens" if name == "ptb" else "images"


def open_source(
    name: str, data_dir: str | None = None, *, image_size: int | None = None
) -> Source | TextSource:
    """Finds a data set, and downloads it if it is not there and can be had.

    Args:
      name: one of `list_sources()`.
      data_dir: the folder of all TFDS data sets; None means TFDS's own, which is `$TFDS_DATA_DIR`
        or `~/tensorflow_datasets`. `digits` needs none; for `ptb` it is the folder of its files.
      image_size: the size that the images will be used at. Those of a data set whose images differ
        in size are stored at 8/7 of it: resized on the shorter side, of which the middle is kept.

    Raises:
      UserError: for an unknown name, and for data that are neither there nor to be had, or damaged;
        says where it looked and what to do.
    """
    if name == "digits":
        return _digits()
    if name == "ptb":
        return open_ptb(data_dir)
    if name in _TFDS_NAMES:
        return _open_tfds(name, data_dir, image_size)
    raise unknown("data set", name, list_sources())


def _digits() -> Source:
    """1,797 scans of handwritten digits, 8 x 8 pixels, of which a fixed fifth is the test set.

    The test set of the UCI repository's "Optical Recognition of Handwritten Digits" (E. Alpaydin
    and C. Kaynak, 1998, CC BY 4.0), in the form in which scikit-learn distributes it: each line has
    64 pixels from 0 to 16 and the digit.
    """
    num_train, num_test = 1437, 360

    @functools.cache
    def load() -> dict[str, Split]:
        packed = importlib.resources.files(__package__).joinpath("digits.csv.gz").read_bytes()
        lines = gzip.decompress(packed).decode().splitlines()
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        labels = table[:, -1].astype(np.int32)
        # NumPy guarantees that RandomState's numbers never change; those of its Generator may.
        order = np.random.RandomState(0).permutation(num_train + num_test)
        test, train = np.split(order, [num_test])
        return {
            split: Split(images[indices], labels[indices])
            for split, indices in (("train", train), ("test", test))
        }

    return Source("digits", 10, (8, 8, 1), {"train": num_train, "test": num_test}, load)


def _open_tfds(name: str, data_dir: str | None, image_size: int | None) -> Source:
    names = {"train": "train", "test": _TFDS_NAMES[name]}  # ours to TFDS's
    with _quiet():
        builder = _tfds_builder(name, data_dir)
        folder = Path(builder.data_dir)  # DATA_DIR/NAME/VERSION
        if not builder.is_prepared():
            _download(builder)
        info = builder.info
        for split in names.values():
            if split not in info.splits or not info.splits[split].num_examples:
                raise UserError(f"the data set in {folder} has no split {split!r}")
        records = _record_reader(builder, names)

    shards = [Path(path) for split in names.values() for path in info.splits[split].filepaths]
    for path in shards:
        if not path.exists():
            raise UserError(f"{path} is missing: remove {folder} and prepare {name} again")
    key = _fingerprint([folder / "dataset_info.json", *shards])
    cache = _cache_root() / f"{name}-{info.version}-{key}"
    image_shape = info.features["image"].shape
    if None in image_shape:
        if image_size is None:
            raise UserError(
                f"the images of {name} differ in size: set config.data.image_size (such as 224)"
            )
        stored = round(image_size * 8 / 7)
        image_shape = (stored, stored, image_shape[2])
        cache = cache.with_name(f"{cache.name}-{stored}")
        records = records and _resized(records, stored)

    @functools.cache
    def load() -> dict[str, Split]:
        splits = _read_cache(cache, source)
        if splits is None:
            assert records is not None
            with _quiet():
                splits = _decode(source, records, folder)
            _write_cache(cache, splits)
        return splits

    source = Source(
        name=name,
        num_classes=info.features["label"].num_classes,
        image_shape=image_shape,
        num_examples={split: info.splits[names[split]].num_examples for split in names},
        load=load,
    )
    # What has been decoded once needs no TensorFlow any more.
    if records is None and _read_cache(cache, source) is None:
        raise UserError(
            f"{name} in {folder} is stored as TFRecord, which needs TensorFlow to be read: "
            f"pip install tensorflow, or convert it where TensorFlow is installed: "
            f"{_prepare_command(builder, 'NEW_DIR')}, and set data_dir to NEW_DIR"
        )
    return source


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser().absolute()
    try:
        return tfds.builder_cls(name)(data_dir=str(root))
    except Exception as error:  # whatever a dataset_info.json makes TFDS and protobuf stumble over
        raise _unreadable(root / name, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read the data set in {path}: {_first_line(error)} "
        f"(if it is damaged, remove it and prepare it again)"
    )


def _record_reader(builder: Any, names: dict[str, str]) -> Records | None:
    """A function that reads a split's records in their stored order.

    None if that needs TensorFlow, which is not there.
    """
    import tensorflow_datasets as tfds

    random_access = tfds.core.FileFormat.with_random_access()
    if random_access & builder.info.available_file_formats():
        # This also points `builder.info` at the files of that format, where there are two.
        data_sources = builder.as_data_source(names)
        return lambda split: _in_batches(data_sources[split])
    if not _has_tensorflow():
        return None

    def read_with_tensorflow(split: str) -> Iterable[dict[str, Any]]:
        _restrain_tensorflow()
        # One file after the other, as ArrayRecord is read; TFDS would mix those of 16 files.
        in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        return tfds.as_numpy(builder.as_dataset(split=names[split], read_config=in_order))

    return read_with_tensorflow


def _in_batches(data_source: Any, size: int = 512) -> Iterator[dict[str, Any]]:
    # In one thread: more gain nothing, since decoding an image of 32 x 32 pixels is nearly all
    # Python.
    for start in range(0, len(data_source), size):
        yield from data_source.__getitems__(range(start, min(start + size, len(data_source))))


def _decode(source: Source, records: Records, folder: Path) -> dict[str, Split]:
    """Reads all splits into memory, with a progress bar if a person can see it."""
    splits = {}
    with tqdm(
        total=sum(source.num_examples.values()),
        desc=f"decoding {source.name}",
        unit=" images",
        leave=False,
        disable=None,
    ) as progress:
        for split, num_examples in source.num_examples.items():
            images = np.empty((num_examples, *source.image_shape), np.uint8)
            labels = np.empty(num_examples, np.int32)
            count = 0
            try:
                for record in records(split):
                    image = record["image"]
                    if image.shape != source.image_shape or image.dtype != np.uint8:
                        raise ValueError(
                            f"{split} image {count} is {image.dtype}{list(image.shape)}, "
                            f"not uint8{list(source.image_shape)}"
                        )
                    images[count], labels[count] = image, record["label"]
                    count += 1
                    progress.update()
                if count != num_examples:
                    raise ValueError(f"{split} has {count} records, not {num_examples}")
                if wrong := set(labels) - set(range(source.num_classes)):
                    raise ValueError(
                        f"{split} has the label {wrong.pop()} of {source.num_classes} classes"
                    )
            except Exception as error:  # each of the readers and decoders has errors of its own
                raise _unreadable(folder, error) from error
            splits[split] = Split(images, labels)
    return splits


def _resized(records: Records, size: int) -> Records:
    return lambda split: (
        record | {"image": _resize(record["image"], size)} for record in records(split)
    )


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[H, W, 3] to uint8[size, size, 3]: the shorter side resized, the middle kept."""
    height, width, _ = image.shape
    scale = size / min(height, width)
    shape = (max(round(width * scale), size), max(round(height * scale), size))
    resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


# Downloading


def _download(builder: Any) -> None:
    """Downloads and prepares a data set, where that is possible without waiting in vain."""
    import tensorflow_datasets as tfds

    name, folder, root = builder.name, Path(builder.data_dir), Path(builder.data_dir_root)
    if folder.exists():  # TFDS would take it for the data set
        raise UserError(f"{folder} holds no prepared data set: remove it")
    elsewhere = f"{_prepare_command(builder, 'NEW_DIR')}, and copy NEW_DIR/{name} to {root}"
    if not _has_tensorflow():
        raise UserError(
            f"{name} is not in {root} (no {folder}), and downloading it needs TensorFlow: "
            f"pip install tensorflow and run this again, or run elsewhere: {elsewhere}"
        )
    for url in _urls_to_download(builder):
        if not _is_reachable(url):
            raise UserError(
                f"{name} is not in {root} (no {folder}) and cannot be downloaded: no connection "
                f"to {url}; run where there is one: {elsewhere}"
            )
    _restrain_tensorflow()
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # of the network, the disk, the archive
        raise UserError(f"cannot prepare {name} in {root}: {_first_line(error)}") from error


def _urls_to_download(builder: Any) -> list[str]:
    """The files that TFDS would download, without those that it already has."""
    from tensorflow_datasets.core.download import resource

    downloads = Path(builder.data_dir_root) / "downloads"
    urls = []
    for url, info in (builder.url_infos or {}).items():
        cached = resource.get_dl_fname(url, info.checksum)
        places = [downloads / builder.name / cached, downloads / cached]
        if info.filename:
            places.append(downloads / "manual" / info.filename)
        if not any(path.exists() for path in places):
            urls.append(url)
    return urls


def _is_reachable(url: str, seconds: float = 8) -> bool:
    """Whether a web server answers at all in that time. TFDS itself would try for minutes."""
    import requests

    answered = threading.Event()

    def probe() -> None:
        with contextlib.suppress(requests.RequestException):
            requests.head(url, timeout=seconds)
            answered.set()

    # In a thread, since looking up the host's name heeds no time limit.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _prepare_command(builder: Any, data_dir: str) -> str:
    # Not TFDS's own command line, which does not start without Apache Beam.
    return (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({builder.name!r}, '
        f"data_dir={data_dir!r}).download_and_prepare(file_format='array_record')\""
    )


# The cache of decoded arrays


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnp"


def _fingerprint(paths: Iterable[Path]) -> str:
    """Changes when one of the files is written or replaced, or when they are moved."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    identity = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _read_cache(cache: Path, source: Source) -> dict[str, Split] | None:
    """The decoded splits as memory maps, None if they are not there or not whole."""
    splits = {}
    for split, num_examples in source.num_examples.items():
        try:
            images = np.load(cache / f"{split}_images.npy", mmap_mode="r")
            labels = np.load(cache / f"{split}_labels.npy")
        except (OSError, EOFError, ValueError):
            return None
        if images.shape != (num_examples, *source.image_shape) or labels.shape != (num_examples,):
            return None
        splits[split] = Split(images, labels)
    return splits


def _write_cache(cache: Path, splits: Mapping[str, Split]) -> None:
    """Keeps the decoded splits, or warns. Each file is there whole or not at all."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            for split, data in splits.items():
                np.save(Path(temporary, f"{split}_images.npy"), data.images)
                np.save(Path(temporary, f"{split}_labels.npy"), data.labels)
            for path in Path(temporary).iterdir():
                path.replace(cache / path.name)
    except OSError as error:
        _log.warning("cannot write the cache %s, decoding again next time: %s", cache, error)


# Helpers


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _restrain_tensorflow() -> None:
    """Keeps TensorFlow quiet and off the GPU, all of whose memory it would take from JAX."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # already running, so the program has its own wishes
        tf.config.set_visible_devices([], "GPU")


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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
