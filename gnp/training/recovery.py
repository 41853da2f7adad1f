"""What a work directory has lost, from its checkpoints."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from gnp.config import from_json
from gnp.errors import UserError
from gnp.files import write_atomically
from gnp.training.checkpoint import newest_description
from gnp.training.workdir import has_checkpoint

_log = logging.getLogger(__name__)


def recover(directory: epath.PathLike) -> None:
    """Writes `config.json` and `metrics.jsonl` where they are missing, from the newest checkpoint.

    Without a `config.json` it also writes the `result.json` of a run that had come to its end, as
    far as the rows of metrics tell it; the command that trained the run completes it.

    Does nothing where nothing is missing, or there is no checkpoint.

    Raises:
      UserError: if they cannot be written, or the configuration is none of this version.
    """
    workdir = epath.Path(directory)
    names = [name for name in ("config.json", "metrics.jsonl") if not (workdir / name).exists()]
    if not names or not has_checkpoint(workdir):
        return
    about = newest_description(workdir)
    if about is None:
        return
    step, rows = about["step"], [row for row in about["rows"] if _is_row(row)]
    where = workdir / "checkpoints" / str(step)
    config = from_json(json.dumps(about["config"]), where=str(where)).to_dict()
    content = {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "config.json": json.dumps(config, indent=2) + "\n",
    }
    result = _result(step, rows, config["epochs"], about["arrays"])
    if "config.json" in names and result and not (workdir / "result.json").exists():
        content["result.json"] = json.dumps(result, indent=2) + "\n"
        names.append("result.json")
    try:
        for name in reversed(names):  # config.json last: without it all of this is done again
            if content[name]:
                write_atomically(workdir / name, content[name])
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror or error}") from None
    _log.warning("%s: %s from the checkpoint of step %d", workdir, " and ".join(names), step)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("split"), str)
        and type(row.get("step")) is int
        and isinstance(row.get("epoch"), float)
    )


def _result(
    step: int, rows: Sequence[dict[str, Any]], epochs: float, arrays: dict[str, Any]
) -> dict[str, Any] | None:
    """What the rows tell of the end; None unless this step is the last and has been evaluated."""
    last = {row["split"]: row for row in rows}
    test = last.get("test")
    if not step or test is None or test["step"] != step:
        return None
    if not abs(test["epoch"] - epochs) < test["epoch"] / step:  # a step, in epochs
        return None
    return {
        "recovered": True,
        "steps": step,
        "epochs": test["epoch"],
        "wall_time": test.get("wall_time"),
        **last,
        "num_params": sum(
            math.prod(shape) for name, (_, shape, _) in arrays.items() if name.startswith("params/")
        ),
    }
