"""The page of one run: what it was, what it came to, its curves and its configuration."""

import json
import math
import re
import string
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from gnp.analysis import figures, runs
from gnp.analysis.page import (
    NONE,
    SPACE,
    decimal,
    document,
    duration,
    entry,
    inline_svg,
    number,
    percent,
    perplexity,
)
from gnp.files import is_remote


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
    _Panel(
        "Adaptive learning rate",
        "How far apart ψ = 1/√v of the parameters are.",
        figures.adaptive_lr,
        (("train", "adaptive_lr_log_std", "std of ln ψ"),),
    ),
)

_GR = {
    "off": "No gradient regularization",
    "none": "Gradient regularization without warmup",
    "r": "Gradient regularization with r-warmup",
    "lambda": "Gradient regularization with λ-warmup",
    "zero": "Gradient regularization with zero-warmup",
}


def page(run: runs.Run, command: str | None = None) -> str:
    """The page as HTML; `command` is the command line that made the run."""
    model, data = (str(run.setting(f"{part}.name") or "?") for part in ("model", "data"))
    panels = [p for p in _PANELS if any(run.has(split, key) for split, key, _ in p.metrics)]
    body = _BODY.substitute(
        heading=escape(f"{model} on {data}"),
        workdir=escape(_name(run)),
        status=_status(run),
        summary=escape(_summary(run)),
        numbers="\n".join(_numbers(run)),
        shaded="Shaded: the warmup. " if max(run.gr_warmup, run.learning_rate_warmup) > 0 else "",
        figures="\n".join(_figure(run, p, f"figure-{i}") for i, p in enumerate(panels, start=1))
        or "<p>Nothing has been logged yet.</p>",
        config="\n".join(config_tables(run.config)),
        # Each word is an inline block, so that lines do not break after the hyphens of an option.
        command=re.sub(r"(\S+)", r"<span>\1</span>", escape(command or "not recorded")),
        params=_params_hash(run),
    )
    return document(f"{model} on {data}: {_name(run)}", body)


def _name(run: runs.Run) -> str:
    """That of the work directory, which may be written as "."."""
    return (run.workdir if is_remote(run.workdir) else run.workdir.resolve()).name


def _status(run: runs.Run) -> str:
    """Whether the run ended, and how far it came where it did not; a warning if it diverged."""
    _, epoch = run.last
    if run.result is not None:
        text = '<p class="status done">finished</p>'
    else:
        progress = f"at epoch {number(epoch)} of {number(run.setting('epochs'))}"
        text = f'<p class="status">not finished: {escape(progress)}</p>'
    if run.metrics.get("train") and not math.isfinite(run.final("train", "loss")):
        text += '\n<p class="status">diverged: the last training loss is not finite</p>'
    return text


def _summary(run: runs.Run) -> str:
    """What was trained and how, in a sentence's length."""

    def setting(name: str) -> str:
        return number(run.setting(name))

    policy = str(run.setting("gr.policy") or "off")
    gr = _GR.get(policy, f"Gradient regularization {policy}")
    if policy != "off":
        gr += f" (r = {setting('gr.radius')}, λ/r = {setting('gr.ratio')})"
    rate = f"{setting('lr.schedule')} learning rate {setting('lr.base')}"
    if run.learning_rate_warmup:
        rate += f" after {number(run.learning_rate_warmup)} epochs of warmup"
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
    model = ", ".join(f"{name} {number(size)}" for name, size in sizes.items())
    seed = f"seed {setting('seed')}"
    parts = (model, gr, setting("optimizer.name"), rate, decay, augment, length, seed)
    return f"{SPACE}· ".join(filter(None, parts))


def _numbers(run: runs.Run) -> Iterator[str]:
    """The key figures: the final ones, or the latest of a run that has not ended."""
    result = run.result or {}
    step, epoch = run.last
    of_text = run.has("test", "perplexity")
    key, show = ("perplexity", perplexity) if of_text else ("error", percent)
    yield entry(f"Test {key}", show(run.final("test", key)), kind="main")
    if run.has("validation", key):
        yield entry(f"Validation {key}", show(run.final("validation", key)))
    yield entry(f"Train {key}", show(run.final("train", key)), "last logged")
    yield entry("Test loss", decimal(run.final("test", "loss")))
    yield entry("Train loss", decimal(run.final("train", "loss")), "last logged")
    noted = {key: runs.number(result.get(key)) for key in ("steps", "epochs", "wall_time")}
    steps = int(step if math.isnan(noted["steps"]) else noted["steps"])
    epochs = epoch if math.isnan(noted["epochs"]) else noted["epochs"]
    yield entry("Epochs", number(round(epochs, 1)), f"{steps:,} steps")
    seconds = noted["wall_time"]
    if math.isnan(seconds):
        ends = [run.series(split, "wall_time")[1][-1:] for split in run.metrics]
        seconds = max((end.item() for end in ends if end.size), default=math.nan)
    speed = ""
    for unit in ("images", "words"):
        if run.has("train", f"{unit}_per_second"):
            speeds = run.series("train", f"{unit}_per_second")[1]
            speed = f"{np.nanmedian(speeds):,.0f} {unit}/s"
    yield entry("Time", duration(seconds), speed)
    if run.has("train", "data_wait"):
        waits = run.series("train", "data_wait")[1]
        yield entry("Waiting for data", percent(np.nanmean(waits)), "mean share of the time")
    num_params = runs.number(result.get("num_params"))
    if num_params > 0:
        yield entry("Parameters", f"{num_params:,.0f}")
    if result.get("devices"):
        yield entry("Devices", str(result["devices"]))


def _figure(run: runs.Run, panel: _Panel, name: str) -> str:
    label = f"{panel.title} against the epoch. {_description(run, panel)}"
    svg = inline_svg(panel.draw(run), name, label)
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
            show = percent if panel.percent else number
            parts.append(
                f"{label}: {show(values[first])} at epoch {number(epochs[first])}, "
                f"{show(values[last])} at epoch {number(epochs[last])}."
            )
    return " ".join(parts)


def config_tables(config: dict[str, Any]) -> Iterator[str]:
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


def _value(value: Any) -> str:
    """A configuration's value: text as it is, all else as in JSON."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_BODY = string.Template("""\
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
""")
