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

    The numbers are those of `metrics.jsonl`, as "train/loss" and so on at their steps. A run that
    is continued goes on in the same one, whose number lies in the work directory; it forgets rows
    that come again, which are the same. `WANDB_MODE=offline` keeps all in the work directory, from
    where `wandb sync` sends it.

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
        number = workdir / "wandb_id"
        if not number.exists():
            write_atomically(number, secrets.token_hex(8) + "\n")
        try:
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
        except wandb.Error as error:
            first = str(error).strip().splitlines()[0]
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
            self._run.log(values | {"epoch": row["epoch"]}, step=row["step"])
        except Exception as error:  # whatever its service raises
            _log.warning("Weights & Biases has ended (%s); the run goes on without it", error)
            self._run = None

    def close(self) -> None:
        """Sends what is left."""
        if self._run is not None:
            self._run.finish()
            self._run = None
