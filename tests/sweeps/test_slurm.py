"""The array job: what its tasks run, with stand-ins for srun, scontrol and Python."""

import os
import subprocess

import pytest

from gnp.sweeps import slurm
from gnp.sweeps.trials import Recipe, product, resolve
from tests.sweeps.conftest import ROOT


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes a program first on the PATH that writes its arguments to a file, and returns that."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, more=""):
        path, arguments = folder / name, tmp_path / f"{name}.txt"
        path.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > '{arguments}'\n{more}\n")
        path.chmod(0o755)
        return arguments

    return make


def recorded(path):
    return path.read_text().split("\0")[:-1]


@pytest.mark.parametrize("code", [0, 75, 1])
def test_each_task_trains_its_trial(tmp_path, monkeypatch, programs, code):
    out = tmp_path / "it's a 50% $HOME"
    (out / "logs").mkdir(parents=True)
    recipe = Recipe.parse(str(ROOT / "configs/digits.py"), [("data.data_dir", "a 'b' $(id)\\ ;")])
    values, arguments = resolve(recipe, {"gr": ["off", "zero"], "lr.drops": ["50%,75%"]})
    trials = product(recipe, values, arguments, (0, 1))
    monkeypatch.chdir(ROOT)
    script = slurm.write(out, trials, slurm.parse(""), at_once=2)
    srun = programs("srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    python = programs("python", f"echo said; pwd; exit {code}")
    scontrol = programs("scontrol")
    monkeypatch.setenv("PYTHON", "python")
    for name, value in (("ARRAY_TASK_ID", "2"), ("ARRAY_JOB_ID", "77"), ("CPUS_PER_TASK", "6")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    trial = trials[2]
    workdir = out / "trials" / trial.name
    assert recorded(python) == ["-m", "gnp.train", *trial.flags, f"--workdir={workdir}"]
    assert recorded(srun)[0] == "--cpus-per-task=6"
    assert (out / "logs" / f"{trial.name}.log").read_text() == f"said\n{ROOT}\n"
    assert scontrol.exists() == (code == 75)  # "start me again"
    if scontrol.exists():
        assert recorded(scontrol) == ["requeue", "77_2"]


def options_of(script):
    """SLURM stops to read options at the first line that is no comment."""
    comments = script.read_text().partition("\nset -euo")[0].splitlines()
    assert all(line.startswith("#") for line in comments)
    lines = [line.removeprefix("#SBATCH ") for line in comments if line.startswith("#SBATCH ")]
    return dict(line.partition("=")[::2] for line in lines)


def test_from_the_flags_only_what_is_not_done_and_nothing_submitted(run, capsys, programs):
    sbatch = programs("sbatch")
    assert run("--grid", "gr=off", "--config.epochs=1") == 0
    capsys.readouterr()
    flags = ["--grid", "gr=off,zero", "--seeds=2", "--config.epochs=1", "--launcher=slurm"]
    assert run(*flags, "--sbatch=--partition=gpu --time=4:00:00 --exclusive", "--jobs=2") == 0
    script = run.out / "array.sbatch"
    assert (
        capsys.readouterr().out == f"an array job of 3 trials; to submit it:\n  sbatch {script}\n"
    )
    assert not sbatch.exists()
    options = options_of(script)
    assert options["--array"] == "0-2%2" and options["--signal"] == "TERM@120"
    assert (options["--partition"], options["--time"], options["--exclusive"]) == (
        *("gpu", "4:00:00", ""),
    )
    assert "--requeue" in options and options["--gpus-per-node"] == "1"
    lines = (run.out / "trials.txt").read_text().splitlines()
    assert [line.partition(".log ")[0].rpartition("/")[2] for line in lines] == [
        *("gr=off,seed=1", "gr=zero,seed=0", "gr=zero,seed=1"),
    ]
    for seed in (0, 1):
        result = run.out / "trials" / f"gr=zero,seed={seed}" / "result.json"
        result.parent.mkdir()
        result.write_text('{"test": {}}')
    assert run("--grid", "gr=r,off", *flags[2:]) == 0
    assert (run.out / "trials.txt").read_text().splitlines()[:3] == lines
    assert options_of(script)["--array"] == "0,3-4"  # gr=off,seed=1, and two that are new
    capsys.readouterr()
    assert run("--grid", "gr=off", "--config.epochs=1", "--launcher=slurm") == 0
    assert capsys.readouterr().out == "all trials are done\n"
