"""Short and readable labels for settings: "gr zero, lr 0.001, decay scheduled 5e-4"."""

from collections.abc import Sequence
from typing import Any

# What labels call a field; those with an empty name are told by their value alone.
_NAMES = {
    "model.name": "",
    "data.name": "",
    "optimizer.name": "",
    "gr.policy": "gr",
    "gr.radius": "r",
    "gr.ratio": "λ/r",
    "gr.warmup": "gr warmup",
    "lr.base": "lr",
    "lr.warmup": "warmup",
    "lr.schedule": "",
    "weight_decay.kind": "decay",
    "weight_decay.value": "decay",
}
ORDER = tuple(_NAMES)  # in which labels tell them, others after these
_WITHOUT = {"lr.warmup": "no warmup", "weight_decay.kind": "no decay"}
# What labels always tell where it differs, and what else follows from them in recipes: from the
# first two the length of a run, from three the learning rate, and so on.
_METHOD = ("model.name", "data.name", "optimizer.name", "weight_decay.kind", "gr.policy")
_CAUSES = {"epochs": 2, "weight_decay": 4, "gr": 5}  # how many of the method; 3 for others


def labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    """A label for each setting; None stands for a field that a setting does not use.

    Fields that follow from the model, the data set and the optimizer are left out, as in recipes
    that have an own batch size for each, and a method's that follow from it. What differs between
    two policies of gradient regularization, or the lengths of two runs of one model, never is.
    """

    def follows(name: str) -> bool:
        causes = _METHOD[: _CAUSES.get(name.split(".")[0], 3)]
        methods = [repr([values.get(cause) for cause in causes]) for values in settings]
        pairs = {(method, repr(x[name])) for method, x in zip(methods, settings, strict=True)}
        return name not in _METHOD and len(pairs) == len(set(methods))

    names = [name for name in (settings[0] if settings else ()) if not follows(name)]
    return [label({name: values[name] for name in names}) for values in settings]


def label(values: dict[str, Any]) -> str:
    """As "vit_ti, gr zero, lr 0.001, decay scheduled 5e-4"; "all" where nothing differs."""
    if values.get("gr.policy") == "off":
        values = {k: x for k, x in values.items() if not k.startswith("gr.") or k == "gr.policy"}
    parts = []
    for name, value in values.items():
        if name == "weight_decay.value" and "weight_decay.kind" in values:
            continue  # beside the kind
        if name in _WITHOUT and str(value) in ("none", "0st", "0ep", "0%"):
            parts.append(_WITHOUT[name])
            continue
        words = [_NAMES.get(name, name.removeprefix("model.").removeprefix("data.")), text(value)]
        if name == "weight_decay.kind" and "weight_decay.value" in values:
            words.append(text(values["weight_decay.value"]))
        parts.append(" ".join(filter(None, words)))
    return ", ".join(parts) or "all"


def text(value: Any) -> str:
    """A configuration's value as short as the command line takes it: 5e-4, 2,2,6,2, none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(text, value)) or "none"
    if isinstance(value, float):
        if value and abs(value) < 1e-3:
            mantissa, exponent = f"{value:.5e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:.6g}"
    return str(value)
