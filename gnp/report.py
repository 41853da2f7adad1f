"""Writes the report of a run: `python -m gnp.report DIR` leaves DIR/report.html.

The report is one file that shows its figures without a network and without scripts. The same
work directory and command give the same bytes.
"""

import io
import json
import math
import os
import re
import string
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from gnp import command_line
from gnp.analysis import figures, runs
from gnp.errors import UserError
from gnp.files import is_remote, write_atomically

_NONE = "–"  # stands where there is no value
_SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit


class _Panel(NamedTuple):
    """One figure of the report, shown where one of its metrics has a value."""

    title: str
    note: str
    draw: Callable[[runs.Run], Figure]
    metrics: Sequence[tuple[str, str, str]]  # split, key, what the figure calls it
    percent: bool = False


def _of_each_split(key: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((split, key, split) for split in ("train", "validation", "test"))


_PANELS = (
    _Panel("Perplexity", "exp(loss).", figures.perplexity, _of_each_split("perplexity")),
    _Panel(
        "Error",
        "Images, or words, that are predicted wrongly.",
        figures.error,
        _of_each_split("error"),
        percent=True,
    ),
    _Panel("Loss", "Mean over images or words, in nats.", figures.loss, _of_each_split("loss")),
    _Panel(
        "Gradient norm",
        "Of the first and, if any, the perturbed gradient.",
        figures.gradient_norm,
        (("train", "grad_norm", "at θ"), ("train", "perturbed_grad_norm", "at θ + ε")),
    ),
    _Panel(
        "Radius and ratio",
        "Of the gradient regularization, as applied.",
        figures.regularization,
        (("train", "radius", "radius"), ("train", "ratio", "ratio")),
    ),
    _Panel(
        "Learning rate",
        "η, as applied.",
        figures.learning_rate,
        (("train", "learning_rate", "learning rate"),),
    ),
    _Panel(
        "Weight norm",
        "L2 norm of all parameters.",
        figures.weight_norm,
        (("train", "weight_norm", "weight norm"),),
    ),
    _Panel(
        "Scheduled weight decay",
        "Its factor 1/√v̄ on the decay.",
        figures.decay_factor,
        (("train", "swd_factor", "1/√v̄"),),
    ),
)

_GR = {
    "off": "No gradient regularization",
    "none": "Gradient regularization without warmup",
    "r": "Gradient regularization with r-warmup",
    "lambda": "Gradient regularization with λ-warmup",
    "zero": "Gradient regularization with zero-warmup",
}


def write(workdir: str | os.PathLike[str], command: str | None = None) -> epath.Path:
    """Writes the report of a run into its work directory.

    Args:
      workdir: the work directory; the run may have ended or not.
      command: the command line that made the run; by default the one in the run's result.

    Returns:
      The file that was written.

    Raises:
      UserError: if the directory does not hold a run, or cannot be written to.
    """
    run = runs.load(workdir)
    noted = (run.result or {}).get("command")
    command = command or (noted if isinstance(noted, str) else None)
    path = run.workdir / "report.html"
    page = _page(run, command)
    try:
        # Half a surrogate pair, as in a file name that is not UTF-8, has no encoding.
        write_atomically(path, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def main() -> int:
    """Parses the directories and writes their reports."""
    parser = command_line.Parser("gnp.report", "Writes the report of a run, DIR/report.html.")
    directory = command_line.directory
    parser.add_argument(
        "workdirs", metavar="DIR", nargs="+", type=directory, help="the work directory of a run"
    )
    for workdir in parser.parse_args().workdirs:
        print(write(workdir))
    return 0


# --- The page -----------------------------------------------------------------------------------


def _page(run: runs.Run, command: str | None) -> str:
    model, data = (str(run.setting(f"{part}.name") or "?") for part in ("model", "data"))
    panels = [p for p in _PANELS if any(run.has(split, key) for split, key, _ in p.metrics)]
    return _TEMPLATE.substitute(
        title=escape(f"{model} on {data}: {_name(run)}"),
        heading=escape(f"{model} on {data}"),
        workdir=escape(_name(run)),
        status=_status(run),
        summary=escape(_summary(run)),
        numbers="\n".join(_numbers(run)),
        shaded="Shaded: the warmup. " if max(run.gr_warmup, run.learning_rate_warmup) > 0 else "",
        figures="\n".join(_figure(run, p, f"figure-{i}") for i, p in enumerate(panels, start=1))
        or "<p>Nothing has been logged yet.</p>",
        config="\n".join(_config_tables(run.config)),
        # Each word is an inline block, so that lines do not break after the hyphens of an option.
        command=re.sub(r"(\S+)", r"<span>\1</span>", escape(command or "not recorded")),
        params=_params_hash(run),
    )


def _name(run: runs.Run) -> str:
    """That of the work directory, which may be written as "."."""
    return (run.workdir if is_remote(run.workdir) else run.workdir.resolve()).name


def _status(run: runs.Run) -> str:
    """Whether the run ended, and how far it came where it did not; a warning if it diverged."""
    _, epoch = run.last
    if run.result is not None:
        text = '<p class="status done">finished</p>'
    else:
        progress = f"at epoch {_number(epoch)} of {_number(run.setting('epochs'))}"
        text = f'<p class="status">not finished: {escape(progress)}</p>'
    if run.metrics.get("train") and not math.isfinite(run.final("train", "loss")):
        text += '\n<p class="status">diverged: the last training loss is not finite</p>'
    return text


def _summary(run: runs.Run) -> str:
    """What was trained and how, in a sentence's length."""

    def setting(name: str) -> str:
        return _number(run.setting(name))

    policy = str(run.setting("gr.policy") or "off")
    gr = _GR.get(policy, f"Gradient regularization {policy}")
    if policy != "off":
        gr += f" (r = {setting('gr.radius')}, λ/r = {setting('gr.ratio')})"
    rate = f"{setting('lr.schedule')} learning rate {setting('lr.base')}"
    if run.learning_rate_warmup:
        rate += f" after {_number(run.learning_rate_warmup)} epochs of warmup"
    decay = "no weight decay"
    if run.setting("weight_decay.kind") not in (None, "none"):
        decay = f"{setting('weight_decay.kind')} weight decay {setting('weight_decay.value')}"
    epochs = setting("epochs")
    length = f"{epochs} {'epoch' if epochs == '1' else 'epochs'}, "
    length += f"batch size {setting('data.batch_size')}"
    augment = str(run.setting("data.augment") or "none")
    augment = "no augmentation" if augment == "none" else f"augmentation {augment}"
    if any(run.has(split, "perplexity") for split in run.metrics):
        augment = f"{setting('data.sequence_length')} words a step"
    # The sizes that are not those of the model's name.
    fields = run.setting("model")
    fields = fields if isinstance(fields, dict) else {}
    sizes = {k: v for k, v in fields.items() if k != "name" and v is not None}
    model = ", ".join(f"{name} {_number(size)}" for name, size in sizes.items())
    seed = f"seed {setting('seed')}"
    parts = (model, gr, setting("optimizer.name"), rate, decay, augment, length, seed)
    return f"{_SPACE}· ".join(filter(None, parts))


def _numbers(run: runs.Run) -> Iterator[str]:
    """The key figures: the final ones, or the latest of a run that has not ended."""
    result = run.result or {}
    step, epoch = run.last
    of_text = run.has("test", "perplexity")
    key, show = ("perplexity", _perplexity) if of_text else ("error", _percent)
    yield _entry(f"Test {key}", show(run.final("test", key)), kind="main")
    if run.has("validation", key):
        yield _entry(f"Validation {key}", show(run.final("validation", key)))
    yield _entry(f"Train {key}", show(run.final("train", key)), "last logged")
    yield _entry("Test loss", _decimal(run.final("test", "loss")))
    yield _entry("Train loss", _decimal(run.final("train", "loss")), "last logged")
    noted = {key: runs.number(result.get(key)) for key in ("steps", "epochs", "wall_time")}
    steps = int(step if math.isnan(noted["steps"]) else noted["steps"])
    epochs = epoch if math.isnan(noted["epochs"]) else noted["epochs"]
    yield _entry("Epochs", _number(round(epochs, 1)), f"{steps:,} steps")
    seconds = noted["wall_time"]
    if math.isnan(seconds):
        ends = [run.series(split, "wall_time")[1][-1:] for split in run.metrics]
        seconds = max((end.item() for end in ends if end.size), default=math.nan)
    speed = ""
    for unit in ("images", "words"):
        if run.has("train", f"{unit}_per_second"):
            speeds = run.series("train", f"{unit}_per_second")[1]
            speed = f"{np.nanmedian(speeds):,.0f} {unit}/s"
    yield _entry("Time", _time(seconds), speed)
    if run.has("train", "data_wait"):
        waits = run.series("train", "data_wait")[1]
        yield _entry("Waiting for data", _percent(np.nanmean(waits)), "mean share of the time")
    num_params = runs.number(result.get("num_params"))
    if num_params > 0:
        yield _entry("Parameters", f"{num_params:,.0f}")
    if result.get("devices"):
        yield _entry("Devices", str(result["devices"]))


def _entry(name: str, value: str, note: str = "", kind: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="{kind}"><dt>{name}</dt><dd>{escape(value)} {small}</dd></div>'


def _figure(run: runs.Run, panel: _Panel, name: str) -> str:
    label = f"{panel.title} against the epoch. {_description(run, panel)}"
    svg = _inline_svg(panel.draw(run), name, label)
    return (
        f"<figure>\n<figcaption><h3>{panel.title}</h3> {panel.note}</figcaption>\n{svg}\n</figure>"
    )


def _description(run: runs.Run, panel: _Panel) -> str:
    """What a reader who does not see the figure learns: where each line starts and ends."""
    parts = []
    for split, key, label in panel.metrics:
        epochs, values = run.series(split, key)
        finite = np.flatnonzero(np.isfinite(values))
        if finite.size:
            first, last = finite[0], finite[-1]
            show = _percent if panel.percent else _number
            parts.append(
                f"{label}: {show(values[first])} at epoch {_number(epochs[first])}, "
                f"{show(values[last])} at epoch {_number(epochs[last])}."
            )
    return " ".join(parts)


def _inline_svg(figure: Figure, name: str, label: str) -> str:
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


def _config_tables(config: dict[str, Any]) -> Iterator[str]:
    """A table a section of the configuration, the fields outside any section first."""
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    for name, fields in {"config": top, **sections}.items():
        rows = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(_value(value))}</td></tr>'
            for key, value in fields.items()
        )
        yield f"<table><caption>{escape(name)}</caption><tbody>{rows}</tbody></table>"


def _params_hash(run: runs.Run) -> str:
    digest = (run.result or {}).get("params_sha256")
    if not digest:
        return ""
    return f"<p>SHA-256 of the final parameters: <code>{escape(str(digest))}</code></p>"


# --- Values as text -----------------------------------------------------------------------------


def _number(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    if math.isfinite(runs.number(value)):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return _NONE if value is None else str(value)


def _decimal(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else _NONE


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else _NONE


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}{_SPACE}%" if math.isfinite(fraction) else _NONE


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return _NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}{_SPACE}h {minutes:02}{_SPACE}min"
    return f"{minutes}{_SPACE}min{_SPACE}{rest:02}{_SPACE}s" if minutes else f"{rest}{_SPACE}s"


def _value(value: Any) -> str:
    """A configuration's value: text as it is, all else as in JSON."""
    if value is None:
        return _NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_TEMPLATE = string.Template("""\
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
</style>
</head>
<body>
<header>
<h1>$heading</h1>
<p class="faint">$workdir</p>
$status
</header>
<main>
<p class="summary">$summary</p>
<dl>
$numbers
</dl>
<h2>Curves</h2>
<p class="faint">${shaded}Rows, where they are many, are faint under their running mean.</p>
<div class="grid">
$figures
</div>
<details>
<summary><h2>Configuration</h2></summary>
<div class="tables">
$config
</div>
</details>
<h2>Command</h2>
<pre><code>$command</code></pre>
$params
</main>
</body>
</html>
""")

if __name__ == "__main__":
    command_line.run(main)
