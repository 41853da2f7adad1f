"""Small archives in place of the genuine ones, and what the tests of them share."""

import dataclasses
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from gnp.data.archives import Archive
from gnp.data.imagenet import IMAGENET, ImageNetArchives
from gnp.errors import UserError

CLASSES = ("n01440764", "n01443537", "n02085620")


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def jpeg(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def archive_of(content: bytes, name: str = "data.zip", url: str = "http://0.0.0.0/") -> Archive:
    return Archive(name, url, len(content), hashlib.md5(content).hexdigest())


def tar_of(files, mode: str = "w") -> bytes:
    """A tar archive of {name: content}, where a content may be a type of tar's."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if content in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
                info.type, info.linkname, content = content, "/etc/passwd", b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def write_tiny_imagenet(folder: Path) -> Archive:
    """Writes an archive like Tiny-ImageNet's, of 3 classes with 4 images and 5 to validate."""
    folder.mkdir(parents=True, exist_ok=True)
    top = "tiny-imagenet-200"
    path = folder / f"{top}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{top}/", "")
        archive.writestr(f"{top}/wnids.txt", "".join(f"{name}\n" for name in CLASSES))
        words = [f"{name}\tanimal {i}, beast {i}\n" for i, name in enumerate(CLASSES)]
        archive.writestr(f"{top}/words.txt", "".join(words))
        for i, name in enumerate(CLASSES):
            archive.writestr(f"{top}/train/{name}/{name}_boxes.txt", "")
            for j in range(4):
                image = f"{top}/train/{name}/images/{name}_{j}.JPEG"
                archive.writestr(image, jpeg(10 * i + j))
        for j in range(5):
            archive.writestr(f"{top}/val/images/val_{j}.JPEG", jpeg(100 + j))
        rows = [f"val_{j}.JPEG\t{CLASSES[j % 3]}\t0\t0\t63\t63\n" for j in range(5)]
        archive.writestr(f"{top}/val/val_annotations.txt", "".join(rows))
        archive.writestr(f"{top}/test/images/test_0.JPEG", jpeg(200))
    return archive_of(path.read_bytes(), path.name)


def write_imagenet_archives(folder: Path, *, train=None, val=None, devkit=None) -> ImageNetArchives:
    """Writes archives like ImageNet's, of 3 classes with 4 images and 5 to validate.

    Args:
      folder: where.
      train: files of the training archive in place of the genuine ones.
      val: the same of the validation archive.
      devkit: the same of the development kit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if train is None:
        train = {
            f"{name}.tar": tar_of(
                {f"{name}_{j}.JPEG": jpeg(10 * i + j, (50 + j, 40 + i)) for j in range(4)}
            )
            for i, name in enumerate(CLASSES)
        }
    if val is None:
        val = {f"ILSVRC2012_val_{j:08d}.JPEG": jpeg(100 + j, (40, 60 + j)) for j in (3, 1, 2, 5, 4)}
    if devkit is None:
        # As in the genuine one: inner nodes of WordNet after the classes, numbers in another order.
        fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")
        fields += ("wordnet_height", "num_train_images")
        rows = [
            (2, CLASSES[0], "tench", "a fish", 0, [], 0, 1300),
            (3, CLASSES[1], "goldfish", "a fish", 0, [], 0, 1300),
            (1, CLASSES[2], "chihuahua", "a dog", 0, [], 0, 1300),
            (4, "n00015388", "animal", "an animal", 3, [1, 2, 3], 5, 0),
        ]
        synsets = np.empty((len(rows), 1), [(field, object) for field in fields])
        synsets[:, 0] = [tuple(np.array(v) if v == [] else v for v in row) for row in rows]
        meta = io.BytesIO()
        scipy.io.savemat(meta, {"synsets": synsets})
        top = "ILSVRC2012_devkit_t12"
        devkit = {
            f"{top}/readme.txt": b"read me",
            f"{top}/data/meta.mat": meta.getvalue(),
            f"{top}/data/ILSVRC2012_validation_ground_truth.txt": b"1\n3\n3\n2\n1\n",
        }
    contents = [tar_of(train), tar_of(val), tar_of(devkit, "w:gz")]
    archives = []
    for content, known in zip(contents, IMAGENET, strict=True):
        (folder / known.name).write_bytes(content)
        archive = archive_of(content, known.name)
        archives.append(archive if known.md5 else dataclasses.replace(archive, md5=None))
    return ImageNetArchives(*archives)
