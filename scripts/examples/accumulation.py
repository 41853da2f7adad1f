"""GR with a batch that is too large for one pass: gradients accumulated over microbatches.

    python scripts/examples/accumulation.py

Two ways, both at two gradients a microbatch:

(a) `exact`: GR of the large batch. `grads` and `grad_fn` are both means over all microbatches, and
    the update is the large batch's. Every microbatch is visited twice, as ε wants their mean.

(b) `per_microbatch`: each microbatch is perturbed along its own gradient, and the results are
    averaged. One visit to each, and over several devices one reduction in place of two. This is
    m-sharpness, m a microbatch's size: another objective than (a), not an estimate of it, and one
    that often generalises better the smaller m is (Foret et al., "Sharpness-Aware Minimization",
    ICLR 2021; Andriushchenko and Flammarion, "Towards Understanding Sharpness-Aware
    Minimization", ICML 2022).

Do not put `optax.MultiSteps` *around* GR: it is neither. At every call it hands GR the mean of the
gradients so far with that call's `grad_fn`, and keeps only the last result: ε is the large batch's,
but the second gradient is the last microbatch's alone, and those of the earlier calls are computed
and thrown away. *After* GR it gives (b), a microbatch a call; GR then counts microbatches, so give
`warmup_steps` in them: `optax.chain(gr, optax.MultiSteps(base, k).gradient_transformation())`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gnp import transforms

gr = transforms.gradient_regularization(
    *transforms.warmup("zero", radius=0.1, ratio=1.0, warmup_steps=50)
)
base = transforms.adams(0.01, weight_decay=5e-4)
model = nn.Sequential([nn.Dense(32), nn.gelu, nn.Dense(3)])


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy of a batch."""
    logits = model.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def exact(params: Any, gr_state: Any, microbatches: Any) -> tuple[Any, Any, jax.Array]:
    """(a): the regularized gradient and the loss of the large batch. Leaves: [k, B / k, …]."""

    def mean_value_and_grad(params: Any) -> Any:
        def add(total: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, batch)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, microbatches)
        return jax.tree.map(lambda x: x / len(microbatches["y"]), total)

    loss, grads = mean_value_and_grad(params)
    grads, gr_state = gr.update(
        grads, gr_state, params, grad_fn=lambda params: mean_value_and_grad(params)[1]
    )
    return grads, gr_state, loss


def per_microbatch(params: Any, gr_state: Any, microbatches: Any) -> tuple[Any, Any, jax.Array]:
    """(b): the mean of the microbatches' own regularized gradients, and of their losses."""

    def add(total: Any, batch: Any) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        # Every microbatch starts from the step's state, so the schedules count steps.
        grads, new_state = gr.update(
            grads, gr_state, params, grad_fn=lambda params: jax.grad(loss_fn)(params, batch)
        )
        return jax.tree.map(jnp.add, total, (loss, grads)), new_state

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, states = jax.lax.scan(add, zero, microbatches)
    loss, grads = jax.tree.map(lambda x: x / len(microbatches["y"]), total)
    return grads, jax.tree.map(lambda x: x[-1], states), loss


def main() -> None:
    """Trains with each, on a batch of 256 random points as 8 microbatches of 32."""
    x = jax.random.normal(jax.random.key(0), (8, 32, 8))
    microbatches = {"x": x, "y": jnp.argmax(x[:, :, :3] ** 2, axis=2)}
    for regularized in (exact, per_microbatch):

        @jax.jit
        def train_step(params, gr_state, base_state, regularized=regularized):
            grads, gr_state, loss = regularized(params, gr_state, microbatches)
            updates, base_state = base.update(grads, base_state, params)
            return optax.apply_updates(params, updates), gr_state, base_state, loss

        params = model.init(jax.random.key(1), x[0])
        state = (params, gr.init(params), base.init(params))
        for step in range(200):
            *state, loss = train_step(*state)
            if step % 100 == 0 or step == 199:
                print(f"{regularized.__name__:14s}  {step:3d}  loss {loss:.3f}")


if __name__ == "__main__":
    main()
