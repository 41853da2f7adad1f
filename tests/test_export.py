"""Exporting a checkpoint: what is in the file, and mistakes."""

import json
import pathlib
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gnp import config as gnp_config
from gnp import export, models
from gnp.errors import UserError
from gnp.models.pretrained import load_pretrained
from gnp.training import train
from gnp.training.experiment import make_experiment
from gnp.training.state import params_sha256

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {"width": 12, "depth": 2, "num_heads": 2}


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    """A short run of a small model, with checkpoints of steps 10 and 14."""
    config = gnp_config.default()
    config.model.update(FIELDS)
    config.data.batch_size = 100
    config.mesh.data = 1
    config.epochs = 1.0
    config.checkpoint.every = "10st"
    config.ema.decay = 0.5
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config, workdir)


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gnp.export", *map(str, flags)])
    return export.main()


def test_the_average_evaluates_as_the_run_says(run, tmp_path):
    """As the parameters of a model, on the test set."""
    workdir, result = run
    config = gnp_config.from_json((workdir / "config.json").read_text(), where="")
    tensors, metadata, _ = export.export(config, workdir, average=True)
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    variables = load_pretrained(
        "vit_ti", tmp_path / "a.safetensors", image_size=8, channels=1, **FIELDS
    )
    experiment = make_experiment(config)
    data = experiment.load_data()
    batch = data.eval_batches["test"].batch(data.eval_input("test"), 0)
    logits = experiment.model.apply(variables, batch["input"])
    wrong = (logits.argmax(-1) != batch["label"]).sum()
    batch = data.eval_batches["test"].batch(data.eval_input("test"), 1)
    logits = experiment.model.apply(variables, batch["input"])
    wrong += ((logits.argmax(-1) != batch["label"]) * batch["weight"]).sum()
    assert wrong / 360 == pytest.approx(result["test"]["ema_error"])
    assert result["test"]["ema_loss"] != result["test"]["loss"]


def test_a_run_without_an_average_says_so(run, tmp_path):
    workdir, _ = run
    config = gnp_config.from_json((workdir / "config.json").read_text(), where="")
    config.ema.decay = None
    with pytest.raises(UserError, match=r"train with config.ema.decay"):
        export.export(config, workdir, average=True)


def test_the_file_has_the_runs_weights(run, tmp_path, monkeypatch, capsys):
    workdir, result = run
    out = tmp_path / "weights.safetensors"
    out.write_text("an older file")
    assert run_main(monkeypatch, f"--workdir={workdir}", f"--out={out}") == 0
    assert capsys.readouterr().out == (
        f"{out}: vit_ti at step 14 of {workdir}, 32 tensors\n"
        "in timm: timm.create_model('vit_tiny_patch16_224', num_classes=10, in_chans=1, "
        "img_size=8, patch_size=2, embed_dim=12, mlp_ratio=4.0, depth=2, num_heads=2, "
        f"checkpoint_path='{out}')\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    variables = load_pretrained("vit_ti", out, image_size=8, channels=1, **FIELDS)
    assert params_sha256(variables["params"]) == result["params_sha256"]
    with safe_open(out, "numpy") as file:
        assert file.metadata() == {"model": "vit_ti", "step": "14", "image_size": "8"}

    earlier = tmp_path / "earlier.safetensors"
    flags = (f"--workdir={workdir}", f"--out={earlier}", "--step=10")
    assert run_main(monkeypatch, *flags) == 0
    assert "at step 10 of" in capsys.readouterr().out
    before, after = load_file(earlier), load_file(out)
    assert before.keys() == after.keys()
    assert (before["blocks.1.attn.qkv.weight"] != after["blocks.1.attn.qkv.weight"]).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=x.safetensors"], "the following arguments are required: --workdir"),
        (["--workdir=RUN"], "the following arguments are required: --out"),
        (["--workdir=nowhere", "--out=x.safetensors"], "nowhere is not a work directory"),
        (["--workdir=RUN", "--out=x.pth"], "--out=x.pth does not end in .safetensors"),
        (["--workdir=RUN", "--out=no/x.safetensors"], "--out: there is no directory no"),
        (["--workdir=RUN", "--out=x.safetensors", "--step=3"], "no checkpoint of step 3"),
    ],
)
def test_mistakes(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run_main(monkeypatch, *(flag.replace("RUN", str(run[0])) for flag in flags))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(run, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*out\.safetensors: "):
        run_main(monkeypatch, f"--workdir={run[0]}", f"--out={out}")
    assert list(tmp_path.iterdir()) == [out]


def test_a_model_that_timm_does_not_have(tmp_path, monkeypatch):
    config = gnp_config.default()
    config.model.name = "googlenet"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match="timm has no counterpart of model 'googlenet'"):
        run_main(monkeypatch, f"--workdir={tmp_path}", f"--out={tmp_path / 'x.safetensors'}")


def test_a_mistake_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "gnp.export", "--workdir=nowhere", "--out=x.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere is not a work directory: it has no config.json\n"
    done = subprocess.run([*command[:3], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m gnp.export" in done.stdout


@pytest.mark.parametrize(
    ("name", "image_size", "fields", "expected"),
    [
        ("resnet50", 224, {}, "timm.create_model('resnet50', num_classes=10"),
        ("resnet50", 32, {}, None),
        ("resnet50", 224, {"depths": (1, 1, 1, 1)}, None),
        ("resnet50", 32, {"stem": "imagenet"}, "timm.create_model('resnet50', num_classes=10"),
        ("vgg16_bn", 224, {"dropout": 0.1}, "timm.create_model('vgg16_bn', num_classes=10"),
        ("vgg16_bn", 224, {"hidden_size": 10}, None),
        ("densenet121", 224, {}, "timm.create_model('densenet121', num_classes=10"),
        ("densenet121", 224, {"growth_rate": 16}, None),
        (
            "vit_b",
            224,
            {"pool": "mean"},
            "timm.create_model('vit_base_patch16_224', num_classes=10, img_size=224, "
            "patch_size=16, embed_dim=768, mlp_ratio=4.0, depth=12, num_heads=12, "
            "class_token=False, global_pool='avg', fc_norm=False",
        ),
        (
            "swin_t",
            32,
            {},
            "timm.create_model('swin_tiny_patch4_window7_224', num_classes=10, img_size=32, "
            "patch_size=2, embed_dim=96, mlp_ratio=4.0, window_size=4, depths=(2, 2, 6, 2), "
            "num_heads=(3, 6, 12, 24)",
        ),
        (
            "cait_xs12",
            224,
            {"class_depth": 3},
            "timm.create_model('cait_xs24_384', num_classes=10, img_size=224, patch_size=16, "
            "embed_dim=288, mlp_ratio=4.0, depth=12, num_heads=6, depth_token_only=3, "
            "mlp_ratio_token_only=4.0",
        ),
    ],
)
def test_the_call_that_makes_the_model_in_timm(name, image_size, fields, expected):
    """`tests/parity` calls them."""
    model = models.create(name, 10, image_size=image_size, **fields)
    assert export.timm_call(name, model, image_size) == expected
