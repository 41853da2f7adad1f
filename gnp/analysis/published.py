"""The papers' figures as data, to stand beside those of one's own runs.

`published/*.csv` has the tables as they were published, each file with its source: test errors in
percent, mean and standard deviation over seeds. Nothing here is computed or filled in.
"""

import csv
import functools
import importlib.resources
from typing import Any, NamedTuple

from gnp.analysis.runs import Run, number
from gnp.config import parse_duration

# The papers' names of models, optimizers and data sets.
MODELS = {
    "vit_ti": "ViT-Ti",
    "vit_s": "ViT-S",
    "vit_b": "ViT-B",
    "swin_t": "Swin-Tiny",
    "swin_s": "Swin-Small",
    "swin_b": "Swin-Base",
    "cait_xxs12": "CaiT-XXS12",
    "cait_xxs24": "CaiT-XXS24",
    "cait_xs12": "CaiT-XS12",
    "cait_s12": "CaiT-S12",
    "resnet18": "ResNet18",
    "vgg16": "VGG16",
    "vgg16_bn": "VGG16",  # the table does not say with or without BatchNorm
    "densenet121": "DenseNet121",
    "googlenet": "GoogLeNet",
}
OPTIMIZERS = {
    "adam": "Adam",
    "amsgrad": "AMSGrad",
    "yogi": "Yogi",
    "radam": "RAdam",
    "adabound": "AdaBound",
    "padam": "Padam",
    "rmsprop": "RMSProp",
    "sgd": "SGD",
}
_DATA = {"imagenet": "imagenet2012"}

# Fields of the model that leave it the published one.
_SAME_MODEL = ("name", "dropout", "stochastic_depth", "scan", "remat")
# The λ of the papers' recipes (GR: Table 3; SWD: Appendix B), by kind of decay.
_GR_DECAY = {"l2": 0.03, "decoupled": 0.03}
_SWD_DECAY = {"l2": 5e-4, "scheduled": 5e-4, "decoupled": 0.5}


class Published(NamedTuple):
    """A figure of a paper.

    Attributes:
      mean: test error in percent.
      std: its standard deviation over the seeds.
      seeds: how many.
      table: where it stands, as "GR 2" or "SWD 1".
      source: the paper.
    """

    mean: float
    std: float
    seeds: int
    table: str
    source: str


class _Key(NamedTuple):
    model: str
    optimizer: str
    lr_warmup: str
    gr_policy: str
    data: str


_GR = "Zhao et al., ICML 2024, arXiv:2406.09723"
_SWD = "Xie et al., NeurIPS 2023, arXiv:2011.11152"
TABLES = ("GR 1", "GR 2", "GR 4", "GR 5", "SWD 1")


def find(run: Run, table: str | None = None) -> Published | None:
    """The published test error for a run's setting.

    A run has one if its model is a published one in its own size, trained from scratch with the
    paper's weight decay, and if its optimizer, learning-rate warmup (yes or no), policy and data
    set are in a table. The rest of the recipe (epochs, batch, learning rate, r, λ/r) is not
    compared: part of it the GR paper has searched.

    Args:
      run: its configuration decides.
      table: one of `TABLES`; by default the first that has the setting. (ViT-Ti, Adam, CIFAR-100,
        GR without warmup of its own is 39.28 in GR Table 1 and 39.38 in GR Table 2.)

    Returns:
      None where nothing has been published.
    """
    tables = TABLES if table is None else (table,)
    keys = {"GR": _gr_key(run), "SWD": _swd_key(run)}
    for name in tables:
        key = keys[name.split()[0]]
        found = _tables()[name].get(key) if key else None
        if found:
            return found
    return None


def method(run: Run) -> str:
    """The usual name of an optimizer with its decay: Adam (L2), AdamW, AdamS, SGDS and so on."""
    name, kind = run.setting("optimizer.name"), run.setting("weight_decay.kind") or "none"
    base = OPTIMIZERS.get(name, str(name))
    if kind in ("l2", "decoupled", "scheduled"):
        return base + {"l2": "", "decoupled": "W", "scheduled": "S"}[kind]
    return f"{base}, {'no' if kind == 'none' else kind} decay"


def has_warmup(run: Run) -> bool:
    """Whether the learning rate warms up.

    Raises:
      UserError: if the configuration's warmup is no duration.
    """
    return parse_duration(run.setting("lr.warmup") or "0st").value > 0


def _gr_key(run: Run) -> _Key | None:
    if not _has_decay(run, _GR_DECAY):
        return None
    optimizer = OPTIMIZERS.get(run.setting("optimizer.name"), "")
    return _key(run, optimizer, "yes" if has_warmup(run) else "no")


def _swd_key(run: Run) -> _Key | None:
    if not _has_decay(run, _SWD_DECAY) or has_warmup(run):
        return None
    return _key(run, method(run), "no")


def _key(run: Run, optimizer: str, warmup: str) -> _Key | None:
    model = run.setting("model")
    model = model if isinstance(model, dict) else {}
    sizes = {k for k, value in model.items() if value is not None} - {*_SAME_MODEL}
    if sizes or model.get("name") not in MODELS:
        return None
    data = str(run.setting("data.name"))
    policy = str(run.setting("gr.policy") or "off")
    return _Key(MODELS[model["name"]], optimizer, warmup, policy, _DATA.get(data, data))


def _has_decay(run: Run, decays: dict[str, float]) -> bool:
    kind = run.setting("weight_decay.kind")
    return decays.get(kind) == number(run.setting("weight_decay.value"))


@functools.cache
def _tables() -> dict[str, dict[_Key, Published]]:
    """Each table's figures by setting."""
    tables: dict[str, dict[_Key, Published]] = {name: {} for name in TABLES}
    for paper, seeds, source in (("GR", 5, _GR), ("SWD", 3, _SWD)):
        for row in _rows(f"{paper.lower()}.csv"):
            key = _Key(
                *(row["model"], row["optimizer"], row["lr_warmup"]),
                *(row["gr_policy"], row["dataset"]),
            )
            name, mean, std = f"{paper} {row['table']}", row["test_error_percent"], row["std"]
            tables[name][key] = Published(float(mean), float(std), seeds, name, source)
    return tables


def _rows(file: str) -> list[dict[str, Any]]:
    folder = importlib.resources.files("gnp.analysis") / "published"
    lines = (folder / file).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))
