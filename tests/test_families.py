"""An epoch of a narrow version of every family of models, by `python -m gnp.train`."""

import json
import pathlib
import sys

import numpy as np
import pytest

from gnp import models
from gnp import train as command
from tests.data.cifar_like import write_cifar, write_imagenet

ROOT = pathlib.Path(__file__).parents[1]

# file of gnp/models → config and its argument, flags
FAMILIES = {
    "vit": ("cifar_vit.py:scale=small,gr=zero", ["width=12", "num_heads=2", "depth=2"]),
    "swin": ("cifar_swin.py:scale=small,gr=zero", ["width=8", "num_heads=2", "scan=true"]),
    "cait": ("cifar_cait.py:scale=small,gr=zero", ["width=8", "num_heads=2", "remat=full"]),
    "resnet": ("cifar_cnn.py:scale=small,model=resnet18,gr=none", ["width=4", "depths=1,1"]),
    "vgg": ("cifar_cnn.py:scale=small,model=vgg16_bn", ["width=4", "batch_norm_groups=4"]),
    "densenet": ("cifar_cnn.py:scale=small,model=densenet121,decay=l2", ["depths=1,2"]),
    "googlenet": ("cifar_cnn.py:scale=small,model=googlenet,optimizer=sgd", ["width=2"]),
    "lstm": ("ptb_lstm.py:scale=small,gr=zero", ["embedding_size=8", "hidden_size=8"]),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cifar(folder, 64, 24)
    rng = np.random.default_rng(0)
    for split, lines in (("train", 60), ("valid", 9), ("test", 9)):
        words = rng.choice(list("abcdefgh"), (lines, 12))
        (folder / f"ptb.{split}.txt").write_text("".join(" ".join(w) + "\n" for w in words))
    return folder


def test_every_family_is_here():
    assert set(FAMILIES) == {info.file for info in models.list_models().values()}


@pytest.mark.parametrize(
    "family",
    # By how long they take to compile.
    [
        *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "googlenet"),
        pytest.param("googlenet", marks=pytest.mark.soak),
    ],
)
def test_an_epoch(family, data_dir, tmp_path, monkeypatch, capsys):
    config, sizes = FAMILIES[family]
    batch = ["--config.data.batch_size=4", "--config.data.sequence_length=5"]
    if family != "lstm":
        batch = ["--config.data.batch_size=32"]
    flags = [
        f"--config={ROOT}/configs/{config}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={data_dir}",
        "--config.epochs=1",
        "--config.mesh.data=4",
        "--config.log.every=50%",
        *batch,
        *(f"--config.model.{size}" for size in sizes),
    ]
    if any(policy in config for policy in ("zero", "none")):
        flags.append("--config.lr.warmup=50%")
    monkeypatch.setattr(sys, "argv", ["gnp.train", *flags])
    assert command.main() == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    metric = "perplexity" if family == "lstm" else "error"
    assert np.isfinite([result[split][metric] for split in ("train", "test")]).all()
    assert np.isfinite([result["train"][key] for key in ("loss", "grad_norm")]).all()
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Test {metric}" in page
    assert f"test {metric}" in capsys.readouterr().out
    if family == "lstm":
        assert result["validation"]["perplexity"] > 1 and "Validation perplexity" in page
        # 60 lines of 12 words and their ends, 4 streams of 5 words a step
        assert result["steps"] == 60 * 13 // 20


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        pytest.param(
            "imagenet_resnet.py:model=resnet18",
            ["width=4", "depths=1,1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "imagenet_swin.py:gr=off",
            ["width=8", "depths=2", "num_heads=2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_imagenet_in_its_format(config, sizes, tmp_path, monkeypatch):
    """Images of several sizes, cropped at random to 28 pixels."""
    images = [(40, 60), (70, 35)] * 8
    write_imagenet(tmp_path, {"train": images, "validation": images[:4]})
    flags = [
        f"--config={ROOT}/configs/{config}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={tmp_path}",
        *("--config.data.image_size=28", "--config.data.batch_size=8", "--config.epochs=1"),
        *("--config.lr.warmup=0st", "--config.mesh.data=2"),
        *(f"--config.model.{size}" for size in sizes),
    ]
    if "swin" in config:
        flags += ["--config.model.patch_size=4", "--config.model.window_size=7"]
    monkeypatch.setattr(sys, "argv", ["gnp.train", *flags])
    assert command.main() == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2 and np.isfinite(result["test"]["loss"])
