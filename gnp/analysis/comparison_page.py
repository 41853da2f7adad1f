"""The report of many runs: a page with tables and figures, and each of them as files."""

import io
import math
import os
import string
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from gnp.analysis import figures, interactive
from gnp.analysis.comparison import (
    Setting,
    frame,
    group,
    has_diverged,
    has_finished,
    metric,
    settings_of,
    was_pruned,
)
from gnp.analysis.page import NONE, document, duration, entry, inline_svg, number
from gnp.analysis.paper_tables import PAPER_TABLES
from gnp.analysis.run_page import config_tables
from gnp.analysis.runs import Run
from gnp.analysis.scores import Cell
from gnp.analysis.table_formats import Column, Table
from gnp.analysis.tables import compare
from gnp.errors import UserError
from gnp.files import is_remote, write_atomically

_FORMATS = {"html": "page", "md": "Markdown", "tex": "LaTeX", "csv": "CSV"}
_IMAGES = ("svg", "pdf", "png")
_WIDE = 7.5  # inches from which a figure gets a row of its own


class _Part(NamedTuple):
    """A table or a figure on the page; of one that cannot be made only why."""

    title: str
    source: str
    html: str = ""
    why_not: str = ""


def write(runs: Sequence[Run], out: epath.Path, damaged: Sequence[str] = ()) -> epath.Path:
    """Writes the report; see `gnp.report.write_comparison`.

    Args:
      runs: the runs.
      out: the folder.
      damaged: what is wrong with others, which is told.

    Raises:
      UserError: if a configuration is not of this version, or `out` cannot be written.
    """
    settings = group(runs)
    for folder in ("tables", "figures"):
        try:
            (out / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(out / folder, error) from error
    overview = compare(runs)
    _write_table(overview, out)
    tables = [_table(name, runs, out) for name in PAPER_TABLES]
    drawn = [_figure(name, runs, out) for name in figures.PAPER_FIGURES]
    _write(out / "runs.csv", frame(runs).to_csv(index=False, lineterminator="\n"))
    curves = _interactive(runs, out)
    made = "\n".join(part.html for part in tables if part.html)
    body = _BODY.substitute(
        heading=escape(_heading(runs)),
        status="\n".join(_status(runs)),
        summary=escape(_summary(settings)),
        numbers="\n".join(_numbers(settings, overview)),
        overview=_scrolled(overview),
        links=f"{_table_links(overview.name)} · {curves.html}".removesuffix(" · "),
        left_out=_left_out(runs, damaged),
        tables=f"<h2>Tables of the papers</h2>\n{made}" if made else "",
        figures="\n".join(part.html for part in drawn if part.html)
        or "<p>There is nothing to draw.</p>",
        missing=_missing([*tables, *drawn, curves]),
        runs=_scrolled(_table_of_runs(settings)),
        config="\n".join(config_tables(_common(settings))),
    )
    page = document(_heading(runs), body, _STYLE)
    _write(out / "index.html", page)
    return out / "index.html"


# --- Tables and figures -------------------------------------------------------------------------


def _table(name: str, runs: Sequence[Run], out: epath.Path) -> _Part:
    paper = PAPER_TABLES[name]
    try:
        table = paper.make(runs)
    except UserError as error:
        _remove(out / "tables" / f"{name}.{suffix}" for suffix in _FORMATS)
        return _Part(paper.title, paper.source, why_not=str(error))
    _write_table(table, out)
    html = (
        f"<section><h3>{escape(table.title)}</h3>\n"
        f'<p class="faint">{escape(paper.source)} · {_table_links(name)}</p>\n'
        f"{_scrolled(table)}</section>"
    )
    return _Part(paper.title, paper.source, html)


def _write_table(table: Table, out: epath.Path) -> None:
    page = document(table.title, f"<h1>{escape(table.title)}</h1>\n{_scrolled(table)}\n", _STYLE)
    contents = (page, table.to_markdown(), table.to_latex(), table.to_csv())
    for suffix, content in zip(_FORMATS, contents, strict=True):
        _write(out / "tables" / f"{table.name}.{suffix}", content)


def _figure(name: str, runs: Sequence[Run], out: epath.Path) -> _Part:
    paper = figures.PAPER_FIGURES[name]
    try:
        figure = paper.draw(runs)
    except UserError as error:
        _remove(out / "figures" / f"{name}.{suffix}" for suffix in _IMAGES)
        return _Part(paper.title, paper.source, why_not=str(error))
    # Laid out once: to do it for each of the files takes longer than to write them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for suffix in _IMAGES:
        _write(out / "figures" / f"{name}.{suffix}", _image(figure, suffix))
    links = " · ".join(f'<a href="figures/{name}.{suffix}">{suffix}</a>' for suffix in _IMAGES)
    svg = inline_svg(figure, name.replace("_", "-"), f"{paper.title}, {paper.source}")
    width = figure.get_figwidth()
    wide = f' class="wide" style="max-width: {5.5 * width:.4g}rem"' if width >= _WIDE else ""
    html = (
        f"<figure{wide}>\n<figcaption><h3>{escape(paper.title)}</h3> {escape(paper.source)} · "
        f"{links}</figcaption>\n{svg}\n</figure>"
    )
    return _Part(paper.title, paper.source, html)


def _interactive(runs: Sequence[Run], out: epath.Path) -> _Part:
    """The link to the page of curves, which has a script and so is one of its own."""
    title = "Interactive curves"
    try:
        interactive.write(runs, out / "interactive.html")
    except UserError as error:
        _remove([out / "interactive.html"])
        return _Part(title, "interactive.html", why_not=str(error))
    return _Part(title, "", '<a href="interactive.html">interactive curves</a>')


def _image(figure: Figure, suffix: str) -> bytes:
    """A figure as a file, without the time of drawing; its fonts are in it, as journals ask."""
    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with matplotlib.rc_context({"svg.hashsalt": "gnp", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=suffix, dpi=200, metadata=dates[suffix])
    return buffer.getvalue()


def _scrolled(table: Table) -> str:
    """A table that is scrolled where it is wider than the page; its caption stays."""
    label = escape(table.title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n'
        f"{table.to_html(caption=False)}\n</div>\n"
        f'<p class="caption">{escape(table.caption)}</p>'
    )


def _table_links(name: str) -> str:
    return " · ".join(f'<a href="tables/{name}.{x}">{says}</a>' for x, says in _FORMATS.items())


# --- What is said of the runs -------------------------------------------------------------------


def _heading(runs: Sequence[Run]) -> str:
    """The models and data sets, as far as they are few."""

    def names(field: str) -> str:
        found = sorted({str(settings_of(run)[field]) for run in runs})
        return ", ".join(found) if len(found) <= 3 else f"{len(found)} {field.split('.')[0]}s"

    return f"{names('model.name')} on {names('data.name')}: {_count(len(runs), 'run')}"


def _status(runs: Sequence[Run]) -> Iterator[str]:
    finished = sum(map(has_finished, runs))
    kind = "status done" if finished == len(runs) else "status"
    yield f'<p class="{kind}">{finished} of {len(runs)} finished</p>'
    for count, state in (
        (sum(map(has_diverged, runs)), "diverged"),
        (sum(map(was_pruned, runs)), "pruned"),
    ):
        if count:
            yield f'<p class="status">{count} {state}</p>'


def _summary(settings: Sequence[Setting]) -> str:
    fields = ", ".join(settings[0].values) or "the seed alone"
    return f"{_count(len(settings), 'setting')}, which differ in {fields}."


def _numbers(settings: Sequence[Setting], overview: Table) -> Iterator[str]:
    """The key figures."""
    best = [row for row in overview.rows if any(isinstance(x, Cell) and x.best for x in row)]
    if len(best) == 1:
        (label, cell, *_), name = best[0], overview.columns[1].name
        spread = f" ± {cell.scores.std:.2f}" if cell.scores.n > 1 else ""
        yield entry(f"Lowest {name}", f"{cell.scores.mean:.2f}{spread}", label, kind="main")
    yield entry("Settings", str(len(settings)))
    seeds = {len({run.setting("seed") for run in setting.runs}) for setting in settings}
    least, most = min(seeds), max(seeds)
    yield entry("Seeds a setting", f"{least}" if least == most else f"{least} to {most}")
    runs = [run for setting in settings for run in setting.runs]
    yield entry("Runs", str(len(runs)))
    seconds = [run.training_time for run in runs if math.isfinite(run.training_time)]
    yield entry("Time of all", duration(sum(seconds)) if seconds else NONE)


def _left_out(runs: Sequence[Run], damaged: Sequence[str]) -> str:
    """The runs that no mean counts, by name, and those that could not be read."""
    names = _names(runs)
    told = [
        (name, _state(run))
        for name, run in zip(names, runs, strict=True)
        if has_diverged(run) or not has_finished(run)
    ]
    lines = [*(f"{name}: {why}" for name, why in told), *damaged]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h3>Left out of the means</h3>\n<ul>{items}</ul>"


def _state(run: Run) -> str:
    if has_diverged(run):
        return "diverged"
    if has_finished(run):
        return "finished"
    state = "pruned by the search" if was_pruned(run) else "not finished"
    return f"{state}, at epoch {number(run.last[1])} of {number(run.setting('epochs'))}"


def _missing(parts: Sequence[_Part]) -> str:
    items = [
        f"<li>{escape(part.title)} ({escape(part.source)}): {escape(part.why_not)}</li>"
        for part in parts
        if part.why_not
    ]
    if not items:
        return ""
    return (
        "<details>\n<summary><h2>What these runs do not show</h2></summary>\n"
        f"<ul>{''.join(items)}</ul>\n</details>"
    )


def _table_of_runs(settings: Sequence[Setting]) -> Table:
    runs = [run for setting in settings for run in setting.runs]
    names = iter(_names(runs))
    rows = []
    for setting in settings:
        for run in setting.runs:
            key = metric(run)
            final = run.final("test", key) * (100 if key == "error" else 1)
            seed = str(run.setting("seed"))
            rows.append((next(names), setting.label, seed, _state(run), final, run.training_time))
    columns = (
        *(Column("run"), Column("setting"), Column("seed"), Column("state")),
        *(Column("test error (%) or perplexity", "{:.2f}".format), Column("time", duration)),
    )
    return Table("runs", "Runs", "The last test figure of each run.", columns, tuple(rows))


def _names(runs: Sequence[Run]) -> list[str]:
    """The work directories from the folder that holds all of them."""
    places = [os.fspath(run.workdir) for run in runs]
    if any(map(is_remote, places)):
        return places
    places = [os.path.abspath(place) for place in places]
    root = os.path.commonpath(list(map(os.path.dirname, places)))
    return [os.path.relpath(place, root) for place in places]


def _common(settings: Sequence[Setting]) -> dict[str, Any]:
    """The configuration that all runs share, nested."""
    common: dict[str, Any] = {}
    for name, value in settings_of(settings[0].runs[0]).items():
        if name not in settings[0].values and name != "seed":
            section, _, field = name.rpartition(".")
            fields = common.setdefault(section, {}) if section else common
            fields[field] = value
    return common


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}{'s' * (number_of != 1)}"


def _write(path: epath.Path, content: str | bytes) -> None:
    data = content.encode(errors="replace") if isinstance(content, str) else content
    try:
        write_atomically(path, data)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _remove(paths: Iterable[epath.Path]) -> None:
    """Removes what an older report of other runs has left."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(path, error) from error


def _cannot_write(path: epath.Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}")


_STYLE = """\
h2 + .scroll, h3 + .scroll, .faint + .scroll { margin-top: .5rem; }
section { margin-top: 1.5rem; break-inside: avoid; }
ul { margin: .3rem 0; padding-left: 1.3rem; }
a { color: inherit; text-underline-offset: .15em; }
.grid {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); align-items: start;
}
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
.results { width: max-content; margin-bottom: 0; font-size: .9375rem; }
.caption { margin: .4rem 0 1rem; color: var(--faint); font-size: .875rem; max-width: 60rem; }
.results th, .results td {
  width: auto; padding: .25rem 1.2rem .25rem 0; text-align: right; color: inherit;
  font: inherit; font-variant-numeric: tabular-nums;
}
.results .text { text-align: left; max-width: min(22rem, 40vw); }
.results td { white-space: nowrap; }
.results thead th { max-width: 7rem; }
.results thead th { font-weight: 600; border-top: 0; vertical-align: bottom; }
.results td small { display: block; font-size: .86em; white-space: nowrap; }
@media print {
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .results { width: auto; font-size: .7rem; break-inside: auto; }
  .results tr { break-inside: avoid; }
  .results th, .results td { padding-right: .6rem; white-space: normal; }
}
"""

_BODY = string.Template("""\
<header>
<h1>$heading</h1>
$status
</header>
<main>
<p class="summary">$summary</p>
<dl>
$numbers
</dl>
<h2>All settings</h2>
<p class="faint"><a href="runs.csv">all runs as CSV</a> · $links</p>
$overview
$left_out
$tables
<h2>Figures</h2>
<div class="grid">
$figures
</div>
$missing
<details>
<summary><h2>Runs</h2></summary>
$runs
</details>
<details>
<summary><h2>Configuration in common</h2></summary>
<div class="tables">
$config
</div>
</details>
</main>
""")
