"""The work directory of a run: whose it is, and what it must agree with."""

import json
import logging
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from gnp.config import difference, from_json
from gnp.data import Source, TextSource
from gnp.errors import UserError
from gnp.files import remove_unfinished, write_atomically

_log = logging.getLogger(__name__)

# The files that only the process writes that trains in the directory.
_OWN = (
    *("config.json", "data.json", "environment.json", "result.json", "wandb_id"),
    *("metrics.jsonl", "metrics.jsonl.damaged"),
)


def make(workdir: epath.Path) -> None:
    """Makes the directory.

    Raises:
      UserError: if it cannot be.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(workdir, error) from None


def claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Makes the directory this configuration's.

    Raises:
      UserError: if it has a run of another one, or cannot be written.
    """
    remove_unfinished(workdir, _OWN)
    path = workdir / "config.json"
    text = json.dumps(config.to_dict(), indent=2)
    try:
        if path.exists():
            # A field that an older version did not have is at its default.
            there = from_json(path.read_text(), where=str(path))
            changed = difference(essential(there), essential(config))
            if changed and _has_begun(workdir):
                raise UserError(
                    f"{workdir} holds a run with another configuration ({'; '.join(changed)}); "
                    "choose another --workdir, or the same configuration to continue it"
                )
        elif _has_begun(workdir):
            raise UserError(
                f"{workdir} has the checkpoints or the metrics of a run but no config.json, which "
                "says of what; bring it back, or choose another --workdir"
            )
        write_atomically(path, text + "\n")
    except OSError as error:
        raise _cannot_write(workdir, error) from None


def essential(config: ConfigDict) -> dict[str, Any]:
    """A configuration without what a run may be continued with another value of."""
    fields = config.to_dict()
    for name in ("workers", "on_damaged"):
        del fields["data"][name]
    for name in ("wandb", "group"):
        del fields["log"][name]
    # Where and how it runs, and how often it is saved; results agree to rounding.
    for name in ("mesh", "checkpoint", "steps_per_call", "watchdog"):
        del fields[name]
    # A run that has stopped at a step may be told to go on in another way.
    for name in ("on_nonfinite", "max_nonfinite"):
        del fields[name]
    return fields


def check_data(workdir: epath.Path, source: Source | TextSource) -> None:
    """Notes what data the run learns from.

    Raises:
      UserError: if it began with others.
    """
    path = workdir / "data.json"
    here = {
        "name": source.name,
        "num_examples": dict(source.num_examples),
        "num_classes": source.num_classes,
    }
    there = _read(path, otherwise=here)
    if there != here and has_checkpoint(workdir):
        raise UserError(
            f"{workdir} holds a run on other data ({json.dumps(there)} there, {json.dumps(here)} "
            "now): bring them back, or choose another --workdir"
        )
    try:
        write_atomically(path, json.dumps(here, indent=2) + "\n")
    except OSError as error:
        raise _cannot_write(workdir, error) from None


def result(workdir: epath.Path) -> dict[str, Any] | None:
    """What the run wrote when it ended; None while it has not, or if that is lost in part."""
    found = _read(workdir / "result.json", otherwise=None)
    whole = isinstance(found, dict) and "test" in found and not found.get("recovered")
    return found if whole else None


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether a run has saved a step there."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def _has_begun(workdir: epath.Path) -> bool:
    """Whether it has made a step worth keeping."""
    metrics = workdir / "metrics.jsonl"
    return has_checkpoint(workdir) or (metrics.exists() and bool(metrics.stat().length))


def _read(path: epath.Path, *, otherwise: Any) -> Any:
    """A file's JSON; what is damaged counts as not there, with a warning."""
    if not path.exists():
        return otherwise
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        _log.warning("%s cannot be read (%s); it is written anew", path, error)
        return otherwise


def _cannot_write(workdir: epath.Path, error: OSError) -> UserError:
    return UserError(f"cannot write the work directory {workdir}: {error.strerror or error}")
