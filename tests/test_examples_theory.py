"""The examples under scripts/examples that show a theorem."""

import importlib.util
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

PATH = pathlib.Path(__file__).parents[1] / "scripts" / "examples" / "weight_decay_at_rest.py"


@pytest.fixture
def example():
    """The example as a module, in float64."""
    with jax.enable_x64(True):
        spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_the_table_shows_vanilla_decay_drifting_and_coupled_decay_at_rest(capsys):
    runpy.run_path(str(PATH), run_name="__main__")
    rows = [line.replace("|", " ").split() for line in capsys.readouterr().out.splitlines()[2:]]
    table = np.array(rows, float)
    step, rate, vanilla, vanilla_drift, coupled, coupled_drift = table.T
    np.testing.assert_array_equal(step, 200 * np.arange(1, 11))
    np.testing.assert_allclose(rate, 0.05 * (1 + np.cos(np.pi * step / 2000)), atol=6e-5)
    assert (np.diff(vanilla) > 0).all() and (np.diff(vanilla_drift[1:]) > 0).all()
    assert vanilla[-1] > 1 and vanilla_drift[-1] > 0.5
    # float32 resolves a component near 2 to 2.4e-7, and can stall where half of that exceeds
    # a step, a distance of 1.2e-7 / (η (a + λ)) away: 2e-6 at the first η and the least a
    assert (coupled[1:] < 4e-6).all() and (coupled_drift[2:] < 4e-6).all()


@pytest.mark.parametrize("kind", ["vanilla", "coupled"])
def test_the_iterates_are_those_of_the_product_formula(example, kind):
    """On a quadratic θ_T = Σ_s η_s a c Π_{u > s} κ_u, with κ the contraction of a step."""
    steps, decay = 300, 0.02
    schedule = optax.cosine_decay_schedule(0.1, steps)
    iterates = example.descend(getattr(example, kind)(schedule, decay), steps)
    rate = np.array([schedule(t) for t in range(steps)])[:, None]
    a, c = np.asarray(example.CURVATURE), np.asarray(example.CENTRE)
    kappa = 1 - rate * a - decay * (1 if kind == "vanilla" else rate)
    after = np.cumprod(np.vstack([np.ones(3), kappa[:0:-1]]), axis=0)[::-1]
    np.testing.assert_allclose(iterates[-1], (rate * a * c * after).sum(0), rtol=1e-10)
    assert iterates.shape == (steps + 1, 3) and not iterates[0].any()


@pytest.mark.parametrize("later", [0.1, 0.05, 0.01])
def test_another_learning_rate_moves_only_vanilla_decay(example, later):
    decay, rate = 0.02, 0.1
    points = {"vanilla": decay / rate, "coupled": decay}
    for kind, strength in points.items():
        theta = example.resting_point(strength)
        tx = getattr(example, kind)(lambda count: later, decay)
        grads = example.CURVATURE * (theta - example.CENTRE)
        updates, _ = tx.update(grads, tx.init(theta), theta)
        expected = decay * (later / rate - 1) * theta if kind == "vanilla" else 0
        np.testing.assert_allclose(updates, jnp.broadcast_to(expected, 3), atol=1e-15)


def test_the_resting_point_is_the_minimum_of_the_regularized_loss(example):
    def loss(theta):
        return jnp.sum(example.CURVATURE * (theta - example.CENTRE) ** 2 + 0.3 * theta**2) / 2

    np.testing.assert_allclose(jax.grad(loss)(example.resting_point(0.3)), 0, atol=1e-15)


def test_theorem_1_where_its_condition_holds(example):
    """η alternates, so that it changes by δ at every step: vanilla decay ends in a cycle of two."""
    rates, decay, steps = np.array([0.1, 0.04]), 0.02, 1000

    def schedule(count):
        return jnp.asarray(rates)[count % 2]

    a, c = np.asarray(example.CURVATURE), np.asarray(example.CENTRE)
    kappa = 1 - decay - rates[:, None] * a  # θ ← κ θ + η a c
    push = rates[:, None] * a * c
    even = (kappa[1] * push[0] + push[1]) / (1 - kappa[0] * kappa[1])
    odd = kappa[0] * even + push[0]
    iterates = example.descend(example.vanilla(schedule, decay), steps)
    np.testing.assert_allclose(iterates[-3:], [even, odd, even], rtol=1e-9)
    assert np.linalg.norm(even - odd) > 1e-2

    iterates = example.descend(example.coupled(schedule, decay), steps)
    np.testing.assert_allclose(iterates[-3:], [example.resting_point(decay)] * 3, rtol=1e-9)
