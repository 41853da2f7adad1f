"""Runs as settings with a look each, in panels, and what they are judged by.

A figure has one panel a data set and model; a setting has the same look in all of them.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from gnp.analysis import comparison
from gnp.analysis.comparison import Setting
from gnp.analysis.figures.style import COLORS, DASHES, MARKERS
from gnp.analysis.labels import text
from gnp.analysis.runs import Run
from gnp.errors import UserError

PANEL = ("data.name", "model.name")  # the fields in which panels differ
MOST = 18  # settings in a figure; of more, the best

Look = dict[str, Any]  # of a line: colour, dashes, marker


def of(runs: Iterable[Run], across: Sequence[str] = PANEL) -> list[Setting]:
    """The settings of runs, those that differ in the `across` fields (dotted) taken as one."""
    originals, changed = {}, []
    for run in runs:
        config = {k: dict(v) if isinstance(v, dict) else v for k, v in run.config.items()}
        for field in across:
            section, name = field.split(".")
            if isinstance(config.get(section), dict):
                config[section].pop(name, None)  # taken to be at its default
        if "gr.policy" in across and isinstance(config.get("gr"), dict):
            config["gr"]["policy"] = "none"  # with "off" none of its other fields would count
        changed.append(dataclasses.replace(run, config=config))
        originals[id(changed[-1])] = run
    return [
        setting._replace(runs=tuple(originals[id(run)] for run in setting.runs))
        for setting in comparison.group(changed)
    ]


def best(found: Sequence[Setting]) -> tuple[list[Setting], str]:
    """At most `MOST` of the settings, those of least final test error, and what says so."""
    if len(found) <= MOST:
        return list(found), ""
    finals = [np.mean([final(run) for run in setting.runs]) for setting in found]
    kept = sorted(np.argsort(finals, kind="stable")[:MOST])  # NaN comes last
    return [found[i] for i in kept], f"the {MOST} best of {len(found)} settings"


def looks(found: Sequence[Setting]) -> dict[str, Look]:
    """A look for each setting by its label.

    Up to six have a colour, dashes and a marker each. Of more, one field decides the colour and
    the others dashes and marker, where that is enough; if not, the looks are numbered through.
    """
    size = len(COLORS)
    indices = [(i % size, (i + i // size) % size) for i in range(len(found))]
    fields = found[0].values if len(found) > size else {}
    for field in sorted(fields, key=lambda field: -len({repr(s.values[field]) for s in found})):
        one = [repr(setting.values[field]) for setting in found]
        rest = [repr({**setting.values, field: None}) for setting in found]
        if len({*one}) <= size and len({*rest}) <= size:
            colors, dashes = list(dict.fromkeys(one)), list(dict.fromkeys(rest))
            indices = [(colors.index(a), dashes.index(b)) for a, b in zip(one, rest, strict=True)]
            break
    return {
        setting.label: {"color": COLORS[i], "linestyle": DASHES[j], "marker": MARKERS[j]}
        for setting, (i, j) in zip(found, indices, strict=True)
    }


def panels(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each data set and model, by what the panels' titles say of these."""
    by_values: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        values = tuple(text(run.setting(field)) for field in PANEL)
        by_values.setdefault(values, []).append(run)
    differs = [len({*column}) > 1 for column in zip(*by_values, strict=True)]
    named: dict[str, list[Run]] = {}
    for values in sorted(by_values):
        name = ", ".join(value for value, shown in zip(values, differs, strict=True) if shown)
        named.setdefault(name, []).extend(by_values[values])
    return named


def differing(runs: Iterable[Run], value: Callable[[Run], Hashable]) -> list[Run]:
    """The runs of the data sets and models for which the value is not the same in all runs."""
    by_panel = panels(runs).values()
    return [run for inner in by_panel if len({*map(value, inner)}) > 1 for run in inner]


def inside(setting: Setting, runs: Sequence[Run]) -> list[Run]:
    """Those of the setting's runs that are among `runs`."""
    among = {id(run) for run in runs}
    return [run for run in setting.runs if id(run) in among]


def complete(runs: Sequence[Run]) -> list[Run]:
    """The runs that came to their end; all of them, if none did."""
    return [run for run in runs if comparison.has_finished(run)] or list(runs)


def final(run: Run) -> float:
    """What the run is judged by: its final test error in percent, or a text's perplexity.

    NaN of one that diverged: what its parameters had come to be is no result.
    """
    if comparison.has_diverged(run):
        return np.nan
    metric = comparison.metric(run)
    value = run.final("test", metric)
    return (100 if metric == "error" else 1) * value if np.isfinite(value) else np.nan


def ended(runs: Sequence[Run], what: str) -> list[Run]:
    """The runs that came to their end, or diverged.

    Raises:
      UserError: if all of them diverged.
    """
    found = [run for run in runs if comparison.has_finished(run) or comparison.has_diverged(run)]
    if not survivors(found):
        raise UserError(f"{what} needs runs that came to their end and have not diverged")
    return found


def survivors(runs: Iterable[Run]) -> list[Run]:
    """Of runs that have `ended` those that did not diverge."""
    return [run for run in runs if not comparison.has_diverged(run)]


def diverged(runs: Sequence[Run]) -> str:
    """How many of the runs diverged, as "2 of 3"; empty where none did."""
    count = sum(map(comparison.has_diverged, runs))
    return f"{count} of {len(runs)}" if count else ""


def metric_label(runs: Sequence[Run]) -> str:
    """What `final` gives for the runs of a panel."""
    return "test error (%)" if comparison.metric(runs[0]) == "error" else "test perplexity"
