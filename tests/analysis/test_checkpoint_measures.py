"""Sharpness of models on data sets, and at a run's checkpoints."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from gnp import config as gnp_config
from gnp import models
from gnp.analysis import checkpoint_measures, measures
from gnp.analysis.checkpoint_measures import adaptive_rates, measure_checkpoints
from gnp.analysis.mean_loss import split_loss
from gnp.analysis.measures import Settings
from gnp.data.loading import ResidentData
from gnp.data.text import TextEvalBatches
from gnp.errors import UserError
from gnp.training import train
from gnp.training.checkpoint import Checkpoints
from gnp.training.evaluation import make_evaluate
from gnp.training.experiment import make_experiment
from gnp.training.optimizer import Optimizer, base_optimizer
from gnp.training.sharding import make_mesh, replicated
from gnp.training.step import init_state
from tests.runs import run

EXAMPLES = 100


def make_config(**fields):
    """A small run on digits, whose evaluation takes its 100 examples in three batches."""
    config = gnp_config.default()
    config.model.update({"width": 12, "depth": 1, "num_heads": 2})
    config.data.update({"batch_size": 100, "augment": "none"})
    config.epochs = 1.0
    config.lr.update({"base": 3e-3, "warmup": "0ep"})
    config.eval.batch_size = 40
    config.checkpoint.every = "10st"
    config.mesh.data = 1
    for field, text in fields.items():
        gnp_config.override(config, field.replace("__", "."), str(text))
    return config


def close(a, b, tolerance):
    a, b = (np.asarray(ravel_pytree(x)[0], np.float64) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def in_one_batch(experiment, data, model_state):
    """The mean loss over the first examples, without the code under test."""
    images, labels = (np.asarray(data.arrays["train"][x][:EXAMPLES]) for x in ("image", "label"))
    batch = data.eval_batches["train"].preprocessing.evaluate(images, labels)

    def loss(params):
        logits = experiment.model.apply(
            {"params": params, **model_state}, batch["input"], train=False
        )
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1)
        return -chosen.mean()

    return loss


# --- Losses over a split -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_language_models_loss_is_that_of_its_words_with_gradients_cut_at_batches():
    """50 of 100 words: in three streams of 34, four full batches of 12 and two words."""
    text = np.random.default_rng(0).integers(0, 6, 101).astype(np.int32)
    model = models.create("lstm", 6, embedding_size=3, hidden_size=4, depth=1, dropout=0.5)
    optimizer = Optimizer(optax.sgd(0.1), lambda count: 0.1, 0.0)
    example = jnp.zeros((3, 1), jnp.int32)
    state = jax.jit(lambda: init_state(model, optimizer, example, seed=0))()
    rng = np.random.default_rng(1)
    params, vector = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.params)
        for _ in range(2)
    )
    mesh = make_mesh(1, batch_size=3)
    batches = TextEvalBatches(len(text), num_streams=3, sequence_length=4, batch_size=4)
    everything = state.replace(params=params), vector, {"word": text}
    state, vector, words = jax.device_put(everything, replicated(mesh))
    data = ResidentData({"train": words}, None, {"train": batches}, "")

    def loss(params):
        total, carry = 0.0, {}
        for i in range(0, 20, 4):
            places = 34 * np.arange(3)[:, None] + np.arange(i, i + 4)
            logits, carry = model.apply({"params": params, **carry}, text[places], mutable="carry")
            carry = jax.lax.stop_gradient(carry)
            log_p = jax.nn.log_softmax(logits)
            losses = -jnp.take_along_axis(log_p, text[places + 1][..., None], 2)[..., 0]
            total += losses.sum() if i < 16 else losses[0, :2].sum()
        return total / 50

    mean = split_loss(model, data, "train", mesh, state, max_examples=50)
    value, grad = mean.value_and_grad(state.params, state.model_state)
    assert mean.num_examples == 50
    expected, product = jax.jit(
        lambda params, vector: jax.jvp(jax.value_and_grad(loss), (params,), (vector,))
    )(state.params, vector)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    assert mean.value(state.params, state.model_state) == pytest.approx(value, rel=1e-6)
    close(grad, expected[1], 1e-5)
    close(mean.hvp(state.params, vector, state.model_state), product[1], 1e-4)

    whole = split_loss(model, data, "train", mesh, state)
    sums = make_evaluate(model, data, "train", mesh, state)(state)["loss"]
    found = whole.value(state.params, state.model_state)
    assert found == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
    assert whole.num_examples == 100


@pytest.mark.slow
def test_batch_norm_has_its_running_statistics():
    config = make_config(model__width=8, model__depth=None, model__num_heads=None)
    gnp_config.override(config, "model.name", "resnet18")
    gnp_config.override(config, "model.depths", "1,1,1")
    experiment = make_experiment(config)
    data, state = experiment.load_data(), experiment.init()
    rng = np.random.default_rng(0)
    stats = jax.tree.map(lambda x: x + rng.uniform(0, 1, x.shape), state.model_state)
    stats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stats)
    vector = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.params)
    mean = split_loss(
        experiment.model, data, "train", experiment.mesh, state, max_examples=EXAMPLES
    )
    value, grad = mean.value_and_grad(state.params, stats)
    loss = in_one_batch(experiment, data, stats)
    expected, product = jax.jit(
        lambda params, vector: jax.jvp(jax.value_and_grad(loss), (params,), (vector,))
    )(state.params, vector)
    assert mean.num_examples == EXAMPLES
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    close(grad, expected[1], 1e-4)
    close(mean.hvp(state.params, vector, stats), product[1], 1e-4)


# --- The adaptive learning rate ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "amsgrad", "yogi", "padam", "rmsprop", "sgd"])
def test_the_adaptive_rates_are_numpys(name):
    config = gnp_config.default().optimizer
    config.name, config.b2 = name, 0.9
    tx = optax.chain(optax.identity(), base_optimizer(config, 1e-3))
    params = {"nu": jnp.ones((2, 3)), "b": jnp.ones(4)}
    grads = np.random.default_rng(0).normal(size=(3, 10)) * [[3], [1], [0.1]]
    if name != "yogi":  # its moments begin with 1e-6
        grads[:, :2] = 0
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        tree = {"nu": jnp.asarray(g[:6].reshape(2, 3)), "b": jnp.asarray(g[6:])}
        _, state = update(tree, state, params)
    found = adaptive_rates(state, config)
    if name == "sgd":
        assert found == (None, None, 0)
        return
    decay = config.decay if name == "rmsprop" else 0.9
    v, largest = np.full(10, 1e-6 if name == "yogi" else 0.0), np.zeros(10)
    for g in grads:
        if name == "yogi":
            v = v - (1 - decay) * np.sign(v - g**2) * g**2
        else:
            v = decay * v + (1 - decay) * g**2
        largest = np.maximum(largest, v)
    v = largest if name in ("amsgrad", "padam") else v
    v = v / (1 if name == "rmsprop" else 1 - 0.9**3)
    rates = 1 / np.sqrt(v[v > 0])
    assert found.left_out == np.sum(v == 0)
    assert found.variance == pytest.approx(np.var(rates), rel=1e-5)
    spread = np.sqrt(np.quantile(rates**-2, 0.95) / np.quantile(rates**-2, 0.05))
    assert found.spread == pytest.approx(spread, rel=1e-5)


def test_an_optimizer_that_has_made_no_step_has_no_adaptive_rates():
    config = gnp_config.default().optimizer
    config.name = "adam"
    state = base_optimizer(config, 1e-3).init(jnp.ones(5))
    assert adaptive_rates(state, config) == (None, None, 5)


# --- Checkpoints ---------------------------------------------------------------------------------

SETTINGS = {
    **{"max_examples": EXAMPLES, "eigenvalues": 3, "lanczos_steps": 25, "density_probes": 1},
    **{"trace_probes": 4, "surface": 3, "extent": 0.5, "ascents": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(make_config(), workdir)
    return workdir


@pytest.mark.slow
def test_the_measures_of_a_runs_checkpoints(finished):
    """The spectrum against ARPACK's, with products over the examples in one batch."""
    workdir, passes, started = finished, [], []
    settings = Settings(**SETTINGS)
    rows = list(
        measure_checkpoints(
            *(make_config(), workdir, settings),
            on_start=lambda step, num_passes: started.append((step, num_passes)),
            on_pass=lambda: passes.append(1),
        )
    )
    assert [row["step"] for row in rows] == [10, 14]
    each = settings.num_passes + 3**2
    assert started == [(10, each), (14, each)] and len(passes) == 2 * each
    row = measures.load(workdir)[-1]
    assert row == rows[-1]
    assert row["epoch"] == pytest.approx(14 * 100 / 1437)

    experiment = make_experiment(make_config())
    state = Checkpoints(workdir).restore(experiment.abstract_state, 14)
    loss = in_one_batch(experiment, experiment.load_data(), state.model_state)
    flat, unravel = ravel_pytree(state.params)
    value_and_grad = jax.jit(jax.value_and_grad(lambda v: loss(unravel(v))))
    product = jax.jit(lambda v: jax.jvp(value_and_grad, (flat,), (v,))[1][1])
    operator = scipy.sparse.linalg.LinearOperator(
        (flat.size, flat.size), lambda v: np.asarray(product(v.astype(np.float32))), dtype="f"
    )
    expected = scipy.sparse.linalg.eigsh(operator, 3, which="LA", return_eigenvectors=False)
    assert (np.abs(row["eigenvalues"] - np.sort(expected)[::-1]) < 1e-3).all()
    assert max(row["eigenvalue_errors"]) < 0.03
    value, g = jax.device_get(value_and_grad(flat))
    assert row["num_examples"] == EXAMPLES
    assert row["loss"] == pytest.approx(float(value), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(np.linalg.norm(g), rel=1e-4)
    assert row["weight_norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    first, _ = value_and_grad(flat + 0.05 * g / np.linalg.norm(g))
    assert row["sam_sharpness"] > float(first) - row["loss"] - 1e-5
    surface = row["surface"]
    assert surface["x"] == surface["y"] == [-0.5, 0.0, 0.5]
    assert surface["loss"][1][1] == pytest.approx(row["loss"], rel=1e-5)
    assert len({x for line in surface["loss"] for x in line}) == 9
    density = row["density"]
    assert np.trapezoid(density["density"], density["eigenvalue"]) == pytest.approx(1, abs=1e-4)
    # Four probes of a matrix whose Frobenius norm is about that of the largest eigenvalues
    assert abs(row["trace"] - np.sum(expected)) < 10 * np.linalg.norm(expected)
    assert row["adaptive_lr_variance"] > 0 and row["adaptive_lr_spread"] > 1


@pytest.mark.slow
def test_the_command_line_measures_what_has_not_been_measured(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("sharpness.jsonl"))
    flags = [f"--workdir={workdir}", "--sharpness", "--eigenvalues=1", "--lanczos_steps=2"]
    flags += ["--max_examples=50", "--trace_probes=2"]
    done = run("evaluate", *flags, "--step=10", "--json")
    assert done.returncode == 0 and "measuring step 10: 6 passes" in done.stderr, done.stderr
    [row] = json.loads(done.stdout)
    assert row["step"] == 10 and row["num_examples"] == 50 and row["settings"]["max_examples"] == 50

    done = run("evaluate", *flags)
    assert done.returncode == 0, done.stderr
    assert "measuring step 14" in done.stderr and "measuring step 10" not in done.stderr
    assert "50 examples of train" in done.stdout and "λ₁" in done.stdout
    assert [r["step"] for r in measures.load(workdir)] == [10, 14]
    head, first, second, _ = done.stdout.splitlines()[1:]
    assert head.split()[:5] == ["step", "epoch", "loss", "‖∇L‖", "‖θ‖"]
    assert head.count("λ") == 1  # the first eigenvalue is the last one too
    assert first.split()[0] == "10" and float(second.split()[2]) == pytest.approx(
        measures.load(workdir)[1]["loss"], abs=1e-4
    )
    other = Settings(**{**json.loads(json.dumps(row["settings"])), "radius": 0.1})
    again = list(measure_checkpoints(make_config(), workdir, other, steps=[10]))
    assert again[0]["radius"] == 0.1 and again[0]["eigenvalues"] == row["eigenvalues"]
    assert [r["radius"] for r in measures.load_all(workdir)] == [0.05, 0.05, 0.1]

    # The surface and all else are measured once, whatever they are asked for with
    started = []

    def measured(settings):
        noted = {"steps": [10], "on_start": lambda step, passes: started.append(passes)}
        return next(measure_checkpoints(make_config(), workdir, settings, **noted))

    plain = dataclasses.replace(other, radius=0.2)
    surface = dataclasses.replace(other, surface=3)
    first = measured(surface)
    assert first["eigenvalues"] == row["eigenvalues"] and len(first["surface"]["x"]) == 3
    assert measured(plain)["surface"] is None
    assert measured(dataclasses.replace(plain, surface=3))["surface"] == first["surface"]
    assert measured(surface) == first and measured(other)["surface"] is None
    assert started == [9, 6]
    assert measures.load_all(workdir)[-2]["surface"] == first["surface"]

    # A run that was begun anew in the same directory
    path = workdir / "sharpness.jsonl"
    path.write_text(
        path.read_text().replace(f'"checksum": {again[0]["checksum"]}', '"checksum": 1')
    )
    [anew] = measure_checkpoints(make_config(), workdir, other, steps=[10])
    assert anew == again[0] and len(measures.load_all(workdir)) == 6


@pytest.mark.slow
def test_a_folder_of_runs_is_measured_one_after_another_whatever_fails(finished, tmp_path):
    """The first has no checkpoint, the last are damaged; one is given a second time."""
    (tmp_path / "runs/a").mkdir(parents=True)
    shutil.copy(finished / "config.json", tmp_path / "runs/a")
    for name in ("runs/d", "bad/e"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{")
    for name in ("b", "c"):
        ignored = shutil.ignore_patterns("sharpness.jsonl", "10")
        shutil.copytree(finished, tmp_path / "runs" / name, ignore=ignored)
    flags = [f"--workdir={tmp_path}/runs", f"--workdir={tmp_path}/runs/b", "--sharpness"]
    flags += [
        f"--workdir={tmp_path}/bad",
        "--eigenvalues=1",
        "--lanczos_steps=2",
        "--trace_probes=2",
        "--max_examples=20",
    ]
    done = run("evaluate", *flags, "--json")
    assert done.returncode == 1
    assert f"error: no checkpoint in {tmp_path}/runs/a" in done.stderr
    for name in ("runs/d", "bad/e"):
        assert f"error: {tmp_path}/{name}/config.json is not valid JSON" in done.stderr
    assert done.stderr.endswith("3 of 5 runs could not be measured\n")
    names = [str(tmp_path / "runs" / name) for name in ("b", "c")]
    assert [(row["workdir"], row["step"]) for row in json.loads(done.stdout)] == [
        (name, 14) for name in names
    ]
    assert all(len(measures.load_all(name)) == 1 for name in names)


def test_a_folder_of_runs_is_not_evaluated_at_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(make_config().to_dict()))
    done = run("evaluate", f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stderr == (
        f"error: {tmp_path} is a folder of runs, and one is evaluated at a time; name it, as "
        f"--workdir={tmp_path}/a, or measure all with --sharpness\n"
    )
    done = run("evaluate", f"--workdir={tmp_path}/a", f"--workdir={tmp_path}/b")
    assert done.returncode == 2 and "error: several runs are given, and one" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_has_a_row_without_numbers(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    state = Checkpoints(finished).restore(make_experiment(make_config()).abstract_state)
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(14, state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)))
    writer.close()
    [row] = measure_checkpoints(make_config(), tmp_path, Settings(max_examples=50))
    assert math.isnan(row["loss"]) and math.isnan(row["trace"]) and row["eigenvalues"] == []
    [there] = measures.load(tmp_path)
    assert there["step"] == 14 and math.isnan(there["sam_sharpness"]) and there["surface"] is None


def test_a_run_without_checkpoints_and_a_model_that_is_too_large(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no checkpoint in"):
        next(measure_checkpoints(make_config(), tmp_path, Settings()))
    (tmp_path / "checkpoints/7").mkdir(parents=True)
    monkeypatch.setattr(checkpoint_measures, "device_memory", lambda mesh: 100_000)
    with pytest.raises(UserError, match=r"lanczos_steps is 40: so many vectors of .* lower it"):
        next(measure_checkpoints(make_config(), tmp_path, Settings(), steps=[7]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--radius=0.1"], "--radius goes with --sharpness; add it"),
        (["--sharpness", "--eigenvalues=x"], "argument --eigenvalues: invalid int value: 'x'"),
        (["--sharpness", "--lanczos_steps=0"], "lanczos_steps is 0; it must be 1 or more"),
        (["--sharpness", "--step=12"], "no checkpoint of step 12 in"),
    ],
)
def test_mistakes_of_the_command_line(tmp_path, flags, message):
    (tmp_path / "config.json").write_text(json.dumps(make_config().to_dict()))
    done = run("evaluate", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
