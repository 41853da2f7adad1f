"""ImageNet and Tiny-ImageNet, from their archives to the folders that `gnp.data.folders` reads.

Both may be interrupted and run again: what is written gets its name when it is whole.
"""

import io
import os
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gnp.data.archives import (
    Archive,
    in_bytes,
    locked,
    progress_bar,
    readable,
    tar_files,
    told,
    unpack_flat,
    unpack_zip,
    unsafe,
    whole,
)
from gnp.data.download import check, fetch
from gnp.data.records import first_line
from gnp.errors import UserError

# J. Wu, Q. Zhang, G. Xu (2017), "Tiny ImageNet Challenge", Stanford CS 231N.
TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248_100_043,
    "90528d7ca1a48142e341f4ef8d21d0de",
)


class ImageNetArchives(NamedTuple):
    """The three files of ILSVRC 2012 (Russakovsky et al., 2015): images, and what classes are."""

    train: Archive
    val: Archive
    devkit: Archive


_IMAGENET_PAGE = "https://image-net.org/download-images"
IMAGENET = ImageNetArchives(
    Archive("ILSVRC2012_img_train.tar", _IMAGENET_PAGE, 147_897_477_120, None),
    Archive("ILSVRC2012_img_val.tar", _IMAGENET_PAGE, 6_744_924_160, None),
    Archive(
        "ILSVRC2012_devkit_t12.tar.gz", _IMAGENET_PAGE, None, "fa75699e90414af021442c21a62c3abf"
    ),
)


def prepare_tiny_imagenet(data_dir: Path, archive: Archive) -> None:
    """Downloads Tiny-ImageNet and unpacks it to DATA_DIR/tiny-imagenet-200, unless it is there.

    The archive stays in DATA_DIR. One that is there already is taken, without a network.

    Args:
      data_dir: the folder to put it into.
      archive: `TINY_IMAGENET`.

    Raises:
      UserError: if it cannot be had or written, or is not what it should be.
    """
    target = data_dir / archive.name.removesuffix(".zip")
    if target.exists() or (data_dir / "train").exists():
        return
    with told(f"write to {data_dir}"):
        data_dir.mkdir(parents=True, exist_ok=True)
    with locked(data_dir):
        if not target.exists():
            unpack_zip(fetch(archive, data_dir), target)


def prepare_imagenet(data_dir: Path, archives: ImageNetArchives) -> None:
    """Unpacks ImageNet's archives in DATA_DIR to DATA_DIR/train/CLASS and DATA_DIR/val.

    `val/val_labels.txt` gets the classes of the validation images. What is unpacked already is
    not unpacked again, and its archive not needed; the archives stay where they are.

    Args:
      data_dir: the folder with the archives.
      archives: `IMAGENET`.

    Raises:
      UserError: if an archive is missing or damaged, or the images cannot be written.
    """
    train, val = data_dir / "train", data_dir / "val"
    needed = [] if train.exists() else [archives.train]
    if not any((data_dir / name).exists() for name in ("val", "valid", "validation")):
        needed += [archives.val, archives.devkit]
    if not needed:
        return
    if missing := [archive for archive in needed if not (data_dir / archive.name).is_file()]:
        files = ", ".join(
            f"{archive.name} ({in_bytes(archive.size)})" if archive.size else archive.name
            for archive in missing
        )
        raise UserError(
            "imagenet cannot be downloaded by a program, since image-net.org wants an account: "
            f"fetch {files} by hand from {missing[0].url} into {data_dir} and run this again"
        )
    for archive in needed:
        check(data_dir / archive.name, archive)
    with locked(data_dir):
        if archives.val in needed and not val.exists():  # the quick one first
            _unpack_val(data_dir / archives.val.name, data_dir / archives.devkit.name, val)
        if archives.train in needed and not train.exists():
            _unpack_train(data_dir / archives.train.name, train)


def _unpack_train(path: Path, target: Path) -> None:
    """Unpacks an archive of archives, one a class.

    Classes that are unpacked are kept for the next call, unless the archive turns out to be wrong.
    """
    unfinished = target.with_name(f".{target.name}.part")
    with (
        told(f"unpack {path} to {target}"),
        path.open("rb") as file,
        progress_bar(f"unpacking {path.name}", path.stat().st_size) as bar,
    ):
        unfinished.mkdir(exist_ok=True)
        try:
            with readable(path):
                for name, inner in tar_files(file, path, bar):
                    wnid = re.fullmatch(r"(n\d{8})\.tar", name)
                    if not wnid:
                        raise unsafe(path, name)
                    if not (unfinished / wnid[1]).exists():
                        with whole(unfinished / wnid[1]) as temporary:
                            unpack_flat(inner, path, temporary)
        except UserError:
            shutil.rmtree(unfinished)
            raise
        unfinished.rename(target)


def _unpack_val(path: Path, devkit: Path, target: Path) -> None:
    """Unpacks an archive of images, and writes `val_labels.txt` beside them."""
    with (
        told(f"unpack {path} to {target}"),
        readable(path),
        path.open("rb") as file,
        progress_bar(f"unpacking {path.name}", path.stat().st_size) as bar,
        whole(target) as temporary,
    ):
        unpack_flat(file, path, temporary, bar)
        labels = _val_labels(devkit, sorted(os.listdir(temporary)))
        (temporary / "val_labels.txt").write_text(labels, encoding="utf-8")


def _val_labels(devkit: Path, images: list[str]) -> str:
    """Lines "FILE CLASS" for the validation images, in order, as the development kit numbers them.

    A class is a number in it, which `meta.mat` translates to WordNet's ("n01440764").
    """
    import scipy.io

    texts: dict[str, bytes] = {}
    table, truth = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
    try:
        with tarfile.open(devkit, "r:gz") as archive:
            for member in archive:
                name = "/".join(PurePosixPath(member.name).parts[-2:])
                if member.isreg() and name in (table, truth) and 0 <= member.size <= 2**24:
                    file = archive.extractfile(member)
                    assert file is not None  # it is a plain file
                    texts[name] = file.read()
        # MATLAB's format has nothing that is run when it is read; functions are read as arrays.
        meta = scipy.io.loadmat(
            io.BytesIO(texts[table]), variable_names=["synsets"], squeeze_me=True
        )
        synsets = meta["synsets"].reshape(-1)
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        lines = texts[truth].split()
        classes = [names[int(line)] for line in lines]
        if len(classes) != len(images):
            raise ValueError(f"it has {len(classes)} labels for {len(images)} validation images")
        if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
            raise ValueError("its classes are not those of WordNet")
    except Exception as error:  # SciPy's readers have many errors of their own
        text = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"cannot read {devkit}: {text}; fetch it again") from error
    return "".join(f"{image} {name}\n" for image, name in zip(images, classes, strict=True))
