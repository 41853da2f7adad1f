"""A table, and how it is written: HTML, Markdown, LaTeX and CSV.

What stands in cells may come from configurations and file names; each format escapes it.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator
from html import escape
from typing import Any, NamedTuple

from gnp.analysis.scores import LEAST_PAIRS, Cell, Paired

NONE = "–"  # stands where there is no value
_CLOSE, _DIFFERS = "†", "*"
_TEXT = ' class="text"'  # the class of text's cells

_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "≥": r"$\geq$",
    "λ": r"$\lambda$",
    "–": "--",
    "…": r"\dots{}",
    "\N{NO-BREAK SPACE}": "~",
    _CLOSE: r"$^\dagger$",
    _DIFFERS: "$^*$",
}


class Column(NamedTuple):
    """A column: its heading, and how its values are shown where they are not a `Cell` or text."""

    name: str
    show: Callable[[Any], str] = str


class Table(NamedTuple):
    """A table of text, numbers and compared settings.

    Attributes:
      name: that of its files, as "gr_table_2".
      title: what it is, in a line.
      caption: how to read it.
      columns: a text column first.
      rows: a value a column: a `Cell`, a `Paired`, text, a number, or None where there is none.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def _repr_html_(self) -> str:  # what a notebook shows
        return self.to_html()

    def to_html(self, *, caption: bool = True) -> str:
        """A <table> element, with the caption in it or not."""
        head = "".join(
            f'<th scope="col"{_TEXT * is_text}>{escape(column.name)}</th>'
            for column, is_text in zip(self.columns, self._are_text(), strict=True)
        )
        body = []
        for row in self.rows:
            texts = [self._html(c, v) for c, v in zip(self.columns, row, strict=True)]
            body.append(f"<tr>{''.join(map(_html_cell, texts, self._are_text()))}</tr>")
        said = f"<caption>{escape(self.caption)}</caption>" if caption else ""
        return (
            f'<table class="results">{said}\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
            + "\n".join(body)
            + "\n</tbody></table>"
        )

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown under a heading, the caption below."""
        lines = [[_markdown(column.name) for column in self.columns]]
        lines.append([":--" if is_text else "--:" for is_text in self._are_text()])
        for row in self.rows:
            lines.append([self._markdown(c, v) for c, v in zip(self.columns, row, strict=True)])
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {_markdown(self.title)}\n\n{rows}\n\n{_markdown(self.caption)}\n"

    def to_latex(self) -> str:
        """A table environment with the rules of the booktabs package."""
        head = " & ".join(_latex(column.name) for column in self.columns)
        rows = [
            " & ".join(self._latex(c, v) for c, v in zip(self.columns, row, strict=True))
            for row in self.rows
        ]
        alignment = "".join("l" if is_text else "r" for is_text in self._are_text())
        lines = [
            r"% \usepackage[T1]{fontenc} \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(f'{self.title}. {self.caption}')}}}",
            rf"\label{{tab:{self.name}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *(rf"{row} \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """The numbers behind the table in full precision, a column each."""
        buffer = io.StringIO()
        raw = [[_raw(column, row[i]) for row in self.rows] for i, column in enumerate(self.columns)]
        # All parts that the cells of a column have, in the order of the fullest.
        names = [max(map(list, cells), key=len, default=[]) for cells in raw]
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([name for part in names for name in part])
        for i in range(len(self.rows)):
            writer.writerow(
                "" if _is_nothing(cells[i].get(name)) else cells[i][name]
                for cells, part in zip(raw, names, strict=True)
                for name in part
            )
        return buffer.getvalue()

    def _are_text(self) -> list[bool]:
        """For each column whether it has nothing but text."""
        return [all(isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]

    def _html(self, column: Column, value: Any) -> str:
        if not isinstance(value, Cell):
            return escape(_text(column, value))
        number = escape(_value(value))
        number = f"<strong>{number}</strong>" if value.best else number
        small = f"<small>published {escape(_published(value))}</small>" if value.published else ""
        return f"{number}{_marks(value)}{escape(_notes(value))} {small}".rstrip()

    def _markdown(self, column: Column, value: Any) -> str:
        if not isinstance(value, Cell):
            return _markdown(_text(column, value))
        number = f"**{_value(value)}**" if value.best else _value(value)
        number += _markdown(_marks(value)) + _notes(value)
        return f"{number} (published {_published(value)})" if value.published else number

    def _latex(self, column: Column, value: Any) -> str:
        if not isinstance(value, Cell):
            return _latex(_text(column, value))
        number = _latex(_value(value))
        number = rf"\textbf{{{number}}}" if value.best else number
        number += _latex(_marks(value) + _notes(value))
        if value.published:
            number += rf" {{\footnotesize (published {_latex(_published(value))})}}"
        return number


def legend(cells: list[Cell], baseline: str) -> Iterator[str]:
    """The sentences of a caption that explain what the cells show.

    Args:
      cells: all of the table.
      baseline: what each is compared with beside the best, in words.
    """
    counts = {cell.scores.n for cell in cells if cell.scores.n}
    if max(counts, default=0) > 1:
        seeds = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        yield f"Mean ± sample standard deviation over {seeds} seeds."
    if any(cell.best for cell in cells):
        yield "Bold: the lowest mean of those compared."
    if any(cell.is_close for cell in cells):
        yield f"{_CLOSE}: not significantly different from it."
    if any(cell.differs for cell in cells):
        yield f"{_DIFFERS}: significantly different from {baseline}."
    tests = [t for cell in cells for t in (cell.against_best, cell.against_baseline) if t]
    if any(test.p is not None for test in tests):
        yield (
            "Tests: two-sided paired t-test on the seeds in common, at p = 0.05, not corrected for "
            "their number."
        )
    if any(test.p is None for test in tests):
        yield (
            "There is no test where fewer than 3 seeds are in common, or all of them differ by the "
            "same."
        )
    if any(cell.published for cell in cells):
        yield "Published: the paper's figure, with its own recipe and seeds."
    if any(cell.scores.diverged for cell in cells):
        yield "Runs that diverged are not in the mean, which is then not bold."
    if any(cell.scores.unfinished for cell in cells):
        yield (
            "Runs that have not ended are not in the mean, which is then bold only if no other has "
            "more seeds."
        )


def p_value(test: Paired) -> str:
    """A test's p, or why there is none."""
    if test.p is None:
        if test.pairs >= LEAST_PAIRS:
            return f"{NONE} (all differ by the same)"
        return f"{NONE} ({test.pairs} pair{'s' * (test.pairs != 1)})"
    return "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"


def _text(column: Column, value: Any) -> str:
    if _is_nothing(value):
        return NONE
    if isinstance(value, Paired):
        return p_value(value)
    return value if isinstance(value, str) else column.show(value)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _value(cell: Cell) -> str:
    scores = cell.scores
    if not scores.n:
        return "diverged" if scores.diverged else NONE
    spread = f" ± {scores.std:.2f}" if scores.n > 1 else ""
    return f"{scores.mean:.2f}{spread}"


def _marks(cell: Cell) -> str:
    return _CLOSE * cell.is_close + _DIFFERS * cell.differs


def _notes(cell: Cell) -> str:
    scores = cell.scores
    notes = [cell.note] if cell.note else []
    if scores.n:
        total = scores.n + scores.diverged + scores.unfinished
        if scores.diverged:
            notes.append(f"{scores.diverged} of {total} diverged")
        if scores.unfinished:
            notes.append(f"{scores.unfinished} of {total} not finished")
    return f" ({', '.join(notes)})" if notes else ""


def _published(cell: Cell) -> str:
    return f"{cell.published.mean:.2f} ± {cell.published.std:.2f}" if cell.published else ""


def _html_cell(html: str, is_text: bool) -> str:
    return f'<th scope="row"{_TEXT}>{html}</th>' if is_text else f"<td>{html}</td>"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", escape(_one_line(text), quote=False))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in _one_line(text))


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def _raw(column: Column, value: Any) -> dict[str, Any]:
    """A value as the columns of a CSV file."""
    name = column.name
    if isinstance(value, Paired):
        return {name: value.p, f"{name}, pairs": value.pairs}
    if not isinstance(value, Cell):
        return {name: value}
    scores, best, base = value.scores, value.against_best, value.against_baseline
    return {
        name: scores.mean if scores.n else None,
        f"{name}, std": scores.std if scores.n > 1 else None,
        f"{name}, seeds": scores.n,
        f"{name}, diverged": scores.diverged,
        f"{name}, unfinished": scores.unfinished,
        f"{name}, best": int(value.best),
        f"{name}, p against best": best and best.p,
        f"{name}, p against baseline": base and base.p,
        f"{name}, published": value.published and value.published.mean,
        f"{name}, published std": value.published and value.published.std,
    }
