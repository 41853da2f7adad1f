"""The measures of sharpness of a run's checkpoints: what is asked, and `sharpness.jsonl`.

A line is a JSON object, a row: one checkpoint, measured with one set of settings. A row holds

- "step", "epoch": where in training;
- "split", "num_examples": over what, "train" and how many of its examples;
- "loss", "grad_norm", "weight_norm": L(θ), ‖∇L(θ)‖ and ‖θ‖;
- "eigenvalues", "eigenvalue_errors": the largest of ∇²L(θ), descending, and their residuals' norms;
- "trace", "trace_error": of ∇²L(θ), and its standard error;
- "density": {"eigenvalue": […], "density": […]}, the smoothed spectral density;
- "sam_sharpness", "radius": max L(θ + ε) − L(θ) over ‖ε‖ ≤ radius;
- "adaptive_lr_variance": over the parameters, of 1/√v̂; null if the optimizer has no v̂;
- "adaptive_lr_spread": likewise, its 95th percentile over its 5th;
- "surface": null, or {"x": […], "y": […], "loss": [[…]]}, rows of "loss" along y;
- "checksum": of the checkpoint's values, to know it by; null where older versions measured it;
- "settings": those of `Settings`.

What is not finite, or was not asked for, is null, or an empty list.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from gnp.analysis.runs import number
from gnp.errors import UserError
from gnp.files import is_remote, write_atomically

NAME = "sharpness.jsonl"

_MAX_BYTES = 256_000_000  # of the file
_LARGEST_SURFACE = 201  # points on a side

_OF_SURFACE = {"surface", "extent"}  # settings of the surface alone
_ITS_OWN = _OF_SURFACE | {"max_examples", "seed"}  # all that it depends on
_NUMBERS = ("loss", "grad_norm", "weight_norm", "trace", "trace_error", "sam_sharpness", "radius")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how precisely.

    Attributes:
      eigenvalues: how many of the largest.
      lanczos_steps: Hessian-vector products for each of the `density_probes`.
      density_probes: random starts of Lanczos' algorithm; the eigenvalues come from the first.
      trace_probes: random vectors of the trace, among which those starts count.
      radius: ρ of SAM's sharpness.
      ascents: steps of projected gradient ascent after its first.
      surface: points on a side of the loss surface, odd, 0 for none; it has n² of them.
      extent: the surface reaches from −extent to extent, in units of the filters' norms.
      max_examples: only the first so many of the split; None for all.
      seed: of everything random.
    """

    eigenvalues: int = 10
    lanczos_steps: int = 40
    density_probes: int = 2
    trace_probes: int = 20
    radius: float = 0.05
    ascents: int = 0
    surface: int = 0
    extent: float = 1.0
    max_examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            **{"eigenvalues": 1, "lanczos_steps": 1, "density_probes": 1, "trace_probes": 1},
            **{"ascents": 0, "surface": 0, "max_examples": 1, "seed": 0},
        }
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise UserError(f"{name} is {value}; it must be {limit} or more")
        for name in ("radius", "extent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}; it must be more than 0, and finite")
        if self.surface and (self.surface < 3 or self.surface % 2 == 0):
            raise UserError(
                f"surface is {self.surface}; it must be odd and 3 or more, so that the point in "
                "the middle is the parameters, or 0 for none"
            )
        if self.surface > _LARGEST_SURFACE:
            raise UserError(
                f"surface is {self.surface}, which is {self.surface**2:,} passes over the data; "
                f"use at most {_LARGEST_SURFACE}"
            )
        if self.lanczos_steps < self.eigenvalues:
            raise UserError(
                f"lanczos_steps is {self.lanczos_steps}, which gives at most as many eigenvalues, "
                f"but eigenvalues is {self.eigenvalues}; use 2 to 4 times as many steps"
            )
        if self.trace_probes < self.density_probes:
            raise UserError(
                f"trace_probes is {self.trace_probes}, but the {self.density_probes} of "
                "density_probes are among them; use at least as many"
            )

    @property
    def num_passes(self) -> int:
        """How often a checkpoint's measures go over the data, the surface's aside, which is n²."""
        products = self.density_probes * (self.lanczos_steps - 1) + self.trace_probes
        return 1 + products + self.ascents + 1


def load(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The measures of a run, the newest row of each step, in the order of the steps.

    Numbers are floats, NaN for null; "step" and "num_examples" are whole.

    Args:
      workdir: the run's directory.

    Returns:
      The rows; none where nothing has been measured.

    Raises:
      UserError: if there is no such directory, or a line is not a row.
    """
    rows = {row["step"]: row for row in load_all(workdir)}
    return [rows[step] for step in sorted(rows)]


def load_all(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """As `load`, but the rows of all settings, in the order in which they were measured."""
    directory = epath.Path(workdir)
    if not is_remote(directory) and not directory.is_dir():
        raise UserError(f"no directory {directory}; give the work directory of a run")
    path = directory / NAME
    rows = []
    for place, line in enumerate(_read(path).split(b"\n"), start=1):
        if line.strip():
            row = _row(line)
            if row is None:
                raise UserError(
                    f"{path}, line {place} is not a row of measures; take the line out, or measure "
                    "again without the file"
                )
            rows.append(row)
    return rows


def current(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """As `load_all`, without the rows of checkpoints that a run begun anew has replaced."""
    rows = load_all(workdir)
    newest = {row["step"]: row["checksum"] for row in rows}
    return [row for row in rows if row["checksum"] in (None, newest[row["step"]])]


def known(
    rows: Sequence[dict[str, Any]], settings: Settings
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Which rows of a checkpoint have what is asked, so that only the rest is measured.

    Args:
      rows: the checkpoint's, in the order in which they were measured.
      settings: what is asked.

    Returns:
      The newest row with all but the surface, and the newest one with the surface (where none is
      asked for, one whose surface is None); None for what has not been measured.
    """
    asked = dataclasses.asdict(settings)

    def newest(names: Iterable[str]) -> dict[str, Any] | None:
        found = (x for x in reversed(rows) if all(x["settings"].get(n) == asked[n] for n in names))
        return next(found, None)

    surface = newest(_ITS_OWN) if settings.surface else {"surface": None}
    return newest(asked.keys() - _OF_SURFACE), surface


def append(workdir: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Adds a row to the file, whole or not at all.

    Args:
      workdir: the run's directory.
      row: as the module describes it; what is not finite becomes null.

    Raises:
      UserError: if it cannot be written.
    """
    path = epath.Path(workdir) / NAME
    before = _read(path)
    if before and not before.endswith(b"\n"):
        before += b"\n"
    line = json.dumps(without_nan(row), allow_nan=False)
    try:
        write_atomically(path, before + line.encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def without_nan(value: Any) -> Any:
    """A tree of dictionaries and lists with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: epath.Path) -> bytes:
    """The file's bytes; none where it does not exist."""
    if not path.exists():
        return b""
    if not is_remote(path) and not os.path.isfile(path):  # a pipe never ends
        raise UserError(f"cannot read {path}: it is no plain file")
    try:
        size = path.stat().length
        if size > _MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes; it is not what gnp.evaluate writes")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _row(line: bytes) -> dict[str, Any] | None:
    """A row with floats for its numbers; None for what is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("settings"), dict):
        return None
    step, examples, epoch = row.get("step"), row.get("num_examples"), number(row.get("epoch"))
    if type(step) is not int or type(examples) is not int or not math.isfinite(epoch):
        return None
    if not (0 <= step < 2**31 and isinstance(row.get("split"), str)):
        return None
    density, surface = row.get("density"), row.get("surface")
    lists = {name: _numbers(row.get(name)) for name in ("eigenvalues", "eigenvalue_errors")}
    curve = _lists(density, ("eigenvalue", "density"))
    plane = _surface(surface)
    if None in lists.values() or curve is None or (surface is not None and plane is None):
        return None
    if len(lists["eigenvalues"]) != len(lists["eigenvalue_errors"]):  # type: ignore[arg-type]
        return None
    checksum = row.get("checksum")
    rates = {name: row.get(name) for name in ("adaptive_lr_variance", "adaptive_lr_spread")}
    return {
        **{"step": step, "epoch": epoch, "split": row["split"], "num_examples": examples},
        **{name: number(row.get(name)) for name in _NUMBERS},
        **lists,
        **{name: None if x is None else number(x) for name, x in rates.items()},
        **{"density": curve, "surface": plane, "settings": row["settings"]},
        "checksum": checksum if type(checksum) is int else None,
    }


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list):
        return None
    return [number(x) for x in value]


def _lists(value: Any, names: tuple[str, str]) -> dict[str, list[float]] | None:
    """An object with two lists of numbers that are equally long."""
    if not isinstance(value, dict):
        return None
    first, second = (_numbers(value.get(name)) for name in names)
    if first is None or second is None or len(first) != len(second):
        return None
    return dict(zip(names, (first, second), strict=True))


def _surface(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("loss"), list):
        return None
    x, y = _numbers(value.get("x")), _numbers(value.get("y"))
    rows = [_numbers(row) for row in value["loss"]]
    if x is None or y is None or len(rows) != len(y):
        return None
    if any(row is None or len(row) != len(x) for row in rows):
        return None
    return {"x": x, "y": y, "loss": rows}
