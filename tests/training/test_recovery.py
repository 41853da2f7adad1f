"""What a work directory has lost comes back from its checkpoints."""

import json
import shutil

import pytest

from gnp.analysis import figures, runs
from gnp.analysis.comparison import find
from gnp.command_line import config_of
from gnp.errors import UserError
from gnp.files import lock
from gnp.training import checkpoint, train
from gnp.training.recovery import recover
from tests.training.test_loop import make_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(make_config(), workdir)
    return workdir


@pytest.fixture
def only_checkpoints(finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def json_of(path):
    return json.loads(path.read_text())


def same(found, expected):
    assert found.tolist() == pytest.approx(expected.tolist(), nan_ok=True)


def test_every_figure_is_redrawn_from_checkpoints_alone(finished, only_checkpoints):
    """Those that can be drawn of one run, from the same numbers."""
    (there,), (here,) = find([finished]), find([only_checkpoints.parent])
    for split, columns in there.metrics.items():
        for key, values in columns.items():
            same(here.metrics[split][key], values)
    for key in ("test", "train", "steps", "num_params"):
        assert here.result[key] == there.result[key]
    drawn = []
    for name, entry in figures.PAPER_FIGURES.items():
        try:
            expected = entry.draw([there])
        except UserError:
            continue
        drawn.append(name)
        for one, other in zip(entry.draw([here]).axes, expected.axes, strict=True):
            for line, like in zip(one.lines, other.lines, strict=True):
                same(line.get_ydata(), like.get_ydata())
    assert {"scheduled_decay", "learning_curves"} <= {*drawn}


def test_the_command_that_trained_the_run_completes_it(finished, only_checkpoints):
    recover(only_checkpoints)
    assert json_of(only_checkpoints / "result.json")["recovered"] is True
    result = train(make_config(), only_checkpoints)
    expected = json_of(finished / "result.json")
    assert json_of(only_checkpoints / "result.json") == result and "recovered" not in result
    for key in ("params_sha256", "num_params", "test", "steps"):
        assert result[key] == expected[key]
    rows = (finished / "metrics.jsonl").read_text()
    assert (only_checkpoints / "metrics.jsonl").read_text() == rows


def test_another_configuration_is_refused(only_checkpoints):
    with pytest.raises(UserError, match=r"another configuration \(config.seed: 0 there, 1 here"):
        train(make_config(seed=1), only_checkpoints)


def test_a_damaged_checkpoint_is_passed_over(only_checkpoints, caplog):
    """The older one tells of a run that has not ended."""
    (only_checkpoints / "checkpoints" / "29" / "about" / "metadata").write_text("{")
    recover(only_checkpoints)
    assert "the checkpoint of step 29 cannot be read" in caplog.text
    run = runs.load(only_checkpoints)
    assert run.last[0] == 20 and run.result is None


def test_metrics_that_are_lost_come_back_when_the_run_goes_on(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "metrics.jsonl").unlink()
    (workdir / "result.json").unlink()
    train(make_config(), workdir)
    assert (workdir / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_what_is_there_stays(finished):
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    recover(finished)
    assert before == {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "splits",
    [["train", "test"], ["train", "validation", "test"], ["test", "test", "train"], ["test"]],
)
@pytest.mark.parametrize("times", [0.5, 1.5, 2.5, 40])
def test_very_many_rows_are_thinned_to_fit(splits, times, monkeypatch):
    """Of each split as many as of the others, and the last, whatever their order."""
    rows = [{"split": splits[i % len(splits)], "step": i, "loss": 0.125} for i in range(1200)]
    limit = int(len(json.dumps(rows)) / times)
    monkeypatch.setattr(checkpoint, "_MAX_ROWS", limit)
    kept = checkpoint._thinned(rows)
    if times < 1:
        assert kept == rows
    assert len(json.dumps(kept)) <= limit * 1.1  # the last of each split come on top
    for split in {*splits}:
        there = [row["step"] for row in rows if row["split"] == split]
        here = [row["step"] for row in kept if row["split"] == split]
        assert here[0] == there[0] and here[-1] == there[-1]
        assert len(here) == pytest.approx(len(there) / (int(times) + 1), abs=2)


def test_the_whole_configuration_comes_back(finished, only_checkpoints):
    assert json.loads(config_of(only_checkpoints).to_json()) == json_of(finished / "config.json")


def test_a_run_one_step_before_its_end_has_no_result(tmp_path):
    """29 steps of 2 epochs of 14.37: the 28th is less than a step from the end."""
    train(make_config(eval__every="1ep", checkpoint__every="1ep"), tmp_path)
    for name in ("config.json", "metrics.jsonl", "result.json"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "29")
    run = runs.load(tmp_path)
    assert run.last[0] == 28 and run.result is None


def test_what_only_looks_like_a_run_is_passed_over(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "checkpoints" / "run")
    (tmp_path / "other" / "checkpoints" / "7").mkdir(parents=True)
    assert [run.workdir.name for run in find([tmp_path])] == ["run"]


def test_a_directory_in_which_a_process_trains_is_left_alone(only_checkpoints):
    with lock(only_checkpoints):
        recover(only_checkpoints)
    assert [path.name for path in only_checkpoints.iterdir() if path.name != ".lock"] == [
        "checkpoints"
    ]
