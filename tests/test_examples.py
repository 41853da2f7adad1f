"""The examples run as they stand, and do what they say: checked by hand-written JAX and NumPy."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from gnp import transforms

EXAMPLES = pathlib.Path(__file__).parents[1] / "scripts" / "examples"
RADIUS, RATIO = 0.1, 0.8


def load(name, run_as="example"):
    """An example's namespace; its functions see what a test puts there."""
    path = EXAMPLES / name
    namespace = {"__name__": run_as}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace


def losses(printed, case=""):
    lines = [line for line in printed.splitlines() if line.startswith(case)]
    return [float(re.search(r"loss (\S+)", line)[1]) for line in lines]


def points(*shape):
    x = jax.random.normal(jax.random.key(5), (*shape, 8))
    return x, jnp.argmax(x[..., :3] ** 2, axis=-1)


def regularized_by_hand(grad_fn, params, radius=RADIUS, ratio=RATIO):
    """Eq. 3 of the GR paper on flat float64 vectors."""
    flat, unravel = ravel_pytree(params)

    def gradient(flat):
        return np.asarray(ravel_pytree(grad_fn(unravel(jnp.float32(flat))))[0], np.float64)

    flat = np.asarray(flat, np.float64)
    first = gradient(flat)
    second = gradient(flat + radius * first / np.linalg.norm(first))
    return (1 - ratio) * first + ratio * second


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


class Spy:
    """An optimizer that does nothing but keep what the step gave it."""

    def init(self, params):
        return ()

    def update(self, updates, state, params, *, grad_fn):
        same = grad_fn(params)
        jax.debug.callback(lambda *seen: self.__dict__.update(seen=seen), updates, same)
        return jax.tree.map(jnp.zeros_like, updates), state


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_uses_nothing_of_gnp_but_the_transforms(path):
    program = path.read_text()
    of_gnp = re.findall(r"^ *(?:from|import) gnp.*", program, re.MULTILINE)
    assert set(of_gnp) <= {"from gnp import transforms"}
    assert f"\n    python scripts/examples/{path.name}\n" in program
    imported = set(re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE))
    assert imported <= {"typing", "collections", "flax", "jax", "numpy", "optax", "gnp"}


@pytest.mark.parametrize("name", ["flax_nnx.py", "batchnorm_dropout.py"])
def test_the_loss_goes_down(name, capsys):
    load(name, "__main__")
    first, *_, last = losses(capsys.readouterr().out)
    assert last < 0.35 * first


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("accumulation.py", ["exact", "per_microbatch"]),
        ("mixed_precision.py", ["float32 ", "bfloat16 "]),
    ],
)
def test_the_loss_goes_down_in_each_case(name, cases, capsys):
    load(name)["main"]()
    printed = capsys.readouterr().out
    for case in cases:
        first, *_, last = losses(printed, case)
        assert last < 0.1 * first, case


def test_nnx_takes_the_steps_of_plain_jax():
    example = load("flax_nnx.py")
    rate, decay = 0.01, 0.02
    example["tx"] = optax.chain(
        transforms.gradient_regularization(RADIUS, RATIO),
        transforms.adams(rate, weight_decay=decay),
    )
    x, y = points(64)
    model = example["Model"](nnx.Rngs(1), dropout=0.0)
    optimizer = nnx.Optimizer(model, example["tx"], wrt=nnx.Param)

    def loss_fn(params):
        hidden, head = params["hidden"], params["head"]
        logits = jax.nn.gelu(x @ hidden["kernel"] + hidden["bias"]) @ head["kernel"] + head["bias"]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    grad_fn = jax.jit(jax.grad(loss_fn))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    theta, unravel = ravel_pytree(params)
    theta = np.asarray(theta, np.float64)
    m = v = np.zeros_like(theta)
    for t in range(1, 4):
        params = unravel(jnp.float32(theta))
        loss = example["train_step"](model, optimizer, x, y)
        np.testing.assert_allclose(loss, loss_fn(params), rtol=1e-5)
        g = regularized_by_hand(grad_fn, params)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        step = m_hat / (np.sqrt(v_hat) + 1e-8) + decay * theta / np.sqrt(v_hat.mean())
        theta = theta - rate * step
        ours = flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        np.testing.assert_allclose(ours, theta, atol=2e-5)


def test_nnx_drops_the_same_units_in_both_passes_and_others_in_the_next_step():
    example, spy = load("flax_nnx.py"), Spy()
    x, y = points(64)
    model = example["Model"](nnx.Rngs(1), dropout=0.5)
    optimizer = nnx.Optimizer(model, spy, wrt=nnx.Param)
    steps = []
    for _ in range(2):
        example["train_step"](model, optimizer, x, y)
        jax.effects_barrier()
        first, second = map(flat, spy.seen)
        np.testing.assert_allclose(first, second, atol=1e-6)
        steps.append(first)
    assert np.abs(steps[0] - steps[1]).max() > 1e-3
    assert model.dropout.rngs.count[...] == 2


def batchnorm_step(tx, key):
    example = load("batchnorm_dropout.py")
    example["tx"] = tx
    x, y = points(64)
    variables = example["model"].init(jax.random.key(1), x, False)
    opt_state = tx.init(variables["params"])
    return variables, *example["train_step"](variables, opt_state, x, y, key)


def test_running_statistics_are_those_of_a_plain_step():
    key = jax.random.key(3)
    plain = batchnorm_step(optax.with_extra_args_support(optax.sgd(0.1)), key)
    # A radius so large that the second pass's statistics are others.
    gr = transforms.gradient_regularization(5.0, RATIO)
    before, after, _, loss = batchnorm_step(optax.chain(gr, optax.sgd(0.1)), key)
    assert loss == plain[3]
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], plain[1]["batch_stats"])
    assert np.abs(flat(after["params"]) - flat(plain[1]["params"])).max() > 1e-3

    # By hand: one move of the average, from the batch at the parameters before the step.
    dense = before["params"]["Dense_0"]
    hidden = np.asarray(points(64)[0] @ dense["kernel"] + dense["bias"], np.float64)
    stats = after["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * hidden.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * hidden.var(axis=0), atol=1e-6)


def test_both_passes_normalise_and_drop_alike():
    spy, steps = Spy(), []
    for seed in (3, 4):
        batchnorm_step(spy, jax.random.key(seed))
        jax.effects_barrier()
        first, second = map(flat, spy.seen)
        np.testing.assert_allclose(first, second, atol=1e-6)
        steps.append(first)
    assert np.abs(steps[0] - steps[1]).max() > 1e-3


def accumulation():
    example = load("accumulation.py")
    example["gr"] = transforms.gradient_regularization(RADIUS, RATIO)
    x, y = points(4, 8)
    params = jax.jit(example["model"].init)(jax.random.key(1), x[0])
    return example, params, example["gr"].init(params), {"x": x, "y": y}


def grad_of(example, batch):
    return jax.jit(lambda params: jax.grad(example["loss_fn"])(params, batch))


def test_exact_accumulation_is_the_large_batch():
    example, params, state, microbatches = accumulation()
    grads, new_state, loss = jax.jit(example["exact"])(params, state, microbatches)
    large = jax.tree.map(lambda x: x.reshape(32, *x.shape[2:]), microbatches)
    expected = regularized_by_hand(grad_of(example, large), params)
    np.testing.assert_allclose(flat(grads), expected, atol=1e-6)
    np.testing.assert_allclose(loss, example["loss_fn"](params, large), rtol=1e-6)
    assert new_state.count == 1


def test_accumulation_per_microbatch_is_the_mean_of_their_own_and_not_the_large_batch():
    example, params, state, microbatches = accumulation()
    grads, new_state, loss = jax.jit(example["per_microbatch"])(params, state, microbatches)
    each = [jax.tree.map(lambda x, i=i: x[i], microbatches) for i in range(4)]
    expected = np.mean([regularized_by_hand(grad_of(example, b), params) for b in each], axis=0)
    np.testing.assert_allclose(flat(grads), expected, atol=1e-6)
    exact, _, exact_loss = jax.jit(example["exact"])(params, state, microbatches)
    assert np.abs(flat(exact) - expected).max() > 1e-3
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-6)
    assert new_state.count == 1  # a step's microbatches are one step to the schedules


@pytest.mark.parametrize("around", [False, True])
def test_multi_steps_after_gr_is_per_microbatch_and_around_it_neither(around):
    example, params, state, microbatches = accumulation()
    if around:
        tx = optax.MultiSteps(optax.chain(example["gr"], optax.sgd(1.0)), 4)
    else:
        tx = optax.chain(
            example["gr"], optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()
        )
    opt_state = tx.init(params)
    for i in range(4):
        grad_fn = grad_of(example, jax.tree.map(lambda x, i=i: x[i], microbatches))
        updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        assert (np.abs(flat(updates)).max() > 0) == (i == 3)
    ours = -flat(updates)

    per_microbatch = flat(jax.jit(example["per_microbatch"])(params, state, microbatches)[0])
    if not around:
        np.testing.assert_allclose(ours, per_microbatch, atol=1e-6)
        assert opt_state[0].count == 4
        return
    exact = flat(jax.jit(example["exact"])(params, state, microbatches)[0])
    assert np.abs(ours - exact).max() > 1e-3 and np.abs(ours - per_microbatch).max() > 1e-3
    # ε of the large batch, the second gradient of the last microbatch.
    large = jax.tree.map(lambda x: x.reshape(32, *x.shape[2:]), microbatches)
    theta, unravel = ravel_pytree(params)
    first = flat(grad_of(example, large)(params))
    perturbed = unravel(jnp.float32(theta + RADIUS * first / np.linalg.norm(first)))
    expected = (1 - RATIO) * first + RATIO * flat(grad_fn(perturbed))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_and_perturbation_are_of_float32_precision(dtype):
    example = load("mixed_precision.py")
    x, y = points(64)
    model = example["make_model"](jnp.dtype(dtype))
    params = jax.jit(model.init)(jax.random.key(1), x)
    assert {str(p.dtype) for p in jax.tree.leaves(params)} == {dtype}
    assert model.apply(params, x).dtype == jnp.bfloat16

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = model.apply(params, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    seen = []

    def grad_fn(params):
        seen.append(params)
        return gradient(params)

    tx = example[f"{dtype}_tx"]
    opt_state = tx.init(optax.tree.cast(params, jnp.float32))
    grads = gradient(params)
    updates, new_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

    g, theta = flat(optax.tree.cast(grads, jnp.float32)), flat(optax.tree.cast(params, jnp.float32))
    norm = np.linalg.norm(g)
    np.testing.assert_allclose(new_state[0].grad_norm, norm, rtol=1e-5)
    perturbed = (theta + 0.01 * g / norm).astype(np.float32)
    expected = np.asarray(perturbed.astype(dtype), np.float64)
    np.testing.assert_allclose(flat(seen[0]), expected, rtol=1e-6, atol=1e-9)

    # The moments are float32, the parameters keep their dtype, and the state its dtypes.
    for before, after in zip(*map(jax.tree.leaves, (opt_state, new_state)), strict=True):
        assert before.dtype == after.dtype in (jnp.float32, jnp.int32)
    after = optax.apply_updates(params, updates)
    assert {str(p.dtype) for p in jax.tree.leaves(after)} == {dtype}


def test_a_perturbation_arrives_on_average_in_float32_parameters_only():
    share = load("mixed_precision.py")["share_that_arrives"]
    key, other = jax.random.split(jax.random.key(0))
    params = jax.random.normal(key, (100_000,))  # ε_i is about 3e-5, half a gap about 2e-3
    grads = jax.random.normal(other, (100_000,))
    assert share(params, grads) == pytest.approx(1, abs=0.2)
    assert share(params.astype(jnp.bfloat16), grads.astype(jnp.bfloat16)) < 0.1
