"""All curves of many runs in one page, to zoom, hover over and switch on and off.

The page is one file with Plotly inside: it needs no network. A click on a run in the legend hides
it in every panel, a double click all others.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from gnp.analysis import comparison
from gnp.analysis.figures import settings
from gnp.analysis.figures.style import DASHES
from gnp.analysis.interactive_page import DARK, LIGHT, PAGE
from gnp.analysis.runs import Run
from gnp.errors import UserError, printable
from gnp.files import write_atomically

if TYPE_CHECKING:  # it takes a second to load
    from plotly.graph_objects import Figure

_MOST_POINTS = 1000  # of a line
_FEW_POINTS = 60  # up to which each has a marker
_LONGEST = 44  # characters of a run's name in the legend; hovering shows more of it
_COLUMNS = 2
_HEIGHT = 310  # pixels of a panel with what is between it and the next
_GAP = 78  # of these what is between
_PLOTLY_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "x")


class _Panel(NamedTuple):
    title: str
    split: str
    key: str
    scale: float = 1.0


_PANELS = (
    _Panel("test error (%)", "test", "error", 100),
    _Panel("test perplexity", "test", "perplexity"),
    _Panel("validation error (%)", "validation", "error", 100),
    _Panel("validation perplexity", "validation", "perplexity"),
    _Panel("training loss", "train", "loss"),
    _Panel("test loss", "test", "loss"),
    _Panel("gradient norm", "train", "grad_norm"),
    _Panel("gradient norm at θ + ε", "train", "perturbed_grad_norm"),
    _Panel("weight norm", "train", "weight_norm"),
    _Panel("learning rate", "train", "learning_rate"),
    _Panel("SWD factor 1/√v̄", "train", "swd_factor"),
    _Panel("std of ln 1/√v", "train", "adaptive_lr_log_std"),
    _Panel("radius r", "train", "radius"),
    _Panel("ratio λ/r", "train", "ratio"),
)
_FINALS = {"error": "final test error (%)", "perplexity": "final test perplexity"}


def write(runs: Sequence[Run], path: str | os.PathLike[str]) -> epath.Path:
    """Writes the page; the same runs give the same bytes.

    Panels of the test error or perplexity, losses, norms, the learning rate, the factor of SWD and
    what GR applied, each against the epoch or the step, and of final test errors against final
    training losses. Of lines with more than 1,000 rows evenly spaced ones are shown.

    Args:
      runs: any number, ended or not.
      path: the file.

    Returns:
      The file.

    Raises:
      UserError: if no run has logged anything, or the file cannot be written.
    """
    from plotly import io

    plot = io.to_html(
        make(runs),
        include_plotlyjs=True,
        full_html=False,
        div_id="curves",
        config={
            "responsive": True,
            "displaylogo": False,
            "showSendToCloud": False,  # a button that would upload the runs to Plotly
            "modeBarButtonsToRemove": ["select2d", "lasso2d"],
        },
    )
    page = PAGE.substitute(plot=plot, themes=json.dumps({"light": LIGHT, "dark": DARK}))
    path = epath.Path(path)
    try:
        # Half a surrogate pair, as in a file name that is not UTF-8, has no encoding.
        write_atomically(path, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def make(runs: Sequence[Run]) -> "Figure":
    """The page's figure, for a notebook; see `write`.

    Raises:
      UserError: if no run has logged anything.
    """
    from plotly.subplots import make_subplots

    panels = [p for p in _PANELS if any(run.has(p.split, p.key) for run in runs)]
    if not panels:
        raise UserError("the interactive page needs runs that have logged something")
    finals = [metric for metric in _FINALS if any(_has_final(run, metric) for run in runs)]
    titles = [panel.title for panel in panels] + [_FINALS[metric] for metric in finals]
    rows = -(-len(titles) // _COLUMNS)
    cells: list[dict[str, Any] | None] = [
        ({} if place < len(titles) else None) for place in range(rows * _COLUMNS)
    ]
    height = rows * _HEIGHT
    figure: Figure = make_subplots(
        rows,
        _COLUMNS,
        specs=[cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)],
        subplot_titles=titles,
        vertical_spacing=_GAP / height if rows > 1 else 0,
        horizontal_spacing=0.07,
    )
    named = _names(runs)
    for number, (run, name, look) in enumerate(named):
        line, marker = look
        about = f"{_shown(name)}<br>{_shown(run.workdir.name)}<br>"
        traces = [_line(run, panel) for panel in panels] + [_point(run, m) for m in finals]
        first = True
        for place, trace in enumerate(traces):
            if trace is None:
                continue
            hover = f"{about}{titles[place]}: %{{y:.5~g}}<br>{trace.pop('hover')}<extra></extra>"
            figure.add_scatter(
                **trace,
                hovertemplate=hover,
                name=_shown(name, _LONGEST),
                line=line,
                marker=marker | ({"size": 9} if trace["mode"] == "markers" else {}),
                legendgroup=f"run-{number}",
                showlegend=first,
                row=place // _COLUMNS + 1,
                col=place % _COLUMNS + 1,
            )
            first = False
    for place in range(len(titles)):
        title = "epoch" if place < len(panels) else "final training loss"
        figure.update_xaxes(title_text=title, row=place // _COLUMNS + 1, col=place % _COLUMNS + 1)
    figure.update_xaxes(showline=True, title_standoff=6)
    figure.update_yaxes(showline=True, exponentformat="power")
    figure.update_layout(
        template={"layout": LIGHT},
        height=height + 40,
        margin={"l": 60, "r": 20, "t": 40, "b": 60},
        legend={"tracegroupgap": 0, "itemwidth": 40, "font_size": 12},
        hovermode="closest",
    )
    return figure


def _names(runs: Sequence[Run]) -> list[tuple[Run, str, tuple[dict[str, Any], dict[str, Any]]]]:
    """The runs by setting and seed, each with its name and the looks of its lines and markers."""
    found = settings.of(runs, across=())
    looks = settings.looks(found)
    named = []
    for setting in found:
        color, dashes = looks[setting.label]["color"], looks[setting.label]["linestyle"]
        index = DASHES.index(dashes)
        line = {"color": color, "dash": _PLOTLY_DASHES[index], "width": 1.8}
        marker = {"color": color, "symbol": _SYMBOLS[index], "size": 5}
        label = "" if setting.label == "all" else f"{setting.label}, "
        for run in setting.runs:
            seed = run.setting("seed")
            named.append((run, f"{label}seed {seed}", (line, marker)))
    counts = Counter(name for _, name, _ in named)
    return [
        (run, name if counts[name] == 1 else f"{run.workdir.name}: {name}", look)
        for run, name, look in named
    ]


def _line(run: Run, panel: _Panel) -> dict[str, Any] | None:
    """A trace of a metric; None where the run has none."""
    if not run.has(panel.split, panel.key):
        return None
    epochs, values = run.series(panel.split, panel.key)
    steps = run.series(panel.split, "step")[1]
    chosen = np.arange(len(values))
    if len(values) > _MOST_POINTS:
        chosen = np.linspace(0, len(values) - 1, _MOST_POINTS).round().astype(int)
    values = np.where(np.isfinite(values), panel.scale * values, np.nan)[chosen]
    return {
        "x": epochs[chosen].tolist(),
        "y": [None if np.isnan(value) else value for value in values.tolist()],
        "customdata": np.stack([epochs, steps], axis=1)[chosen].tolist(),
        "mode": "lines+markers" if len(chosen) <= _FEW_POINTS else "lines",
        "hover": "epoch %{customdata[0]:.5~g}, step %{customdata[1]:,}",
    }


def _point(run: Run, metric: str) -> dict[str, Any] | None:
    """A trace of the final values; None where the run has none."""
    if not _has_final(run, metric):
        return None
    return {
        "x": [run.final("train", "loss")],
        "y": [settings.final(run)],
        "mode": "markers",
        "hover": "final training loss: %{x:.5~g}",
    }


def _has_final(run: Run, metric: str) -> bool:
    if comparison.metric(run) != metric or not comparison.has_finished(run):
        return False
    return bool(np.isfinite(run.final("train", "loss")) and np.isfinite(settings.final(run)))


def _shown(text: str, longest: int = 200) -> str:
    """Text that Plotly shows as it is; the middle of a long one is left out.

    Plotly takes some HTML in names, and %{…} in them for a value.
    """
    text = printable(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 :]}"
    return escape(text, quote=False).replace("%", "&#37;")
