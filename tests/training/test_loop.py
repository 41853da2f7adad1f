"""A whole run in a work directory, on digits."""

import contextlib
import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from tensorboardX.proto import event_pb2

from gnp import config as gnp_config
from gnp import export
from gnp.errors import UserError
from gnp.files import lock
from gnp.training import Interrupted, loop, train
from gnp.training import workdir as workdirs
from gnp.training.evaluation import evaluate_checkpoint
from gnp.training.experiment import Experiment
from gnp.training.metrics import MetricsWriter, Progress
from gnp.training.stopping import stop_requests


def make_config(**fields):
    config = gnp_config.default()
    config.model.update({"width": 12, "depth": 1, "num_heads": 2})
    config.data.update({"batch_size": 100, "augment": "pad_crop:1"})
    config.epochs = 2.0  # 1437 / 100 examples: 29 steps
    config.lr.update({"base": 3e-3, "warmup": "50%"})
    config.gr.update({"policy": "zero"})
    config.weight_decay.update({"kind": "scheduled", "value": 5e-4})
    config.log.every = "5st"
    config.eval.every = "12st"
    config.checkpoint.every = "10st"
    config.mesh.data = 1
    for field, text in fields.items():
        gnp_config.override(config, field.replace("__", "."), str(text))
    return config


def read_rows(workdir, split=None):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if split in (None, row["split"])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(make_config(), workdir, command="the command")


def test_the_work_directory(finished):
    workdir, result = finished
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        json.dumps(make_config().to_dict())
    )
    assert json.loads((workdir / "result.json").read_text()) == result
    assert {p.name for p in (workdir / "checkpoints").iterdir()} >= {"20", "29"}
    assert result["steps"] == 29
    assert result["command"] == "the command"
    assert len(result["params_sha256"]) == 64
    assert list(workdir.glob("events.out.tfevents.*"))


def test_the_rows_of_metrics(finished):
    workdir, result = finished
    rows = read_rows(workdir, "train")
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 29]
    assert [row["step"] for row in read_rows(workdir, "test")] == [12, 24, 29]
    expected = {
        *("step", "epoch", "wall_time", "split", "loss", "error", "learning_rate", "grad_norm"),
        *("perturbed_grad_norm", "radius", "ratio", "swd_factor", "weight_norm"),
        *("images_per_second", "top5_error"),
    }
    assert all(set(row) == expected for row in rows)
    # Zero-warmup over the first 14 steps (50 % of 29): no second gradient until then.
    assert [row["perturbed_grad_norm"] is None for row in rows] == [True, True] + [False] * 4
    assert [row["ratio"] for row in rows] == pytest.approx([0, 0, 0.2, 1, 1, 1])
    rates = [3e-3 * t / 14 for t in range(1, 6)]
    assert rows[0]["learning_rate"] == pytest.approx(np.mean(rates), rel=1e-5)
    assert rows[-1]["epoch"] == pytest.approx(29 / 14.37)
    assert rows[0]["loss"] > rows[-1]["loss"]
    assert result["train"] == rows[-1]


def test_tensorboard_has_the_same_values(finished):
    workdir, _ = finished
    (path,) = workdir.glob("events.out.tfevents.*")
    blob, values = path.read_bytes(), {}
    while blob:  # length, its checksum, the event, its checksum
        size = int.from_bytes(blob[:8], "little")
        event = event_pb2.Event.FromString(blob[12 : 12 + size])
        blob = blob[16 + size :]
        for value in event.summary.value:
            values[event.step, value.tag] = value.simple_value
    for row in read_rows(workdir):
        key = row["step"], f"{row['split']}/loss"
        assert values[key] == pytest.approx(row["loss"], rel=1e-6)
    assert (5, "train/perturbed_grad_norm") not in values


def test_a_checkpoint_is_evaluated(finished):
    workdir, result = finished
    values = evaluate_checkpoint(make_config(), workdir)
    assert values["step"] == 29
    assert values["test"]["error"] == result["test"]["error"]
    assert values["test"]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
    assert values["train"]["num_examples"] == 1437 and values["train"]["grad_norm"] > 0
    assert evaluate_checkpoint(make_config(), workdir, step=20)["step"] == 20
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; there are \[20, 29\]"):
        evaluate_checkpoint(make_config(), workdir, step=7)


def test_killed_between_the_last_checkpoint_and_the_result(finished, tmp_path):
    workdir, result = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = train(make_config(), tmp_path / "run", command="the command")
    assert again["wall_time"] >= result["wall_time"]
    assert again | {"wall_time": 0, "speed": 0} == result | {"wall_time": 0, "speed": 0}
    assert read_rows(tmp_path / "run") == read_rows(workdir)


@pytest.mark.parametrize(
    "reads", [1, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (-5, -1))]
)
def test_what_is_interrupted_is_saved_whenever_the_signal_comes(tmp_path, monkeypatch, reads):
    """A request that is there from its n-th reading on: between calls, and in an evaluation.

    The last four readings are those of the last evaluation, before them comes that of the last
    call.
    """
    config = make_config(eval__every="2st", eval__batch_size=100)

    class Later:
        count = 0

        @property
        def exit_code(self):
            self.count += 1
            return 75 if self.count >= reads else 0

    if reads < 0:
        counter, from_the_end, reads = Later(), reads, 10**9
        monkeypatch.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(counter))
        train(config, tmp_path / "whole")
        reads = counter.count + 1 + from_the_end
    monkeypatch.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(Later()))
    with pytest.raises(Interrupted) as stop:
        train(config, tmp_path)
    assert stop.value.exit_code == 75
    assert stop.value.saved_step == stop.value.step
    assert (tmp_path / "checkpoints" / str(stop.value.step)).is_dir()
    monkeypatch.undo()
    train(config, tmp_path)
    assert [row["step"] for row in read_rows(tmp_path, "test")] == [*range(2, 29, 2), 29]


def test_one_process_a_directory(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} .* training in"):
        train(make_config(), tmp_path)


def test_a_line_of_progress_shows_the_newest_evaluation(capsys):
    progress = Progress(total_steps=20, steps_per_epoch=10.0, step=0)
    train_row = {"split": "train", "loss": 1.5, "error": 0.5}
    progress.show(4, [])
    progress.show(10, [train_row, {"split": "test", "error": 0.25}])
    progress.show(20, [train_row | {"loss": None}, {"split": "test", "error": 0.125}])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("epoch 1.0/2.0  step 10/20  loss 1.5000  error 50.00%")
    assert "test error 25.00%" in first and "test error 12.50%" in second
    assert "loss not finite" in second


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    workdir, result = finished
    monkeypatch.setattr(Experiment, "load_data", None)
    before = sorted(workdir.rglob("*"))
    assert train(make_config(), workdir) == result
    assert sorted(workdir.rglob("*")) == before


def test_another_configuration_is_refused_with_the_difference(finished):
    workdir, _ = finished
    with pytest.raises(UserError) as error:
        train(make_config(gr__radius=0.2, seed=3), workdir)
    assert "config.gr.radius: 0.1 there, 0.2 here; config.seed: 0 there, 3 here" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__batch_size": 2000}, "but digits has only 1437 training images"),
        ({"model__num_heads": 5}, "model.num_heads 5 does not divide model.width 12"),
        ({"gr__warmup": "30st"}, "config.gr.warmup is '30st', 30 steps, but the run has only 29"),
        ({"mesh__data": 3}, "config.data.batch_size is 100, which 3 devices do not divide"),
        ({"data__name": "digitss"}, "did you mean 'digits'?"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, fields, message):
    with pytest.raises(UserError) as error:
        train(make_config(**fields), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_work_directories_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the work directory"):
        train(make_config(), tmp_path / "file")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not valid JSON"):
        train(make_config(), tmp_path)


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    row = {"step": 3, "epoch": 1.0, "wall_time": 2.0, "split": "train", "loss": 1.5}
    later = row | {"step": 8}
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(later)}\n" + json.dumps(later)[:20])
    writer = MetricsWriter(tmp_path, step=5)
    assert writer.last == {"train": row} and writer.wall_time == 2.0
    writer.write(row | {"step": 6})
    writer.close()
    assert [r["step"] for r in read_rows(tmp_path)] == [3, 6]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_first_signal_asks_and_the_second_acts(number, code, capfd):
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(n) for n in numbers]  # a background job ignores SIGINT
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.exit_code == 0
        signal.raise_signal(number)
        assert stop.exit_code == code
        assert "stopping after the steps under way" in capfd.readouterr().err
        assert signal.getsignal(number) is before  # so a second one acts as if there were no run
    assert [signal.getsignal(n) for n in numbers] == handlers


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def enter():
        with stop_requests() as stop:
            seen.append(stop.exit_code)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [0]


@pytest.mark.slow
def test_a_run_that_begins_from_pretrained_weights(finished, tmp_path):
    """Of an exported run: it begins where that one ended, and continues without the file."""
    workdir, result = finished
    weights = tmp_path / "weights.safetensors"
    tensors, metadata, _ = export.export(make_config(), workdir)
    safetensors.numpy.save_file(tensors, weights, metadata)
    fields = {"model__pretrained": weights, "epochs": 0.1, "lr__base": 1e-12}
    fields |= {"weight_decay__value": 1e-9, "lr__warmup": "0st", "gr__policy": "off"}
    fine_tuned = train(make_config(**fields), tmp_path / "run")
    assert fine_tuned["test"]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-4)
    weights.unlink()
    values = evaluate_checkpoint(make_config(**fields), tmp_path / "run")
    assert values["test"]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-4)
    with pytest.raises(UserError, match=r"weights.safetensors"):
        train(make_config(**fields), tmp_path / "other")


def test_a_stopped_run_that_has_logged_nothing_keeps_its_configuration(finished, tmp_path):
    """Its checkpoint tells that it made steps, and a mistyped pretrained file leaves nothing."""
    workdir, _ = finished
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(workdir / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"config.lr.base: 0.003 there, 0.1 here"):
        train(make_config(lr__base=0.1), tmp_path)
    with pytest.raises(UserError, match=r"there is no file .*nowhere.safetensors"):
        train(make_config(model__pretrained="nowhere.safetensors"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_field_that_an_older_version_did_not_have_is_at_its_default(tmp_path):
    config = make_config().to_dict()
    del config["model"]["pool"], config["data"]["image_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text("{}")
    workdirs.claim(epath.Path(tmp_path), make_config())
    with pytest.raises(UserError, match=r"config.data.image_size: None there, 16 here"):
        workdirs.claim(epath.Path(tmp_path), make_config(data__image_size=16))


def test_fields_that_the_model_does_not_have_are_named_together(tmp_path):
    with pytest.raises(UserError) as error:
        train(make_config(model__name="resnet18", model__width=8), tmp_path / "run")
    assert str(error.value).startswith(
        "resnet18 has no config.model.depth and no config.model.num_heads; "
        "unset with --config.model.depth=none --config.model.num_heads=none (it has: depths, "
    )
