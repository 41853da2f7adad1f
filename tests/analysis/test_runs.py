"""Reading work directories."""

import json
import math

import numpy as np
import pytest

from gnp.analysis import runs
from gnp.errors import UserError
from tests.analysis import made_runs

CONFIG = {"epochs": 8.0, "lr": {"warmup": "2ep"}, "gr": {"policy": "zero", "warmup": None}}
ROWS = (
    {"step": 10, "epoch": 1.0, "split": "train", "loss": 2.0, "perturbed_grad_norm": None},
    {"step": 10, "epoch": 1.0, "split": "test", "loss": 2.5, "error": 0.9},
    {"step": 20, "epoch": 2.0, "split": "train", "loss": float("nan"), "ratio": 1},
)


def make(workdir, config=CONFIG, rows=ROWS, tail="", result=None):
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(row) + "\n" for row in rows]
    (workdir / "metrics.jsonl").write_text("".join(lines) + tail)
    if result is not None:
        (workdir / "result.json").write_text(json.dumps(result))
    return workdir


@pytest.mark.parametrize(
    ("count", "seconds"), [(None, 100), (4, 25), (0, math.nan), ("x", math.nan)]
)
def test_the_time_of_runs_that_were_trained_together_is_shared(tmp_path, count, seconds):
    made_runs.make(tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    together = {} if count is None else {"trained_together": count}
    path.write_text(json.dumps(json.loads(path.read_text()) | together))
    assert runs.load(tmp_path / "run").training_time == pytest.approx(seconds, nan_ok=True)


def test_load_reads_columns_of_float64_with_nan_for_null_and_missing(tmp_path):
    run = runs.load(make(tmp_path))
    assert run.config == CONFIG and run.result is None and run.workdir == tmp_path
    train = run.metrics["train"]
    assert set(train) == {"step", "epoch", "loss", "perturbed_grad_norm", "ratio"}
    assert all(column.dtype == np.float64 for column in train.values())
    np.testing.assert_array_equal(train["loss"], [2, np.nan])
    np.testing.assert_array_equal(train["perturbed_grad_norm"], [np.nan, np.nan])
    np.testing.assert_array_equal(train["ratio"], [np.nan, 1])
    np.testing.assert_array_equal(run.metrics["test"]["error"], [0.9])


def test_values_that_are_not_numbers_are_nan(tmp_path):
    row = {"step": 1, "epoch": 1.0, "split": "train", "loss": "high", "error": True}
    train = runs.load(make(tmp_path, rows=[row])).metrics["train"]
    assert np.isnan(train["loss"]).all() and np.isnan(train["error"]).all()


@pytest.mark.parametrize("tail", ['{"step": 30, "ep', '{"step": 30, "ep\n', "\x00\x00", "\n\n"])
def test_a_torn_last_line_is_ignored(tmp_path, tail):
    np.testing.assert_array_equal(
        runs.load(make(tmp_path, tail=tail)).metrics["train"]["step"], [10, 20]
    )


@pytest.mark.parametrize("line", ['{"step": 30, "ep', "[1]", '{"step": 3, "split": "train"}'])
def test_a_broken_line_elsewhere_names_file_and_line(tmp_path, line):
    tail = f"{line}\n{json.dumps(ROWS[0])}\n"
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4 ") as error:
        runs.load(make(tmp_path, tail=tail))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_has_logged_nothing_is_empty(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run = runs.load(tmp_path)
    assert run.metrics == {} and run.last == (0, 0.0)
    assert not run.has("train", "loss") and np.isnan(run.final("test", "error"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", "no directory"),
        ("notes.txt", "", "no config.json"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "should hold a JSON object"),
    ],
)
def test_what_is_no_run_is_a_user_error_in_one_line(tmp_path, name, text, message):
    workdir = tmp_path / "run"
    if name is not None:
        workdir.mkdir()
        (workdir / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        runs.load(workdir)
    assert str(workdir) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_result_is_a_user_error(tmp_path):
    make(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json"):
        runs.load(tmp_path)


def test_final_prefers_the_result_to_the_last_row(tmp_path):
    run = runs.load(make(tmp_path, result={"test": {"error": 0.25}}))
    assert run.final("test", "error") == 0.25
    assert run.final("test", "loss") == 2.5
    assert np.isnan(run.final("test", "accuracy"))


def test_last_is_of_the_split_that_is_ahead(tmp_path):
    assert runs.load(make(tmp_path)).last == (20, 2.0)


def test_setting_reads_dotted_names_and_is_none_where_there_is_none(tmp_path):
    run = runs.load(make(tmp_path))
    assert run.setting("gr.policy") == "zero" and run.setting("epochs") == 8
    assert run.setting("gr.none") is None and run.setting("epochs.none") is None


@pytest.mark.parametrize(
    ("warmup", "epochs"), [("2ep", 2.0), ("25%", 2.0), ("25st", 2.5), ("0st", 0.0), (None, 0.0)]
)
def test_the_warmup_in_epochs(tmp_path, warmup, epochs):
    run = runs.load(make(tmp_path, config=CONFIG | {"lr": {"warmup": warmup}}))
    assert run.learning_rate_warmup == run.gr_warmup == epochs


@pytest.mark.parametrize(("policy", "epochs"), [("zero", 4.0), ("none", 2.0), ("off", 2.0)])
def test_the_warmup_of_gr_is_its_own_where_a_policy_uses_it(tmp_path, policy, epochs):
    config = CONFIG | {"gr": {"policy": policy, "warmup": "4ep"}}
    run = runs.load(make(tmp_path, config=config))
    assert run.gr_warmup == epochs and run.learning_rate_warmup == 2


def test_a_wrong_duration_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="soon"):
        _ = runs.load(make(tmp_path, config={"lr": {"warmup": "soon"}})).gr_warmup
