"""What a work directory has lost, from its checkpoints."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from gnp.config import from_json
from gnp.errors import UserError
from gnp.files import is_locked, write_atomically
from gnp.training.checkpoint import newest_description
from gnp.training.workdir import has_checkpoint

_log = logging.getLogger(__name__)


def recover(directory: epath.PathLike, *, held: bool = False) -> None:
    """Writes `config.json` and `metrics.jsonl` where they are missing, from the newest checkpoint.

    Without a `config.json` it also writes the `result.json` of a run that had come to its end, as
    far as the rows of metrics tell it; the command that trained the run completes it. Rows that
    were made after the checkpoint was saved do not come back, nor does the time of the run, which
    others may have shared.

    Does nothing where nothing is missing, there is no checkpoint, or a process trains.

    Args:
      directory: the work directory.
      held: whether this process holds its lock.

    Raises:
      UserError: if the files cannot be written, or the configuration is none of this version.
    """
    workdir = epath.Path(directory)
    try:
        missing = [x for x in ("config.json", "metrics.jsonl") if not (workdir / x).exists()]
        if not missing or not has_checkpoint(workdir) or (not held and is_locked(workdir)):
            return
        about = newest_description(workdir)
    except OSError as error:
        raise UserError(f"cannot read {workdir}: {error.strerror or error}") from None
    if about is None:
        return
    step, rows = about["step"], [row for row in about["rows"] if _is_row(row)]
    where = workdir / "checkpoints" / str(step)
    config = from_json(json.dumps(about["whole_config"]), where=str(where)).to_dict()
    content = {}
    if "config.json" in missing:
        result = _result(step, rows, config["epochs"], about["arrays"])
        if result is not None and not (workdir / "result.json").exists():
            content["result.json"] = json.dumps(result, indent=2) + "\n"
    if "metrics.jsonl" in missing and rows:
        content["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    if "config.json" in missing:  # last: without it all of this is done again
        content["config.json"] = json.dumps(config, indent=2) + "\n"
    try:
        for name, text in content.items():
            write_atomically(workdir / name, text)
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror or error}") from None
    if content:
        names = " and ".join(content)
        _log.warning("%s: %s made from the checkpoint of step %d", workdir, names, step)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("split"), str)
        and type(row.get("step")) is int
        and isinstance(row.get("epoch"), float)
        and math.isfinite(row["epoch"])
    )


def _result(
    step: int, rows: Sequence[dict[str, Any]], epochs: float, arrays: dict[str, Any]
) -> dict[str, Any] | None:
    """What the rows tell of the end; None unless this step is the last and has been evaluated."""
    last = {row["split"]: row for row in rows}
    test = last.get("test")
    if not step or test is None or test["step"] != step or not test["epoch"] > 0:
        return None
    if step != max(round(epochs * step / test["epoch"]), 1):  # how many the run has
        return None
    return {
        "recovered": True,
        "steps": step,
        "epochs": test["epoch"],
        **last,
        "num_params": sum(
            math.prod(shape) for name, (_, shape, _) in arrays.items() if name.startswith("params/")
        ),
    }
