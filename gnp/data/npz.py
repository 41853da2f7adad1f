"""Images and labels in an `.npz` file, which NumPy writes with `np.savez`."""

import math
import re
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from gnp.data.archives import host_memory, in_bytes
from gnp.data.records import MAX_CLASSES, ArrayRecords, Source, first_line, plain
from gnp.errors import UserError

_SPLITS = {"train": "train", "valid": "validation", "val": "validation", "validation": "validation"}
_SPLITS["test"] = "test"
_HEADERS = {  # of an array in the file, by the version of its format
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_IMAGES, _LABELS = ("images", "image", "x"), ("labels", "label", "y")

_EXPECTED = (
    "write one with np.savez(file, train_images=…, train_labels=…, test_images=…, test_labels=…), "
    "uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3] and whole labels [N] from 0"
)


def open_npz(path: str | None) -> Source:
    """Reads `train_images` and `train_labels`, and the same of validation and test, from a file.

    Also understood are `x_train` and `y_train`, `val_images`, `val_labels`, and the like. `images`
    and `labels` alone are the split "train". Nothing pickled is read.

    Args:
      path: the file.

    Raises:
      UserError: if it is no such file, or the images, their number or the labels are not as they
        must be.
    """
    if not path:
        raise UserError("config.data.data_dir is not set: for npz it is the path of the .npz file")
    file = Path(path).expanduser()
    arrays = _read(file)
    splits, found = {}, {}
    for key in arrays:
        if match := re.fullmatch(r"([a-z]+)(?:_([a-z]+))?", key.lower()):
            words = [word for word in match.groups() if word is not None]
            kinds = [word for word in words if word in _IMAGES + _LABELS]
            others = [word for word in words if word not in kinds]
            split = _SPLITS.get(others[0]) if others else "train"
            if len(kinds) == 1 and split is not None:
                found[split, "image" if kinds[0] in _IMAGES else "label"] = key
    for split in ("train", "validation", "test"):
        keys = found.get((split, "image")), found.get((split, "label"))
        if keys[0] and keys[1]:
            splits[split] = _records(file, split, keys[0], keys[1], arrays)
    if not splits:
        raise UserError(
            f"{file} has no images and labels, only {', '.join(arrays) or 'nothing'}; {_EXPECTED}"
        )

    shapes = {records.images.shape[1:] for records in splits.values()}
    if len(shapes) > 1:
        raise UserError(f"{file} has splits of different image shapes: {sorted(shapes)}")
    height, width, channels = shapes.pop()
    num_classes = 1 + max(int(records.labels.max()) for records in splits.values())
    return Source(
        name="npz",
        classes=tuple(map(str, range(num_classes))),
        image_shape=(height, width, channels),
        same_size=True,
        splits=splits,
        test_split=next((split for split in ("test", "validation") if split in splits), None),
        key=None,
        where=str(file),
    )


def _read(file: Path) -> dict[str, np.ndarray]:
    arrays, what = {}, str(file)
    try:
        with open(plain(file), "rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("it is no .npz file, or is cut off")
            _check_sizes(opened)
        with np.load(file, allow_pickle=False) as archive:
            for key in archive.files:
                what = f"{key} of {file}"
                arrays[key] = np.asarray(archive[key])
        return arrays
    except FileNotFoundError:
        raise UserError(
            f"there is no file {file}; set config.data.data_dir to a .npz file"
        ) from None
    except Exception as error:  # of the file, of zip, zlib or NumPy
        text = first_line(error)
        if "pickle" in text:
            text = "it holds pickled objects, which are never loaded"
        raise UserError(f"cannot read {what}: {text}; {_EXPECTED}") from None


def _check_sizes(file: IO[bytes]) -> None:
    """Raises a `ValueError` if the arrays would take more memory than their file can mean."""
    with zipfile.ZipFile(file) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > host_memory():
            raise ValueError(f"its arrays would take {in_bytes(total)}, more than there is memory")
        for member in archive.infolist():
            # Others can unpack a few bytes to gigabytes at once.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is compressed as NumPy does not")
            if not member.filename.endswith(".npy"):
                continue
            with archive.open(member) as content:
                version = np.lib.format.read_magic(content)
                if version not in _HEADERS:
                    raise ValueError(f"{member.filename} is of a version for structures")
                shape, _, dtype = _HEADERS[version](content)
                needed = content.tell() + math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and needed > member.file_size:
                raise ValueError(
                    f"the header of {member.filename} tells of {in_bytes(needed)}, but there are "
                    f"{in_bytes(member.file_size)}"
                )


def _records(
    file: Path, split: str, image_key: str, label_key: str, arrays: dict[str, np.ndarray]
) -> ArrayRecords:
    images, labels = arrays[image_key], arrays[label_key]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or not images.size:
        raise UserError(
            f"{image_key} of {file} has the shape {list(arrays[image_key].shape)}; {_EXPECTED}"
        )
    if images.dtype != np.uint8:
        images = _bytes(file, image_key, images)
    if labels.ndim == 2 and labels.shape[1] == 1:  # as some write them
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise UserError(f"{label_key} of {file} is {labels.dtype}{list(labels.shape)}; {_EXPECTED}")
    if len(labels) != len(images):
        raise UserError(
            f"{file} has {len(images)} images in {image_key} but {len(labels)} in {label_key}"
        )
    if not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        place = int(np.argmax((labels < 0) | (labels >= MAX_CLASSES)))
        raise UserError(
            f"{label_key}[{place}] of {file} is {labels[place]}; labels are whole numbers from 0"
        )
    return ArrayRecords(images, labels.astype(np.int32), f"{split} in {file}")


def _bytes(file: Path, key: str, images: np.ndarray) -> np.ndarray:
    """Other numbers as uint8: whole ones from 0 to 255, or floats that are all from 0 to 1."""
    if images.dtype.kind not in "uif":
        raise UserError(f"{key} of {file} is {images.dtype}; {_EXPECTED}")
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    if not finite.all():
        raise UserError(
            f"{key}[{int(np.argmin(finite))}] of {file} has NaN or infinity "
            f"({int((~finite).sum())} of {len(images)} images have)"
        )
    low, high = images.min(), images.max()
    if np.issubdtype(images.dtype, np.floating) and 0 <= low <= high <= 1:
        return np.rint(images * 255).astype(np.uint8)
    if 0 <= low <= high <= 255 and (images == np.rint(images)).all():
        return images.astype(np.uint8)
    raise UserError(
        f"{key} of {file} has values from {low} to {high}; pixels are whole numbers from 0 to 255, "
        "or all from 0 to 1"
    )
