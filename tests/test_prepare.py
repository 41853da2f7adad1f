"""python -m gnp.prepare: what it prints, and that it may be killed at any time and run again."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnp import prepare
from gnp.command_line import run
from gnp.data import archives, imagenet, open_source
from gnp.errors import UserError
from tests.data.cifar_like import write_cifar, write_imagenet
from tests.data.fake_archives import (
    jpeg,
    message_of,
    tree,
    write_imagenet_archives,
    write_tiny_imagenet,
)
from tests.data.faulty_server import serving

ROOT = Path(__file__).parents[1]

# The command line on other archives, which stops within the file that follows {copies} others.
IN_PART = """
import itertools, shutil, sys, time
from gnp import prepare
from gnp.command_line import run
from gnp.data import imagenet
from gnp.data.archives import Archive
from gnp.data.imagenet import ImageNetArchives

imagenet.TINY_IMAGENET, imagenet.IMAGENET = {tiny!r}, {archives!r}
copy, numbers = shutil.copyfileobj, itertools.count()
shutil.copyfileobj = lambda *files: time.sleep(60) if next(numbers) == {copies} else copy(*files)
run(prepare.main)
"""


def call(*arguments) -> None:
    """Runs the command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
        assert prepare.main() == 0


def printed(capsys, *arguments) -> list[str]:
    """What it prints, by lines."""
    capsys.readouterr()  # of TFDS's writer
    call(*arguments)
    return capsys.readouterr().out.splitlines()


def start(*arguments, copies: int | None = None, **kwargs) -> subprocess.Popen:
    """Runs it in a process, which stops after so many files, or never."""
    code = IN_PART.format(tiny=imagenet.TINY_IMAGENET, archives=imagenet.IMAGENET, copies=copies)
    command = [sys.executable, "-B", "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- The command line ---------------------------------------------------------------------------


def test_help_names_all_data_sets():
    done = subprocess.run(
        [sys.executable, "-m", "gnp.prepare", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in ("digits", "tiny_imagenet", "imagenet", "folder", "npz", "ptb", "cifar10"):
        assert f"\n{name}" in done.stdout


def test_a_mistake_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", "tiny_imagnet", f"--data_dir={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        run(prepare.main)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == "error: unknown data set 'tiny_imagnet'; did you mean 'tiny_imagenet'?\n"


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet", "folder", "npz", "ptb"])
def test_a_missing_data_dir_is_told(name):
    assert message_of(call, name).startswith(f"--data_dir is not set: for {name} it is the ")


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet", "folder", "ptb", "cifar10"])
def test_a_data_dir_that_is_a_file_is_told(tmp_path, name):
    path = tmp_path / "file"
    path.touch()
    message = message_of(call, name, f"--data_dir={path}")
    assert message.startswith(f"--data_dir={path} is a file; for {name} it is the folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write all")
@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet", "folder", "ptb"])
def test_a_folder_that_is_closed_is_told(tmp_path, name):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    assert str(folder) in message_of(call, name, f"--data_dir={folder / 'data'}")


# --- Summaries ----------------------------------------------------------------------------------


def test_digits_need_nothing(capsys):
    assert printed(capsys, "digits") == [
        "digits in this package: nothing to prepare",
        "  train: 1,437 images",
        "  test: 360 images",
        "  classes: 10 (0, 1, 2, 3, 4, …)",
        "  image size: 8 × 8 pixels, grey",
        "to train on it: python -m gnp.train --config=FILE.py --workdir=runs/NAME \\",
        "  --config.data.name=digits",
    ]


def test_ptb_says_which_files_are_missing(tmp_path, capsys):
    (tmp_path / "ptb.train.txt").write_text("a b c\nb c <unk>\n")
    (tmp_path / "ptb.valid.txt").write_text("a b\n")
    message = message_of(call, "ptb", f"--data_dir={tmp_path}")
    assert "put ptb.train.txt, ptb.valid.txt, ptb.test.txt of T. Mikolov's" in message
    assert f"into {tmp_path} and run this again; missing: ptb.test.txt" in message
    (tmp_path / "ptb.test.txt").write_text("c d\n")
    assert printed(capsys, "ptb", f"--data_dir={tmp_path}") == [
        f"ptb in {tmp_path}",
        "  train: 8 words",
        "  validation: 3 words",
        "  test: 3 words",
        "  vocabulary: 5 words",
        "to train on it: python -m gnp.train --config=FILE.py --workdir=runs/NAME \\",
        f"  --config.data.name=ptb --config.data.data_dir={tmp_path}",
    ]


def test_npz_is_checked(tmp_path, capsys):
    path = tmp_path / "my data.npz"
    assert "there is no file" in message_of(call, "npz", f"--data_dir={path}")
    np.savez(path, x_train=np.zeros((5, 16, 16, 3), np.uint8), y_train=[0, 1, 2, 1, 0])
    assert printed(capsys, "npz", f"--data_dir={path}") == [
        f"npz in {path}",
        "  train: 5 images",
        "  classes: 3 (0, 1, 2)",
        "  image size: 16 × 16 pixels, RGB",
        f"  on disk: {archives.in_bytes(path.stat().st_size)}",
        "to train on it: python -m gnp.train --config=FILE.py --workdir=runs/NAME \\",
        f"  --config.data.name=npz '--config.data.data_dir={path}'",
    ]


def test_folder_is_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"cannot read the folder {tmp_path / 'data'}" in message_of(
        call, "folder", "--data_dir=data"
    )
    for i, name in enumerate(["train/cat/0.jpg", "train/dog/1.jpg", "val/cat/2.jpg"]):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(i, (30 + i, 40)))
    size = sum(len(content) for content in tree(tmp_path).values())
    assert printed(capsys, "folder", "--data_dir=data") == [
        f"folder in {tmp_path}/data",
        "  train: 2 images",
        "  validation: 1 images, the test set",
        "  classes: 2 (cat, dog)",
        "  image size: differs, as 30 × 40 pixels and 31 × 40 pixels",
        f"  on disk: {size / 1000:.1f} kB in 3 files",
        "to train on it: python -m gnp.train --config=FILE.py --workdir=runs/NAME \\",
        f"  --config.data.name=folder --config.data.data_dir={tmp_path}/data "
        "--config.data.image_size=224",
    ]


@pytest.mark.parametrize("size", [(256, 256), (300, 300), (40, 60)])
def test_whether_an_image_size_is_needed(tmp_path, capsys, size):
    """Opened with one, 256 × 256 pixels are kept: those that are so large need none."""
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        Image.new("RGB", size[::-1]).save(tmp_path / split / "class" / "0.png")
    lines = printed(capsys, "folder", f"--data_dir={tmp_path}")
    assert ("image_size=224" in lines[-1]) == (size[0] != size[1])
    open_source("folder", str(tmp_path), image_size=None if size[0] == size[1] else 224)


def test_prepared_by_tfds_is_summarised(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gnp.data.tfds.prepare_tfds", None)  # not called
    write_cifar(tmp_path, 20, 10)
    folder = tmp_path / "cifar10" / "3.0.2"
    for version in ("3.0.2", "3.0.1"):  # the second as prepared by an older TFDS
        current = folder.with_name(version)
        folder.rename(current)
        info = current / "dataset_info.json"
        info.write_text(info.read_text().replace("3.0.2", version))
        folder = current
        lines = printed(capsys, "cifar10", f"--data_dir={tmp_path}")
        assert lines[:5] == [
            f"cifar10 in {folder}",
            "  train: 20 images",
            "  test: 10 images",
            "  classes: 10 (0, 1, 2, 3, 4, …)",
            "  image size: 32 × 32 pixels, RGB",
        ]
        assert lines[-1] == f"  --config.data.name=cifar10 --config.data.data_dir={tmp_path}"


def test_imagenet_of_tfds_is_summarised(tmp_path, capsys):
    write_imagenet(tmp_path, {"train": [(80, 160), (120, 60), (50, 50)], "validation": [(8, 9)]})
    lines = printed(capsys, "imagenet2012", f"--data_dir={tmp_path}")
    assert "  validation: 1 images, the test set" in lines
    assert "  image size: differs, as 50 × 50 pixels and 80 × 160 pixels" in lines
    assert lines[-1].endswith(f"--config.data.data_dir={tmp_path} --config.data.image_size=224")


def test_tfds_of_the_environment_needs_no_data_dir(tmp_path, capsys, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    write_cifar(tmp_path, 4, 2)
    assert printed(capsys, "cifar10")[-1] == "  --config.data.name=cifar10"


@pytest.fixture
def tiny_dir(tmp_path, monkeypatch):
    """A folder with an archive in place of Tiny-ImageNet's."""
    folder = tmp_path / "tiny"
    monkeypatch.setattr(imagenet, "TINY_IMAGENET", write_tiny_imagenet(folder))
    return folder


@pytest.fixture
def imagenet_dir(tmp_path, monkeypatch):
    """A folder with archives in place of ImageNet's."""
    folder = tmp_path / "imagenet"
    monkeypatch.setattr(imagenet, "IMAGENET", write_imagenet_archives(folder))
    return folder


def test_tiny_imagenet_twice(tiny_dir, capsys):
    for _ in range(2):
        call("tiny_imagenet", f"--data_dir={tiny_dir}")
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert lines[:5] == [
            f"tiny_imagenet in {tiny_dir}/tiny-imagenet-200",
            "  train: 12 images",
            "  validation: 5 images, the test set",
            "  classes: 3 (animal 0, animal 1, animal 2)",
            "  image size: 64 × 64 pixels, RGB",
        ]
        assert f"archives that may be removed: tiny-imagenet-200.zip in {tiny_dir}" in lines[6]
        assert lines[-1] == f"  --config.data.name=tiny_imagenet --config.data.data_dir={tiny_dir}"
        assert "train in" in err and "has 12 images in place of 100,000" in err
        before = tree(tiny_dir)
    assert tree(tiny_dir) == before
    # In the data set's own folder too.
    assert (
        printed(capsys, "tiny_imagenet", f"--data_dir={tiny_dir}/tiny-imagenet-200")[0] == lines[0]
    )


def test_imagenet_twice(imagenet_dir, capsys):
    for place in (imagenet_dir, imagenet_dir.parent):  # also in the folder around it
        lines = printed(capsys, "imagenet", f"--data_dir={place}")
        assert lines[:4] == [
            f"imagenet in {imagenet_dir}",
            "  train: 12 images",
            "  validation: 5 images, the test set",
            f"  classes: 3 ({', '.join(sorted(os.listdir(imagenet_dir / 'train')))})",
        ]
        assert lines[4] == "  image size: differs, as 50 × 40 pixels and 53 × 42 pixels"
        content = [v for k, v in tree(imagenet_dir).items() if not k.startswith("ILSVRC")]
        assert lines[5] == f"  on disk: {sum(map(len, content)) / 1000:.1f} kB in 18 files"
        assert "of archives that may be removed: ILSVRC2012_img_train.tar, ILSVRC2012" in lines[6]


# --- Interruptions ------------------------------------------------------------------------------


def interrupt(process, number) -> None:
    """Kills a process, and checks what it says if it can."""
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert not out
    if number == signal.SIGINT:
        assert process.returncode == 130
        line = err.strip()
        assert "\n" not in line
        assert line.startswith("interrupted; to go on: python -m gnp.prepare ")
    else:
        assert process.returncode == -number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_unpacking_a_zip_may_be_interrupted(tiny_dir, tmp_path, number):
    process = start("tiny_imagenet", f"--data_dir={tiny_dir}", copies=7)
    wait_until(lambda: len(tree(tiny_dir)) == 1 + 7 + 1, process)
    interrupt(process, number)
    assert not (tiny_dir / "tiny-imagenet-200").exists()
    with pytest.raises(UserError):  # nothing that would be taken for the data set
        open_source("tiny_imagenet", str(tiny_dir))
    call("tiny_imagenet", f"--data_dir={tiny_dir}")
    whole = tmp_path / "whole"
    imagenet.prepare_tiny_imagenet(whole, write_tiny_imagenet(whole))
    assert tree(tiny_dir / "tiny-imagenet-200") == tree(whole / "tiny-imagenet-200")
    assert tree(tiny_dir).keys() == tree(whole).keys()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_unpacking_tars_may_be_interrupted(imagenet_dir, tmp_path, number):
    # In the second class: 5 validation images and the first class, of 4 images, are there.
    process = start("imagenet", f"--data_dir={imagenet_dir}", copies=5 + 4 + 1)
    unfinished = imagenet_dir / ".train.part"
    wait_until(lambda: len(list(unfinished.glob(".n*/*"))) == 2, process)
    interrupt(process, number)
    assert not (imagenet_dir / "train").exists()
    with pytest.raises(UserError):
        open_source("imagenet", str(imagenet_dir), image_size=32)
    kept = {path: path.stat().st_mtime_ns for path in unfinished.glob("n*/*")}
    assert len(kept) == 4
    call("imagenet", f"--data_dir={imagenet_dir}")
    for path, written in kept.items():
        moved = imagenet_dir / "train" / path.relative_to(unfinished)
        assert moved.stat().st_mtime_ns == written
    whole = tmp_path / "whole"
    imagenet.prepare_imagenet(whole, write_imagenet_archives(whole))
    assert tree(imagenet_dir).keys() == tree(whole).keys()
    assert tree(imagenet_dir / "train") == tree(whole / "train")
    assert tree(imagenet_dir / "val") == tree(whole / "val")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_downloading_may_be_interrupted(tmp_path, monkeypatch, number):
    archive = write_tiny_imagenet(tmp_path)
    content = (tmp_path / archive.name).read_bytes()
    target = tmp_path / "data"
    with serving(content) as server:
        archive = dataclasses.replace(archive, url=server.url)
        monkeypatch.setattr(imagenet, "TINY_IMAGENET", archive)
        server.fault = "stalls"
        process = start("tiny_imagenet", f"--data_dir={target}")
        part = target / f"{archive.name}.part"
        wait_until(lambda: part.exists() and part.stat().st_size > 0, process)
        interrupt(process, number)
        have = part.stat().st_size
        assert 0 < have < len(content)
        server.fault = ""
        call("tiny_imagenet", f"--data_dir={target}")
        assert server.ranges == [None, f"bytes={have}-"]
    assert (target / archive.name).read_bytes() == content
    assert not part.exists()
    assert open_source("tiny_imagenet", str(target)).num_examples["train"] == 12


def test_a_disk_that_takes_no_more_is_told(tiny_dir):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    process = start("tiny_imagenet", f"--data_dir={tiny_dir}", preexec_fn=limit)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith("error: cannot unpack ") and err.count("\n") == 1
    assert "File too large" in err
    assert [path.name for path in tiny_dir.iterdir()] == ["tiny-imagenet-200.zip"]
