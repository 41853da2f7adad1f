"""The LSTM against the textbook's equations."""

import jax
import jax.numpy as jnp
import numpy as np

from gnp import models

SIZES = {"embedding_size": 3, "hidden_size": 4, "depth": 2}
WORDS = 7


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(params, words, state):
    """The logits of one stream, a word at a time, in float64; `state` is changed in place."""
    logits = []
    for word in words:
        x = params["embedding"]["embedding"][word]
        for layer in range(SIZES["depth"]):
            p = params[f"layers_{layer}"]
            c, h = state[layer]
            gates = x @ p["input"]["kernel"] + p["input"]["bias"] + h @ p["recurrent"]
            i, f, o, g = (gates[k * 4 : (k + 1) * 4] for k in range(4))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            state[layer] = (c, h)
            x = h
        logits.append(x @ params["head"]["kernel"] + params["head"]["bias"])
    return np.array(logits)


def make(**overrides):
    model = models.create("lstm", WORDS, **SIZES, **overrides)
    words = np.random.default_rng(0).integers(0, WORDS, (2, 10))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), words))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes["params"])
    return model, params, words


def test_logits_and_carried_state_against_numpy():
    """Two calls that carry the state are one long text, and the state is that of NumPy."""
    model, params, words = make()
    first, carried = model.apply({"params": params}, words[:, :6], mutable=["carry"])
    second, carried = model.apply({"params": params, **carried}, words[:, 6:], mutable=["carry"])
    alone = model.apply({"params": params}, words[:, 6:])
    for stream in range(2):
        state = [(np.zeros(4), np.zeros(4)) for _ in range(2)]
        expected = numpy_lstm(params, words[stream], state)
        both = np.concatenate([first[stream], second[stream]])
        # Logits of the order of 3 from float32 states after 20 updates: 20 ulp.
        np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-5)
        for layer in range(2):
            for name, value in zip("ch", state[layer], strict=True):
                ours = carried["carry"][f"layers_{layer}"][name][stream]
                np.testing.assert_allclose(ours, value, rtol=1e-5, atol=1e-6)
        fresh = numpy_lstm(params, words[stream, 6:], [(np.zeros(4), np.zeros(4))] * 2)
        np.testing.assert_allclose(alone[stream], fresh, rtol=1e-5, atol=1e-5)


def test_nothing_is_differentiated_beyond_the_call():
    """The gradient of a window is that of NumPy's central differences with the state held."""
    with jax.enable_x64(True):
        model, params, words = make(dropout=0.0, dtype=jnp.float64)
        _, carried = model.apply({"params": params}, words[:, :6], mutable=["carry"])
        # The state is float32, and so are the logits that are summed.
        carried = jax.tree.map(lambda x: np.asarray(x, np.float64), carried["carry"])

        def total(params):
            logits = model.apply({"params": params, "carry": carried}, words[:1, 6:])
            return jnp.sum(logits**2)

        carried = jax.tree.map(lambda x: x[:1], carried)
        grad = jax.grad(total)(params)["layers_0"]["recurrent"]

    def expected(step):
        moved = jax.tree.map(np.copy, params)
        moved["layers_0"]["recurrent"][1, 2] += step
        state = [tuple(carried[f"layers_{layer}"][name][0] for name in "ch") for layer in range(2)]
        return np.sum(numpy_lstm(moved, words[0, 6:], state) ** 2)

    difference = (expected(1e-5) - expected(-1e-5)) / 2e-5
    np.testing.assert_allclose(grad[1, 2], difference, rtol=2e-5)


def test_dropout_is_not_on_what_is_remembered():
    """With all inputs of the layers dropped, the state still decays by its own equations."""
    model, params, words = make(dropout=0.5)
    apply = jax.jit(lambda key: model.apply({"params": params}, words, True, rngs={"dropout": key}))
    assert not np.array_equal(apply(jax.random.key(0)), apply(jax.random.key(1)))
    np.testing.assert_array_equal(apply(jax.random.key(0)), apply(jax.random.key(0)))
    # Rate 1 − 1e-7 drops everything: only biases and the state are left in each layer.
    model, params, words = make(dropout=1 - 1e-7)
    _, carried = model.apply(
        {"params": params}, words, True, rngs={"dropout": jax.random.key(0)}, mutable=["carry"]
    )
    p = params["layers_0"]
    c = h = np.zeros(4)
    for _ in range(words.shape[1]):
        i, f, o, g = np.split(p["input"]["bias"] + h @ p["recurrent"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    np.testing.assert_allclose(carried["carry"]["layers_0"]["h"][0], h, rtol=1e-5, atol=1e-6)


def test_published_initialisation():
    model = models.create("lstm", 1000, embedding_size=40, hidden_size=50)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((3, 1), jnp.int32))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        assert np.abs(leaf).max() <= 0.05, path
        assert np.abs(leaf).max() > 0.04, path
    assert not any(x.any() for x in jax.tree.leaves(variables["carry"]))
