"""The directory of a sweep: what was asked of it, and what of that is done.

    OUT/sweep.json        what was asked
    OUT/trials/NAME/      the work directory of a trial
    OUT/logs/NAME.log     what the trial printed

Readers of runs need the work directories alone.
"""

import contextlib
import json
import pathlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from gnp import config as gnp_config
from gnp.analysis.comparison import PRUNED
from gnp.errors import UserError
from gnp.files import is_locked, lock, write_atomically
from gnp.sweeps.trials import Recipe, Trial
from gnp.training import workdir

_FORMAT = 1


def make(out: pathlib.Path) -> None:
    """Makes the directory.

    Raises:
      UserError: if it cannot be made, or is something else.
    """
    if (out / "config.json").exists():
        raise UserError(f"{out} is the work directory of a run; choose another --out")
    try:
        for folder in ("trials", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


@contextlib.contextmanager
def hold(out: pathlib.Path) -> Iterator[None]:
    """Holds the directory for this process.

    Raises:
      UserError: if another sweep holds it.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(out))
        except UserError as error:  # which names the flag of gnp.train
            raise UserError(str(error).replace("--workdir", "--out")) from None
        yield


def asked(
    recipe: Recipe,
    *,
    kind: str,
    parameters: Mapping[str, Sequence[str] | str],
    seeds: Sequence[int],
    metric: str,
) -> dict[str, Any]:
    """What `sweep.json` holds.

    Args:
      recipe: what the trials have in common.
      kind: "grid" or "search".
      parameters: the values of each parameter, or the distribution as it was written.
      seeds: the seeds.
      metric: what the trials are judged by.
    """
    argument = f":{recipe.argument}" if recipe.argument else ""
    return {
        "format": _FORMAT,
        "kind": kind,
        "config": recipe.file + argument,
        "overrides": dict(recipe.overrides),
        "configuration": workdir.essential(recipe.load()),
        "parameters": {
            name: value if isinstance(value, str) else list(value)
            for name, value in parameters.items()
        },
        "seeds": list(seeds),
        "metric": metric,
    }


def claim(out: pathlib.Path, here: dict[str, Any]) -> None:
    """Notes what is asked, beside what was asked before.

    A grid may get more values and seeds, and the configuration may change as that of a run that is
    continued may. All else stays as it was.

    Raises:
      UserError: if the directory has another sweep, with the difference.
    """
    path = out / "sweep.json"
    if path.exists():
        there = _read(path)
        if changed := list(_differences(there, here, where=str(path))):
            raise UserError(
                f"{out} holds another sweep ({'; '.join(changed)}); choose another --out"
            )
        if here["kind"] == "grid":
            before = there["parameters"]
            parameters = {
                name: [*before[name], *(text for text in values if text not in before[name])]
                for name, values in here["parameters"].items()
            }
            seeds = sorted({*there["seeds"], *here["seeds"]})
            here = {**here, "parameters": parameters, "seeds": seeds}
    try:
        write_atomically(path, json.dumps(here, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def check(out: pathlib.Path, trials: Iterable[Trial]) -> None:
    """Checks that what the trials have begun with is what they are to have.

    Raises:
      UserError: for the first that has not: its config file is not what it was.
    """
    for trial in trials:
        path = trial.workdir(out) / "config.json"
        if not path.exists():
            continue
        there = gnp_config.from_json(path.read_text(), where=str(path))
        changed = gnp_config.difference(workdir.essential(there), workdir.essential(trial.config))
        if changed:
            raise UserError(
                f"trial {trial.name} was begun with another configuration ({'; '.join(changed)}); "
                "choose another --out"
            )


def result(out: pathlib.Path, trial: Trial) -> dict[str, Any] | None:
    """What a trial wrote when it ended; None while it has not."""
    return workdir.result(epath.Path(trial.workdir(out)))


def note_pruned(out: pathlib.Path, trial: Trial) -> None:
    """Leaves a file in the work directory that says so, for readers of the run."""
    with contextlib.suppress(OSError):
        (trial.workdir(out) / PRUNED).touch()


def in_training(out: pathlib.Path) -> dict[str, int]:
    """The trials that processes are training, such as those of a sweep that was killed.

    And the number of each process on this machine, −1 if that is not known.
    """
    paths = sorted(path for path in (out / "trials").iterdir() if is_locked(path))
    return {path.name: _holder(path / ".lock") for path in paths}


def _holder(path: pathlib.Path) -> int:
    try:
        holder = json.loads(path.read_bytes())
        return int(holder["process"]) if holder["host"] == socket.gethostname() else -1
    except (OSError, ValueError, LookupError, TypeError):  # it is only for people
        return -1


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not (
        isinstance(there, dict)
        and there.get("format") == _FORMAT
        and isinstance(there.get("configuration", {}), dict)
        and isinstance(there.get("parameters"), dict)
        and all(isinstance(x, str | list) for x in there["parameters"].values())
        and isinstance(there.get("seeds"), list)
        and all(type(seed) is int for seed in there["seeds"])
    ):
        raise UserError(f"{path} is not what this gnp.sweep writes; choose another --out")
    return there


def _differences(there: dict[str, Any], here: dict[str, Any], *, where: str) -> Iterable[str]:
    """What differs of what must not; `where` names the file of `there` in errors."""
    fixed = ["kind"]
    if here["kind"] == "search":  # whose trials are told apart and judged by these
        fixed += ["seeds", "metric"]
    for name in fixed:
        if there.get(name) != here[name]:
            yield f"{name}: {there.get(name)} there, {here[name]} here"
    # The file may have moved, or is named from another folder: what counts is what it gives. An
    # older version noted that of the trials alone.
    if "configuration" in there:
        before = gnp_config.from_json(json.dumps(there["configuration"]), where=where)
        yield from gnp_config.difference(workdir.essential(before), here["configuration"])
    before, now = there["parameters"], here["parameters"]
    if {*before} != {*now}:
        yield f"parameters: {', '.join(before)} there, {', '.join(now)} here"
    elif here["kind"] == "search":
        for name in now:
            if before[name] != now[name]:
                yield f"{name}: {before[name]} there, {now[name]} here"
