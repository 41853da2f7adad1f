"""What the pages of reports share: the look, numbers as text, and figures inside the page.

A page is one file that shows its figures without a network and without scripts.
"""

import io
import math
import string
from html import escape
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from gnp.analysis import figures, runs

NONE = "–"  # stands where there is no value
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit


def document(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
      title: as text; it is escaped here.
      body: HTML.
      style: CSS beside that of every page.
    """
    return _DOCUMENT.substitute(title=escape(title), body=body, style=style)


def entry(name: str, value: str, note: str = "", kind: str = "") -> str:
    """A key figure: an entry of a <dl>; `name` and `kind` are HTML, the rest is text."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="{kind}"><dt>{name}</dt><dd>{escape(value)} {small}</dd></div>'


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element that shares a page with others and takes its text colour.

    Args:
      figure: a figure whose text and axes have the colour `figures.INK`.
      name: unique on the page; the element's ids start with it.
      label: what assistive technology says in place of the picture.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    namespace = "{http://www.w3.org/2000/svg}"
    for parent in list(root.iter()):
        for child in list(parent):
            # A <style> would apply to the whole page; the metadata has the time of drawing.
            if child.tag in (f"{namespace}metadata", f"{namespace}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(namespace)
        for key, value in list(element.attrib.items()):
            if key == "id":
                value = f"{name}-{value}"
            elif key == "style":
                value = value.replace(figures.INK, "currentColor")
            elif key.endswith("}href"):
                del element.attrib[key]
                key, value = "href", value.replace("#", f"#{name}-")
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height"):
        del root.attrib[key]  # the page decides; viewBox keeps the proportions
    root.attrib |= {"xmlns": namespace.strip("{}"), "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


# --- Values as text -----------------------------------------------------------------------------


def number(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    if math.isfinite(runs.number(value)):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return NONE if value is None else str(value)


def decimal(value: float) -> str:
    """A loss in four decimals."""
    return f"{value:.4f}" if math.isfinite(value) else NONE


def perplexity(value: float) -> str:
    """A perplexity in two decimals."""
    return f"{value:.2f}" if math.isfinite(value) else NONE


def percent(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.2f}{SPACE}%" if math.isfinite(fraction) else NONE


def duration(seconds: float) -> str:
    """Seconds as hours and minutes, or as minutes and seconds."""
    if not math.isfinite(seconds):
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}{SPACE}h {minutes:02}{SPACE}min"
    return f"{minutes}{SPACE}min{SPACE}{rest:02}{SPACE}s" if minutes else f"{rest}{SPACE}s"


_DOCUMENT = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root {
  --paper: #fff; --ink: #1a1a1a; --faint: #5c6168; --rule: #d9dce0; --tint: #f4f5f7;
  --good: #006b4f; --warn: #a34700;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e4e6e9; --faint: #a3a9b1; --rule: #383d44; --tint: #1e2227;
    --good: #4cc9a0; --warn: #ff9d5c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.25rem clamp(.75rem, 3vw, 2rem) 3rem; max-width: 84rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1.0625rem; }
small, figcaption, .faint { color: var(--faint); font-size: .875rem; }
h3 { color: var(--ink); }
header { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: center; }
header .faint { font-size: 1rem; }
.status {
  padding: .1rem .7rem; border: 1px solid; border-radius: 1rem;
  color: var(--warn); font-weight: 600; font-size: .9375rem;
}
.done { color: var(--good); }
.done::before { content: "✓ "; }
.summary { margin: .5rem 0 1rem; max-width: 60rem; }
dl {
  display: flex; flex-wrap: wrap; gap: .8rem 1.6rem; padding: .8rem 1rem;
  border: 1px solid var(--rule); border-radius: .5rem; background: var(--tint);
  overflow-wrap: break-word;
}
dl div { flex: 1 1 6.5rem; }
dt { color: var(--faint); font-size: .875rem; }
dd { font-size: 1.2rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
dd small { display: block; font-weight: 400; }
dl .main { flex-basis: 12.5rem; }
.main dd { font-size: 2.2rem; line-height: 1.1; }
.main small { margin-top: .3rem; }
.grid {
  display: grid; gap: 1.75rem 2rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
}
figure { display: flex; flex-direction: column; break-inside: avoid; min-width: 0; }
svg { width: 100%; height: auto; margin-top: auto; padding-top: .4rem; }
svg * { stroke-linecap: butt; stroke-linejoin: round; }
svg text, svg tspan { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: 600; margin-top: 2rem; }
summary h2 { display: inline; margin: 0; }
.tables { columns: 19rem; column-gap: 2rem; margin-top: .5rem; }
table { width: 100%; border-collapse: collapse; break-inside: avoid; margin-bottom: 1rem; }
caption { text-align: left; font-weight: 600; }
th, td { text-align: left; vertical-align: baseline; padding: .1rem 0; font-weight: 400;
  border-top: 1px solid var(--rule); }
th { color: var(--faint); width: 50%; padding-right: 1rem; }
code, td { font: .875rem/1.5 ui-monospace, monospace; }
pre { margin: 0; padding: .8rem; border-radius: .5rem; background: var(--tint);
  white-space: pre-wrap; }
pre span { display: inline-block; }
pre + p { margin-top: .5rem; }
@media print {
  body { padding: 0; font-size: .8rem; }
  .grid { grid-template-columns: repeat(2, 1fr); }
  summary { list-style: none; }
  details::details-content { content-visibility: visible; display: block; }
}
$style</style>
</head>
<body>
$body</body>
</html>
""")
