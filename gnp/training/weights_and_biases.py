"""A run's numbers in Weights & Biases."""

import logging
import secrets
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp.errors import UserError
from gnp.files import is_remote, write_atomically

_log = logging.getLogger(__name__)


class WandbRun:
    """A run of the project `config.log.wandb`, in the group `config.log.group` if there is one.

    The numbers are those of `metrics.jsonl`, as "train/loss" and so on against "step". A run that
    is continued goes on in the same one, whose number lies in the work directory; rows that it
    makes again are there again, the same, unless it went back by `on_nonfinite=rollback`.
    `WANDB_MODE=offline` keeps all in the work directory, from where `wandb sync` sends it.

    Raises:
      UserError: if Weights & Biases is not installed or not logged in to.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "config.log.wandb is set, but Weights & Biases is not installed; run "
                "pip install 'gnp[wandb]'"
            ) from None
        try:
            number = workdir / "wandb_id"
            if not number.exists():
                write_atomically(number, secrets.token_hex(8) + "\n")
            self._run: Any = wandb.init(
                project=config.log.wandb,
                group=config.log.group,
                name=workdir.name,
                id=number.read_text().strip(),
                resume="allow",
                reinit="create_new",  # several runs may be trained by one process
                dir=None if is_remote(workdir) else str(workdir),
                config=gnp_config.flat(config),
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("*", step_metric="step")
        except (wandb.Error, OSError) as error:
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UserError(
                f"config.log.wandb: {first} (wandb login, or WANDB_MODE=offline)"
            ) from None

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row's numbers; an error ends them, with a warning."""
        if self._run is None:
            return
        values = {
            f"{row['split']}/{name}": value
            for name, value in row.items()
            if isinstance(value, float) and name not in ("epoch", "wall_time")
        }
        try:
            self._run.log(values | {"step": row["step"], "epoch": row["epoch"]})
        except Exception as error:  # whatever its service raises
            _log.warning("Weights & Biases has ended (%s); the run goes on without it", error)
            self._run = None

    def close(self) -> None:
        """Sends what is left."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                _log.warning("Weights & Biases lacks the last rows (%s)", error)
            self._run = None
