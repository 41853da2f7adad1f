"""A real file system that fills up, and a program that writes there.

    with small_disk(kib=256) as disk:
        process = disk.start([sys.executable, "-c", PROGRAM])  # works in the small file system
        disk.fill()
        …
        disk.free()
        process.wait(timeout=60)
        assert (disk.path / "metrics.jsonl").read_text()

The file system is a tmpfs in a mount name space of its own, so nothing outside sees it, root or
not, and it is gone in the end.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
_FILLER = ".filler"


@dataclasses.dataclass(frozen=True)
class Disk:
    """A small file system.

    Attributes:
      path: where this process finds it.
      inside: where the programs of `start` find it, which is also their working directory.
    """

    path: pathlib.Path
    inside: str
    _holder: int

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a command in the file system, with text in pipes; the options are `Popen`'s.

        The process is the command's own, not a shell's, so that a signal reaches it.
        """
        enter = [
            "nsenter",
            f"--target={self._holder}",
            "--user",
            "--mount",
            "--preserve-credentials",
        ]
        here = ["sh", "-c", f'cd "{self.inside}" && exec "$@"', "sh"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        options.setdefault("env", {**os.environ, "PYTHONPATH": str(ROOT)})
        return subprocess.Popen([*enter, *here, *command], text=True, **options)

    def run(self, command: Sequence[str], *, timeout: float = 120, **options: Any) -> str:
        """Runs a command to its end; returns what it wrote, to standard error and then output.

        Raises:
          AssertionError: if it ends with another code than 0.
          subprocess.TimeoutExpired: if it does not end; it is killed then.
        """
        with self.start(command, **options) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            finally:
                process.kill()
        assert process.returncode == 0, errors
        return errors + output

    def python(self, program: str, *, timeout: float = 120) -> str:
        """Runs a Python program given as text; as `run`."""
        return self.run([sys.executable, "-c", program], timeout=timeout)

    def fill(self, *, leave: int = 0) -> None:
        """Fills the file system but for `leave` bytes, rounded down to pages."""
        with open(self.path / _FILLER, "ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            if leave:
                file.truncate(max(file.tell() - leave, 0))

    def free(self) -> None:
        """Takes away what `fill` wrote."""
        (self.path / _FILLER).unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(*, kib: int) -> Iterator[Disk]:
    """Makes a file system of so many KiB; skips the test where the kernel does not allow it."""
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no program {program}")
    with tempfile.TemporaryDirectory(prefix="gnp-disk-") as point:
        mount = f'mount -t tmpfs -o size={kib}k small "{point}" && echo ready && exec cat'
        holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with holder:
            if holder.stdout.readline() != "ready\n":
                pytest.skip(f"no file system of one's own: {holder.stderr.read().strip()}")
            try:
                yield Disk(pathlib.Path(f"/proc/{holder.pid}/root{point}"), point, holder.pid)
            finally:
                # cat ends, and the file system with the last process that works in it.
                holder.stdin.close()
