"""Sweeps in the test's process, whose trials are stand-ins."""

import json
import pathlib
import sys

import pytest

from gnp import sweep

ROOT = pathlib.Path(__file__).parents[2]
STAND_IN = pathlib.Path(__file__).with_name("stand_in.py")


class Sweep:
    """Sweeps of configs/digits.py in one directory, with a stand-in for gnp.train."""

    def __init__(self, out, monkeypatch):
        self.out, self._monkeypatch = out, monkeypatch

    def __call__(self, *flags, config="configs/digits.py"):
        """Its exit code."""
        command = ["gnp.sweep", f"--config={config}", f"--out={self.out}", *flags]
        self._monkeypatch.setattr(sys, "argv", command)
        return sweep.main()

    def starts(self, name):
        """What each start of a trial found."""
        path = self.out / "trials" / name / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def trials(self):
        """The names of the trials that have a work directory."""
        return sorted(path.name for path in (self.out / "trials").iterdir())

    @property
    def asked(self):
        return json.loads((self.out / "sweep.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("gnp.sweep.environment.set_up", lambda: None)
    return Sweep(tmp_path / "sweep", monkeypatch)
