"""Checkpoints of the train state, written by Orbax, and what tells a damaged one.

A checkpoint is a directory, `checkpoints/<step>`, with Orbax's item "state" and the item "about", a
JSON object: the format's number, the step, the configuration, the rows of metrics so far, and
of each array the dtype, the shape and a checksum of its values, which does not depend on how it lay
on the devices.
"""

import collections
import contextlib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from gnp.config import difference
from gnp.errors import UserError
from gnp.files import is_remote
from gnp.training.checksum import described, named
from gnp.training.processes import all_true, errors_shared, is_main, wait_for_all
from gnp.training.state import TrainState

_log = logging.getLogger(__name__)

FORMAT = 1  # of what is written; all up to it are read
_MOST_STEPS = 4096  # checkpoints that are looked at
_MAX_ABOUT = 16_000_000  # bytes of a checkpoint's description
_MAX_ROWS = 4_000_000  # bytes of the rows in it
_SHOWN = 5  # differences told of a checkpoint that does not fit


class Checkpoints:
    """The checkpoints in a work directory.

    Saving is asynchronous and atomic: an interrupted save leaves no checkpoint. Every one of
    several processes makes the same calls.

    Args:
      workdir: the run's directory.
      config: the configuration, nested: compared where a checkpoint does not fit.
      noted: all of it, for who has nothing but the checkpoints; by default the same.
      keep: how many of the newest are kept; None to read only.

    Attributes:
      best_step: that of a checkpoint that is kept beside the newest, or None.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        config: Mapping[str, Any] | None = None,
        noted: Mapping[str, Any] | None = None,
        keep: int | None = None,
    ):
        workdir = epath.Path(workdir)
        if not is_remote(workdir):
            workdir = workdir.resolve()
        self._workdir, self._directory = workdir, workdir / "checkpoints"
        self._config, self._keep = config or {}, keep
        self._noted = self._config if noted is None else noted
        self.best_step: int | None = None
        if keep is None:
            return
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._saving: epath.Path | None = None
        _silence_late_writes()
        with errors_shared():
            try:
                if is_main():
                    self._directory.mkdir(parents=True, exist_ok=True)
                    self._remove_unfinished()
            except OSError as error:
                raise UserError(f"cannot write {self._directory}: {error.strerror}") from None

    def steps(self) -> list[int]:
        """The steps of the checkpoints, the newest first, as the first process sees them."""
        return sorted(_of_main(_list(self._directory) if is_main() else []), reverse=True)

    def checksum(self, step: int) -> int | None:
        """A checksum of all values of a checkpoint; None if there is none that can be read."""
        try:
            return _crc32c(_read_about(self._directory / str(step))["arrays"])
        except Exception:  # a damaged one raises anything; `restore` tells of it
            return None

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads the checkpoint of `step`, by default the newest one that is not damaged.

        A damaged one is told of in a warning and, by a run that writes, moved to `damaged/`.

        Args:
          like: the state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves).
          step: one of `steps`.

        Raises:
          UserError: if there is no such checkpoint, if it is that of another configuration or of a
            newer version, or if none can be read.
        """
        with errors_shared():
            steps = self.steps()
            if not steps:
                raise UserError(f"no checkpoint in {self._directory}; has the run been started?")
            if step is not None and step not in steps:
                raise UserError(
                    f"no checkpoint of step {step} in {self._directory}; there are {steps[::-1]}"
                )
        told, damaged = "", []
        for candidate in steps if step is None else [step]:
            try:
                state = self._read(candidate, like)
            except _DamagedError as error:
                told = f"the checkpoint {self._directory / str(candidate)} is damaged: {error}"
                damaged.append(candidate)
                if step is None:
                    _log.warning("%s", told)
                continue
            if self._keep is not None:
                for other in damaged:
                    self._set_aside(other)
            return state
        others = [other for other in steps if other != step]
        raise UserError(
            f"{told}; there are those of the steps {others[::-1]}"
            if step is not None
            else f"no checkpoint of {self._workdir} can be read; the oldest: {told}. Begin again "
            "in another --workdir, or bring a copy of the folder checkpoints back"
        )

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, to none of which the run goes back any more."""
        if is_main():
            for later in _list(self._directory):
                if later > step:
                    (self._directory / str(later)).rmtree()
        wait_for_all(f"the checkpoints after {step}")

    def save(self, step: int, state: TrainState, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begins to save; returns when the state's buffers may be donated.

        Args:
          step: the state's.
          state: what is saved.
          rows: those of `metrics.jsonl` so far; very many are thinned.

        Raises:
          OSError: if this or the save before has failed, as on a full disk; nothing is left of it,
            and another may be tried.
        """
        failure: OSError | None = None
        try:
            self.wait()
        except OSError as error:
            failure = error
        if not all_true(failure is None):
            raise failure or OSError("another process could not save")
        if step in self.steps():
            return
        if jax.default_backend() == "cpu":
            # Orbax reads host memory in the background, which is the donated buffers' own.
            state = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
        about = _about(step, state, self._config, self._noted, rows)
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave(about)}
        self._saving = self._directory / str(step)
        with self._failures():
            self._writer.save(self._saving, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Removes old checkpoints when a new one is complete; does not wait for one.

        Raises:
          OSError: if a save has failed.
        """
        with self._failures():
            self._writer.check_for_errors()
        if self._saving is not None and self._saving.exists():
            if is_main():
                self._remove_old(self._saving)
            self._saving = None

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          OSError: if it has failed.
        """
        with self._failures():
            self._writer.wait_until_finished()
        self.check()
        # Again: right after a failure other writes of the same save may have been under way.
        with contextlib.suppress(OSError):
            self._remove_unfinished()

    def _read(self, step: int, like: TrainState) -> TrainState:
        path = self._directory / str(step)
        about = _attempt(lambda: _read_about(path))
        self._check_fit(path, about, like)
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        with reader:
            state = _attempt(lambda: reader.restore(path, args=args)["state"])
        for name, (*_, checksum) in described(state).items():
            if checksum != about["arrays"][name][2]:
                raise _DamagedError(f"the values of {name} are not those that were saved")
        return state

    def _check_fit(self, path: epath.Path, about: Mapping[str, Any], like: TrainState) -> None:
        if about["format"] > FORMAT:
            raise UserError(
                f"{path} was written by a newer version of gnp (its format is {about['format']}, "
                f"this version reads up to {FORMAT}); update gnp"
            )
        there = {name: f"{dtype}{shape}" for name, (dtype, shape, _) in about["arrays"].items()}
        here = {name: f"{x.dtype}{list(x.shape)}" for name, x in named(like).items()}
        if there == here:
            return
        lines = difference(about["config"], self._config) if self._config else []
        lines += [
            f"{name}: {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UserError(
            f"{path} is not a checkpoint of this configuration: {'; '.join(lines[:_SHOWN])}{more}"
        )

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way: a new one of its step may come."""
        folder = self._workdir / "damaged"
        if is_main():
            folder.mkdir(exist_ok=True)
            (folder / "README").write_text("Checkpoints that could not be read.\n")
            names = (f"{step}{suffix}" for suffix in ("", *(f".{i}" for i in range(1, 1000))))
            target = next(folder / name for name in names if not (folder / name).exists())
            (self._directory / str(step)).rename(target)
            _log.warning("moved to %s; an older checkpoint is used", target)
        wait_for_all(f"the damaged checkpoint {step}")

    def close(self) -> None:
        """Waits for the last save, whether it succeeds or not, and ends Orbax's threads."""
        if self._keep is None:
            return
        with contextlib.suppress(OSError):
            self.wait()
        self._writer.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever Orbax and its storage raise in here is an `OSError` in one line."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            raise OSError(_first_line(error)) from error

    def _remove_unfinished(self) -> None:
        """Removes what interrupted and failed saves have left."""
        if is_main() and self._directory.exists():  # a remote folder is there with its first file
            for path in self._directory.iterdir():
                if path.name.isdecimal() and not ocp.utils.is_checkpoint_finalized(path):
                    path.rmtree()  # where there is no renaming
                elif ".orbax-checkpoint-tmp" in path.name:
                    path.rmtree()

    def _remove_old(self, new: epath.Path) -> None:
        """Leaves the newest `keep` checkpoints and the best one."""
        assert self._keep is not None
        # Else a power cut might leave neither the old ones nor the new one.
        if not is_remote(new):
            _flush(new)
        for step in sorted(_list(self._directory))[: -self._keep]:
            if step != self.best_step:
                (self._directory / str(step)).rmtree()


def best_step(rows: Iterable[Mapping[str, Any]], metric: str, steps: Sequence[int]) -> int | None:
    """Which of the steps has the least value of a metric, as "validation/error", the first if many.

    Args:
      rows: those of `metrics.jsonl`.
      metric: a split and one of its values.
      steps: those that are asked for.
    """
    split, name = metric.split("/")
    values = {
        row["step"]: row[name]
        for row in rows
        if row["split"] == split and row["step"] in steps and row.get(name) is not None
    }
    return min(sorted(values), key=lambda step: values[step], default=None)


class _DamagedError(Exception):
    """What is wrong with a checkpoint."""


def _attempt(read: Callable[[], Any]) -> Any:
    """What `read` gives in every process, or a `_DamagedError` in all."""
    value, told = None, ""
    try:
        value = read()
    except UserError:
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "No space" not in str(error):
            raise  # memory
        told = _first_line(error)
    if not all_true(not told):
        raise _DamagedError(told or "another process cannot read it")
    return value


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{text[0][:300]}" if text else type(error).__name__


def _list(directory: epath.Path) -> list[int]:
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if re.fullmatch(r"\d{1,9}", path.name)]
    return [int(path.name) for path in paths if ocp.utils.is_checkpoint_finalized(path)]


def _of_main(numbers: list[int]) -> list[int]:
    """The numbers that the first process has."""
    if jax.process_count() == 1:
        return numbers
    padded = np.full(_MOST_STEPS, -1, np.int32)
    padded[: len(numbers)] = numbers[:_MOST_STEPS]
    shared = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return [int(x) for x in shared if x >= 0]


@functools.cache
def _silence_late_writes() -> None:
    """Has an error in the save of an array told once, and not by every other array too.

    Orbax ends its event loop at the first error. Of each write that is still under way TensorStore
    then finds it closed, which goes to `sys.unraisablehook`, and asyncio logs the errors of those
    that nobody waits for any more.
    """
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    before = sys.unraisablehook

    def hook(told: Any) -> None:
        if not (told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"):
            before(told)

    sys.unraisablehook = hook


def _flush(directory: epath.Path) -> None:
    """Has the files of a directory survive a power cut."""
    for folder, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# --- What a checkpoint tells of itself ----------------------------------------------------------


def newest_description(workdir: epath.PathLike) -> dict[str, Any] | None:
    """What the newest checkpoint tells of itself that can be read; None if none can.

    It has "step", "config" (what of it decides results, nested), "whole_config" (all of it), "rows"
    (those of `metrics.jsonl` when it was saved) and "arrays": the dtype, shape and checksum of each
    by its path in the state. Older versions had neither rows nor the whole configuration.
    """
    directory = epath.Path(workdir) / "checkpoints"
    for step in sorted(_list(directory), reverse=True):
        try:
            about = _read_about(directory / str(step))
        except Exception as error:  # a damaged one raises anything
            _log.warning("the checkpoint of step %d cannot be read: %s", step, _first_line(error))
            continue
        if about["format"] <= FORMAT:
            return {"rows": [], "whole_config": about["config"], **about, "step": step}
    return None


def _thinned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each split every so-manieth row and the last, so that they fit into a description."""
    every = len(json.dumps(rows)) // _MAX_ROWS + 1
    if every == 1:
        return list(rows)
    last = {row["split"]: row for row in rows}
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for row in rows:
        if seen[row["split"]] % every == 0 or row is last[row["split"]]:
            kept.append(row)
        seen[row["split"]] += 1
    return kept


def _about(
    step: int,
    state: TrainState,
    config: Mapping[str, Any],
    noted: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    content = {
        **{"format": FORMAT, "step": step, "config": config, "whole_config": noted},
        **{"rows": _thinned(rows), "arrays": described(state)},
    }
    return {"content": content, "crc32c": _crc32c(content)}


def _read_about(path: epath.Path) -> dict[str, Any]:
    if (path / "default").exists() and not (path / "about").exists():
        raise UserError(
            f"{path} was written by a version of gnp without a format number, which this one does "
            "not read; finish the run with that version, or begin it again in another --workdir"
        )
    file = path / "about" / "metadata"
    if file.stat().length > _MAX_ABOUT:
        raise ValueError(f"its description has more than {_MAX_ABOUT:,} bytes")
    about = json.loads(file.read_text())
    content = about["content"]
    if about["crc32c"] != _crc32c(content):
        raise ValueError("its description has another checksum than when it was written")
    if not _is_about(content):
        raise ValueError("its description is not one that gnp writes")
    return content


def _is_about(content: Any) -> bool:
    """Whether all is there that is read of it; of a newer version only its number is."""
    version = content.get("format")
    if not isinstance(version, int):
        return False
    return version > FORMAT or (
        isinstance(content["config"], dict)
        and isinstance(content.get("rows", []), list)
        and isinstance(content.get("whole_config", {}), dict)
        and isinstance(content["arrays"], dict)
        and all(
            isinstance(x, list)
            and list(map(type, x)) == [str, list, int]
            and all(type(size) is int for size in x[1])
            for x in content["arrays"].values()
        )
    )


def _crc32c(content: Any) -> int:
    return google_crc32c.value(json.dumps(content, sort_keys=True).encode())
