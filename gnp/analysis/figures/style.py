"""How figures look: colours, lines, text and scales.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart, made lighter or
darker until each has a contrast of at least 3:1 with white and with near-black. Lines also
differ in width, dashes or markers, so that they stay apart in a grey print.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, OCHRE, GREY = COLORS = (
    "#1a7fc1",
    "#d55e00",
    "#009e73",
    "#bf5f96",
    "#9a7200",
    "#777777",
)
# The colour of text, axes and shading. Whoever embeds a figure may replace it; no line has it.
INK = "#1a1a1a"
DASHES = ("-", (0, (5, 1.6)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 3)), (0, (3, 3)))
MARKERS = ("o", "s", "^", "D", "v", "X")

# The digits that a logarithmic axis labels in each decade, by how many decades it spans.
_DIGITS = ((1, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,))


def _ink(color: str) -> dict[str, Any]:
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color")
    return dict.fromkeys((*names, "xtick.color", "ytick.color"), color)


# Text that stays readable when a phone shows a figure in the width of its screen.
_STYLE: Any = {
    "figure.figsize": (4.2, 2.6),
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.markersize": 4,
    "errorbar.capsize": 2.5,
    "text.parse_math": False,  # a dollar in the name of a run is a dollar
} | _ink(INK)
_DARK: Any = {"figure.facecolor": "#15181c", "axes.facecolor": "#15181c"} | _ink("#e4e6e9")

_page: contextvars.ContextVar[Any] = contextvars.ContextVar("page", default=None)
_Arguments = ParamSpec("_Arguments")


def styled(draw: Callable[_Arguments, Figure]) -> Callable[_Arguments, Figure]:
    """Lets a function draw in this style; the caller's settings of Matplotlib stay as they are."""

    @functools.wraps(draw)
    def drawn(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE | (_page.get() or {})):
            return draw(*args, **kwargs)

    return drawn


@contextlib.contextmanager
def dark() -> Iterator[None]:
    """Figures drawn inside of `with figures.dark():` are light on dark, for a dark notebook."""
    token = _page.set(_DARK)
    try:
        yield
    finally:
        _page.reset(token)


def ink() -> str:
    """The colour of text and shading in the figure that is being drawn."""
    return matplotlib.rcParams["text.color"]


def drawn_values(axes: Axes) -> np.ndarray:
    """All finite values drawn as lines."""
    values = [np.asarray(line.get_ydata(), np.float64) for line in axes.lines]
    together = np.concatenate([np.empty(0), *values])
    return np.extract(np.isfinite(together), together)


def scale_y(axes: Axes) -> None:
    """A logarithmic axis where all values are positive and the largest is many times the least."""
    values = drawn_values(axes)
    if not values.size or values.min() <= 0 or values.max() < 3 * values.min():
        return
    axes.set_yscale("log")
    label_decades(axes, "y", np.log10(values.max() / values.min()))


def color_ticks(low: float, high: float, *, log: bool = False) -> np.ndarray:
    """A few round values from `low` to `high` for a colour bar, linear or logarithmic."""
    if log:
        digits = _DIGITS[min(int(np.log10(high / low)), len(_DIGITS) - 1)]
        locator: ticker.Locator = ticker.LogLocator(subs=digits, numticks=99)
    else:
        locator = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    ticks = np.asarray(locator.tick_values(low, high))
    return np.extract((ticks >= low) & (ticks <= high), ticks)


def label_decades(axes: Axes, which: str, decades: float) -> None:
    """Labels a logarithmic axis ("x" or "y") that spans so many decades with plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    digits = _DIGITS[min(int(decades), len(_DIGITS) - 1)]
    axis.set_major_locator(ticker.LogLocator(subs=digits))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
