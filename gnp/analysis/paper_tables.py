"""The tables of the GR paper (arXiv:2406.09723) and of the SWD paper (arXiv:2011.11152), from runs.

Each takes runs, of which it uses those that it can place, and gives a `Table` with the published
figure beside ours where there is one. Where several settings belong in one place, as after a search
for the learning rate, it shows the one with the lowest mean, and says so.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gnp.analysis.labels import text
from gnp.analysis.pivot import METHODS, POLICIES, Fact, Place, facts_of, pivot, rank, task_rank
from gnp.analysis.runs import Run
from gnp.analysis.table_formats import Table
from gnp.errors import UserError

_IMAGENETS = ("Tiny-ImageNet", "ImageNet")
_WARMUP_POLICIES = ("r", "lambda", "zero")


def gr_table_1(runs: Sequence[Run]) -> Table:
    """GR Table 1: the test error with and without GR, with and without learning-rate warmup.

    Raises:
      UserError: if no model has runs of `gr.policy` off and none, or all have warmup, or none has.
    """
    facts = [fact for fact in facts_of(runs) if fact.policy in ("off", "none")]
    both = _keys(facts, "off") & _keys(facts, "none")
    if not any((*key[:3], not key[3]) in both for key in both):
        raise UserError(
            "GR Table 1 needs runs with gr.policy off and with none, each with lr.warmup and "
            "without (0st), of one model, optimizer and data set"
        )
    return pivot(
        "gr_table_1",
        "GR Table 1: with and without GR, with and without warmup of the learning rate",
        ("model", "optimizer", "warmup"),
        [fact for fact in facts if (fact.model, fact.optimizer, fact.task, fact.warms) in both],
        lambda fact: Place(
            (fact.model, fact.optimizer, "yes" if fact.warms else "no"),
            f"{fact.task}, {POLICIES[fact.policy]}",
            (fact.model, fact.optimizer, fact.warms, fact.task),
            fact.policy == "off",
        ),
        lambda fact: (task_rank(fact), rank(fact.policy, POLICIES)),
        "GR 1",
        baseline="that without GR",
    )


def gr_table_2(runs: Sequence[Run]) -> Table:
    """GR Table 2: the warmup policies by model and optimizer, ViTs.

    Raises:
      UserError: if no model has runs of `gr.policy` none and of a warmup policy.
    """
    facts = [
        fact for fact in facts_of(runs) if fact.family == "vit" and fact.data not in _IMAGENETS
    ]
    return _policies("gr_table_2", "GR Table 2: warmup policies on ViTs", facts, "vit_*", "GR 2")


def gr_table_4(runs: Sequence[Run]) -> Table:
    """GR Table 4: the warmup policies on Swin and CaiT.

    Raises:
      UserError: if no model has runs of `gr.policy` none and of a warmup policy.
    """
    facts = [
        fact
        for fact in facts_of(runs)
        if fact.family in ("swin", "cait") and fact.data not in _IMAGENETS
    ]
    title = "GR Table 4: warmup policies on Swin and CaiT"
    return _policies("gr_table_4", title, facts, "swin_* or cait_*", "GR 4")


def gr_table_5(runs: Sequence[Run]) -> Table:
    """GR Table 5: the warmup policies on Tiny-ImageNet and ImageNet.

    Raises:
      UserError: if no model has runs of `gr.policy` none and of a warmup policy.
    """
    facts = [fact for fact in facts_of(runs) if fact.data in _IMAGENETS]
    title = "GR Table 5: warmup policies on Tiny-ImageNet and ImageNet"
    return _policies("gr_table_5", title, facts, "tiny_imagenet or imagenet", "GR 5")


def swd_table_1(runs: Sequence[Run]) -> Table:
    """SWD Table 1: the test error by optimizer, AdamS beside AdamW, SGD and others.

    Raises:
      UserError: if no model has runs of AdamS and of another of its optimizers.
    """
    facts = [fact for fact in facts_of(runs) if fact.policy == "off" and fact.optimizer in METHODS]
    with_adams = {(fact.model, fact.task) for fact in facts if fact.optimizer == "AdamS"}
    facts = [fact for fact in facts if (fact.model, fact.task) in with_adams]
    if {fact.optimizer for fact in facts} <= {"AdamS"}:
        raise UserError(
            "SWD Table 1 needs runs without GR of AdamS (optimizer.name adam, weight_decay.kind "
            "scheduled) and of AdamW (decoupled), Adam (l2), SGD (sgd, l2) or others, of one model "
            "and data set"
        )
    return pivot(
        "swd_table_1",
        "SWD Table 1: optimizers",
        ("data set", "model"),
        sorted(facts, key=task_rank),
        lambda fact: Place(
            (fact.task, fact.model),
            fact.optimizer,
            (fact.task, fact.model),
            fact.optimizer == "AdamW",
        ),
        lambda fact: rank(fact.optimizer, METHODS),
        "SWD 1",
        baseline="AdamW",
    )


def weight_decay_study(runs: Sequence[Run]) -> Table:
    """The SWD paper's λ study: the test error against the weight decay, by optimizer.

    Raises:
      UserError: if no optimizer has runs of two weight decays.
    """
    facts = [fact for fact in facts_of(runs) if fact.decay > 0 and fact.policy == "off"]
    decays: dict[tuple[str, ...], set[float]] = {}
    for fact in facts:
        decays.setdefault((fact.model, fact.task, fact.optimizer), set()).add(fact.decay)
    facts = [fact for fact in facts if len(decays[fact.model, fact.task, fact.optimizer]) > 1]
    if not facts:
        raise UserError(
            "the study of λ needs runs without GR of two or more weight_decay.value, of one model, "
            "optimizer and data set"
        )
    return pivot(
        "weight_decay_study",
        "Error against weight decay λ",
        ("data set", "model", "optimizer"),
        sorted(facts, key=task_rank),
        lambda fact: Place(
            (fact.task, fact.model, fact.optimizer),
            f"λ = {text(fact.decay)}",
            (fact.task, fact.model, fact.optimizer),
            False,
        ),
        lambda fact: fact.decay,
        "SWD 1",
        axis="weight_decay.value",
    )


class PaperTable(NamedTuple):
    """A table of a paper: `make(runs)` raises UserError where the runs are not what it shows."""

    title: str
    source: str
    make: Callable[[Sequence[Run]], Table]


_GR, _SWD = "arXiv:2406.09723", "arXiv:2011.11152"
PAPER_TABLES = {
    "gr_table_1": PaperTable("GR with and without warmup", f"{_GR}, Table 1", gr_table_1),
    "gr_table_2": PaperTable("Warmup policies on ViTs", f"{_GR}, Table 2", gr_table_2),
    "gr_table_4": PaperTable("Warmup policies on Swin and CaiT", f"{_GR}, Table 4", gr_table_4),
    "gr_table_5": PaperTable("Warmup policies on ImageNet", f"{_GR}, Table 5", gr_table_5),
    "swd_table_1": PaperTable("Optimizers", f"{_SWD}, Table 1", swd_table_1),
    "weight_decay_study": PaperTable("Error against λ", f"{_SWD}, λ study", weight_decay_study),
}


def _keys(facts: Sequence[Fact], policy: str) -> set[tuple[str, str, str, bool]]:
    """The models, optimizers, data sets and warmups that have a policy."""
    return {(f.model, f.optimizer, f.task, f.warms) for f in facts if f.policy == policy}


def _policies(name: str, title: str, facts: Sequence[Fact], which: str, table: str) -> Table:
    """A row a model, optimizer and policy; a column a data set. With warmup, as in the paper."""
    facts = [fact for fact in facts if fact.warms]
    warmups: set[Any] = set().union(*(_keys(facts, policy) for policy in _WARMUP_POLICIES))
    both = warmups & _keys(facts, "none")
    if not both:
        raise UserError(
            f"{title.split(':')[0]} needs runs of {which} with lr.warmup and gr.policy none, and "
            "of r, lambda or zero, of one model, optimizer and data set"
        )
    return pivot(
        name,
        title,
        ("model", "optimizer", "policy"),
        [fact for fact in facts if (fact.model, fact.optimizer, fact.task, True) in both],
        lambda fact: Place(
            (fact.model, fact.optimizer, POLICIES[fact.policy]),
            fact.task,
            (fact.model, fact.optimizer, fact.task),
            fact.policy == "off",
        ),
        task_rank,
        table,
        baseline="that without GR",
        cost=True,
    )
