"""Settings in the rows and columns of a paper's table.

`facts` reads from a setting what the papers' tables tell apart, `pivot` lays settings out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gnp.analysis import published
from gnp.analysis.comparison import Setting, group, settings_of
from gnp.analysis.labels import text
from gnp.analysis.runs import Run, number
from gnp.analysis.scores import Cell, Scores, compared, preference, score
from gnp.analysis.table_formats import Column, Table, legend
from gnp.analysis.tables import mean_gradients, metric_name

# The papers' names of data sets and policies, in their order.
DATA = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny_imagenet": "Tiny-ImageNet",
    "imagenet": "ImageNet",
    "imagenet2012": "ImageNet",
    "ptb": "Penn TreeBank",
}
POLICIES = {
    "off": "no GR",
    "none": "GR",
    "r": "GR, r-warmup",
    "lambda": "GR, λ-warmup",
    "zero": "GR, zero-warmup",
}
# SWD Table 1, its columns in order.
METHODS = ("AdamS", "SGD", "Adam", "AMSGrad", "AdamW", "AdaBound", "Padam", "Yogi", "RAdam")
# What may be set of a model and leave its size.
_SAME_SIZE = ("model.name", "model.scan", "model.remat", "model.pretrained")
# What the tables tell themselves.
_TOLD = ("model.", "data.name", "gr.policy", "optimizer.", "weight_decay.kind", "lr.warmup", "seed")


class Fact(NamedTuple):
    """A setting by what the papers' tables tell apart."""

    setting: Setting
    scores: Scores
    family: str  # "vit", "swin", …
    model: str
    data: str
    length: str  # ", 200 epochs", where those of the model on the data set differ
    optimizer: str
    policy: str
    warms: bool  # the learning rate
    decay: float  # λ

    @property
    def task(self) -> str:
        """What it is trained on, and for how long where that differs."""
        return self.data + self.length


class Place(NamedTuple):
    """Where a setting stands in a table.

    Attributes:
      row: the texts that its row begins with.
      column: the heading of its column.
      rivals: what those that it is compared with have in common.
      is_baseline: whether they are compared with it.
    """

    row: tuple[str, ...]
    column: str
    rivals: tuple[Any, ...]
    is_baseline: bool


def facts_of(runs: Sequence[Run]) -> list[Fact]:
    """The settings of runs, ordered as the papers' tables."""
    facts = []
    settings = group(runs)
    lengths: dict[tuple[str, str], set[float]] = {}
    for setting in settings:
        run = setting.runs[0]
        key = _model(run), str(run.setting("data.name"))
        lengths.setdefault(key, set()).add(number(run.setting("epochs")))
    for setting in settings:
        run = setting.runs[0]
        name, data = str(run.setting("model.name")), str(run.setting("data.name"))
        # Longer training is no merit of a policy or an optimizer.
        several = len(lengths[_model(run), data]) > 1
        length = f", {text(run.setting('epochs'))} epochs" if several else ""
        method = published.method(run)
        facts.append(
            Fact(
                setting,
                score(setting.runs),
                name.split("_")[0],
                _model(run),
                DATA.get(data, data),
                length,
                method,
                run.setting("gr.policy") or "off",
                published.has_warmup(run),
                number(run.setting("weight_decay.value")),
            )
        )
    return sorted(
        (fact for fact in facts if fact.policy in POLICIES),
        key=lambda fact: (
            rank(fact.model.split(" (")[0], published.MODELS.values()),
            fact.model,
            rank(fact.optimizer, METHODS),
            fact.warms,
            rank(fact.policy, POLICIES),
        ),
    )


def rank(name: str, order: Iterable[str]) -> tuple[int, str]:
    """A key that sorts names in an order, those that it lacks last."""
    names = list(dict.fromkeys(order))
    return (names.index(name), "") if name in names else (len(names), name)


def task_rank(fact: Fact) -> tuple[Any, ...]:
    """A key that sorts by the data set, in the papers' order, and the length of training."""
    return rank(fact.data, DATA.values()), number(fact.setting.runs[0].setting("epochs"))


def _model(run: Run) -> str:
    """The paper's name of a model, with the fields that are not those of its name."""
    fields = settings_of(run)
    name = fields["model.name"]
    name = "VGG16-BN" if name == "vgg16_bn" else published.MODELS.get(name, name)
    given = [
        f"{field.removeprefix('model.').replace('_', ' ')} {text(size)}"
        for field, size in fields.items()
        if field.startswith("model.") and size is not None and field not in _SAME_SIZE
    ]
    return f"{name} ({', '.join(given)})" if given else name


def pivot(
    name: str,
    title: str,
    heads: tuple[str, ...],
    facts: Sequence[Fact],
    place: Callable[[Fact], Place],
    order: Callable[[Fact], Any],
    table: str,
    *,
    baseline: str = "",
    axis: str = "",
    cost: bool = False,
) -> Table:
    """Settings in rows and columns, each compared with its rivals.

    Args:
      name: that of the table's files.
      title: what it is.
      heads: the headings of the texts that rows begin with.
      facts: the settings; rows are in their order.
      place: where a setting stands.
      order: the key that columns are sorted by.
      table: the published table whose figures stand beside ours.
      baseline: what `Place.is_baseline` marks, in words.
      axis: another field that columns or rows tell.
      cost: whether a last column has the gradients a step.
    """
    places: dict[tuple[tuple[str, ...], str], list[Fact]] = {}
    for fact in facts:
        places.setdefault(place(fact)[:2], []).append(fact)
    chosen = {
        key: min(members, key=lambda fact: preference(fact.scores))
        for key, members in places.items()
    }
    rivals: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
    for key, fact in chosen.items():
        rivals.setdefault(place(fact).rivals, []).append(key)
    cells: dict[tuple[tuple[str, ...], str], Cell] = {}
    for keys in rivals.values():
        members = [chosen[key] for key in keys]
        base = next((i for i, fact in enumerate(members) if place(fact).is_baseline), None)
        judged = compared(
            [fact.scores for fact in members],
            [base] * len(members),
            [_published(fact.setting.runs[0], table) for fact in members],
        )
        cells |= dict(zip(keys, judged, strict=True))
    if len({cell.scores.n for cell in cells.values()}) > 1:
        cells = {key: cell._replace(note=f"n = {cell.scores.n}") for key, cell in cells.items()}
    columns = list(dict.fromkeys(place(fact).column for fact in sorted(facts, key=order)))
    rows = []
    for row in dict.fromkeys(row for row, _ in places):
        values: list[Any] = [*row, *(cells.get((row, column)) for column in columns)]
        if cost:
            settings = [fact.setting for key, fact in chosen.items() if key[0] == row]
            values.append(mean_gradients([run for each in settings for run in each.runs]))
        rows.append(tuple(values))
    searched = max(map(len, places.values()))
    caption = [
        f"{metric_name(run for fact in facts for run in fact.setting.runs).capitalize()}.",
        *legend(list(cells.values()), baseline),
    ]
    if searched > 1:
        caption.append(
            f"In some places there are up to {searched} settings, of which the one with the lowest "
            "mean test error is shown, which is a choice made on the test set."
        )
    others = {name for keys in rivals.values() for name in _others([chosen[key] for key in keys])}
    others.discard(axis)
    if others:
        caption.append(f"What is compared differs in {', '.join(sorted(others))} too.")
    last = (Column("gradients a step", "{:.2f}".format),) if cost else ()
    all_columns = (*map(Column, (*heads, *columns)), *last)
    return Table(name, title, " ".join(caption), all_columns, tuple(rows))


def _others(facts: Sequence[Fact]) -> Iterator[str]:
    """The fields that rivals differ in beside those that a table tells."""
    all_fields = [settings_of(fact.setting.runs[0]) for fact in facts]
    for name in {name for fields in all_fields for name in fields if not name.startswith(_TOLD)}:
        if len({repr(fields[name]) for fields in all_fields if name in fields}) > 1:
            yield name


def _published(run: Run, table: str) -> published.Published | None:
    """The figure in a table, or in another one: GR Table 2 refers to Table 1 for runs without."""
    return published.find(run, table) or published.find(run)
