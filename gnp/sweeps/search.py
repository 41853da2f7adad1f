"""Which trial is next: settings drawn by Optuna, of which bad ones may be given up early."""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from gnp.sweeps import directory, summary
from gnp.sweeps.jobs import Outcome, alone
from gnp.sweeps.parameters import Distribution
from gnp.sweeps.processes import Job
from gnp.sweeps.progress import Progress, Watch
from gnp.sweeps.trials import Recipe, Trial, own_seed, resolve


@dataclasses.dataclass
class _Setting:
    """What was drawn, and the trials of it: one a seed."""

    number: int
    trials: list[Trial]
    results: list[dict[str, Any] | None]
    is_pruned: bool
    has_diverged: bool  # one of them has, and no other is begun


class Search:
    """The trials of a search: each setting that is drawn is trained with all seeds.

    A setting's objective is the mean of the metric over its seeds. Pruning judges it by its first
    seed, and from the sixth setting on: if at its n-th evaluation its best is worse than the median
    of what the settings before had at theirs, it is given up.

    Optuna's study lies in OUT/optuna.journal. What is not complete there, since it was interrupted
    or a trial failed, is continued before anything new is drawn.

    Args:
      out: the sweep's directory.
      recipe: what the trials have in common.
      space: what is searched, as `check` gives it.
      arguments: the names in it that are arguments of the config file.
      seeds: the seeds of each setting.
      metric: what is minimised.
      num_settings: how many settings are drawn, those of earlier starts included.
      sampler: "tpe" or "random".
      sampler_seed: setting n depends on it, on n, and for "tpe" on the settings before.
      prune: "none" or "median".

    Attributes:
      failed: the trials that have failed since the start, with the reason.
    """

    def __init__(
        self,
        out: pathlib.Path,
        recipe: Recipe,
        space: Mapping[str, Distribution],
        arguments: Sequence[str],
        seeds: Sequence[int],
        metric: str,
        *,
        num_settings: int,
        sampler: str = "tpe",
        sampler_seed: int = 0,
        prune: str = "none",
    ):
        self._out, self._recipe, self._metric = out, recipe, metric
        self._space, self._arguments, self._seeds = space, arguments, seeds
        self._num_settings, self._sampler, self._sampler_seed = num_settings, sampler, sampler_seed
        self._prunes, self._watch = prune != "none", Watch(metric)
        optuna.logging.set_verbosity(logging.WARNING)
        self._study = optuna.create_study(
            study_name="sweep",
            storage=JournalStorage(JournalFileBackend(str(out / "optuna.journal"))),
            direction="minimize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        self._settings: dict[int, _Setting] = {}
        self.failed: dict[str, str] = {}
        self._unfinished: list[int] = []
        for drawn in self._study.trials:
            if not {*space} <= {*drawn.params}:  # killed while it was drawn
                self._study.tell(drawn.number, state=TrialState.FAIL, skip_if_finished=True)
            elif drawn.state != TrialState.FAIL:
                self._settings[drawn.number] = self._setting(drawn)
                if drawn.state == TrialState.RUNNING:
                    self._unfinished.append(drawn.number)
        directory.check(out, [trial for x in self._settings.values() for trial in x.trials])
        self._waiting: list[Trial] = []
        self._running: set[str] = set()

    def next(self) -> Job | None:
        """The job of the next trial."""
        while not self._waiting:
            if self._unfinished:
                setting = self._settings[self._unfinished.pop(0)]
            elif len(self._settings) < self._num_settings:
                setting = self._draw()
            else:
                return None
            pairs = zip(setting.trials, setting.results, strict=True)
            self._waiting = [trial for trial, result in pairs if result is None]
            self._tell_if_complete(setting)
        trial = self._waiting.pop(0)
        self._running.add(trial.name)
        return alone(self._out, trial)

    def count(self) -> dict[str, int]:
        """How many trials are in which state."""
        settings = self._settings.values()
        done = sum(result is not None for x in settings for result in x.results)
        pruned = sum(
            result is None and trial.name not in self._running
            for x in settings
            for trial, result in zip(x.trials, x.results, strict=True)
            if x.is_pruned
        )
        failed = len(
            {*self.failed}.union(
                trial.name
                for x in settings
                for trial, result in zip(x.trials, x.results, strict=True)
                if x.has_diverged and result is None and trial.name not in self._running
            )
        )
        total = max(self._num_settings, len(settings)) * len(self._seeds)
        waiting = total - done - pruned - failed - len(self._running)
        return {"done": done, "failed": failed, "pruned": pruned, "waiting": waiting}

    def is_unwanted(self, trial: Trial, progress: Progress) -> bool:
        """Whether the trial's setting is worse than the median of the settings before."""
        setting = self._of(trial)
        if directory.result(self._out, trial) is not None:  # it has just ended
            return False
        if self._prunes and not setting.is_pruned and trial is setting.trials[0]:
            drawn = self._report(setting, progress)
            if drawn.should_prune():
                self._study.tell(setting.number, state=TrialState.PRUNED)
                setting.is_pruned = True
                self._waiting = [x for x in self._waiting if x.setting != trial.setting]
        return setting.is_pruned

    def ended(self, trial: Trial, outcome: Outcome) -> Outcome:
        """Notes it; tells Optuna when all seeds of the setting are done."""
        self._running.remove(trial.name)
        setting = self._of(trial)
        result = directory.result(self._out, trial)
        setting.results[setting.trials.index(trial)] = result
        if setting.is_pruned:
            if result:
                return outcome
            directory.note_pruned(self._out, trial)
            return Outcome("pruned", "worse than the median")
        if outcome.state == "failed":
            self.failed[trial.name] = outcome.text
            if any(trial.workdir(self._out).glob("nonfinite-*.npz")):
                self._give_up(setting)
        if result is not None and trial is setting.trials[0]:
            self._report(setting, self._watch.look(trial.workdir(self._out)))
        self._tell_if_complete(setting)
        return outcome

    def advice(self) -> str:
        """What may be done about trials that have failed."""
        if any(setting.has_diverged for setting in self._settings.values()):
            return (
                "the same command tries them again, but for those that diverged: they are judged "
                "the worst"
            )
        return "the same command tries them again"

    def lines(self) -> list[summary.Line]:
        """The settings that were drawn; of the pruned ones what was finished."""
        return [
            summary.line(x.trials[0].setting, x.results, self._metric)
            for x in self._settings.values()
        ]

    def _draw(self) -> _Setting:
        # A sampler of its own for each, so that a sweep that was interrupted draws the same.
        seed = int(
            np.random.SeedSequence([self._sampler_seed, len(self._settings)]).generate_state(1)[0]
        )
        self._study.sampler = (
            optuna.samplers.RandomSampler(seed)
            if self._sampler == "random"
            else optuna.samplers.TPESampler(seed=seed)
        )
        drawn = self._study.ask({name: _distribution(x) for name, x in self._space.items()})
        self._settings[drawn.number] = self._setting(self._study.trials[drawn.number])
        return self._settings[drawn.number]

    def _setting(self, drawn: FrozenTrial) -> _Setting:
        values = {name: str(drawn.params[name]) for name in self._space}
        label = ",".join(f"{name}={_short(drawn.params[name])}" for name in self._space)
        trials = [
            self._recipe.trial(
                values, self._arguments, seed, label=f"{drawn.number:03},{label}", check=False
            )
            for seed in self._seeds
        ]
        results = [directory.result(self._out, trial) for trial in trials]
        return _Setting(
            drawn.number,
            trials,
            results,
            is_pruned=drawn.state == TrialState.PRUNED,
            has_diverged=drawn.state == TrialState.COMPLETE and None in results,
        )

    def _of(self, trial: Trial) -> _Setting:
        return next(x for x in self._settings.values() if trial in x.trials)

    def _report(self, setting: _Setting, progress: Progress) -> optuna.Trial:
        """Tells Optuna the values that it has not heard of."""
        drawn = optuna.Trial(self._study, self._study.trials[setting.number]._trial_id)
        heard = len(self._study.trials[setting.number].intermediate_values)
        for number in range(heard, len(progress.values)):
            drawn.report(progress.values[number], step=number)
        return drawn

    def _give_up(self, setting: _Setting) -> None:
        """Tells Optuna that a setting, which has diverged, is worse than all others."""
        if not setting.has_diverged:
            self._study.tell(setting.number, math.inf)
        setting.has_diverged = True
        self._waiting = [x for x in self._waiting if x.setting != setting.trials[0].setting]

    def _tell_if_complete(self, setting: _Setting) -> None:
        if setting.is_pruned or setting.has_diverged or None in setting.results:
            return
        values = [summary.value(result, self._metric) for result in setting.results]
        # One that is not finite is worse than all others.
        self._study.tell(setting.number, float(np.nan_to_num(np.mean(values), nan=np.inf)))


def check(
    recipe: Recipe, space: Mapping[str, Distribution], seeds: Sequence[int] | None
) -> tuple[dict[str, Distribution], tuple[str, ...], tuple[int, ...]]:
    """The space with its choices as they are written in names, which are arguments, and the seeds.

    Raises:
      UserError: if a parameter, one of its choices or an end of its range is not valid.
    """
    ends, arguments = resolve(recipe, {name: x.ends for name, x in space.items()})
    seeds = own_seed(recipe, seeds)
    first = {name: texts[0] for name, texts in ends.items()}
    for name, texts in ends.items():
        for text in texts:
            recipe.trial({**first, name: text}, arguments, seeds[0])
    checked = {
        name: x._replace(choices=ends[name]) if x.kind == "choice" else x
        for name, x in space.items()
    }
    return checked, arguments, seeds


def _distribution(x: Distribution) -> BaseDistribution:
    """Optuna's."""
    if x.kind == "choice":
        return CategoricalDistribution(x.choices)
    if x.kind == "int":
        return IntDistribution(int(x.low), int(x.high))
    return FloatDistribution(x.low, x.high, log=x.kind == "loguniform")


def _short(value: str | int | float) -> str:
    """A drawn value in a name, which need not be exact beside the number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
