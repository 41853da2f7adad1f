"""Many runs side by side: which there are, which are seeds of one setting, and all as a table.

In a notebook `comparison.frame("runs/sweep")` gives a pandas DataFrame with a row a run.
"""

import functools
import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from gnp import config as gnp_config
from gnp.analysis import runs as gnp_runs
from gnp.analysis.labels import ORDER, labels, text
from gnp.analysis.runs import Run, number
from gnp.errors import UserError
from gnp.files import is_remote

if TYPE_CHECKING:  # it takes half a second to load
    import pandas

Path = str | os.PathLike[str]

PRUNED = "pruned"  # the file that a search leaves in the work directory of a run it has stopped

_MAX_DEPTH = 8  # folders inside of folders in which runs are looked for
_MAX_FOLDERS = 20_000

# Fields that change when something is measured, or where data lie, and no result.
_WITHOUT_EFFECT = ("data.data_dir", "log.every", "log.adaptive_lr", "eval.every")
# Values that have an order of their own.
_ORDERS = {
    "gr.policy": gnp_config.GR_POLICIES,
    "optimizer.name": gnp_config.OPTIMIZERS,
    "weight_decay.kind": gnp_config.WEIGHT_DECAYS,
}


class Setting(NamedTuple):
    """Runs whose configurations differ in their seed only.

    Attributes:
      label: what tells the setting from the others, short and readable: "gr zero, lr 0.001".
      values: the fields (dotted) in which the settings differ, with the value of each here.
      runs: its runs, by seed.
    """

    label: str
    values: dict[str, Any]
    runs: tuple[Run, ...]


def find(directories: Sequence[Path], damaged: list[str] | None = None) -> list[Run]:
    """Reads the runs in directories, each a work directory or a folder that holds some.

    A run is a directory with a config.json, or with checkpoints. What lies inside of one is its
    own, and hidden folders are not looked into; a run that is found twice counts once.

    Args:
      directories: as in ["runs/sweep", "runs/b"].
      damaged: gets what is wrong with each run that cannot be read, or whose configuration is of
        another version, which is then passed over; without it the first one is raised.

    Returns:
      The runs in the order of the directories, those of a folder by name.

    Raises:
      UserError: if a path is no directory, holds no run or too much else, or no run can be read.
    """
    found: dict[str, Run] = {}
    seen: set[str] = set()
    for directory in directories:
        folder = epath.Path(directory)
        if not folder.is_dir():
            raise UserError(f"no directory {folder}; give work directories, or folders of them")
        workdirs = list(_workdirs(folder))
        if not workdirs:
            raise UserError(
                f"{folder} holds no run: no directory in it, {_MAX_DEPTH} levels deep, has a "
                "config.json"
            )
        for workdir in workdirs:
            place = os.fspath(workdir)
            place = place if is_remote(place) else os.path.realpath(place)
            if place in seen:
                continue
            seen.add(place)
            try:
                run = gnp_runs.load(workdir)
                settings_of(run)
            except UserError as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
            else:
                found[place] = run
    if damaged and not found:
        raise UserError(damaged[0])
    return list(found.values())


def _workdirs(folder: epath.Path) -> Iterator[epath.Path]:
    """The work directories in a folder, in the order of their names."""
    waiting, seen = [(folder, 0)], 0
    while waiting:
        here, depth = waiting.pop()
        seen += 1
        if seen > _MAX_FOLDERS:
            raise UserError(
                f"{folder} has more than {_MAX_FOLDERS:,} folders in it; give the folder of the "
                "runs alone"
            )
        if gnp_runs.is_workdir(here):
            yield here
        elif depth < _MAX_DEPTH:
            try:
                inside = [p for p in here.iterdir() if not p.name.startswith(".") and p.is_dir()]
            except OSError as error:
                raise UserError(f"cannot read {here}: {error.strerror}") from error
            waiting += [(path, depth + 1) for path in sorted(inside, reverse=True)]


def group(runs: Iterable[Run]) -> list[Setting]:
    """Puts runs that are seeds of one setting together.

    Two are, if their configurations differ in `seed` and in fields without effect on results only
    (`gnp.training.workdir.essential` has a list of these; where data lie and how often something
    is logged or evaluated are others, and so is `gr` where its policy is "off"). A field that an
    older version did not have is at its default.

    Returns:
      The settings, ordered by the fields in which they differ.

    Raises:
      UserError: if a run's configuration is not of this version.
    """
    groups: dict[Hashable, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        fields = settings_of(run)
        fields.pop("seed")
        groups.setdefault(repr(sorted(fields.items())), (fields, []))[1].append(run)
    configs = [fields for fields, _ in groups.values()]
    names = sorted({name for fields in configs for name in fields})
    differing = [
        name for name in names if len({repr(each[name]) for each in configs if name in each}) > 1
    ]
    differing.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    values = [{name: fields.get(name) for name in differing} for fields in configs]
    settings = [
        Setting(label, value, tuple(sorted(members, key=_by_seed)))
        for label, value, (_, members) in zip(labels(values), values, groups.values(), strict=True)
    ]
    return sorted(settings, key=lambda setting: [_rank(*item) for item in setting.values.items()])


def settings_of(run: Run) -> dict[str, Any]:
    """The fields of a run's configuration that can change its results, and the seed, by name.

    Raises:
      UserError: if its configuration is not of this version.
    """
    return dict(_settings(json.dumps(run.config), str(run.workdir / "config.json")))


@functools.lru_cache(maxsize=10_000)  # each table and figure asks for those of all runs
def _settings(content: str, where: str) -> dict[str, Any]:
    from gnp.training.workdir import essential  # loads jax

    config = gnp_config.from_json(content, where=where)
    fields = _flat(essential(config))
    idle = {name for name in fields if name.startswith("gr.") and name != "gr.policy"}
    without = {*_WITHOUT_EFFECT, *(idle if fields["gr.policy"] == "off" else ())}
    return {name: value for name, value in fields.items() if name not in without}


def frame(source: Path | Sequence[Path | Run]) -> "pandas.DataFrame":
    """All runs as a DataFrame, one row a run, settings together and by seed.

    Args:
      source: a directory, several, or runs; see `find`.

    Returns:
      The columns `workdir`, `setting` (its label), the configuration's fields in which the
      settings differ, `seed`, `finished`, `diverged`; the final value of every metric as
      "test/error" (a fraction) or "train/loss", the last logged one where the run has not ended;
      `steps`, `training_time` in seconds, `num_params`, and `gradients`, the mean number of
      gradients that a step has taken. NaN stands where a run has no value.

    Raises:
      UserError: as `find` and `group` do.
    """
    import pandas

    if isinstance(source, str | os.PathLike):
        source = [source]
    found: list[Run] = []
    for each in source:
        found += [each] if isinstance(each, Run) else find([each])
    rows = [
        {
            "workdir": str(run.workdir),
            "setting": setting.label,
            **setting.values,
            "seed": run.setting("seed"),
            "finished": has_finished(run),
            "diverged": has_diverged(run),
            **_metrics(run),
            "steps": _steps(run),
            "training_time": run.training_time,
            "num_params": number((run.result or {}).get("num_params")),
            "gradients": gradients_per_step(run),
        }
        for setting in group(found)
        for run in setting.runs
    ]
    if not rows:
        raise UserError("there are no runs for a table")
    table = pandas.DataFrame(rows)
    metrics = sorted(name for name in table.columns if "/" in name)
    first, last = list(table.columns), ["steps", "training_time", "num_params", "gradients"]
    first = [name for name in first if name not in (*metrics, *last)]
    return table[[*first, *metrics, *last]]


def has_finished(run: Run) -> bool:
    """Whether the run came to its end."""
    return isinstance((run.result or {}).get("test"), dict)


def was_pruned(run: Run) -> bool:
    """Whether a search has stopped the run, since others did better."""
    return not has_finished(run) and (run.workdir / PRUNED).exists()


def has_diverged(run: Run) -> bool:
    """Whether its last training loss, or its final test metric, is not a finite number.

    Or it has ended at such a step, of which it then keeps the batch (`config.on_nonfinite`).
    """
    if not has_finished(run) and any(run.workdir.glob("nonfinite-*.npz")):
        return True
    if run.metrics.get("train") and not math.isfinite(run.final("train", "loss")):
        return True
    return has_finished(run) and not math.isfinite(run.final("test", metric(run)))


def metric(run: Run) -> str:
    """The test metric that a run is judged by: "perplexity" of a language model, else "error"."""
    test = (run.result or {}).get("test")
    logged = {*run.metrics.get("test", {}), *(test if isinstance(test, dict) else ())}
    return "perplexity" if "perplexity" in logged else "error"


def gradients_per_step(run: Run) -> float:
    """The mean number of gradients that a step of the run has computed so far.

    1 without gradient regularization and while zero-warmup lasts, otherwise 2. With the estimator
    "exact" a Hessian-vector product counts as two gradients, and as three where the ratio is a
    schedule (see `gnp.transforms.gradient_regularization`). NaN before the first logged step.
    """
    steps = _steps(run)
    if not steps > 0:
        return math.nan
    policy = run.setting("gr.policy") or "off"
    if policy == "off" or not number(run.setting("gr.ratio")) > 0:
        return 1.0
    result, (step, epoch) = run.result or {}, run.last
    epochs = number(result.get("epochs"))
    per_epoch = steps / epochs if epochs > 0 else step / epoch if epoch > 0 else math.nan
    total = round(number(run.setting("epochs")) * per_epoch) if per_epoch > 0 else int(steps)
    warmup = run.setting("gr.warmup") or run.setting("lr.warmup") or "0st"
    begin = min(gnp_config.parse_duration(warmup).steps(per_epoch, total), steps)
    exact = run.setting("gr.estimator") == "exact"
    each = (4 if policy in ("lambda", "zero") and begin else 3) if exact else 2
    plain = begin if policy == "zero" else 0
    return (plain + each * (steps - plain)) / steps


def _steps(run: Run) -> float:
    steps = number((run.result or {}).get("steps"))
    return float(run.last[0]) if math.isnan(steps) else steps


def _metrics(run: Run) -> dict[str, float]:
    """The final metrics by "split/name"."""
    names: dict[str, set[str]] = {split: set(columns) for split, columns in run.metrics.items()}
    for split, values in (run.result or {}).items():
        if isinstance(values, dict) and "loss" in values:  # a split's, not what else is noted
            names.setdefault(split, set()).update(values)
    return {
        f"{split}/{name}": run.final(split, name)
        for split, found in names.items()
        for name in found - {"split", "step", "epoch", "wall_time"}
    }


def _rank(name: str, value: Any) -> tuple[int, float, str]:
    """A key that sorts the values of a field: unset ones, numbers, then text."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    order = _ORDERS.get(name, ())
    return 2, float(order.index(value)) if value in order else len(order), text(value)


def _by_seed(run: Run) -> tuple[float, str]:
    return number(run.setting("seed")), str(run.workdir)


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value
    return flat
