"""What TFDS needs to prepare a data set, and what is said where it is not there."""

import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gnp.data import download, open_source, prepare_tfds
from tests.data.cifar_like import write_cifar
from tests.data.fake_archives import message_of


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "tfds"


@pytest.fixture
def can_download(monkeypatch):
    """As if TensorFlow were installed and all servers answered."""
    monkeypatch.setattr(prepare_tfds, "has_tensorflow", lambda: True)
    monkeypatch.setattr(download, "is_reachable", lambda url: True)
    monkeypatch.setattr(prepare_tfds, "_restrain_tensorflow", lambda: None)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_unprepared_says_at_once_what_to_run(data_dir, monkeypatch, name):
    monkeypatch.setattr(prepare_tfds, "has_tensorflow", lambda: False)
    start = time.monotonic()
    message = message_of(open_source, name, str(data_dir))
    assert time.monotonic() - start < 3
    assert str(data_dir / name / "3.0.2") in message
    assert "pip install tensorflow" in message
    assert f"python -m gnp.prepare {name} --data_dir=NEW" in message


def test_unprepared_without_a_network_is_not_tried(data_dir, monkeypatch):
    probed = []
    monkeypatch.setattr(prepare_tfds, "has_tensorflow", lambda: True)
    monkeypatch.setattr(download, "is_reachable", probed.append)  # None: not reachable
    message = message_of(open_source, "cifar10", str(data_dir))
    assert probed == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert probed[0] in message
    assert str(data_dir) in message
    assert not data_dir.exists()


@pytest.mark.parametrize("place", ["manual/cifar-10-binary.tar.gz", "cifar10/{cached}", "{cached}"])
def test_an_archive_at_hand_needs_no_network(data_dir, place):
    cached = "cs.toronto.edu_kriz_cifar-10-binaryxKOMUKG8XzocVTfyFVq51o-fJese2Nnd2j2ymlm8od0.tar.gz"
    builder = tfds.builder_cls("cifar10")(data_dir=str(data_dir))
    assert len(prepare_tfds._urls_to_download(builder)) == 1
    path = data_dir / "downloads" / place.format(cached=cached)
    path.parent.mkdir(parents=True)
    path.touch()
    assert not prepare_tfds._urls_to_download(builder)


def test_unprepared_is_prepared_where_that_is_possible(
    data_dir, tmp_path, monkeypatch, capfd, can_download
):
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    Image.fromarray(image).save(tmp_path / "image.png")
    record = {"id": "0", "image": tmp_path / "image.png", "label": 3}

    def split_generators(self, dl_manager):
        return {"train": [(0, record), (1, record)], "test": [(0, record)]}

    monkeypatch.setattr(tfds.builder_cls("cifar10"), "_split_generators", split_generators)
    folder = prepare_tfds.prepare_tfds("cifar10", data_dir)
    assert capfd.readouterr().out == ""
    assert folder == data_dir / "cifar10" / "3.0.2"
    assert list(folder.glob("*.array_record-*"))
    source = open_source("cifar10", str(data_dir))
    assert source.num_examples == {"train": 2, "test": 1}
    with Image.open(io.BytesIO(source.splits["test"][0].image)) as decoded:
        np.testing.assert_array_equal(np.asarray(decoded), image)


def test_prepared_is_not_prepared_again(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    monkeypatch.setattr(prepare_tfds, "has_tensorflow", lambda: False)
    assert prepare_tfds.prepare_tfds("cifar10", data_dir) == data_dir / "cifar10" / "3.0.2"


def test_empty_folder_is_not_taken_for_the_data_set(data_dir, can_download):
    folder = data_dir / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    for prepare in (prepare_tfds.prepare_tfds, lambda name, root: open_source(name, str(root))):
        message = message_of(prepare, "cifar10", data_dir)
        assert message == f"{folder} holds no prepared data set: remove it"


def test_failed_download_is_told(data_dir, monkeypatch, can_download):
    def fail(self, **kwargs):
        raise OSError("Not enough disk space.\nNeeded: 1 GiB")

    monkeypatch.setattr(tfds.builder_cls("cifar10"), "download_and_prepare", fail)
    message = message_of(open_source, "cifar10", str(data_dir))
    assert message == f"cannot prepare cifar10 in {data_dir}: Not enough disk space."


def test_a_version_that_tfds_cannot_make_is_told(data_dir):
    message = message_of(prepare_tfds.prepare_tfds, "cifar10:1.2.3", data_dir)
    assert message.startswith("TFDS cannot make cifar10:1.2.3: ")


def test_files_to_fetch_by_hand_are_told(data_dir, can_download):
    """In the folder in which TFDS looks for them, and both, of which TFDS needs the second."""
    builder = tfds.builder("imagenet2012", data_dir=str(data_dir))
    manager = builder._make_download_manager(None, tfds.download.DownloadConfig())
    manual = Path(manager._manual_dir)
    assert manual == data_dir / "downloads" / "manual"
    files = ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]
    for there in [None, "of another data set", files[0], files[1]]:
        shutil.rmtree(manual, ignore_errors=True)
        if there:
            manual.mkdir(parents=True)
            (manual / there).touch()
        message = message_of(prepare_tfds.prepare_tfds, "imagenet2012", data_dir)
        assert f"fetch its files by hand into {manual} and run this again" in message
        assert all(file in message for file in files)


def test_files_fetched_by_hand_need_no_network(data_dir, monkeypatch, can_download):
    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    for file in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (manual / file).touch()
    probed, prepared = [], []
    monkeypatch.setattr(download, "is_reachable", probed.append)
    monkeypatch.setattr(
        tfds.builder_cls("imagenet2012"),
        "download_and_prepare",
        lambda self, **kwargs: prepared.append(kwargs),
    )
    folder = prepare_tfds.prepare_tfds("imagenet2012", data_dir)
    assert folder == data_dir / "imagenet2012" / "5.1.0"
    assert prepared == [{"file_format": "array_record"}] and not probed
