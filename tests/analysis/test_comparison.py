"""Finding runs, seeds of one setting, and all runs as a DataFrame."""

import json
import math

import numpy as np
import pytest

from gnp.analysis import comparison, labels
from gnp.errors import UserError
from tests.analysis.made_runs import make, seeds


def places(runs, root):
    return [str(run.workdir.relative_to(root)) for run in runs]


def test_find_takes_work_directories_and_folders_of_them(tmp_path):
    for name in ("sweep/trials/b", "sweep/trials/a", "sweep/other/deep/er/c", "alone"):
        make(tmp_path / name)
    found = comparison.find([tmp_path / "alone", tmp_path / "sweep"])
    assert places(found, tmp_path) == [
        *("alone", "sweep/other/deep/er/c", "sweep/trials/a", "sweep/trials/b"),
    ]


def test_a_run_counts_once_and_what_is_in_it_is_its_own(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "a" / "checkpoints" / "inner")
    make(tmp_path / ".hidden")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = comparison.find([tmp_path, tmp_path / "a", str(tmp_path / "link")])
    assert places(found, tmp_path) == ["a"]


def test_find_says_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no directory .*nowhere; give work directories"):
        comparison.find([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    make(tmp_path / "a")
    with pytest.raises(UserError, match=r"empty holds no run: .*config\.json"):
        comparison.find([tmp_path / "a", tmp_path / "empty"])
    make(tmp_path.joinpath("deep", *"123456789"))
    with pytest.raises(UserError, match=r"deep holds no run: .*8 levels deep"):
        comparison.find([tmp_path / "deep"])


def test_find_does_not_search_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_MAX_FOLDERS", 3)
    for name in "abcd":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="more than 3 folders"):
        comparison.find([tmp_path])


def test_seeds_of_one_setting_are_together_by_seed(tmp_path):
    runs = [
        make(tmp_path / f"{policy}-{seed}", seed=seed, gr__policy=policy, lr__warmup="1ep")
        for seed in (10, 2)
        for policy in ("zero", "off", "lambda")
    ]
    settings = comparison.group(runs)
    assert [setting.label for setting in settings] == ["gr off", "gr lambda", "gr zero"]
    assert [setting.values for setting in settings] == [
        {"gr.policy": policy} for policy in ("off", "lambda", "zero")
    ]
    for setting in settings:
        assert [run.setting("seed") for run in setting.runs] == [2, 10]


def test_fields_that_cannot_change_results_make_no_setting(tmp_path):
    runs = [
        make(tmp_path / "a", data__data_dir="/x", log__every="1st", mesh__data=2),
        make(tmp_path / "b", data__data_dir="/y", eval__every="2ep", checkpoint__keep=7, seed=1),
    ]
    old = json.loads((tmp_path / "b" / "config.json").read_text()) | {"seed": 2}
    del old["watchdog"], old["lr"]["layer_decay"], old["weight_decay"]["exclude"]
    make(tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    runs += comparison.find([tmp_path / "old"])
    (setting,) = comparison.group(runs)
    assert setting.label == "all" and setting.values == {} and len(setting.runs) == 3
    assert comparison.group([]) == []


def test_without_regularization_its_fields_make_no_setting(tmp_path):
    """As of a grid of policies and radii."""
    runs = [
        make(tmp_path / f"{policy}-{radius}", gr__policy=policy, gr__radius=radius)
        for policy in ("off", "zero")
        for radius in (0.05, 0.1)
    ]
    settings = comparison.group(runs)
    assert [(x.label, len(x.runs)) for x in settings] == [
        *(("gr off", 2), ("gr zero, r 0.05", 1), ("gr zero, r 0.1", 1))
    ]
    assert settings[0].values == {"gr.policy": "off", "gr.radius": None}
    same = comparison.group([runs[0], runs[2]])
    assert [setting.values for setting in same] == [{"gr.policy": x} for x in ("off", "zero")]


def test_settings_are_ordered_by_value(tmp_path):
    rates = (0.01, 3e-4, 0.1, 2.0)
    runs = [make(tmp_path / str(rate), lr__base=rate) for rate in rates]
    runs += [make(tmp_path / f"w{width}", model__width=width) for width in (96, 8)]
    labels = [setting.label for setting in comparison.group(runs)]
    assert labels == [
        *("lr 3e-4, width none", "lr 0.001, width 8", "lr 0.001, width 96"),
        *("lr 0.01, width none", "lr 0.1, width none", "lr 2, width none"),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"gr.policy": "zero"}, {"gr.policy": "off"}], ["gr zero", "gr off"]),
        (
            [
                {"lr.base": 1e-3, "weight_decay.kind": "scheduled", "weight_decay.value": 5e-4},
                {"lr.base": 2e-3, "weight_decay.kind": "none", "weight_decay.value": 0.0},
                {"lr.base": 3e-3, "weight_decay.kind": "scheduled", "weight_decay.value": 1e-4},
            ],
            [
                *("lr 0.001, decay scheduled 5e-4", "lr 0.002, no decay"),
                "lr 0.003, decay scheduled 1e-4",
            ],
        ),
        (
            [
                {"gr.policy": "off", "gr.radius": None},
                {"gr.policy": "zero", "gr.radius": 0.05},
                {"gr.policy": "zero", "gr.radius": 0.1},
            ],
            ["gr off", "gr zero, r 0.05", "gr zero, r 0.1"],
        ),
        # What follows from the method is left out.
        (
            [
                {"optimizer.name": "sgd", "lr.base": 0.1, "clip_norm": None, "epochs": 3.0},
                {"optimizer.name": "adam", "lr.base": 0.1, "clip_norm": 1.0, "epochs": 3.0},
                {"optimizer.name": "adam", "lr.base": 0.2, "clip_norm": 1.0, "epochs": 4.0},
            ],
            ["sgd, lr 0.1, epochs 3", "adam, lr 0.1, epochs 3", "adam, lr 0.2, epochs 4"],
        ),
        # But not what tells two policies, or two optimizers' training, apart.
        (
            [
                {"gr.policy": "off", "epochs": 80.0, "lr.base": 0.1, "gr.radius": 0.1},
                {"gr.policy": "none", "epochs": 80.0, "lr.base": 0.2, "gr.radius": 0.2},
            ],
            ["gr off, lr 0.1", "gr none, lr 0.2"],
        ),
        (
            [
                {"optimizer.name": "sgd", "lr.base": 0.1, "epochs": 80.0},
                {"optimizer.name": "adam", "lr.base": 0.2, "epochs": 2.0},
            ],
            ["sgd, epochs 80", "adam, epochs 2"],
        ),
        (
            [
                {"lr.warmup": "0st", "model.depths": (2, 2)},
                {"lr.warmup": "4ep", "model.depths": ()},
            ],
            ["no warmup, depths 2,2", "warmup 4ep, depths none"],
        ),
    ],
)
def test_labels_are_short_and_different(settings, expected):
    assert labels.labels(settings) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((5e-4, "5e-4"), (1e-3, "0.001"), (-2.5e-7, "-2.5e-7"), (0.0, "0"), (300.0, "300")),
        *((123456789, "123456789"), (True, "true"), (None, "none"), ((2, 6), "2,6"), ("a", "a")),
    ],
)
def test_values_are_as_on_the_command_line(value, expected):
    assert labels.text(value) == expected


def test_a_configuration_of_another_version_is_named(tmp_path):
    run = make(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(run.config | {"gamma_ray": 1}))
    message = r"a/config\.json is not a configuration of this version: unknown field 'gamma_ray'"
    with pytest.raises(UserError, match=message):
        comparison.group(comparison.find([tmp_path]))


def test_a_frame_has_a_row_a_run(tmp_path):
    seeds(tmp_path / "zero", [0.25, 0.5], gr__policy="zero", lr__warmup="4ep")
    make(tmp_path / "off-0", None, rows=3, lr__warmup="4ep")
    make(tmp_path / "off-1", math.nan, seed=1, lr__warmup="4ep")
    table = comparison.frame(tmp_path)
    assert list(table.columns) == [
        *("workdir", "setting", "gr.policy", "seed", "finished", "diverged"),
        *("test/error", "test/loss", "train/grad_norm", "train/loss"),
        *("steps", "training_time", "num_params", "gradients"),
    ]
    assert list(table["setting"]) == ["gr off", "gr off", "gr zero", "gr zero"]
    assert list(table["seed"]) == [0, 1, 0, 1]
    assert list(table["finished"]) == [False, True, True, True]
    assert list(table["diverged"]) == [False, True, False, False]
    np.testing.assert_allclose(table["test/error"], [0.3, np.nan, 0.25, 0.5])
    np.testing.assert_allclose(table["train/loss"], [1 / 3, np.nan, 0.1, 0.1])
    np.testing.assert_array_equal(table["steps"], [30, 100, 100, 100])
    np.testing.assert_array_equal(table["training_time"], [np.nan, 100, 100, 100])
    np.testing.assert_allclose(table["gradients"], [1, 1, 1.6, 1.6])  # 40 of 100 steps warm up
    assert table["workdir"].iloc[2] == str(tmp_path / "zero" / "seed-0")


def test_a_frame_of_nothing_is_a_mistake():
    with pytest.raises(UserError, match="no runs"):
        comparison.frame([])


def test_a_frame_takes_runs_and_directories(tmp_path):
    runs = seeds(tmp_path, [0.1, 0.2])
    assert comparison.frame(tmp_path).equals(comparison.frame(runs))
    assert comparison.frame([tmp_path / "seed-0", runs[1]]).equals(comparison.frame(runs))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gr__policy": "off"}, 1),
        ({"gr__policy": "none"}, 2),
        ({"gr__policy": "none", "gr__ratio": 0.0}, 1),
        ({"gr__policy": "r"}, 2),
        ({"gr__policy": "lambda"}, 2),
        ({"gr__policy": "zero"}, 1.8),  # 20 of 100 steps with one gradient
        ({"gr__policy": "zero", "gr__warmup": "50%"}, 1.5),
        ({"gr__policy": "zero", "gr__warmup": "90st"}, 1.1),
        ({"gr__policy": "none", "gr__estimator": "exact"}, 3),
        ({"gr__policy": "r", "gr__estimator": "exact"}, 3),
        ({"gr__policy": "lambda", "gr__estimator": "exact"}, 4),
        ({"gr__policy": "zero", "gr__estimator": "exact"}, 0.2 + 0.8 * 4),
    ],
)
def test_gradients_a_step(tmp_path, fields, expected):
    run = make(tmp_path / "a", lr__warmup="2ep", **fields)
    assert comparison.gradients_per_step(run) == pytest.approx(expected)


def test_gradients_a_step_of_a_run_under_way(tmp_path):
    fields = {"gr__policy": "zero", "lr__warmup": "2ep"}
    assert comparison.gradients_per_step(make(tmp_path / "a", None, rows=1, **fields)) == 1
    half = comparison.gradients_per_step(make(tmp_path / "b", None, rows=4, **fields))
    assert half == pytest.approx(1.5)
    assert math.isnan(comparison.gradients_per_step(make(tmp_path / "c", None, rows=0)))


def test_one_that_ended_at_a_step_that_is_not_finite_has_diverged(tmp_path):
    """Its rows are all finite: the failing step writes none."""
    run = make(tmp_path / "a", error=None, rows=3)
    assert not comparison.has_diverged(run)
    (tmp_path / "a" / "nonfinite-31.npz").touch()
    assert comparison.has_diverged(run)
    ended = make(tmp_path / "b", error=0.25)
    (tmp_path / "b" / "nonfinite-31.npz").touch()  # but it went on, as with on_nonfinite=skip
    assert not comparison.has_diverged(ended)
