"""What surrounds the curves of `gnp.analysis.interactive`: page, buttons, light and dark."""

import string
from typing import Any

from gnp.analysis.figures.style import COLORS


def _theme(paper: str, ink: str, rule: str, tint: str) -> dict[str, Any]:
    axis = {"gridcolor": rule, "linecolor": ink, "zeroline": False, "automargin": True}
    return {
        "colorway": list(COLORS),
        "paper_bgcolor": paper,
        "plot_bgcolor": paper,
        "font": {"color": ink, "family": "system-ui, sans-serif", "size": 13},
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"bgcolor": tint, "font": {"color": ink}, "align": "left", "namelength": -1},
        "modebar": {"bgcolor": paper, "color": ink, "activecolor": COLORS[0]},
    }


LIGHT = _theme("#ffffff", "#1a1a1a", "#d9dce0", "#f4f5f7")
DARK = _theme("#15181c", "#e4e6e9", "#383d44", "#1e2227")

PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>Curves of the runs</title>
<style>
:root { --paper: #fff; --ink: #1a1a1a; --faint: #5c6168; --rule: #d9dce0; --tint: #f4f5f7; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e6e9; --faint: #a3a9b1; --rule: #383d44; --tint: #1e2227; }
}
body {
  margin: 0; padding: 1rem clamp(.5rem, 2vw, 1.5rem); background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.4rem; margin: 0; }
p { margin: .2rem 0 .6rem; color: var(--faint); }
.bar { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; }
.bar div { display: flex; align-items: center; gap: .4rem; }
button {
  font: inherit; font-size: .9rem; padding: .1rem .7rem; color: inherit;
  background: var(--tint); border: 1px solid var(--rule); border-radius: .4rem; cursor: pointer;
}
button[aria-pressed="true"] { border-color: currentColor; font-weight: 600; }
.scroll { overflow-x: auto; }
.scroll > div { min-width: 54rem; }
</style>
</head>
<body>
<h1>Curves of the runs</h1>
<p>Drag to zoom, double-click to zoom out. Click a run in the legend to hide it in every panel,
double-click it to see it alone.</p>
<div class="bar">
<div role="group" aria-label="horizontal axis">Against
<button data-set="x" data-to="0" aria-pressed="true">epoch</button>
<button data-set="x" data-to="1" aria-pressed="false">step</button></div>
<div role="group" aria-label="scale of the horizontal axis">Horizontal
<button data-set="xaxis" data-to="linear" aria-pressed="true">linear</button>
<button data-set="xaxis" data-to="log" aria-pressed="false">log</button></div>
<div role="group" aria-label="scale of the vertical axis">Vertical
<button data-set="yaxis" data-to="linear" aria-pressed="true">linear</button>
<button data-set="yaxis" data-to="log" aria-pressed="false">log</button></div>
</div>
<noscript><p>The curves need JavaScript, which is in this file.</p></noscript>
<div class="scroll">
$plot
</div>
<script>
const curves = document.getElementById("curves");
const themes = $themes;
const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = (name) => Plotly.relayout(curves, {template: {layout: themes[name]}});
const paintAsWished = () => paint(dark.matches ? "dark" : "light");

// Against the epoch or the step: columns 0 and 1 of the rows' own data. Final values have none.
function setX(column) {
  const numbers = [...curves.data.keys()].filter((i) => curves.data[i].customdata);
  const axes = new Set(numbers.map((i) => (curves.data[i].xaxis || "x").replace("x", "xaxis")));
  const titles = {};
  for (const axis of axes) {
    titles[axis + ".title.text"] = ["epoch", "step"][column];
    titles[axis + ".autorange"] = true;
  }
  const x = numbers.map((i) => curves.data[i].customdata.map((row) => row[column]));
  Plotly.update(curves, {x}, titles, numbers);
}
function setScale(axis, type) {
  const change = {};
  for (const name of Object.keys(curves.layout)) {
    if (name.startsWith(axis)) {
      change[name + ".type"] = type;
      change[name + ".autorange"] = true;
    }
  }
  Plotly.relayout(curves, change);
}
for (const button of document.querySelectorAll("button[data-set]")) {
  button.addEventListener("click", () => {
    const {set, to} = button.dataset;
    if (set === "x") setX(Number(to)); else setScale(set, to);
    for (const other of document.querySelectorAll(`button[data-set="$${set}"]`)) {
      other.setAttribute("aria-pressed", other === button);
    }
  });
}
dark.addEventListener("change", paintAsWished);
addEventListener("beforeprint", () => paint("light"));
addEventListener("afterprint", paintAsWished);
if (dark.matches) paint("dark");
</script>
</body>
</html>
""")
