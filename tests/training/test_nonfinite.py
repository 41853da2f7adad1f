"""A loss or a gradient that is not finite: stop, skip, rollback."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layouts import two_processes
from test_loop import make_config, read_rows

from gnp.data.pipeline import Preprocessing
from gnp.errors import UserError
from gnp.training import nonfinite, train
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import make_experiment
from gnp.training.state import params_sha256
from gnp.training.step import make_train_step
from tests.test_readme import blocks


def poison(monkeypatch, bad):
    """Has the batches for whose numbers `bad` holds come with a pixel that is not a number."""
    clean = Preprocessing.train

    def train_batch(self, images, labels, step):
        batch = clean(self, images, labels, step)
        pixels = batch["input"]
        pixels = pixels.at[3, 2, 1, 0].set(jnp.where(bad(step), jnp.nan, pixels[3, 2, 1, 0]))
        return batch | {"input": pixels}

    monkeypatch.setattr(Preprocessing, "train", train_batch)


def arrays(workdir, step):
    """The checksums of a checkpoint's arrays."""
    path = workdir / "checkpoints" / str(step) / "about" / "metadata"
    arrays = json.loads(path.read_text())["content"]["arrays"]
    return {name: checksum for name, (_, _, checksum) in arrays.items()}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run without such a step, with checkpoints of the steps 10, 12, 20, 24 and 29."""
    workdir = tmp_path_factory.mktemp("clean")
    fields = {"checkpoint__keep": 9, "checkpoint__every": "12st"}
    train(make_config(**fields), workdir)
    return workdir


@pytest.mark.slow
def test_stop_keeps_the_state_of_before_and_the_batch(clean, tmp_path, monkeypatch):
    poison(monkeypatch, lambda step: step == 12)
    workdir = tmp_path / "runs" / "b"  # as in the README
    with pytest.raises(UserError) as error:
        train(make_config(), workdir)
    assert str(error.value).startswith("step 13: the loss or a gradient is not finite; the state")
    assert str(workdir / "nonfinite-13.npz") in str(error.value) and "\n" not in str(error.value)
    assert arrays(workdir, 12) == arrays(clean, 12)
    assert all(row["step"] <= 12 for row in read_rows(workdir))

    monkeypatch.chdir(tmp_path)
    found = {}
    exec(blocks("python")[1], found)
    failure = found["failure"]
    assert int(failure.state.step) == 12
    assert np.argwhere(np.isnan(failure.batch["input"])).tolist() == [[3, 2, 1, 0]]
    assert np.isnan(found["state"].params["head"]["kernel"]).all()

    # The same again, and on with another choice.
    with pytest.raises(UserError, match="step 13: the loss"):
        train(make_config(), workdir)
    result = train(make_config(on_nonfinite="skip"), workdir)
    assert result["skipped"] == 1 and result["steps"] == 29
    assert np.isfinite(result["test"]["loss"])


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match="no step of its run has failed"):
        nonfinite.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [1, 4])
def test_skip_leaves_the_update_out(tmp_path, monkeypatch, caplog, mesh):
    poison(monkeypatch, lambda step: (step == 7) | (step == 12))
    result = train(make_config(on_nonfinite="skip", mesh__data=mesh), tmp_path)
    assert result["skipped"] == 2
    rows = read_rows(tmp_path, "train")
    assert [row["skipped"] for row in rows] == pytest.approx([0, 0.2, 0.2, 0, 0, 0])
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert "not finite, left out (2 so far)" in caplog.text


def test_a_step_that_is_left_out_changes_nothing_but_the_count():
    experiment = make_experiment(make_config(ema__decay=0.9, gr__policy="none"))
    step = jax.jit(
        make_train_step(
            *(experiment.model, experiment.optimizer),
            **{"seed": 0, "log_every": 100, "ema_decay": 0.9, "nonfinite_limit": 3},
        )
    )
    state = experiment.init()
    batch = {"input": jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), "label": jnp.arange(8)}
    bad = batch | {"input": batch["input"].at[0].set(jnp.inf)}
    before = step(state, batch)
    after = step(before, bad)
    assert int(after.step) == int(after.data_step) == 2
    assert [int(x) for x in after.nonfinite] == [1, 1]
    for name in ("params", "opt_state", "model_state", "ema"):
        assert params_sha256(getattr(after, name)) == params_sha256(getattr(before, name))
    assert [float(x) for x in after.metrics["loss"]] == [float(x) for x in before.metrics["loss"]]
    assert float(after.metrics["skipped"][0]) == 1
    # A good step ends the row; the third in a row is where it stays, whatever comes.
    assert [int(x) for x in step(after, batch).nonfinite] == [0, 1]
    third = step(step(after, bad), bad)
    assert [int(x) for x in third.nonfinite] == [3, 2] and int(third.step) == 3
    for again in (step(third, bad), step(third, batch)):
        assert params_sha256(again) == params_sha256(third)


@pytest.mark.slow
def test_too_many_in_a_row_stop_it(tmp_path, monkeypatch):
    poison(monkeypatch, lambda step: step >= 7)
    config = make_config(on_nonfinite="skip", max_nonfinite=3)
    with pytest.raises(UserError, match=r"step 10: .* not finite \(3 steps in a row\)"):
        train(config, tmp_path)
    assert Checkpoints(tmp_path).steps()[0] == 9


@pytest.mark.slow
def test_rollback_goes_on_with_the_batches_after_the_bad_one(tmp_path, monkeypatch, caplog):
    """As a run that was continued by hand from the checkpoint, at another batch."""
    config = make_config(on_nonfinite="rollback")
    whole = make_experiment(config)
    by_hand, workdir = tmp_path / "by_hand", tmp_path / "run"
    poison(monkeypatch, lambda step: step == 12)
    result = train(config, workdir)
    assert "step 13: the loss or a gradient is not finite; back to step 10" in caplog.text
    assert result["steps"] == 29 and result["skipped"] == 0

    with pytest.raises(UserError):  # for the state after 10 steps, where it stops two steps later
        train(make_config(), by_hand)
    reader = Checkpoints(by_hand)
    state = reader.restore(whole.abstract_state, 10)
    shutil.rmtree(by_hand / "checkpoints")
    writer = Checkpoints(by_hand, keep=2)
    writer.save(10, state.replace(data_step=jnp.int32(13)))
    writer.close()
    assert train(make_config(), by_hand)["params_sha256"] == result["params_sha256"]
    times = {"wall_time": 0, "images_per_second": 0}
    rows = [[row | times for row in read_rows(x)] for x in (workdir, by_hand)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_rollback_without_a_checkpoint_begins_again(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, lambda step: step == 3)
    result = train(make_config(on_nonfinite="rollback", steps_per_call=3), tmp_path)
    assert "back to step 0, and on with the batches after number 3" in caplog.text
    assert result["steps"] == 29


@pytest.mark.slow
def test_rollbacks_end(tmp_path, monkeypatch):
    poison(monkeypatch, lambda step: step >= 12)
    config = make_config(on_nonfinite="rollback", max_nonfinite=3)
    with pytest.raises(UserError, match=r"step 11: .* not finite \(after 3 rollbacks\)"):
        train(config, tmp_path)
    assert all(row["step"] <= 10 for row in read_rows(tmp_path))


@pytest.mark.slow
def test_a_streamed_run_goes_back_too(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, lambda step: step == 12)
    fields = {"data__resident": "false", "data__mean": "0.3,", "data__std": "0.4,"}
    results = [
        train(make_config(on_nonfinite="rollback", **fields), tmp_path / "streamed"),
        train(make_config(on_nonfinite="rollback"), tmp_path / "kept"),
    ]
    assert "on with the batches after number 12" in caplog.text
    assert [result["steps"] for result in results] == [29, 29]


def test_a_run_that_diverges_says_so(tmp_path):
    """A learning rate beyond float32's range."""
    config = make_config(optimizer__name="sgd", lr__base=1e30, lr__warmup="0st", gr__policy="off")
    with pytest.raises(UserError, match=r"A lower config.lr.base or config.clip_norm may help"):
        train(config, tmp_path)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("stop", marks=pytest.mark.soak),
        pytest.param("skip", marks=pytest.mark.soak),
        pytest.param("rollback", marks=pytest.mark.slow),
    ],
)
def test_two_processes_agree(tmp_path, policy):
    """Of four devices each; the weights grow until they overflow."""
    fields = {"on_nonfinite": policy, "max_nonfinite": 2, "mesh__data": 8, "lr__base": 1e30}
    (first, _), (second, _) = two_processes(tmp_path, **fields)
    assert first == second
    assert "the loss or a gradient is not finite" in first
