"""A run repeated in a work directory of its own, and where it first differs from the original."""

import itertools
import json
import sys
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from gnp import config as gnp_config
from gnp.errors import UserError
from gnp.files import is_remote, write_atomically
from gnp.training import provenance
from gnp.training.metrics import MetricsWriter, Row
from gnp.training.processes import errors_shared, is_main

Key = tuple[int, str]  # a row's step and split

# Fields that say where a run's data, devices and checkpoints are. Of these only the mesh changes
# numbers, in the order of their sums.
_FREE_FIELDS = ("data.data_dir", "data.workers")
_FREE_GROUPS = ("mesh.", "checkpoint.")
_ERRORS = ("error", "loss", "perplexity")


class Ended(Exception):  # noqa: N818, it is no error
    """All that an unfinished run has logged has been compared."""


def load_config(original: epath.Path, overrides: Iterable[tuple[str, str]]) -> ConfigDict:
    """The configuration of a run that is to be repeated.

    Args:
      original: its work directory.
      overrides: pairs of a field's path and its value as text.

    Raises:
      UserError: if the directory holds no run, or an override may change the results.
    """
    path = original / "config.json"
    if not path.exists():
        raise UserError(f"{original} is not the work directory of a run: it has no config.json")
    config = gnp_config.from_json(path.read_text(), where=str(path))
    for field, text in overrides:
        if field not in _FREE_FIELDS and not field.startswith(_FREE_GROUPS):
            raise UserError(
                f"--config.{field} cannot be set in a replay, which has the configuration of "
                f"{original}; only config.data.data_dir, config.data.workers, config.mesh.* and "
                "config.checkpoint.* can"
            )
        gnp_config.override(config, field, text)
    return config


class Replay:
    """Compares a run with the original that it repeats, row by row as it logs them.

    Args:
      original: the work directory of the run to compare with, finished or not.
      workdir: that of the repetition.
      ends_early: whether `on_row` may end the repetition of an unfinished run.

    Raises:
      UserError: if the original has logged nothing, or its files are damaged.
    """

    def __init__(self, original: epath.Path, workdir: epath.Path, *, ends_early: bool = True):
        self._original, self._workdir = original, workdir
        self._there = _read_rows(original)
        if not self._there:
            raise UserError(
                f"{original} has no rows in metrics.jsonl that a replay could be compared with"
            )
        self._last_step = max(step for step, _ in self._there)
        self._result = _read_result(original)
        self._ends_early = ends_early and self._result is None
        self._here: dict[Key, Row] = {}
        self._told = False

    def claim(self) -> None:
        """Makes the work directory this replay's, and compares the rows that it has already.

        Raises:
          UserError: if it holds another run.
        """
        path = self._workdir / "replay.json"
        of = _place(self._original)
        if _place(self._workdir) == of:
            raise UserError(f"--workdir {self._workdir} is the run that --replay would repeat")
        if path.exists():
            there = _read_object(path).get("of")
            if there != of:
                raise UserError(
                    f"{self._workdir} holds a replay of {there}; choose another --workdir"
                )
        elif (self._workdir / "config.json").exists():
            raise UserError(
                f"{self._workdir} holds a run that is no replay; choose another --workdir"
            )
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"of": of}) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write the work directory {self._workdir}: {error.strerror}"
            ) from None
        for row in _read_rows(self._workdir).values():
            self._compare(row)

    def on_row(self, row: Row) -> None:
        """Compares a row of the repetition, and tells the first difference at once.

        Raises:
          Ended: when an unfinished original has no more rows.
        """
        self._compare(row)
        if self._ends_early and (
            row["step"] > self._last_step or self._there.keys() <= self._here.keys()
        ):
            raise Ended

    def continuations(self) -> list[str]:
        """A line for each time that the original was continued in another environment."""
        starts = provenance.starts(self._original)
        lines = []
        for before, after in itertools.pairwise(starts):
            changed = provenance.differences(before, after, ("before", "after"))
            if changed:
                lines.append(
                    f"{self._original} was continued at step {after['step']} in another "
                    f"environment: {'; '.join(changed)}"
                )
        return lines

    def verdict(self, result: dict[str, Any] | None) -> tuple[bool, list[str]]:
        """Whether the repetition is identical to the original, and the lines that say so.

        Args:
          result: what `train` returned; None if it was ended by `Ended`.
        """
        first = next(iter(self._differing()), None)
        finished = self._result is not None and result is not None
        sha256 = [x["params_sha256"] for x in (self._result, result) if finished and x]
        same_params = len(set(sha256)) <= 1
        if first is None and same_params:
            rows = f"identical to {self._original}: {len(self._there)} rows"
            if finished:
                return True, [f"{rows} and the parameters (sha256 {sha256[0]})"]
            return True, [f"{rows}, up to step {self._last_step}; it has not ended"]
        where = f"first at {self._line(first)}" if first else "in the parameters alone"
        lines = [f"differs from {self._original}: {where}{self._final_difference()}"]
        if finished and same_params:
            lines.append(f"the parameters are identical (sha256 {sha256[0]})")
        elif finished:
            lines.append(f"parameters: sha256 {sha256[0]} there, {sha256[1]} here")
        return False, lines + self._environment() + self.continuations()

    def _compare(self, row: Row) -> None:
        key = row["step"], row["split"]
        self._here[key] = row
        if not self._told and key[0] <= self._last_step and self._differs(key):
            self._told = True
            # Above the progress bar, if there is one.
            tqdm.write(f"differs from {self._original}: {self._line(key)}", file=sys.stderr)

    def _differing(self) -> list[Key]:
        """The rows that are not the same, in the order of steps."""
        both = {**self._there, **self._here}
        return [
            key
            for key in sorted(both, key=lambda key: key[0])
            if key[0] <= self._last_step and self._differs(key)
        ]

    def _differs(self, key: Key) -> bool:
        there, here = self._there.get(key), self._here.get(key)
        return there is None or here is None or _difference(there, here) is not None

    def _line(self, key: Key) -> str:
        """Where a row differs: its first value that does."""
        (step, split), there, here = key, self._there.get(key), self._here.get(key)
        if there is None or here is None:
            return f"step {step}, {split}: no row {'there' if there is None else 'here'}"
        name = _difference(there, here) or ""
        values = [repr(row[name]) if name in row else "nothing" for row in (there, here)]
        return f"step {step}, {split}/{name}: {values[0]} there, {values[1]} here"

    def _final_difference(self) -> str:
        """How far the last values on the test set are from each other, if both runs have them."""
        step = max((step for step, split in self._there if split == "test"), default=None)
        there, here = (
            ({} if step is None else rows.get((step, "test"), {}))
            for rows in (self._there, self._here)
        )
        names = [name for name in _ERRORS if name in there and name in here]
        if not names:
            return ""
        largest = max(_relative(there[name], here[name]) for name in names)
        return (
            f"; largest relative difference of the final test {' and '.join(names)} {largest:.2g}"
        )

    def _environment(self) -> list[str]:
        there, here = (provenance.starts(x) for x in (self._original, self._workdir))
        if not there or not here:
            missing = self._workdir if there else self._original
            return [f"environment: not noted in {missing}"]
        return [f"environment: {line}" for line in provenance.differences(there[-1], here[-1])]


def begin(original: epath.Path, workdir: epath.Path) -> Replay:
    """Makes a work directory a run's replay; every one of several processes calls it.

    Raises:
      UserError: as `Replay` and its `claim`.
    """
    with errors_shared():
        # One of several processes cannot end alone: they train to the end.
        replay = Replay(original, workdir, ends_early=jax.process_count() == 1)
        if is_main():
            replay.claim()
            for line in replay.continuations():
                print(line, file=sys.stderr)
    return replay


def _difference(there: Row, here: Row) -> str | None:
    """The first name whose values differ, times left out."""
    for name in {**there, **here}:
        if name in ("wall_time", "data_wait") or name.endswith("_per_second"):
            continue
        if name not in there or name not in here or there[name] != here[name]:
            return name
    return None


def _relative(a: float | None, b: float | None) -> float:
    """|a − b| over the larger; infinite where one alone is a number."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _place(path: epath.Path) -> str:
    """A directory's one name; a remote one has no other."""
    return str(path) if is_remote(path) else str(path.resolve())


def _read_object(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def _read_result(workdir: epath.Path) -> dict[str, Any] | None:
    path = workdir / "result.json"
    if not path.exists():
        return None
    result = _read_object(path)
    if "params_sha256" not in result:
        raise UserError(f"{path} has no params_sha256; is it the result of a run?")
    return result


def _read_rows(workdir: epath.Path) -> dict[Key, Row]:
    """The rows that a run has logged."""
    rows = MetricsWriter(workdir, step=sys.maxsize, writes=False).history
    return {(row["step"], row["split"]): row for row in rows}
