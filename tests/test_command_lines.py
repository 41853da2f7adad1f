"""The command lines in processes of their own: help, mistakes, a whole run, progress."""

import json
import os
import struct
import subprocess

import pytest

from tests.data.cifar_like import write_cifar
from tests.runs import ROOT, TINY, command, run, train


@pytest.mark.parametrize("module", ["train", "evaluate", "export", "report", "sweep"])
def test_help(module):
    done = run(module, "--help")
    assert done.returncode == 0
    assert f"python -m gnp.{module}" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.gr.polcy=zero"], "did you mean 'config.gr.policy'?"),
        (["--config.gr.policy=zreo"], "unknown config.gr.policy 'zreo'; did you mean 'zero'?"),
        (["--config.lr.warmup=50000st"], "50000 steps, but the run has only 3592"),
        (["--config.gr.radius=-1"], "config.gr.radius is -1.0; it must be 0 or more"),
        (["--config.gr.radius"], "--config.gr.radius has no value; write --config.gr.radius=VALUE"),
        (["--confg.gr.radius=1"], "unknown flag '--confg.gr.radius'"),
        (["--workdr=x"], "unknown flag '--workdr'; did you mean '--workdir'?"),
        (["--config.lr.warmup=10"], "'10' is no duration"),
        (
            ["--config.data.batch_size=1440"],
            "batch_size is 1440, but digits has only 1437 training images",
        ),
        (["--config.model.name=vit_tt"], "did you mean 'vit_ti'?"),
        (["--config.data.name=cifar100", "--config.data.data_dir=nowhere"], "cifar100 is not in"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, flags, message):
    done = train(tmp_path / "run", *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("train", [], "the following arguments are required: --config, --workdir"),
        ("train", ["--config=configs/digit.py", "--workdir=x"], "did you mean 'configs/digits.py'"),
        ("evaluate", [], "the following arguments are required: --workdir"),
        ("evaluate", ["--workdir=nowhere"], "nowhere is not a work directory"),
        ("report", ["nowhere"], "nowhere"),
        ("evaluate", ["--workdr=x"], "unknown flag '--workdr'; did you mean '--workdir'?"),
        ("sweep", [], "the following arguments are required: --config, --out"),
        ("sweep", ["--confg=a", "--out=x"], "unknown flag '--confg'; did you mean '--config'?"),
        ("sweep", ["--config=configs/digit.py", "--out=x", "--seeds=2"], "'configs/digits.py'?"),
    ],
)
def test_other_mistakes(module, flags, message):
    done = run(module, *flags)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_train_on_cifar_evaluate_and_report(tmp_path):
    """From an ArrayRecord data set on disk to the report, and again."""
    write_cifar(tmp_path / "data", 120, 41)
    flags = [
        *(f"--config.data.data_dir={tmp_path / 'data'}", "--config.epochs=2", *TINY),
        *("--config.data.batch_size=40", "--config.lr.warmup=1ep", "--config.gr.policy=r"),
    ]
    workdir = tmp_path / "run"
    done = train(workdir, *flags, config="configs/cifar_vit.py:scale=small")
    assert done.returncode == 0, done.stderr
    assert "120 train, 41 test images" in done.stderr
    assert "test error" in done.stdout
    page = (workdir / "report.html").read_text()
    assert "configs/cifar_vit.py:scale=small" in page and "<svg" in page

    done = run("evaluate", f"--workdir={workdir}", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    result = json.loads((workdir / "result.json").read_text())
    assert values["test"]["error"] == result["test"]["error"]
    assert values["test"]["num_examples"] == 41

    (workdir / "report.html").unlink()
    assert run("report", workdir).returncode == 0
    assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_a_finished_run_answers_at_once(tmp_path):
    flags = [*TINY, "--config.epochs=1"]
    first, second = train(tmp_path, *flags), train(tmp_path, *flags)
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    assert "step" not in second.stderr
    refused = train(tmp_path, *flags, "--config.seed=1")
    assert refused.returncode == 2
    assert "config.seed: 0 there, 1 here" in refused.stderr


@pytest.mark.slow
def test_progress_is_a_bar_on_a_terminal(tmp_path):
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    primary, secondary = os.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    flags = [f"--workdir={tmp_path}", *TINY, "--config.epochs=1"]
    process = subprocess.Popen(
        command("train", "--config=configs/digits.py", *flags),
        cwd=ROOT,
        stderr=secondary,
        stdout=subprocess.DEVNULL,
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            part = os.read(primary, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(60) == 0
    assert b"14/14" in shown and b"test error" in shown


@pytest.mark.slow
def test_evaluating_a_run_that_diverged(tmp_path):
    flags = [*TINY, "--config.epochs=1", "--config.optimizer.name=sgd", "--config.lr.base=1e30"]
    done = train(tmp_path, *flags)
    assert done.returncode == 2 and "loss or a gradient is not finite" in done.stderr, done.stderr
    done = run("evaluate", f"--workdir={tmp_path}")
    assert done.returncode == 0 and "gradient norm not finite" in done.stdout, done.stderr
    done = run("evaluate", f"--workdir={tmp_path}", "--json")
    assert json.loads(done.stdout)["test"]["grad_norm"] is None


def test_evaluating_a_run_that_has_no_checkpoint(tmp_path):
    from gnp import config

    (tmp_path / "config.json").write_text(json.dumps(config.default().to_dict()))
    done = run("evaluate", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "no checkpoint in" in done.stderr and done.stderr.count("\n") == 1, done.stderr
