"""Runs of `python -m gnp.train` in processes of their own, and what they leave."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

from tests.small_disk import Disk

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = "configs/digits.py"
TINY = [
    *("--config.model.width=12", "--config.model.depth=1", "--config.model.num_heads=2"),
    *("--config.data.batch_size=100", "--config.mesh.data=1", "--config.log.every=5st"),
]
_PATIENCE = 300.0  # seconds after which a run hangs


def command(module, *flags):
    return [sys.executable, "-m", f"gnp.{module}", *map(str, flags)]


def run(module, *flags):
    return subprocess.run(
        command(module, *flags), cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE
    )


def train(workdir, *flags, config=DIGITS):
    return run("train", f"--config={config}", f"--workdir={workdir}", *flags)


class Training:
    """A run under way.

    Attributes:
      workdir: its work directory.
      process: its `Popen`.
    """

    def __init__(self, workdir: pathlib.Path, process: subprocess.Popen, log: pathlib.Path):
        self.workdir, self.process, self._log = workdir, process, log
        self._said: str | None = None

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        return self._log.read_text() if self._said is None else self._said

    def end(self) -> None:
        """Kills what is left of it."""
        self.process.kill()
        self.process.wait()
        self._said = self._log.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(_PATIENCE)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Returns when the condition holds, which is asked all the time."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}: {self.stderr}"
            assert time.monotonic() < deadline, f"it did not come to {what}: {self.stderr}"
            time.sleep(0.001)

    def wait_for_rows(self, count: int) -> None:
        self.wait_until(lambda: num_rows(self.workdir) >= count, f"{count} rows")

    def wait_for_line(self, text: str) -> None:
        self.wait_until(lambda: text in self.stderr, f"saying {text!r}")

    def wait_for_a_save(self) -> None:
        """Returns in the middle of a save, or very soon after it."""
        self.wait_until(lambda: bool(saves_under_way(self.workdir)), "a save")


@contextlib.contextmanager
def training(
    workdir: pathlib.Path, *flags: str, disk: Disk | None = None, env: Mapping[str, str] = {}
) -> Iterator[Training]:
    """Starts a run; what is left of it in the end is killed.

    Args:
      workdir: its work directory.
      *flags: beside --config and --workdir.
      disk: the file system that `workdir` is in, if it is a small one.
      env: variables that it has beside this process's.
    """
    where, start = workdir, subprocess.Popen
    if disk is not None:
        where, start = pathlib.Path(disk.inside) / workdir.relative_to(disk.path), disk.start
    arguments = command("train", f"--config={ROOT / DIGITS}", f"--workdir={where}", *flags)
    with tempfile.NamedTemporaryFile(prefix="gnp-log-") as log:
        process = start(
            arguments,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        )
        running = Training(workdir, process, pathlib.Path(log.name))
        try:
            yield running
        finally:
            running.end()


def rows_of(workdir):
    """The rows of metrics whose lines are complete."""
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def num_rows(workdir):
    return len(rows_of(workdir))


def saves_under_way(workdir):
    return [name for name in _checkpoints(workdir) if ".orbax-checkpoint-tmp" in name]


def saved_steps(workdir):
    return sorted(int(name) for name in _checkpoints(workdir) if name.isdecimal())


def _checkpoints(workdir):
    try:
        return os.listdir(workdir / "checkpoints")
    except FileNotFoundError:
        return []


def comparable(workdir):
    """All that a run leaves, without times."""
    rows = rows_of(workdir)
    for row in rows:
        del row["wall_time"]
        row.pop("images_per_second", None)
    return rows, json.loads((workdir / "result.json").read_text())["params_sha256"]
