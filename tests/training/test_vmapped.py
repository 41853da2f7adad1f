"""Runs that one program trains together: each is what it would be by itself."""

import contextlib
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import make_config, read_rows

from gnp import config as gnp_config
from gnp import models
from gnp.data import pipeline
from gnp.errors import UserError
from gnp.training import Interrupted, loop, step, train, vmapped
from gnp.training import optimizer as optimizers
from gnp.training.checkpoint import Checkpoints
from gnp.training.compilation import compiled
from gnp.training.evaluation import evaluate_checkpoint
from gnp.training.experiment import make_experiment

DIFFERING = (
    {"seed": "0"},
    {
        **{"seed": "1", "lr__base": "0.02", "gr__radius": "0.05", "gr__ratio": "0.8"},
        **{"weight_decay__value": "1e-3", "optimizer__momentum": "0.8", "clip_norm": "0.3"},
    },
)


def make_configs(*differing, **fields):
    """Of 14 steps, 7 of which warm up. Adam would grow the rounding of gradients that are 0."""
    fields = {
        **{"optimizer__name": "sgd", "lr__base": "0.05", "model__dropout": "0.1"},
        **{"clip_norm": "1.0", "ema__decay": "0.9", "epochs": "1", "checkpoint__every": "5st"},
        **{"eval__every": "6st"},
        **fields,
    }
    return [make_config(**(fields | one)) for one in differing or DIFFERING]


def timeless(rows):
    """Rows without what the clock says."""
    clock = ("wall_time", "images_per_second")
    return [{name: x for name, x in row.items() if name not in clock} for row in rows]


def directories(path, count=2):
    return [path / f"{i}" for i in range(count)]


class Perceptron(nn.Module):
    """A model that is quick to compile; its numbers are float64 where those are enabled."""

    @nn.compact
    def __call__(self, images, train=False):
        wide = {"dtype": jnp.float64, "param_dtype": jnp.float64} if jax.config.x64_enabled else {}
        hidden = nn.tanh(nn.Dense(16, **wide)(images.reshape(len(images), -1)))
        hidden = nn.Dropout(0.1, deterministic=not train)(hidden)
        return nn.Dense(10, **wide)(hidden)


@pytest.fixture(scope="module")
def perceptron():
    """Every model is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "create", lambda *arguments, **overrides: Perceptron())
        yield


@pytest.fixture(scope="module")
def together(tmp_path_factory, perceptron):
    """The work directories and results of a group."""
    workdirs = directories(tmp_path_factory.mktemp("together"))
    return workdirs, vmapped.train(make_configs(), workdirs, command="the command")


# --- What may be trained together ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("differing", "groups"),
    [
        (({}, {"seed": "1"}, {"lr__base": "0.1"}, {"clip_norm": "2"}), [[0, 1, 2, 3]]),
        (({}, {"gr__policy": "none"}, {"seed": "1"}), [[0, 2], [1]]),
        (({}, {"clip_norm": "none"}, {"gr__ratio": "0"}), [[0], [1], [2]]),
        (({}, {"optimizer__b2": "0.99"}, {"optimizer__eps": "1e-6"}), [[0, 2], [1]]),
        (({}, {"steps_per_call": "3"}, {"epochs": "3"}), [[0, 1], [2]]),
        (({"on_nonfinite": "rollback"},) * 2, [[0], [1]]),
        (({"mesh__data": "2"},) * 2, [[0], [1]]),
        (({"data__resident": "false"},) * 2, [[0], [1]]),
        (({"gr__num_groups": "2"},) * 2, [[0], [1]]),
    ],
)
def test_group(differing, groups):
    assert vmapped.group(make_configs(*differing)) == groups


def test_what_is_no_group_is_refused(tmp_path):
    configs = make_configs({}, {"epochs": "3"})
    with pytest.raises(UserError, match=r"runs 0 and 1 cannot .*: config.epochs: 1.0 there, 3.0"):
        vmapped.train(configs, directories(tmp_path, 2))
    configs = make_configs({}, {"seed": "1"})
    with pytest.raises(UserError, match="2 configurations, 1 work directories: each run needs"):
        vmapped.train(configs, [tmp_path, tmp_path])
    assert vmapped.train([], []) == []
    assert not list(tmp_path.iterdir())


# --- The numbers of the optimizer ---------------------------------------------------------------


def trajectory(config, params, steps=4):
    """Parameters under 4 updates on a quadratic loss, by an optimizer of `config`."""
    curvature = jnp.array([1.0, 3.0, 0.1])
    optimizer = optimizers.build(config, steps_per_epoch=1.0, total_steps=8, params=lambda: params)

    def loss(params):
        return jnp.sum(curvature * params["x"] ** 2) / 2 + optimizer.l2_penalty(params)

    def body(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        updates, state = optimizer.tx.update(grads, state, params, grad_fn=jax.grad(loss))
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), optimizer.report(state, jnp.int32(0))["learning_rate"][0]

    (params, _), rates = jax.lax.scan(body, (params, optimizer.tx.init(params)), length=steps)
    return params["x"], rates


@pytest.mark.parametrize(
    ("name", "kind", "policy"),
    [
        ("adam", "scheduled", "zero"),
        ("amsgrad", "l2", "lambda"),
        ("yogi", "decoupled", "r"),
        ("radam", "coupled", "none"),
        ("padam", "scheduled", "off"),
        ("adabound", "vanilla", "zero"),
        ("rmsprop", "scheduled", "none"),
        ("sgd", "scheduled", "zero"),
    ],
)
def test_every_number_may_be_traced(name, kind, policy):
    fields = {
        **{"optimizer__name": name, "weight_decay__kind": kind, "gr__policy": policy},
        **{"lr__schedule": "step", "lr__warmup_kind": "constant", "lr__warmup": "2st"},
        **{"lr__drops": "3st", "epochs": "8", "clip_norm": "0.5", "model__dropout": "none"},
    }
    configs = [make_config(**fields) for _ in range(2)]
    other = {"optimizer.eps": 1e-4, "optimizer.partial": 0.25, "gr.ratio": 0.7, "lr.base": 0.02}
    for field in vmapped.NUMBERS:
        if field != "ema.decay":
            value = other.get(field, 0.8 * vmapped._get(configs[1], field))
            gnp_config.override(configs[1], field, repr(value))
    params = {"x": jnp.array([1.0, -2.0, 3.0])}
    alone = [trajectory(config, params) for config in configs]
    values = {
        field: jnp.array([vmapped._get(config, field) for config in configs])
        for field in vmapped.NUMBERS
        if field != "ema.decay"
    }
    many = jax.vmap(lambda x: trajectory(vmapped._with_numbers(configs[0], x), params))(values)
    for i, expected in enumerate(alone):
        for ours, theirs in zip(many, expected, strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=2e-6)
    assert not np.allclose(alone[0][0], alone[1][0], rtol=1e-3)


def test_masks_are_those_of_each_seed():
    def bits(impl, seed):
        key = jax.random.fold_in(jax.random.key(seed, impl=impl), 7)
        return jax.random.bits(jax.random.split(key)[1], (5,))

    seeds = jnp.array([3, 4])
    alone = [bits("rbg", seed) for seed in (3, 4)]
    many = jax.jit(jax.vmap(lambda seed: bits(vmapped._ONE_BY_ONE, seed)))(seeds)
    np.testing.assert_array_equal(many, alone)
    assert (jax.vmap(lambda seed: bits("rbg", seed))(seeds)[1] != alone[1]).any()


# --- Gradient regularization's second gradient --------------------------------------------------


def test_the_second_gradient_is_not_computed_in_the_warmup():
    """Counted on the host: none in the two steps of warmup, one in each step after."""
    calls = []
    config = make_config(gr__policy="zero", lr__warmup="2st", optimizer__name="sgd", epochs="8")

    def grad_fn(params):
        jax.debug.callback(lambda x: calls.append(float(x)), params["x"][0])
        return params

    def one(values):
        numbers = vmapped._with_numbers(config, values)
        params = {"x": values["lr.base"] * jnp.ones(3)}
        tx = optimizers.build(numbers, steps_per_epoch=1.0, total_steps=8, params=lambda: params).tx

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params, grad_fn=grad_fn)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), length=5)[0]

    values = {"lr.base": jnp.array([0.1, 0.2]), "gr.ratio": jnp.array([1.0, 0.5])}
    jax.block_until_ready(jax.jit(jax.vmap(one))(values))
    jax.effects_barrier()
    assert len(calls) == 3 * 2  # of each run


class _Nothing:
    """The checkpoints of a directory that has none."""

    def steps(self):
        return []


def traced(configs):
    """The program of a group, and its first states."""
    first = make_experiment(configs[0])
    stack = vmapped.Stack([first.with_config(config) for config in configs])
    data = first.load_data()
    state = stack.state([_Nothing()] * len(configs), None)
    call = stack.train_call(data, log_every=5, max_steps=14)
    return call.trace(state, data.train_input(), 14, *stack.arguments), stack.each(state)


def products(text, computations):
    """The matrix products of a compiled computation, with those of all that it calls."""
    names = re.findall(r"%[\w.-]+", text)
    inner = [computations[name] for name in names if name in computations]
    return text.count(" dot(") + sum(products(other, computations) for other in inner)


@pytest.mark.slow
def test_the_branch_is_in_the_compiled_program():
    """One branch has the second gradient's matrix products, as many as are in all the rest."""
    program, _ = traced(make_configs())
    text = compiled(program.lower()).as_text()
    computations = dict(re.findall(r"^(%[\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    branches = [
        [products(computations[name], computations) for name in names.split(", ")]
        for names in re.findall(r" conditional\(.*branch_computations=\{(.*?)\}", text)
    ]
    (none, second) = next(pair for pair in branches if sum(pair))
    assert sum(map(sum, branches)) == second > 0 == none
    assert text.count(" dot(") == 2 * second


# --- Against the same runs one by one -----------------------------------------------------------


def parameters(config, workdir, step):
    state = Checkpoints(workdir).restore(make_experiment(config).abstract_state, step)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])


def close(value):
    return pytest.approx(value, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_each_run_is_what_it_is_by_itself(tmp_path):
    """Up to float32's rounding, 6e-8 in each of about 100 operations one after another in a step.

    Those of 14 steps add up to at most 1e-4; most of them cancel.
    """
    configs, workdirs = make_configs(), directories(tmp_path)
    results = vmapped.train(configs, workdirs, command="the command")
    # The second differs in all numbers.
    config, ours, result = configs[1], workdirs[1], results[1]
    theirs = tmp_path / "alone"
    expected = train(config, theirs, command="the command")
    assert {p.name for p in ours.iterdir() if "tfevents" not in p.name} == {
        p.name for p in theirs.iterdir() if "tfevents" not in p.name
    }
    for name in ("config.json", "data.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    assert json.loads((ours / "result.json").read_text()) == result
    assert result.keys() == expected.keys() and result["command"] == "the command"
    for row, other in zip(read_rows(ours), read_rows(theirs), strict=True):
        assert list(row) == list(other)
        assert [row[x] for x in ("step", "epoch", "split")] == [
            other[x] for x in ("step", "epoch", "split")
        ]
        for name, value in timeless([other])[0].items():
            assert row[name] == (value if value in (None, row["split"]) else close(value)), name
    assert Checkpoints(ours).steps() == Checkpoints(theirs).steps() == [14, 10]
    for at in (10, 14):
        a, b = parameters(config, ours, at), parameters(config, theirs, at)
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
    assert len({result["params_sha256"] for result in results}) == 2


@pytest.mark.slow
def test_the_first_parameters_are_those_of_each_seed():
    configs = make_configs()
    _, states = traced(configs)
    for config, state in zip(configs, states, strict=True):
        jax.tree.map(np.testing.assert_array_equal, state, make_experiment(config).init())


@pytest.mark.slow
def test_in_float64_the_same_to_ten_digits(tmp_path, perceptron, monkeypatch):
    """What float32 there is in a step, the loss and the images, is float64 here."""
    monkeypatch.setattr(
        step,
        "cross_entropy",
        lambda logits, labels: (
            -jnp.sum(jax.nn.one_hot(labels, 10) * logits, axis=-1)
            + jax.nn.logsumexp(logits, axis=-1)
        ),
    )
    monkeypatch.setattr(
        pipeline, "normalise", lambda images, mean, std: (images / 255 - mean) / std
    )
    configs, workdirs = make_configs(), directories(tmp_path)
    with jax.enable_x64(True):
        vmapped.train(configs, workdirs)
        for i, config in enumerate(configs):
            train(config, tmp_path / "alone" / f"{i}")
            a, b = (parameters(config, path, 14) for path in (workdirs[i], tmp_path / f"alone/{i}"))
            assert a.dtype == b.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# --- Continued ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_can_be_continued_and_evaluated_by_itself(together, tmp_path):
    config, workdir = make_configs()[1], tmp_path / "run"
    shutil.copytree(together[0][1], workdir)
    expected = together[1][1]["test"]["loss"]
    assert evaluate_checkpoint(config, workdir)["test"]["loss"] == close(expected)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "14")
    assert train(config, workdir)["test"]["loss"] == close(expected)


@pytest.mark.slow
def test_interrupted_and_killed_it_ends_as_if_it_had_not_been(together, tmp_path, monkeypatch):
    workdirs, configs = directories(tmp_path), make_configs()

    class Later:
        count = 0

        @property
        def exit_code(self):
            self.count += 1
            return 75 if self.count >= 9 else 0

    with monkeypatch.context() as patch:
        patch.setattr(loop, "CALL_SECONDS", 1e3)  # how many steps a call has is no question of time
        patch.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(Later()))
        with pytest.raises(Interrupted) as error:
            vmapped.train(configs, workdirs)
    assert error.value.exit_code == 75
    saved = error.value.saved_step
    assert [Checkpoints(path).steps()[0] for path in workdirs] == [saved] * 2
    assert saved == 6  # in the evaluation, when the first run has its row
    assert [len(read_rows(path, "test")) for path in workdirs] == [1, 0]
    # As if killed when only one had been saved.
    shutil.rmtree(workdirs[1] / "checkpoints" / str(saved))
    assert [Checkpoints(path).steps() for path in workdirs] == [[6, 5], [5]]
    results = vmapped.train(configs, workdirs)
    for path, other, result, expected in zip(
        workdirs, together[0], results, together[1], strict=True
    ):
        assert result["params_sha256"] == expected["params_sha256"]
        assert timeless(read_rows(path)) == timeless(read_rows(other))
    assert vmapped.train(configs, workdirs) == results


@pytest.mark.parametrize(
    ("steps", "parts"),
    [
        ({0: [], 1: []}, [[0, 1]]),
        ({0: [10, 5], 2: [10, 5]}, [[0, 2]]),
        ({0: [10, 5], 1: [5]}, [[0, 1]]),
        ({0: [10, 5], 1: [], 2: [10, 5], 3: []}, [[0, 2], [1, 3]]),  # seeds that came later
        ({0: [10], 1: [5], 2: [10]}, [[0, 2]]),
        ({0: [10], 1: [5]}, []),
        ({0: [10, 5], 1: []}, []),
        ({}, []),
    ],
)
def test_who_goes_on_together(steps, parts):
    """Nothing that has been trained is begun again."""
    assert vmapped._parts(steps) == parts


# --- A loss that is not finite ------------------------------------------------------------------


@pytest.mark.slow
def test_one_that_diverges_disturbs_no_other(together, tmp_path):
    """The other is bit for bit what it is beside a run that does not diverge."""
    differing = DIFFERING[0], DIFFERING[1] | {"lr__base": "1e30"}
    workdirs, configs = directories(tmp_path), make_configs(*differing)
    results = vmapped.train(configs, workdirs)
    assert results[0]["params_sha256"] == together[1][0]["params_sha256"]
    assert list(results[1]) == ["failed"]
    with pytest.raises(UserError) as error:
        train(configs[1], tmp_path / "alone")
    told = str(error.value).replace(str(tmp_path / "alone"), str(workdirs[1]))
    assert results[1]["failed"] == told
    assert timeless(read_rows(workdirs[1])) == timeless(read_rows(tmp_path / "alone"))
    assert Checkpoints(workdirs[1]).steps() == Checkpoints(tmp_path / "alone").steps()
    # Again, it says the same, and the other is done.
    assert vmapped.train(configs, workdirs) == results
