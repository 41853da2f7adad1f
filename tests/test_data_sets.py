"""`python -m gnp.train` on a small data set in each form on disk, kept and streamed."""

import json
import pathlib
import signal
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from gnp import config as gnp_config
from gnp import train as command
from gnp.data import open_source, preview
from gnp.data.order import example_at
from gnp.errors import UserError
from gnp.training import Interrupted, train
from gnp.training.evaluation import evaluate_checkpoint
from gnp.training.metrics import Progress
from tests.data.cifar_like import as_tfrecord, write_cifar

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["width=8", "depth=1", "num_heads=2"]


def write_image(path, label, rng, *, size=None):
    """An image whose class is in its colour; of any size; some are grey, some PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size or rng.integers(40, 90, 2)
    colour = np.eye(3)[label] * 150 + rng.integers(0, 60, (height, width, 3))
    image = Image.fromarray(colour.astype(np.uint8))
    image.convert("L" if rng.random() < 0.1 else "RGB").save(path)


def write_folder(root, *, sizes=(24, 8), size=None):
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val"), sizes, strict=True):
        for i in range(count):
            suffix = "png" if i % 5 == 0 else "JPEG"
            write_image(root / split / f"n0{i % 3}" / f"{i}.{suffix}", i % 3, rng, size=size)
    return root


def write_tiny_imagenet(root):
    rng = np.random.default_rng(0)
    lines = []
    for label, wnid in enumerate(["n01", "n02", "n03"]):
        for i in range(8):
            path = root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            write_image(path, label, rng, size=(64, 64))
        name = f"val_{label}.JPEG"
        write_image(root / "val" / "images" / name, label, rng, size=(64, 64))
        lines.append(f"{name}\t{wnid}\t0\t0\t62\t57\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("n02\nn01\nn03\n")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    images = (np.eye(3)[labels] * 150)[:, None, None] + rng.integers(0, 60, (30, 12, 12, 3))
    np.savez(root / "images.npz", images=images.astype(np.uint8), labels=labels)
    write_cifar(root / "tfrecord", 24, 9)
    as_tfrecord(root / "tfrecord" / "cifar10" / "3.0.2")
    write_tiny_imagenet(root / "tiny")
    write_folder(root / "folder")
    return root


def flags(config, workdir, *fields):
    return [
        "gnp.train",
        f"--config={ROOT}/configs/{config}",
        f"--workdir={workdir}",
        *("--config.epochs=2", "--config.data.batch_size=8", "--config.mesh.data=1"),
        *("--config.log.every=1ep", "--config.lr.warmup=50%", "--config.dtype=float32"),
        *(f"--config.model.{size}" for size in SMALL),
        *(f"--config.{field}" for field in fields),
    ]


CASES = {
    "npz": (
        "folder.py:gr=off",
        *("data.name=npz", "data.data_dir=DATA/images.npz", "data.image_size=12"),
        *("data.train=train[:80%]", "data.validation=train[80%:90%]", "data.test=train[90%:]"),
        "model.patch_size=6",
    ),
    "tfrecord": ("cifar_vit.py:scale=small", "data.data_dir=DATA/tfrecord"),
    "tiny imagenet": ("tiny_imagenet_vit.py:scale=small,augment=heavy", "data.data_dir=DATA/tiny"),
    "imagenet, streamed": (
        "imagenet_vit.py:scale=small,augment=heavy",
        *("data.data_dir=DATA/folder", "data.resident=false", "data.workers=2"),
        "data.image_size=32",
    ),
    "folder, kept": ("folder.py", "data.data_dir=DATA/folder", "data.image_size=32"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "npz" else pytest.mark.slow) for case in CASES],
)
def test_trains(case, data, tmp_path, monkeypatch, capsys):
    config, *fields = (text.replace("DATA", str(data)) for text in CASES[case])
    monkeypatch.setattr(sys, "argv", flags(config, tmp_path / "run", *fields))
    assert command.main() == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    values = [result[split][key] for split in ("train", "test") for key in ("loss", "error")]
    assert np.isfinite(values).all()
    assert ("data_wait" in result["train"]) == ("streamed" in case)
    assert ("validation" in result) == (case == "npz")
    assert "Test error" in (tmp_path / "run" / "report.html").read_text()
    streamed = "streamed by 2 workers" in capsys.readouterr().err
    assert streamed == ("streamed" in case)


@pytest.mark.parametrize("case", ["tiny imagenet", "npz"])
def test_preview_draws_what_the_step_sees(case, data, tmp_path, monkeypatch, capsys):
    config, *fields = (text.replace("DATA", str(data)) for text in CASES[case])
    out = tmp_path / "preview.png"
    arguments = [f"--out={out}", "--rows=2", "--columns=3", "--step=1"]
    settings = [flag for flag in flags(config, "x", *fields) if not flag.startswith("--workdir")]
    monkeypatch.setattr(sys, "argv", [*settings, *arguments])
    assert preview.main() == 0
    image = np.asarray(Image.open(out))
    assert image.shape[1] == 1.5 * 3 * 120
    assert image[..., :3].std() > 10
    assert "step 1: 6 of 8 images of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--step=9"], "--step is 9; the run has the steps 0 to 5"),
        (["--rows=0"], "--rows is 0; it must be from 1 to 50"),
        (["--out=x.nonsense"], "cannot write x.nonsense: "),
        (["--cofnig.seed=1"], "unknown flag '--cofnig.seed'"),
    ],
)
def test_preview_says_what_is_wrong(more, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, *fields = (text.replace("DATA", str(data)) for text in CASES["npz"])
    settings = [flag for flag in flags(config, "x", *fields) if not flag.startswith("--workdir")]
    monkeypatch.setattr(sys, "argv", [*settings, "--out=x.png", *more])
    with pytest.raises(UserError) as error:
        preview.main()
    assert message in str(error.value)


def streamed(folder, **fields):
    config = gnp_config.default()
    config.model.update({"width": 8, "depth": 1, "num_heads": 2, "patch_size": 8})
    config.data.update(
        {
            "name": "folder",
            "data_dir": str(folder),
            "image_size": 16,
            "batch_size": 8,
            "resident": "false",
            "workers": 1,
            "augment": "random_resized_crop,flip,mixup",
        }
    )
    config.epochs = 4.0  # of 24 examples: 12 steps
    config.log.every = "2st"
    config.checkpoint.every = "5st"
    config.mesh.data = 1
    for field, text in fields.items():
        gnp_config.override(config, field.replace("__", "."), str(text))
    return config


@pytest.mark.slow
def test_a_streamed_run_that_was_stopped_ends_as_one_that_was_not(data, tmp_path, monkeypatch):
    """With another number of workers before and after, down to the bits."""
    whole = train(streamed(data / "folder"), tmp_path / "whole")
    show = Progress.show

    def stop(self, step, rows):
        show(self, step, rows)
        if step == 6:
            signal.raise_signal(signal.SIGINT)

    config = streamed(data / "folder")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", stop)
        with pytest.raises(Interrupted) as interrupted:
            train(config, tmp_path / "parts")
    assert 6 <= interrupted.value.step < 12
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]
    parts = train(config, tmp_path / "parts")
    assert parts["params_sha256"] == whole["params_sha256"]
    other = train(streamed(data / "folder", data__workers=0), tmp_path / "threads")
    assert other["params_sha256"] == whole["params_sha256"]
    values = evaluate_checkpoint(config, tmp_path / "whole")
    assert values["test"]["error"] == pytest.approx(whole["test"]["error"])
    assert values["test"]["num_examples"] == 8
    assert values["train"]["num_examples"] == 24


@pytest.mark.parametrize(
    "split",
    [pytest.param("train", marks=pytest.mark.slow), pytest.param("val", marks=pytest.mark.soak)],
)
def test_a_damaged_file_stops_the_run_and_nothing_is_lost(split, tmp_path):
    """It is named, what was learned is saved, and the run goes on when the file is mended.

    The training file is read for the first time just after an evaluation, and saved nowhere else.
    """
    root = write_folder(tmp_path / "data")
    fields = {"data__mean": "0.5,0.5,0.5", "data__std": "0.2,0.2,0.2", "checkpoint__every": "5ep"}
    config = streamed(root, **fields)
    file = sorted((root / split).rglob("*.*"))[0]
    if split == "train":  # the example of the last place of the first epoch
        records = open_source("folder", str(root), image_size=16).splits["train"]
        last = int(example_at(config.seed, np.array([23]), 24)[0])
        file = pathlib.Path(records[last].name)
        config.eval.every = "2st"
    content = file.read_bytes()
    file.write_bytes(content[:300])
    with pytest.raises(UserError) as error:
        train(config, tmp_path / "run")
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "config.data.on_damaged=skip" in str(error.value)
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [{"train": 2, "val": 3}[split]]
    file.write_bytes(content)
    result = train(config, tmp_path / "run")
    assert result["params_sha256"] == train(config, tmp_path / "whole")["params_sha256"]


@pytest.mark.slow
def test_what_may_change_when_a_run_is_continued(data, tmp_path):
    """The number of workers and what damage does, but not the data."""
    root = write_folder(tmp_path / "data")
    file = root / "train" / "n01" / "7.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    config = streamed(root, data__mean="0.5,0.5,0.5", data__std="0.2,0.2,0.2")
    with pytest.raises(UserError, match="on_damaged=skip"):
        train(config, tmp_path / "run")
    config.data.update({"on_damaged": "skip", "workers": 0})
    assert train(config, tmp_path / "run")["steps"] == 12
    (tmp_path / "run" / "result.json").unlink()
    file.unlink()
    with pytest.raises(UserError, match="holds a run on other data"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_damaged_file_is_left_out(tmp_path, caplog):
    root = write_folder(tmp_path / "data")
    (root / "train" / "n01" / "7.JPEG").write_bytes(b"no image")
    (root / "val" / "n00" / "3.JPEG").write_bytes(b"")
    results = [
        train(
            streamed(root, data__on_damaged="skip", data__resident=kept), tmp_path / f"run-{kept}"
        )
        for kept in ("true", "false")
    ]
    assert all(np.isfinite(result["test"]["loss"]) for result in results)
    messages = "\n".join(record.getMessage() for record in caplog.records)
    for file in ("train/n01/7.JPEG is damaged: it is no image that", "val/n00/3.JPEG is damaged"):
        assert messages.count(file) == 2
    for kept in ("true", "false"):
        values = evaluate_checkpoint(
            streamed(root, data__on_damaged="skip", data__resident=kept), tmp_path / f"run-{kept}"
        )
        assert (values["train"]["num_examples"], values["test"]["num_examples"]) == (23, 7)


@pytest.mark.slow
def test_kept_and_streamed_agree_without_augmentation(tmp_path):
    """The same evaluation of the same parameters, when normalised alike."""
    root = write_folder(tmp_path / "data")
    fields = {"data__augment": "none", "data__mean": "0.5,0.5,0.5", "data__std": "0.2,0.2,0.2"}
    config = streamed(root, **fields)
    train(config, tmp_path / "run")
    (a, b) = (
        evaluate_checkpoint(streamed(root, **fields, data__resident=kept), tmp_path / "run")
        for kept in ("true", "false")
    )
    for split in ("train", "test"):
        for metric in ("loss", "error", "grad_norm", "num_examples"):
            assert a[split][metric] == pytest.approx(b[split][metric], rel=1e-5)


def test_a_folder_without_a_test_set_says_how_to_set_one_apart(tmp_path):
    root = write_folder(tmp_path / "data", sizes=(12, 0))
    with pytest.raises(UserError) as error:
        train(streamed(root), tmp_path / "run")
    message = str(error.value)
    assert "--config.data.train=train[:90%] --config.data.test=train[90%:]" in message
    assert not (tmp_path / "run").exists()
    result = train(
        streamed(root, data__train="train[:67%]", data__test="train[67%:]", epochs=2),
        tmp_path / "run",
    )
    assert result["steps"] == 2


def test_what_is_missing_is_told(data, tmp_path, caplog):
    config = streamed(data / "folder", data__train="train[:1]", data__batch_size=1, epochs=2)
    train(config, tmp_path / "run")
    assert any(
        "the split train has no image of 2 of the 3 classes (n0" in record.getMessage()
        for record in caplog.records
    )
    with pytest.raises(UserError, match=r"batch_size is 8, but folder has only 1 train"):
        train(streamed(data / "folder", data__train="train[:1]"), tmp_path / "other")
    with pytest.raises(UserError, match=r"data.mean has 1 values, but the images have 3"):
        train(streamed(data / "folder", data__mean="0.5"), tmp_path / "third")


def test_what_does_not_fit_is_streamed_or_refused(data, tmp_path, monkeypatch, capsys):
    from gnp.data import loading

    monkeypatch.setattr(loading, "device_memory", lambda mesh: 20_000)
    with pytest.raises(UserError, match=r"resident is true, but folder is too large to be kept"):
        train(streamed(data / "folder", data__resident="true"), tmp_path / "kept")
    train(streamed(data / "folder", data__resident="auto", epochs=1), tmp_path / "auto")
    assert "streamed by 1 worker " in capsys.readouterr().err
