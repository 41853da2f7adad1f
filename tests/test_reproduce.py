"""Every sweep of the recipes that reproduce is one that `gnp.sweep` would begin."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from gnp.sweeps.parameters import parse_grid
from gnp.sweeps.trials import Recipe, product, resolve

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "reproduce"
NAMES = sorted(path.stem for path in FOLDER.glob("*_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_trial_is_valid_and_counted(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    recipe = importlib.import_module(name)
    assert set(recipe.SCALES) == {"paper", "small"}
    count = {}
    for scale, sweeps in recipe.SCALES.items():
        count[scale] = 0
        assert len({sweep.name for sweep in sweeps}) == len(sweeps)
        for sweep in sweeps:
            file, _, argument = sweep.config.partition(":")
            fields = tuple((field, str(value)) for field, value in sweep.fields.items())
            base = Recipe(str(ROOT / "configs" / file), argument, fields)
            grid = parse_grid([f"{field}={values}" for field, values in sweep.grid.items()])
            trials = product(base, *resolve(base, grid), None)
            count[scale] += len(trials)
            for trial in trials:
                assert (trial.config.epochs > 50) == (scale == "paper"), trial.name
    runs, seeds = re.search(r"(\d+) runs [^(]*\((\w+) seeds?\)", recipe.__doc__).groups()
    assert int(runs) == count["paper"] * (1 if seeds == "one" else int(seeds))


def test_a_dry_run_prints_the_commands(tmp_path):
    command = [sys.executable, str(FOLDER / "gr_table2.py"), f"--out={tmp_path / 'out'}"]
    flags = ["--scale=small", "--seeds=3", "--data_dir=data", "--dry_run", "--config.epochs=2"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sweep, report = done.stdout.splitlines()
    for part in ("--grid=gr=off,none,r,lambda,zero", "--seeds=3", "--config.data.data_dir=data"):
        assert part in sweep
    assert "gnp.report" in report
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command, "--scale=smal"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown scale 'smal'; did you mean 'small'?\n"


@pytest.mark.parametrize(
    ("codes", "called", "code"),
    [
        ({}, ["sweep a", "evaluate done", "sweep b", "report"], 0),
        ({"sweep a": 1}, ["sweep a", "evaluate done", "sweep b", "report"], 1),
        ({"evaluate done": 2}, ["sweep a", "evaluate done", "sweep b", "report"], 1),
        ({"sweep a": 1, "report": 2}, ["sweep a", "evaluate done", "sweep b", "report"], 2),
        ({"sweep a": 2}, ["sweep a"], 2),
        ({"sweep a": 130}, ["sweep a"], 130),
        ({"evaluate done": 130}, ["sweep a", "evaluate done"], 130),
    ],
)
def test_what_fails_stops_nothing_else(codes, called, code, tmp_path, monkeypatch, capsys):
    """One of the first sweep's two trials is complete, and is measured."""
    monkeypatch.syspath_prepend(str(FOLDER))
    reproduction = importlib.import_module("reproduction")
    for name in ("done", "failed"):
        (tmp_path / "a" / "trials" / name).mkdir(parents=True)
    (tmp_path / "a" / "trials" / "done" / "result.json").touch()
    seen = []

    def call(command):
        module = command[2].removeprefix("gnp.")
        place = next((x for x in command if x.startswith(("--out=", "--workdir="))), "")
        seen.append(module if module == "report" else f"{module} {pathlib.Path(place).name}")
        return codes.get(seen[-1], 0)

    monkeypatch.setattr(reproduction, "_call", call)
    monkeypatch.setattr(sys, "argv", ["x.py", f"--out={tmp_path}", "--scale=s"])
    sweeps = [
        reproduction.Sweep("a", "digits.py", measured=9),
        reproduction.Sweep("b", "digits.py"),
    ]
    with pytest.raises(SystemExit) as end:
        reproduction.main("", {"s": sweeps}, seeds=1)
    assert (seen, end.value.code) == (called, code)
    error = capsys.readouterr().err
    if "report" in called:
        assert ("trials of a" in error) == ("sweep a" in codes)
        assert (f"the sharpness of {tmp_path}" in error) == ("evaluate done" in codes)
