"""Extreme values: what is finite stays finite and right, and what is not finite stays visible.

The oracles are the formulas in NumPy's float64, which holds the square of every float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gnp import transforms

FLOAT32 = np.finfo(np.float32)
TINY, MAX = float(FLOAT32.tiny), float(FLOAT32.max)
EXTREMES = (0.0, TINY, 1e-30, 1e-25, 1e-20, 1e-10, 1.0, 1e10, 2e19, 1e30, MAX)

DECAY, B2 = 0.01, 0.9
swd = transforms.scheduled_weight_decay(optax.identity(), DECAY, b2=B2)
few = functools.partial(settings, deadline=None, max_examples=40)


def numbers(largest=MAX, smallest=TINY):
    """0, and float32's normal numbers of every size, extreme ones above all."""
    known = [x for x in EXTREMES if smallest <= x <= largest]
    exponents = st.floats(np.log10(smallest) + 0.1, np.log10(largest) - 0.1)
    size = st.one_of(st.just(0.0), st.sampled_from(known), exponents.map(lambda e: 10**e))
    return st.builds(lambda sign, x: sign * x, st.sampled_from([1, -1]), size)


def trees(largest=MAX, smallest=TINY):
    """Two leaves of sizes of their own: [3] and [2, 1]."""
    leaf = functools.partial(st.lists, numbers(largest, smallest))
    return st.tuples(leaf(min_size=3, max_size=3), leaf(min_size=2, max_size=2)).map(
        lambda pair: {"a": np.float32(pair[0]), "b": np.float32(pair[1])[:, None]}
    )


def with_subnormals():
    return st.tuples(trees(), st.sampled_from([0.0, 1e-45, 1e-40])).map(
        lambda pair: {"a": pair[0]["a"], "b": np.full((2, 1), pair[1], np.float32)}
    )


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf, np.float64)).all(), jax.tree_util.keystr(path)


ZEROS = {"a": np.zeros(3, np.float32), "b": np.zeros((2, 1), np.float32)}
radii = st.one_of(
    st.sampled_from([0.0, TINY, 1e-30, 1e-10, 0.05, 1.0, 1e10, 1e30, MAX]),
    st.floats(-37, 38).map(lambda e: 10**e),
)


@functools.partial(jax.jit, static_argnames=("dtype", "mask"))
def perturbation(grads, radius, *, dtype=jnp.float32, mask=False):
    """ε itself: the perturbed point of parameters 0, given back by `grad_fn` at the ratio 1."""
    tx = transforms.gradient_regularization(
        lambda t: radius, 1.0, mask={"a": True, "b": False} if mask else None
    )
    seen = []

    def grad_fn(params):
        seen.append(params)
        return params

    grads = jax.tree.map(lambda g: g.astype(dtype), grads)
    _, state = tx.update(grads, tx.init(ZEROS), ZEROS, grad_fn=grad_fn)
    return grads, seen[0], state


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@few()
@given(grads=trees(), radius=radii)
@example(
    grads={"a": np.array([0, 0, 1e-25], np.float32), "b": np.zeros((2, 1), np.float32)},
    radius=float(np.finfo(np.float32).max),
)
def test_the_perturbation_is_the_formula_and_has_its_length(dtype, mask, grads, radius):
    if dtype == jnp.bfloat16:  # whose largest number is smaller
        grads = jax.tree.map(lambda g: g.clip(-3e38, 3e38), grads)
    if dtype == jnp.float16:
        grads = jax.tree.map(lambda g: g.clip(-6e4, 6e4), grads)
    rounded, epsilon, state = perturbation(grads, np.float32(radius), dtype=dtype, mask=mask)
    g = flat(rounded)
    np.testing.assert_allclose(state.grad_norm, min(np.linalg.norm(g), MAX), rtol=1e-6)
    if mask:
        g[3:] = 0
    norm = np.linalg.norm(g)
    expected = radius * g / norm if norm else np.zeros_like(g)
    # What of ε itself, or beside the largest element, is below the normal numbers may be 0.
    lost = 4 * TINY * max(radius, 1)
    np.testing.assert_allclose(flat(epsilon), expected, rtol=2e-6, atol=lost)
    if norm and radius >= 1e-30:
        np.testing.assert_allclose(np.linalg.norm(flat(epsilon)), radius, rtol=2e-6)


def test_a_norm_of_many_squares_that_vanish_beside_one_that_does_not():
    grads = np.full(100_000, 5e-20, np.float32)
    grads[0] = 1e-18
    zeros = np.zeros_like(grads)
    tx = transforms.gradient_regularization(0.1, 1.0)
    point, state = tx.update(grads, tx.init(zeros), zeros, grad_fn=lambda p: p)
    norm = np.linalg.norm(grads.astype(np.float64))
    np.testing.assert_allclose(state.grad_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(point, 0.1 * grads / norm, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("size", [0.0, 1e-25, 1.0, 1e30])
def test_gradients_that_are_known_when_the_step_is_compiled(size, shape, dtype):
    """XLA reorders the products of constants, and those of scalars, which must not be seen."""
    grads = jnp.full(shape, size, dtype)
    zeros = jnp.zeros(shape, dtype)
    tx = optax.chain(transforms.gradient_regularization(0.1, 1.0), swd)

    def step(grads):
        def grad_fn(params):
            return params + grads

        return tx.update(grads, tx.init(zeros), zeros, grad_fn=grad_fn)[1]

    norm = np.linalg.norm(flat(grads))
    for gr, decay in (jax.jit(lambda: step(grads))(), jax.jit(step)(grads)):
        np.testing.assert_allclose(gr.grad_norm, norm, rtol=1e-6)
        np.testing.assert_allclose(gr.perturbed_grad_norm, norm + 0.1 * (size > 0), rtol=1e-2)
        v = (1 - B2) * min((norm + 0.1 * (size > 0)) ** 2 / grads.size, MAX)
        np.testing.assert_allclose(decay.mean_nu, v, rtol=1e-2)


@functools.partial(jax.jit, static_argnames="penalty")
def adaptive_point(params, grads, radius, *, penalty):
    """θ + ε of the adaptive variant."""
    tx = transforms.gradient_regularization(lambda t: radius, 1.0, adaptive=True, penalty=penalty)
    return tx.update(grads, tx.init(params), params, grad_fn=lambda p: p)


@few()
@given(
    params=trees(largest=1e37, smallest=1e-30),
    grads=trees(),
    radius=st.sampled_from([1e-3, 0.1, 2.0]),
)
def test_the_adaptive_perturbation_is_the_formula(params, grads, radius):
    point, state = adaptive_point(params, grads, radius, penalty="norm")
    assert_finite((point, state))
    theta, g = flat(params), flat(grads)
    products = theta * g
    norm = np.linalg.norm(products)
    # Where θ is 0 or tiny for the largest gradient, what is 36 decades below that one can be lost.
    smallest = 1e-36 * np.abs(g).max()
    lost = (np.abs(g) < smallest) | (np.abs(products) < smallest)
    assume(np.linalg.norm(products[lost]) <= 1e-7 * norm)
    expected = theta + (radius * theta * products / norm if norm else 0)
    np.testing.assert_allclose(flat(point), expected, rtol=5e-6, atol=1e-36)


@few()
@given(
    params=trees(smallest=1e-12),
    grads=trees(),
    radius=st.sampled_from([0.0, 1e-35, 1e-10, 1.0, 1e30]),
)
def test_the_squared_adaptive_perturbation_is_the_formula(params, grads, radius):
    """Wherever r θ² g is a float32, and inf at most elsewhere."""
    point, _ = adaptive_point(params, grads, radius, penalty="squared_norm")
    theta, g = flat(params), flat(grads)
    epsilon = np.float64(np.float32(radius)) * theta**2 * g
    expected = theta + epsilon
    there = np.abs(expected) < 0.99 * MAX
    assert not np.isnan(flat(point)).any()
    # Products of up to three numbers may be below the normal ones on the way.
    lost = 4 * TINY * (1 + np.abs(theta)) * max(radius, 1) * (1 + np.abs(theta))
    error = np.abs(flat(point) - expected)[there]
    assert (error <= (2e-6 * (np.abs(theta) + np.abs(epsilon)) + lost)[there]).all()


@jax.jit
def mixed(first, second, ratio):
    tx = transforms.gradient_regularization(0.1, lambda t: ratio)
    return tx.update(first, tx.init(ZEROS), ZEROS, grad_fn=lambda p: second)


@few()
@given(first=trees(), second=trees(), ratio=st.sampled_from([0.0, TINY, 0.3, 1.0, 1.5, 2.0, 1e10]))
def test_the_mix_is_right_where_its_terms_overflow(first, second, ratio):
    updates, state = mixed(first, second, np.float32(ratio))
    assert_finite(state)
    alpha, g, h = np.float64(np.float32(ratio)), flat(first), flat(second)
    expected = (1 - alpha) * g + alpha * h
    there = np.abs(expected) < 0.99 * MAX
    rounding = 1e-6 * (np.abs((1 - alpha) * g) + np.abs(alpha * h)) + 4 * TINY
    assert (np.abs(flat(updates) - expected) <= rounding)[there].all()
    assert not np.isnan(flat(updates)).any()
    norm = min(np.linalg.norm(h), MAX) if ratio else 0
    np.testing.assert_allclose(state.perturbed_grad_norm, norm, rtol=1e-6)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 100.0])
def test_the_mix_of_two_gradients_that_are_alike_is_that_gradient(ratio):
    largest = jax.tree.map(lambda x: np.full_like(x, -3e38), ZEROS)
    for tx in (ratio, lambda t: ratio):
        tx = transforms.gradient_regularization(0.1, tx)
        updates, _ = tx.update(largest, tx.init(ZEROS), ZEROS, grad_fn=lambda p: largest)
        np.testing.assert_allclose(flat(updates), flat(largest), rtol=1e-4)


@jax.jit
def grouped(grads, radius):
    """The groups' ε, the mean gradient and the state."""
    seen = []

    def grad_fn(params):
        seen.append(params)
        return grads

    tx = transforms.gradient_regularization(lambda t: radius, 0.5, num_groups=3)
    updates, state = tx.update(grads, tx.init(ZEROS), ZEROS, grad_fn=grad_fn)
    return seen[0], updates, state


@few()
@given(groups=st.lists(trees(), min_size=3, max_size=3), radius=st.sampled_from([0.0, 0.1, 1e30]))
def test_each_group_has_its_own_length_and_the_mean_does_not_overflow(groups, radius):
    grads = jax.tree.map(lambda *leaves: np.stack(leaves), *groups)
    epsilon, updates, state = grouped(grads, np.float32(radius))
    each = np.stack([flat(g) for g in groups])
    norms = np.linalg.norm(each, axis=1)
    for i, (g, norm) in enumerate(zip(each, norms, strict=True)):
        expected = np.float64(np.float32(radius)) * g / norm if norm else np.zeros_like(g)
        of_group = flat(jax.tree.map(lambda x: x[i], epsilon))  # noqa: B023
        np.testing.assert_allclose(of_group, expected, rtol=2e-6, atol=4 * TINY * max(radius, 1))
    rounding = 1e-6 * np.abs(each).mean(axis=0) + 4 * TINY
    assert (np.abs(flat(updates) - each.mean(axis=0)) <= rounding).all()
    mean_norm = np.minimum(norms, MAX).mean()
    np.testing.assert_allclose(state.grad_norm, mean_norm, rtol=1e-6, atol=TINY)


VARIANTS = {
    "plain": {},
    "exact": {"estimator": "exact"},
    "exact-adaptive": {"estimator": "exact", "adaptive": True},
    "squared": {"penalty": "squared_norm"},
    "adaptive": {"adaptive": True},
    "mask": {"mask": {"a": True, "b": False}, "adaptive": True},
    "groups": {"num_groups": 2},
    "groups-adaptive": {"num_groups": 2, "adaptive": True},
}


def tanh(params):
    """A gradient function that is finite, as is its derivative, wherever it is evaluated."""
    return jax.tree.map(jnp.tanh, params)


@functools.partial(jax.jit, static_argnames="name")
def updated(params, grads, radius, *, name):
    variant = VARIANTS[name]
    if "num_groups" in variant:
        grads = jax.tree.map(lambda g: jnp.stack([g, -g / 3]), grads)
    tx = transforms.gradient_regularization(lambda t: radius, lambda t: 0.5, **variant)
    return tx.update(grads, tx.init(params), params, grad_fn=tanh)


@pytest.mark.parametrize("name", VARIANTS)
@few(max_examples=25)
@given(
    params=trees(largest=1e18),
    grads=with_subnormals(),
    radius=st.sampled_from([0.0, 1e-45, TINY, 0.1, 1.0]),
)
def test_every_variant_stays_finite(name, params, grads, radius):
    assert_finite(updated(params, grads, np.float32(radius), name=name))


@pytest.mark.parametrize("name", VARIANTS)
@few(max_examples=10)
@given(grads=trees(), wrong=st.sampled_from([np.nan, np.inf, -np.inf]), index=st.integers(0, 4))
def test_what_is_not_finite_shows_in_the_norms(name, grads, wrong, index):
    leaf, at = ("a", index) if index < 3 else ("b", index - 3)
    grads[leaf].ravel()[at] = wrong
    ones = jax.tree.map(np.ones_like, ZEROS)
    _, state = updated(ones, grads, np.float32(0.1), name=name)
    assert not np.isfinite(state.grad_norm)
    updates, state = mixed(ones, grads, np.float32(0.5))
    assert not np.isfinite(flat(updates)).all()
    assert not np.isfinite(state.perturbed_grad_norm)


swd_step = jax.jit(swd.update)


@few()
@given(params=trees(largest=1e30), gradients=st.lists(trees(), min_size=1, max_size=5), end=trees())
def test_the_mean_second_moment_saturates_and_comes_down_again(params, gradients, end):
    """v̄ of each step, the decay it gives, and the parameters' dtype: against the recurrence."""
    state, v = swd.init(params), 0.0
    gradients = [*gradients, end, ZEROS, ZEROS]
    for t, grads in enumerate(gradients, 1):
        updates, state = swd_step(grads, state, params)
        assert_finite(state)
        v = min(B2 * v + (1 - B2) * min((flat(grads) ** 2).mean(), MAX), MAX)
        # Squares, and the products with 1 − β₂, are lost below the normal numbers.
        np.testing.assert_allclose(state.mean_nu, v, rtol=1e-5, atol=5 * t * TINY)
        v_bar = v / (1 - B2**t)
        if v_bar > 1e8 * TINY:
            np.testing.assert_allclose(state.factor, 1 / np.sqrt(min(v_bar, MAX)), rtol=1e-5)
        decay = DECAY * float(state.factor) * flat(params)
        expected = flat(grads) + decay
        there = np.abs(expected) < 0.99 * MAX
        rounding = 1e-6 * (np.abs(flat(grads)) + np.abs(decay)) + TINY * (1 + np.abs(flat(params)))
        assert (np.abs(flat(updates) - expected) <= rounding)[there].all()


@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_the_mean_second_moment_stays_saturated(b2):
    """From the first step on, however the average and its correction are rounded."""
    tx = transforms.scheduled_weight_decay(optax.identity(), DECAY, b2=b2)
    grads = jax.tree.map(lambda x: np.full_like(x, 1e30), ZEROS)
    step, state = jax.jit(tx.update), tx.init(ZEROS)
    for _ in range(100):
        _, state = step(grads, state, ZEROS)
        np.testing.assert_allclose(state.factor, 1 / np.sqrt(MAX), rtol=1e-4)
    np.testing.assert_allclose(state.mean_nu, (1 - b2**100) * MAX, rtol=1e-4)


def test_a_mean_whose_sum_overflows_is_right():
    """Also that of AMSGrad's running maximum, whose squares are no longer squared."""
    params = np.ones(1000, np.float32)
    grads = np.full(1000, 3e18, np.float32)
    for tx in (swd, transforms.adams(0.1, b2=B2, amsgrad=True)[:2]):
        init, update = tx if isinstance(tx, tuple) else (tx.init, tx.update)
        _, state = jax.jit(update)(grads, init(params), params)
        state = state if isinstance(state, transforms.ScheduledWeightDecayState) else state[0]
        np.testing.assert_allclose(state.mean_nu, (1 - B2) * 9e36, rtol=1e-5)
        np.testing.assert_allclose(state.factor, 1 / 3e18, rtol=1e-5)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_the_mean_second_moment_shows_what_is_not_finite(wrong):
    grads = {"a": np.float32([1e30, wrong, 0]), "b": ZEROS["b"]}
    _, state = swd_step(grads, swd.init(ZEROS), ZEROS)
    assert not np.isfinite(state.mean_nu)


OPTIMIZERS = {
    "adams": transforms.adams(1e-3),
    "adams-amsgrad": transforms.adams(1e-3, amsgrad=True),
    "amsgrad": transforms.amsgrad(1e-3),
    "scale_by_amsgrad": transforms.scale_by_amsgrad(),
    "padam": transforms.padam(0.1),
    "scale_by_padam": transforms.scale_by_padam(),
    "adabound": transforms.adabound(1e-3),
    "scale_by_adabound": transforms.scale_by_adabound(final_ratio=10.0),
    "sgds": transforms.sgds(0.1, weight_decay=0.01),
}
STEPS = {name: jax.jit(tx.update) for name, tx in OPTIMIZERS.items()}
OURS = (
    transforms.ScheduledWeightDecayState,
    transforms.ScaleByAmsgradState,
    transforms.ScaleByAdaboundState,
)


def ours(state):
    """Our own leaves of a state: all but those of Optax's transforms inside."""
    states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, OURS))
    for x in states:
        if isinstance(x, transforms.ScheduledWeightDecayState):
            yield x._replace(inner_state=None)
            yield from ours(x.inner_state)
        elif isinstance(x, OURS):
            yield x


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
@few(max_examples=15)
@given(
    params=trees(largest=1e10),
    gradients=st.lists(with_subnormals(), min_size=3, max_size=3),
    scale=st.sampled_from([1.0, 0.1]),
)
def test_every_optimizer_stays_finite(name, dtype, params, gradients, scale):
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    state = OPTIMIZERS[name].init(params)
    for grads in gradients:
        grads = jax.tree.map(lambda g: (scale * g.clip(-1e38, 1e38)).astype(dtype), grads)
        updates, state = STEPS[name](grads, state, params)
        assert_finite(updates)
        assert_finite(list(ours(state)))


@pytest.mark.parametrize("size", [1e10, 1e18, 2e19, 1e30, 3e38])
def test_amsgrad_of_a_constant_gradient_is_its_sign_at_any_size(size):
    tx = transforms.scale_by_amsgrad(b2=0.99)
    grads = np.float32([size, -size, 0])
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
        assert_finite(state)
        np.testing.assert_allclose(updates, [1, -1, 0], rtol=1e-4)


@pytest.mark.parametrize("name", ["amsgrad", "padam", "adabound"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_moments_show_what_is_not_finite(name, wrong):
    grads = {"a": np.float32([1e30, wrong, 0]), "b": ZEROS["b"]}
    _, state = STEPS[name](grads, OPTIMIZERS[name].init(ZEROS), ZEROS)
    assert not np.isfinite(flat((state[0].mu, state[0].nu))).all()
