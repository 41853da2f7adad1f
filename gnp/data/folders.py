"""Images in folders, one for each class, as ImageNet, Tiny-ImageNet and most people keep them.

    DATA_DIR/train/CLASS/**/*.jpg
    DATA_DIR/val/CLASS/**/*.jpg         or "validation", "valid", "test"
    DATA_DIR/val/**/*.jpg               with a file that says which class each is

Without folders of those names, DATA_DIR/CLASS/**/*.jpg is the split "train". A file of labels is
`val_annotations.txt` (of Tiny-ImageNet), `val_labels.txt`, `LOC_val_solution.csv` (of Kaggle) or
`imagenet_2012_validation_synset_labels.txt`, in the split's folder or beside it. Its lines are
"FILE CLASS …", separated by a tab, a comma or a space, or only "CLASS", in the order of the sorted
files.
"""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gnp.data.decode import size_of
from gnp.data.records import DamagedError, Record, Source, fingerprint, plain
from gnp.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_SPLITS = {
    "train": "train",
    "training": "train",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_LABEL_FILES = (
    "val_annotations.txt",
    "val_labels.txt",
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
)

_NUM_CLASSES = {"tiny_imagenet": 200, "imagenet": 1000}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """Image files and their classes.

    Attributes:
      root: the folder of all.
      paths: of the files, relative to it.
      labels: int32[N].
    """

    root: str
    paths: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        path = os.path.join(self.root, self.paths[i])
        try:
            with open(plain(path), "rb") as file:
                return Record(file.read(), int(self.labels[i]), path)
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from None


def open_folder(name: str, data_dir: str | None) -> Source:
    """Finds the images of a folder of class folders.

    The classes are the names of the training split's folders, sorted. The examples of a split are
    in an order that is shuffled, once and for all, so that a part of it holds all classes.

    Args:
      name: "folder", or "imagenet" or "tiny_imagenet".
      data_dir: the folder that holds the splits or the classes; also the one around
        `tiny-imagenet-200`, `imagenet` or `ILSVRC2012`.

    Raises:
      UserError: if it is not there, cannot be read, or holds no images or no classes, if a class
        has no images, or if a split has images of unknown class.
    """
    if not data_dir:
        raise UserError(
            f"config.data.data_dir is not set: for {name} it is the folder with train/CLASS/*.jpg "
            "and val/CLASS/*.jpg, or with CLASS/*.jpg"
        )
    root = Path(data_dir).expanduser().absolute()
    children = _folders(root)
    for inner in ("tiny-imagenet-200", "imagenet", "ILSVRC2012"):
        if inner in children and not any(child.lower() in _SPLITS for child in children):
            root = root / inner
            children = _folders(root)
    split_folders: dict[str, Path] = {}
    for child in children:
        if split := _SPLITS.get(child.lower()):
            if split in split_folders:
                raise UserError(
                    f"{split_folders[split]} and {root / child} are one split: keep one"
                )
            split_folders[split] = root / child
    if not split_folders:
        split_folders = {"train": root}
    if "train" not in split_folders:
        raise UserError(f"{root} has no folder 'train' beside {', '.join(split_folders)}")
    classes = _folders(split_folders["train"])
    if not classes:
        raise UserError(
            f"{split_folders['train']} has no folders: {name} wants one for each class, with its "
            "images inside"
        )
    _check_classes(name, root, classes)
    splits = {}
    for split, folder in split_folders.items():
        records = _split(root, folder, classes, split)
        if records is not None:
            splits[split] = records
    train = splits["train"]
    label_files = [_label_file(root, folder, split) for split, folder in split_folders.items()]
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) == 0)
    if empty.size:
        folder = split_folders["train"] / classes[empty[0]]
        raise UserError(
            f"{folder} has no images ({', '.join(SUFFIXES)}); remove it if it is no class"
            + (f" ({empty.size} such folders)" if empty.size > 1 else "")
        )
    return Source(
        name=name,
        classes=_titles(root, classes),
        image_shape=(*_common_size(train), 3),
        same_size=name == "tiny_imagenet",
        splits=splits,
        test_split=next((split for split in ("test", "validation") if split in splits), None),
        key=lambda: fingerprint(
            [os.path.join(root, path) for records in splits.values() for path in records.paths]
            + [str(file) for file in label_files if file is not None]
        ),
        where=str(root),
    )


def _split(root: Path, folder: Path, classes: Sequence[str], split: str) -> FolderRecords | None:
    """A split's images; None for a test set whose classes are not known."""
    numbers = {name: i for i, name in enumerate(classes)}
    children = _folders(folder)
    paths, names = [], []
    if set(children) & set(classes):
        if foreign := sorted(set(children) - set(classes)):
            raise UserError(
                f"{folder / foreign[0]} is no class of the training images (their folders are "
                f"{', '.join(classes[:3])}, …): remove it, or add it to them"
            )
        for child in children:
            found = list(_images(folder / child))
            paths += found
            names += [child] * len(found)
    else:
        paths = sorted(_images(folder), key=os.path.basename)
        if not paths:
            raise UserError(f"{folder} has no images ({', '.join(SUFFIXES)})")
        label_file = _label_file(root, folder, split)
        if label_file is None and split == "test":
            return None
        if label_file is None:
            raise UserError(
                f"the classes of the images in {folder} are not known: sort them into folders "
                f"named as those of the training images, or put {' or '.join(_LABEL_FILES[:2])} "
                "there, with lines 'FILE CLASS'"
            )
        names = _labels(label_file, paths, numbers)
    if not paths:
        raise UserError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    labels = np.array([numbers[name] for name in names], np.int32)
    order = np.random.RandomState(0).permutation(len(paths))
    relative = [paths[i].removeprefix(f"{root}{os.sep}") for i in order]
    return FolderRecords(str(root), relative, labels[order])


def _label_file(root: Path, folder: Path, split: str) -> Path | None:
    """The file with a split's labels; beside the folders there are only those for validation."""
    places = (folder, root) if split == "validation" else (folder,)
    files = (place / name for name in _LABEL_FILES for place in places)
    return next((file for file in files if file.is_file()), None)


def _labels(file: Path, paths: Sequence[str], classes: Mapping[str, int]) -> list[str]:
    """The class of each image file, from a file of labels."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    rows = [_row(line.strip(), classes) for line in lines if line.strip()]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(paths):
            raise UserError(f"{file} has {len(rows)} lines for {len(paths)} images")
        names = [row[0] for row in rows]
    else:
        known = {os.path.splitext(row[0])[0]: row[1] for row in rows if len(row) > 1}
        stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
        missing = [path for path, stem in zip(paths, stems, strict=True) if stem not in known]
        if missing:
            raise UserError(
                f"{file} does not say which class {missing[0]} is ({len(missing)} such images)"
            )
        names = [known[stem] for stem in stems]
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"{file} names the class {unknown[0]!r}, of which there are no training images "
            f"(their folders are {', '.join(list(classes)[:3])}, …)"
        )
    return names


def _row(line: str, classes: Mapping[str, int]) -> list[str]:
    """A line of a file of labels: [CLASS] or [FILE, CLASS]; both may have spaces inside."""
    separator = next((s for s in "\t, " if s in line), None)
    if line in classes or separator is None:
        return [line]
    file, rest = (part.strip() for part in line.split(separator, 1))
    return [file, rest if rest in classes else re.split(r"[\t, ]", rest)[0]]


def _check_classes(name: str, root: Path, classes: Sequence[str]) -> None:
    """Says it if a data set whose classes are known is not whole."""
    if (root / "wnids.txt").is_file() and name == "tiny_imagenet":
        try:
            listed = Path(plain(root / "wnids.txt")).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {root / 'wnids.txt'}: {error}") from None
        if missing := sorted(set(listed) - set(classes)):
            raise UserError(
                f"{root / 'train' / missing[0]} is missing, which wnids.txt lists "
                f"({len(missing)} of {len(listed)} are): unpack the archive again"
            )
    if len(classes) == 1:
        _log.warning(
            "there is only one class in %s, %r: if the classes' folders are inside it, set "
            "config.data.data_dir to it",
            *(root, classes[0]),
        )
    expected = _NUM_CLASSES.get(name, len(classes))
    if len(classes) != expected:
        _log.warning("%s has %d classes in %s, not %d", name, len(classes), root, expected)


def _titles(root: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes' names for people: of WordNet's numbers those in `words.txt`, if it is there."""
    titles = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path(plain(root / "words.txt")).read_text(encoding="utf-8").splitlines():
            number, _, words = line.partition("\t")
            titles[number] = words.partition(",")[0]
    return tuple(titles.get(name, name) for name in classes)


def _common_size(train: FolderRecords) -> tuple[int, int]:
    """(height, width) if the first images are of one size, (0, 0) if they are not."""
    sizes = set()
    for i in range(min(len(train), 64)):
        try:
            sizes.add(size_of(train[i]))
        except Exception:  # a damaged image is found when it is decoded
            continue
    return sizes.pop() if len(sizes) == 1 else (0, 0)


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _images(folder: Path) -> Iterator[str]:
    """The paths of all image files in a folder and those below it, sorted."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    for below, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.path.join(below, file)
