"""ImageNet and Tiny-ImageNet from archives whole, damaged and hostile."""

import fcntl
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from gnp.data import open_source
from gnp.data.imagenet import IMAGENET, TINY_IMAGENET, prepare_imagenet, prepare_tiny_imagenet
from tests.data.fake_archives import (
    CLASSES,
    archive_of,
    jpeg,
    message_of,
    tar_of,
    tree,
    write_imagenet_archives,
    write_tiny_imagenet,
)

# --- Tiny-ImageNet ------------------------------------------------------------------------------


def test_tiny_imagenet_is_unpacked_once(tmp_path):
    archive = write_tiny_imagenet(tmp_path)
    prepare_tiny_imagenet(tmp_path, archive)
    target = tmp_path / "tiny-imagenet-200"
    unpacked = tree(target)
    with zipfile.ZipFile(tmp_path / archive.name) as genuine:
        assert unpacked == {
            name.removeprefix("tiny-imagenet-200/"): genuine.read(name)
            for name in sorted(genuine.namelist())
            if not name.endswith("/")
        }
    source = open_source("tiny_imagenet", str(tmp_path))
    assert source.num_examples == {"train": 12, "validation": 5}
    assert source.classes == ("animal 0", "animal 1", "animal 2")
    (tmp_path / archive.name).unlink()  # what is unpacked needs no archive
    before = target.stat().st_mtime_ns
    prepare_tiny_imagenet(tmp_path, archive)
    assert target.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-imagenet-200"]


def test_what_an_interrupted_run_left_is_done_again(tmp_path):
    archive = write_tiny_imagenet(tmp_path)
    left = tmp_path / ".tiny-imagenet-200.part" / "train"
    left.mkdir(parents=True)
    (left / "foreign").write_text("foreign")
    prepare_tiny_imagenet(tmp_path, archive)
    assert "train/foreign" not in tree(tmp_path / "tiny-imagenet-200")
    assert not left.exists()


def test_a_second_process_does_not_interfere(tmp_path):
    archive = write_tiny_imagenet(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    message = message_of(prepare_tiny_imagenet, tmp_path, archive)
    assert message == f"another process is preparing data in {tmp_path}: wait until it has ended"
    os.close(descriptor)
    prepare_tiny_imagenet(tmp_path, archive)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "folder"
    message = message_of(prepare_tiny_imagenet, folder, TINY_IMAGENET)
    assert message.startswith(f"cannot write to {folder}: Not a directory")


# --- ImageNet -----------------------------------------------------------------------------------


def test_imagenet_is_unpacked_with_its_labels(tmp_path):
    archives = write_imagenet_archives(tmp_path)
    prepare_imagenet(tmp_path, archives)
    files = tree(tmp_path)
    assert {name: files[f"train/{name}/{name}_3.JPEG"] for name in CLASSES} == {
        name: jpeg(10 * i + 3, (53, 40 + i)) for i, name in enumerate(CLASSES)
    }
    assert len([name for name in files if name.startswith("train/")]) == 12
    assert files["val/ILSVRC2012_val_00000002.JPEG"] == jpeg(102, (40, 62))
    assert files["val/val_labels.txt"].decode() == (
        "ILSVRC2012_val_00000001.JPEG n02085620\n"
        "ILSVRC2012_val_00000002.JPEG n01443537\n"
        "ILSVRC2012_val_00000003.JPEG n01443537\n"
        "ILSVRC2012_val_00000004.JPEG n01440764\n"
        "ILSVRC2012_val_00000005.JPEG n02085620\n"
    )
    assert len(files) == 12 + 6 + 3
    source = open_source("imagenet", str(tmp_path), image_size=32)
    assert source.num_examples == {"train": 12, "validation": 5}
    labels = {Path(r.name).name: r.label for r in source.splits["validation"]}
    assert [labels[f"ILSVRC2012_val_{j:08d}.JPEG"] for j in range(1, 6)] == [2, 1, 1, 0, 2]

    for archive in archives:  # what is unpacked needs no archives
        (tmp_path / archive.name).unlink()
    prepare_imagenet(tmp_path, archives)
    assert tree(tmp_path).keys() == {name for name in files if not name.startswith("ILSVRC")}


def test_imagenet_is_unpacked_only_where_it_is_missing(tmp_path):
    archives = write_imagenet_archives(tmp_path)
    prepare_imagenet(tmp_path, archives)
    whole = tree(tmp_path)
    # As if interrupted in the second class, after the first.
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "train").rename(tmp_path / ".train.part")
    shutil.rmtree(tmp_path / ".train.part" / CLASSES[2])
    second = tmp_path / ".train.part" / CLASSES[1]
    second.rename(tmp_path / ".train.part" / f".{CLASSES[1]}.part")
    (tmp_path / ".train.part" / f".{CLASSES[1]}.part" / f"{CLASSES[1]}_0.JPEG").write_bytes(b"half")
    first = (tmp_path / ".train.part" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").stat()
    prepare_imagenet(tmp_path, archives)
    assert tree(tmp_path) == whole
    again = (tmp_path / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


def test_imagenet_says_what_to_fetch(tmp_path):
    message = message_of(prepare_imagenet, tmp_path, IMAGENET)
    assert "ILSVRC2012_img_train.tar (147.9 GB), ILSVRC2012_img_val.tar (6.7 GB), " in message
    assert "ILSVRC2012_devkit_t12.tar.gz by hand from https://image-net.org/" in message
    assert f"into {tmp_path}" in message
    (tmp_path / "train").mkdir()
    (tmp_path / "ILSVRC2012_img_val.tar").touch()
    message = message_of(prepare_imagenet, tmp_path, IMAGENET)
    assert "fetch ILSVRC2012_devkit_t12.tar.gz by hand" in message


def test_an_archive_of_imagenet_that_is_not_whole_is_told(tmp_path):
    archives = write_imagenet_archives(tmp_path)
    for archive in archives:
        path = tmp_path / archive.name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        message = message_of(prepare_imagenet, tmp_path, archives)
        assert f"{path} is not the genuine file, but has" in message
        path.write_bytes(content)
    assert not (tmp_path / "train").exists() and not (tmp_path / "val").exists()


GOOD = f"{CLASSES[0]}.tar"
HOSTILE = [
    {"good.JPEG": b"good", "../evil": b"evil"},
    {"good.JPEG": b"good", "/evil": b"evil"},
    {"good.JPEG": b"good", "folder/evil": b"evil"},
    {"good.JPEG": b"good", "..": b"evil"},
    {"good.JPEG": b"good", "link": tarfile.SYMTYPE},
    {"good.JPEG": b"good", "link": tarfile.LNKTYPE},
    {"good.JPEG": b"good", "device": tarfile.CHRTYPE},
]


@pytest.mark.parametrize(
    "archives",
    [
        *({"val": files} for files in HOSTILE),
        *({"train": {GOOD: tar_of(files)}} for files in HOSTILE),
        {"train": {f"../{GOOD}": tar_of({"good.JPEG": b"good"})}},
        {"train": {"..tar": tar_of({"good.JPEG": b"good"})}},
        {"train": {GOOD: tarfile.SYMTYPE}},
    ],
)
def test_a_tar_that_leaves_its_folder_is_refused(tmp_path, archives):
    folder = tmp_path / "folder"
    archives = write_imagenet_archives(folder, **archives)
    message = message_of(prepare_imagenet, folder, archives)
    assert "which the genuine file does not" in message
    names = {path.name for path in tmp_path.rglob("*") if not path.name.startswith("ILSVRC2012")}
    images = {f"ILSVRC2012_val_{j:08d}.JPEG" for j in range(1, 6)}
    assert names <= {"folder", "val", "val_labels.txt"} | images


def test_a_sparse_tar_is_refused(tmp_path):
    """Of which a few bytes may declare a file of any size."""
    content = bytearray(tar_of({"sparse.JPEG": b"x" * 512}))
    content[156:157] = b"S"
    content[386:410] = b"00000000000\x0000000001000\x00"  # where its one piece is, of 512 bytes
    content[483:495] = b"77777777777\x00"  # 8 GiB
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\x00 " % sum(content[:512])
    archives = write_imagenet_archives(tmp_path)
    (tmp_path / archives.val.name).write_bytes(content)
    archives = archives._replace(val=archive_of(content, archives.val.name))
    message = message_of(prepare_imagenet, tmp_path, archives)
    assert "'sparse.JPEG', which the genuine file does not" in message
    assert not (tmp_path / "val").exists()


def break_header(content: bytes) -> bytes:
    """Damages the header of a tar's third file, at which `tarfile` would end without a word."""
    place = content.index(b"_2.JPEG")
    return content[: place + 1] + b"\xff" + content[place + 2 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-15_000],
        break_header,
        lambda content: b"",
        lambda content: b"x",
        lambda content: tar_of({}),
    ],
)
def test_a_damaged_class_is_told(tmp_path, damage):
    good = tar_of({f"{CLASSES[0]}_{j}.JPEG": jpeg(j) for j in range(4)})
    files = {GOOD: good, f"{CLASSES[1]}.tar": damage(good)}
    archives = write_imagenet_archives(tmp_path, train=files)
    message = message_of(prepare_imagenet, tmp_path, archives)
    assert message.startswith(f"{tmp_path / archives.train.name} is damaged: ")
    assert not (tmp_path / "train").exists()
    assert not (tmp_path / ".train.part").exists()  # of the first class is as little known


def test_a_damaged_header_of_a_class_is_told(tmp_path):
    content = {f"{name}.tar": tar_of({"a_0.JPEG": jpeg(0)}) for name in CLASSES}
    archives = write_imagenet_archives(tmp_path, train=content)
    path = tmp_path / archives.train.name
    packed = path.read_bytes()
    place = packed.index(f"{CLASSES[2]}.tar".encode())
    path.write_bytes(packed[:place] + b"\xff" + packed[place + 1 :])
    assert "is damaged: no header of a file" in message_of(prepare_imagenet, tmp_path, archives)
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(
    ("devkit", "reason"),
    [
        ({}, "it has no 'data/meta.mat'"),
        ({"data/meta.mat": b"no MATLAB"}, "cannot read"),
        ({"data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n"}, "cannot read"),
    ],
)
def test_a_wrong_devkit_is_told(tmp_path, devkit, reason):
    archives = write_imagenet_archives(tmp_path, devkit=devkit)
    message = message_of(prepare_imagenet, tmp_path, archives)
    assert reason in message
    assert str(tmp_path / archives.devkit.name) in message
    assert not (tmp_path / "val").exists()


def test_labels_that_do_not_fit_the_images_are_told(tmp_path):
    archives = write_imagenet_archives(tmp_path, val={"ILSVRC2012_val_00000001.JPEG": jpeg(0)})
    message = message_of(prepare_imagenet, tmp_path, archives)
    assert "it has 5 labels for 1 validation images" in message
    assert not (tmp_path / "val").exists()
