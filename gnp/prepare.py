"""python -m gnp.prepare: downloads and prepares data sets, or says what to fetch by hand."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gnp.command_line import Parser, run
from gnp.errors import UserError, printable

if TYPE_CHECKING:
    from gnp.data import Source

DESCRIPTION = """\
Downloads and prepares a data set, as far as a program can, and says what it holds and with which
flags to train on it. Where files must be fetched by hand, it says which, and where they go.
It may be interrupted: the same command goes on. What is prepared already is only looked at.

NAME            DATA_DIR
digits          (none: it comes with this package)
tiny_imagenet   the folder to download to (248 MB, and as much again unpacked)
imagenet        the folder with the archives of image-net.org, fetched by hand (155 GB); they are
                unpacked there
folder          the folder with your own train/CLASS/*.jpg and val/CLASS/*.jpg: is checked
npz             your own .npz file: is checked
ptb             the folder with the Penn TreeBank's text, fetched by hand: is checked
cifar10, cifar100, imagenet2012, and all others of TensorFlow Datasets:
                the folder of all of them ($TFDS_DATA_DIR or ~/tensorflow_datasets); preparing one
                needs TensorFlow, reading it does not"""

_FOLDERS = {  # what the data directory is, of those that have no default
    "tiny_imagenet": "the folder to download it to",
    "imagenet": "the folder with its archives or with train/CLASS/*.JPEG",
    "folder": "the folder with train/CLASS/*.jpg and val/CLASS/*.jpg",
    "npz": "the .npz file",
    "ptb": "the folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt",
}

_WHOLE = {  # the number of images
    "tiny_imagenet": {"train": 100_000, "validation": 10_000},
    "imagenet": {"train": 1_281_167, "validation": 50_000},
}

_IMAGE_SIZE = 224  # to open data sets whose images differ in size


def main() -> int:
    """Parses the flags, prepares, and prints what there is."""
    parser = Parser("gnp.prepare", DESCRIPTION)
    parser.add_argument("name", metavar="NAME", help="of the data set")
    parser.add_argument("--data_dir", help="the folder (of npz the file) of the data set")
    flags = parser.parse_args()
    try:
        data_dir = _prepare(flags.name, flags.data_dir)
        print("\n".join(_summary(flags.name, data_dir)))
    except KeyboardInterrupt:
        command = shlex.join(["python", "-m", "gnp.prepare", *sys.argv[1:]])
        print(f"\ninterrupted; to go on: {command}", file=sys.stderr, flush=True)
        os._exit(130)  # an orderly exit would wait for threads that still download
    except OSError as error:
        if error.filename is None:  # not of the disk
            raise
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return 0


def _prepare(name: str, data_dir: str | None) -> str | None:
    """Makes a data set ready for `open_source`, and returns its absolute data directory."""
    if data_dir is None:
        if name in _FOLDERS:
            raise UserError(f"--data_dir is not set: for {name} it is {_FOLDERS[name]}")
        return None
    path = Path(data_dir).expanduser().absolute()
    if name != "npz" and path.exists() and not path.is_dir():
        what = _FOLDERS.get(name, "the folder of all data sets")
        raise UserError(f"--data_dir={data_dir} is a file; for {name} it is {what}")

    # Here, so that --help and a mistake do not wait for JAX.
    from gnp.data import imagenet

    if name == "tiny_imagenet":
        imagenet.prepare_tiny_imagenet(path, imagenet.TINY_IMAGENET)
    elif name == "imagenet":
        inner = (path / folder for folder in ("imagenet", "ILSVRC2012"))
        around = not (path / "train").exists() and next(filter(Path.is_dir, inner), None)
        imagenet.prepare_imagenet(around or path, imagenet.IMAGENET)
    elif name == "ptb":
        files = [f"ptb.{split}.txt" for split in ("train", "valid", "test")]
        if missing := [file for file in files if not (path / file).is_file()]:
            raise UserError(
                "the text of ptb is licensed (Linguistic Data Consortium, LDC99T42) and cannot be "
                f"downloaded by a program: put {', '.join(files)} of T. Mikolov's "
                f"simple-examples.tgz into {path} and run this again; missing: {', '.join(missing)}"
            )
    return str(path)  # any other: open_source prepares it


def _summary(name: str, data_dir: str | None) -> Iterator[str]:
    """Opens a data set; the lines that say what it holds, and how to train on it."""
    from gnp.data import TextSource, open_source

    try:
        source = open_source(name, data_dir)
        varies = False
    except UserError as error:
        if "set config.data.image_size" not in str(error):
            raise
        source = open_source(name, data_dir, image_size=_IMAGE_SIZE)
        varies = True
    flags = [f"--config.data.name={name}"]
    if data_dir is not None and name != "digits":
        flags.append(f"--config.data.data_dir={data_dir}")
    if isinstance(source, TextSource):
        yield f"{name} in {data_dir}"
        yield from (f"  {split}: {n:,} words" for split, n in source.num_examples.items())
        yield f"  vocabulary: {source.num_classes:,} words"
    else:
        yield f"{name} in {source.where}{': nothing to prepare' if name == 'digits' else ''}"
        yield from (_split(source, split) for split in source.splits)
        yield f"  classes: {_classes(source)}"
        smallest, largest = _extremes(source)
        if not varies:
            kind = {1: "grey", 3: "RGB", 4: "RGBA"}[source.image_shape[2]]
            yield f"  image size: {_pixels(largest)}, {kind}"
        else:
            flags.append(f"--config.data.image_size={_IMAGE_SIZE}")
            yield f"  image size: differs, as {_pixels(smallest)} and {_pixels(largest)}"
        yield from _disk_space(name, Path(source.where))
    yield "to train on it: python -m gnp.train --config=FILE.py --workdir=runs/NAME \\"
    yield f"  {shlex.join(flags)}"


def _split(source: "Source", split: str) -> str:
    number = source.num_examples[split]
    whole = _WHOLE.get(source.name, {}).get(split, number)
    if number != whole:
        print(
            f"warning: {split} in {source.where} has {number:,} images in place of {whole:,}; to "
            "prepare it anew, remove it and run this again",
            file=sys.stderr,
        )
    note = ", the test set" if split == source.test_split != "test" else ""
    return f"  {split}: {number:,} images{note}"


def _classes(source: "Source") -> str:
    shown = printable(", ".join(source.classes[:5]))
    return f"{source.num_classes} ({shown}{', …' if source.num_classes > 5 else ''})"


def _extremes(source: "Source") -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the smallest and the largest of the first training images."""
    from gnp.data.decode import size_of

    records = source.splits.get("train") or next(iter(source.splits.values()))
    sizes = []
    for i in range(min(len(records), 64)):
        try:
            sizes.append(size_of(records[i]))
        except Exception:  # a damaged image is told of when it is decoded
            continue
    sizes.sort(key=lambda size: (size[0] * size[1], size))
    return (sizes[0], sizes[-1]) if sizes else ((0, 0), (0, 0))


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[0]} × {size[1]} pixels"


def _disk_space(name: str, place: Path) -> Iterator[str]:
    """What a data set takes on the disk, if it is there, and what its archives do."""
    from gnp.data import imagenet
    from gnp.data.archives import in_bytes

    archives = {
        "tiny_imagenet": [place.parent / imagenet.TINY_IMAGENET.name],
        "imagenet": [place / archive.name for archive in imagenet.IMAGENET],
    }.get(name, [])
    archives = [path for path in archives if path.is_file()]
    if place.is_file():
        yield f"  on disk: {in_bytes(place.stat().st_size)}"
    elif place.is_dir():
        sizes = [
            os.stat(path).st_size
            for folder, _, files in os.walk(place)
            for path in (os.path.join(folder, file) for file in files)
            if Path(path) not in archives
        ]
        yield f"  on disk: {in_bytes(sum(sizes))} in {len(sizes):,} files"
    if archives:
        total = in_bytes(sum(path.stat().st_size for path in archives))
        names = ", ".join(path.name for path in archives)
        yield f"  and {total} of archives that may be removed: {names} in {archives[0].parent}"


if __name__ == "__main__":
    run(main)
