"""Searches: what Optuna draws, hears and prunes, and that a search may be interrupted anywhere."""

import json
import math

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from gnp.errors import UserError
from gnp.sweeps import directory
from gnp.sweeps.jobs import Outcome
from gnp.sweeps.parameters import parse_search
from gnp.sweeps.progress import Progress
from gnp.sweeps.search import Search, check
from gnp.sweeps.trials import Recipe
from tests.sweeps.conftest import ROOT

DIGITS = str(ROOT / "configs/digits.py")
SPACE = "lr.base=loguniform(1e-4,1e-1);model.depth=int(1,3);gr=choice(off,zero)"


def search(out, space=SPACE, *, seeds=(0,), num_settings=4, **more):
    directory.make(out)
    recipe = Recipe.parse(DIGITS, [])
    asked, arguments, seeds = check(recipe, parse_search([space]), seeds)
    return Search(
        *(out, recipe, asked, arguments, seeds, "test/error"), num_settings=num_settings, **more
    )


def study(out):
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    return optuna.load_study(study_name="sweep", storage=storage)


def end(source, out, trial, error):
    """Ends a trial as gnp.train does."""
    workdir = trial.workdir(out)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "result.json").write_text(json.dumps({"test": {"error": error}}))
    return source.ended(trial, Outcome("done"))


def work(source, out, count, error=lambda trial: 0.5):
    """Ends so many trials, and gives them."""
    trials = []
    for _ in range(count):
        (trial,) = source.next().trials
        end(source, out, trial, error(trial))
        trials.append(trial)
    return trials


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_was_interrupted_draws_what_it_would_have_drawn(tmp_path, sampler):
    def error(trial):
        return abs(math.log10(trial.config.lr.base) + 3)

    whole = search(tmp_path / "whole", num_settings=14, sampler=sampler)
    expected = [trial.name for trial in work(whole, tmp_path / "whole", 14, error)]
    assert whole.next() is None
    names = []
    for count in (1, 5, 5, 3):
        source = search(tmp_path / "parts", num_settings=14, sampler=sampler)
        names += [trial.name for trial in work(source, tmp_path / "parts", count, error)]
        source.next()  # is under way when it is interrupted
    assert names == expected
    other = search(tmp_path / "other", num_settings=14, sampler=sampler, sampler_seed=1)
    assert work(other, tmp_path / "other", 1)[0].name != expected[0]


def test_what_is_drawn_is_what_is_trained(tmp_path):
    source = search(tmp_path, num_settings=6, sampler="random")
    trials = work(source, tmp_path, 6)
    for trial, drawn in zip(trials, study(tmp_path).trials, strict=True):
        config, params = trial.config, drawn.params
        assert config.lr.base == params["lr.base"] and 1e-4 <= config.lr.base <= 1e-1
        assert config.model.depth == params["model.depth"] in (1, 2, 3)
        assert config.gr.policy == params["gr"] in ("off", "zero")
        assert drawn.value == 0.5
    assert len({trial.config.lr.base for trial in trials}) == 6
    assert trials[3].name.startswith("003,lr.base=") and trials[3].name.endswith(",seed=0")


@pytest.mark.slow
def test_tpe_comes_closer_than_chance(tmp_path):
    """On the parabola x² of x = log10(rate) + 3, of which it is told nothing but the values.

    The mean of x² over [-5, 3], as chance draws it, is (5³ + 3³) / (3 · 8).
    """

    def error(trial):
        return (math.log10(trial.config.lr.base) + 3) ** 2

    source = search(tmp_path, "lr.base=loguniform(1e-8,1)", num_settings=40)
    trials = work(source, tmp_path, 40, error)
    assert sum(map(error, trials[20:])) / 20 < (5**3 + 3**3) / 24 / 2


def test_the_objective_is_the_mean_over_the_seeds(tmp_path):
    source = search(tmp_path, seeds=(3, 7), num_settings=2)
    trials = work(source, tmp_path, 4, lambda trial: 0.1 * trial.seed)
    assert [trial.seed for trial in trials] == [3, 7, 3, 7]
    assert [drawn.value for drawn in study(tmp_path).trials] == pytest.approx([0.5, 0.5])
    (first, second) = source.lines()
    assert first.values == pytest.approx((0.3, 0.7)) and first.setting != second.setting


def test_one_that_is_not_finite_is_the_worst(tmp_path):
    work(search(tmp_path, num_settings=1), tmp_path, 1, lambda trial: None)
    assert study(tmp_path).trials[0].value == math.inf


def test_one_that_ended_at_such_a_step_is_too_and_is_not_tried_again(tmp_path):
    source = search(tmp_path, seeds=(0, 1), num_settings=2)
    (bad,) = source.next().trials
    bad.workdir(tmp_path).mkdir(parents=True)
    (bad.workdir(tmp_path) / "nonfinite-7.npz").touch()  # what gnp.train leaves there
    source.ended(bad, Outcome("failed", "step 7: the loss or a gradient is not finite"))
    assert study(tmp_path).trials[0].value == math.inf
    assert source.count() == {"done": 0, "failed": 2, "pruned": 0, "waiting": 2}
    again = search(tmp_path, seeds=(0, 1), num_settings=2)
    assert again.count() == {"done": 0, "failed": 2, "pruned": 0, "waiting": 2}
    assert again.advice().endswith("but for those that diverged: they are judged the worst")
    names = [trial.setting for trial in work(again, tmp_path, 2)]
    assert bad.setting not in names and again.next() is None
    assert study(tmp_path).trials[1].value == 0.5


def test_failed_and_interrupted_settings_are_continued_first(tmp_path):
    source = search(tmp_path, seeds=(0, 1), num_settings=3)
    (done, failed) = (source.next().trials[0], source.next().trials[0])
    end(source, tmp_path, done, 0.25)
    assert source.ended(failed, Outcome("failed", "why")) == ("failed", "why")
    assert source.failed == {failed.name: "why"}
    assert source.advice() == "the same command tries them again"
    assert source.count() == {"done": 1, "failed": 1, "pruned": 0, "waiting": 4}
    under_way = source.next().trials[0]
    again = search(tmp_path, seeds=(0, 1), num_settings=3)
    assert again.count() == {"done": 1, "failed": 0, "pruned": 0, "waiting": 5}
    names = [trial.name for trial in work(again, tmp_path, 5)]
    assert names[:2] == [failed.name, under_way.name] and again.next() is None
    assert study(tmp_path).trials[0].value == pytest.approx((0.25 + 0.5) / 2)


def test_a_bad_setting_is_pruned_by_its_first_seed(tmp_path):
    """Five settings whose n-th evaluation is 1 / n; the next is at 0.4 where they are at 1/3."""
    source = search(tmp_path, seeds=(0, 1), num_settings=7, prune="median")
    for _ in range(5):
        first, second = (source.next().trials[0] for _ in range(2))
        for count in (1, 2, 3):
            assert not source.is_unwanted(second, Progress(3, (9.0,) * 3))
            seen = Progress(count, tuple(1 / n for n in range(1, count + 1)))
            assert not source.is_unwanted(first, seen)
        end(source, tmp_path, first, 1 / 3)
        end(source, tmp_path, second, 1 / 3)
    bad = source.next().trials[0]
    assert not source.is_unwanted(bad, Progress(1, (0.4,)))
    assert not source.is_unwanted(bad, Progress(2, (0.4, 0.9)))  # its best so far is compared
    assert source.is_unwanted(bad, Progress(3, (0.4, 0.9, 0.9)))
    bad.workdir(tmp_path).mkdir(parents=True, exist_ok=True)
    assert source.ended(bad, Outcome("failed", "exit code 75")).state == "pruned"
    assert (bad.workdir(tmp_path) / "pruned").exists()  # which reports read
    assert not source.failed
    good = source.next().trials[0]
    assert good.setting != bad.setting  # its second seed is not trained
    assert source.count()["pruned"] == 2
    states = [drawn.state.name for drawn in study(tmp_path).trials]
    assert states == ["COMPLETE"] * 5 + ["PRUNED", "RUNNING"]
    again = search(tmp_path, seeds=(0, 1), num_settings=7, prune="median")
    assert again.next().trials[0].name == good.name


def test_an_end_of_a_range_that_is_not_valid_is_refused(tmp_path):
    recipe = Recipe.parse(DIGITS, [])
    for space, message in [
        ("lr.base=uniform(-1,1)", "config.lr.base is -1.0; it must be above 0"),
        ("model.depth=uniform(1,3)", "'1.0' is not a whole number"),
        ("gr=choice(off,zreo)", "did you mean 'zero'"),
        ("gr.polcy=choice(off,zero)", "did you mean 'config.gr.policy'"),
        ("gr.ratio=uniform(0,1);gr.radius=uniform(0,1)", "config.gr.radius is 0"),
    ]:
        with pytest.raises(UserError) as error:
            check(recipe, parse_search([space]), None)
        assert message in str(error.value)


def test_a_search_says_that_the_test_set_chooses(run, capsys):
    flags = ["--search", "lr.base=uniform(1e-3,1e-2)", "--trials=1", "--config.epochs=1"]
    validation = ["--config.data.train=train[:90%]", "--config.data.validation=train[90%:]"]
    for more, says in [([], True), (["--metric=test/error"], False), (validation, False)]:
        run.out = run.out.with_name(f"sweep{len(more)}")
        assert run(*flags, *more) == 0
        error = capsys.readouterr().err
        assert ("the test set chooses the settings" in error) == says
        assert (" ".join(validation) in error) == says


def test_a_search_from_the_flags(run, capsys):
    space, seeds, epochs = "lr.base=loguniform(1e-4,1e-2)", "--seeds=1", "--config.epochs=2"
    assert run("--search", space, seeds, epochs, "--trials=2") == 0
    assert "2 settings × 1 seeds, judged by test/error" in capsys.readouterr().err
    assert run("--search", space, seeds, epochs, "--trials=3") == 0
    assert len(run.trials) == 3 and all(len(run.starts(name)) == 1 for name in run.trials)
    assert run.asked["kind"] == "search"
    assert run.asked["parameters"] == {"lr.base": "loguniform(1e-4,1e-2)"}
    drawn = study(run.out).trials
    expected = [abs(math.log10(x.params["lr.base"]) + 3) / 10 for x in drawn]
    assert [x.value for x in drawn] == pytest.approx(expected)
    assert [x.intermediate_values[1] for x in drawn] == pytest.approx(expected)
    for flags, message in [
        (["--search", space, "--seeds=2"], r"seeds: \[0\] there, \[0, 1\] here"),
        (["--search", space, "--metric=test/loss"], "metric: test/error there, test/loss here"),
        (["--search", "lr.base=uniform(1,2)"], r"lr.base: loguniform\(1e-4,1e-2\) there, uniform"),
        (["--grid", "lr.base=1,2"], "kind: search there, grid here"),
    ]:
        with pytest.raises(UserError, match=message):
            run(*flags, epochs)
