"""The table of any runs: all settings beside each other, what they came to and what they cost.

`Table` has `to_html`, `to_markdown`, `to_latex` and `to_csv`. The papers' tables are in
`gnp.analysis.paper_tables`.

    runs = comparison.find(["runs/sweep"])
    print(tables.compare(runs).to_markdown())
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from gnp.analysis import published
from gnp.analysis.comparison import gradients_per_step, group, has_finished, metric, settings_of
from gnp.analysis.page import duration
from gnp.analysis.runs import Run
from gnp.analysis.scores import Cell, Scores, compared, preference, score
from gnp.analysis.table_formats import Column, Table, legend
from gnp.errors import UserError


def compare(runs: Sequence[Run]) -> Table:
    """All settings of the runs, a row each, with what they cost.

    Settings compete within a data set, a model's name and a length. The baseline of one with
    gradient regularization is the same setting without; otherwise it is AdamW (Adam with decoupled
    decay) with the same other fields, of several the one with the lowest mean.

    Raises:
      UserError: if there are no runs, or a configuration is not of this version.
    """
    settings = group(runs)
    if not settings:
        raise UserError("there are no runs to compare")
    fields = [settings_of(setting.runs[0]) for setting in settings]
    scores = [score(setting.runs) for setting in settings]
    plain = [_plain(i, fields) for i in range(len(settings))]
    cells: list[Cell] = [Cell(each) for each in scores]
    for members in _together([(f["data.name"], f["model.name"], f["epochs"]) for f in fields]):
        baselines = [
            plain[i] if plain[i] is not None else _adamw(i, members, fields, scores)
            for i in members
        ]
        judged = compared(
            [scores[i] for i in members],
            [None if b is None else members.index(b) for b in baselines],
            [published.find(settings[i].runs[0]) for i in members],
        )
        for i, cell in zip(members, judged, strict=True):
            cells[i] = cell
    times = [_mean(run.training_time for run in setting.runs) for setting in settings]
    speeds = [_mean(run.speed for run in setting.runs) for setting in settings]
    columns: dict[Column, Sequence[Any]] = {
        Column("setting"): [setting.label for setting in settings],
        Column(metric_name(runs)): cells,
        Column("seeds"): [cell.scores.n for cell in cells],
        Column("p, best"): [cell.against_best for cell in cells],
        Column("p, baseline"): [cell.against_baseline for cell in cells],
        Column("gradients a step", "{:.2f}".format): [
            mean_gradients(setting.runs) for setting in settings
        ],
        Column("time", duration): times,
        Column("time / without GR", "{:.2f}".format): [
            speeds[j] / speed if j is not None and speed > 0 else None
            for speed, j in zip(speeds, plain, strict=True)
        ],
    }
    # A column without a value in any row says nothing.
    shown = {c: v for c, v in columns.items() if any(x is not None and x == x for x in v)}
    caption = [
        *legend(cells, "the baseline"),
        "Settings of one data set, model and length are compared; the baseline is the same setting "
        "without GR, or else with AdamW."
        * any(cell.against_baseline is not None for cell in cells),
        "Several runs of one seed count as one, their mean."
        * any(len({run.setting("seed") for run in x.runs}) < len(x.runs) for x in settings),
        "Time is that of the runs' clocks; time / without GR is of their steps alone, without "
        "compiling. Runs that went side by side slowed each other down."
        * any(time == time for time in times),
    ]
    return Table(
        "comparison",
        "All settings",
        " ".join(filter(None, caption)),
        tuple(shown),
        tuple(zip(*shown.values(), strict=True)),
    )


def _plain(index: int, fields: Sequence[dict[str, Any]]) -> int | None:
    """The setting that differs in having no gradient regularization."""
    if fields[index]["gr.policy"] == "off":
        return None
    return next(
        (
            i
            for i, other in enumerate(fields)
            if other["gr.policy"] == "off"
            and _without(other, "gr.") == _without(fields[index], "gr.")
        ),
        None,
    )


def _adamw(
    index: int,
    members: Sequence[int],
    fields: Sequence[dict[str, Any]],
    scores: Sequence[Scores],
) -> int | None:
    """The best setting that differs in the optimizer and the decay only, and is AdamW."""

    def others(i: int) -> dict[str, Any]:
        return _without(fields[i], "optimizer.", "weight_decay.")

    twins = [
        i
        for i in members
        if (fields[i]["optimizer.name"], fields[i]["weight_decay.kind"]) == ("adam", "decoupled")
        and others(i) == others(index)
        and scores[i].n
    ]
    return min(twins, key=lambda i: preference(scores[i]), default=None)


def _without(fields: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not name.startswith(prefixes)}


def _together(keys: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal keys, together."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def mean_gradients(runs: Sequence[Run]) -> float:
    """The mean number of gradients a step of the runs that have ended; of all where none has."""
    ended = list(filter(has_finished, runs))
    return float(np.mean([gradients_per_step(run) for run in ended or runs]))


def _mean(values: Iterable[float]) -> float:
    """The mean of the values that are numbers, as those of runs that have ended; else NaN."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def metric_name(runs: Iterable[Run]) -> str:
    """What tables call the metric that runs are judged by."""
    used = set(map(metric, runs))
    names = {"error": "test error (%)", "perplexity": "test perplexity"}
    return " or ".join(name for key, name in names.items() if key in used)
