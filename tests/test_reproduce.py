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
