"""The test metric of a setting over its seeds, and which differences between settings count."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gnp.analysis.comparison import has_diverged, has_finished, metric
from gnp.analysis.published import Published
from gnp.analysis.runs import Run, number

LEVEL = 0.05  # p below it is significant
LEAST_PAIRS = 3  # seeds that two settings must share to be tested


class Scores(NamedTuple):
    """The test errors in percent, or the perplexities, of one setting's runs.

    Attributes:
      values: the metric by seed; the mean of several runs of one seed. Runs that have not ended
        and those that diverged have none.
      diverged: how many runs came to numbers that are not finite.
      unfinished: how many others have not ended.
    """

    values: Mapping[float, float]
    diverged: int = 0
    unfinished: int = 0

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN where there is none."""
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def std(self) -> float:
        """The sample standard deviation (n − 1) over seeds; NaN of fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if self.n > 1 else math.nan

    @property
    def n(self) -> int:
        """How many seeds there are."""
        return len(self.values)

    @property
    def is_whole(self) -> bool:
        """Whether all of its runs came to a value, so that its mean lacks none."""
        return self.n > 0 and not self.diverged and not self.unfinished


class Paired(NamedTuple):
    """A paired t-test on the seeds that two settings share.

    Attributes:
      p: its two-sided p-value; None with fewer than `LEAST_PAIRS` pairs, and where all differ by
        the same, of which the t-test would be certain without knowing the noise.
      pairs: how many seeds they share.
    """

    p: float | None
    pairs: int


class Cell(NamedTuple):
    """What a table shows of a setting, compared with others.

    Attributes:
      scores: the setting's.
      best: whether it has the lowest mean of those compared.
      against_best: the test against the one that has; None for itself, and without one.
      against_baseline: the test against the baseline; None for itself, and without one.
      published: the paper's figure, if any.
      note: what else is shown beside the number.
    """

    scores: Scores
    best: bool = False
    against_best: Paired | None = None
    against_baseline: Paired | None = None
    published: Published | None = None
    note: str = ""

    @property
    def is_close(self) -> bool:
        """Whether the difference from the best was tested and is not significant."""
        return _p(self.against_best) >= LEVEL

    @property
    def differs(self) -> bool:
        """Whether the difference from the baseline was tested and is significant."""
        return _p(self.against_baseline) < LEVEL


def score(runs: Sequence[Run]) -> Scores:
    """The test metric of runs that are seeds of one setting."""
    values: dict[float, list[float]] = {}
    diverged = sum(map(has_diverged, runs))
    unfinished = sum(not has_finished(run) and not has_diverged(run) for run in runs)
    for run in runs:
        if has_finished(run) and not has_diverged(run):
            key = metric(run)
            value = run.final("test", key) * (100 if key == "error" else 1)
            values.setdefault(number(run.setting("seed") or 0), []).append(value)
    means = {seed: float(np.mean(values[seed])) for seed in sorted(values)}
    return Scores(means, diverged, unfinished)


def preference(scores: Scores) -> tuple[bool, float]:
    """A key that sorts first what to show of several settings: a whole one, of the lowest mean."""
    return not scores.is_whole, scores.mean if scores.n else math.inf


def paired(one: Scores, other: Scores) -> Paired:
    """The two-sided paired t-test of the difference, `scipy.stats.ttest_rel`."""
    seeds = [seed for seed in one.values if seed in other.values]
    if len(seeds) < LEAST_PAIRS:
        return Paired(None, len(seeds))
    a, b = (np.array([scores.values[seed] for seed in seeds]) for scores in (one, other))
    if (a == b).all():  # 0/0 in the statistic; there is no difference
        return Paired(1.0, len(seeds))
    if np.ptp(a - b) <= 1e-9 * np.abs([a, b]).max():  # as of one test image more on each seed
        return Paired(None, len(seeds))

    from scipy import stats  # slow to load

    return Paired(float(stats.ttest_rel(a, b).pvalue), len(seeds))


def compared(
    scores: Sequence[Scores],
    baselines: Sequence[int | None],
    published: Sequence[Published | None],
) -> list[Cell]:
    """Compares settings with the best of them and each with its baseline.

    The best has the lowest mean; there is none among fewer than two settings with a mean. One of
    which a run diverged is never the best: the mean of those that did not is too good. Nor is one
    of which runs have not ended, if another has more seeds.

    Args:
      scores: those of the settings.
      baselines: for each the index of its baseline, itself or None.
      published: for each the paper's figure.
    """
    most = max((each.n for each in scores), default=0)
    means = [
        math.nan if each.diverged or (each.unfinished and each.n < most) else each.mean
        for each in scores
    ]
    best = None
    if sum(each.n > 0 for each in scores) > 1 and not np.isnan(means).all():
        best = int(np.nanargmin(means))

    def against(index: int, other: int | None) -> Paired | None:
        if other is None or other == index or not scores[index].n or not scores[other].n:
            return None
        return paired(scores[index], scores[other])

    return [
        Cell(each, i == best, against(i, best), against(i, baselines[i]), published[i])
        for i, each in enumerate(scores)
    ]


def _p(test: Paired | None) -> float:
    return math.nan if test is None or test.p is None else test.p
