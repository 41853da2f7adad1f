"""GR with a Flax Linen model that has BatchNorm and dropout.

    python scripts/examples/batchnorm_dropout.py

A GR step runs the model twice, at θ and at θ + ε, and the two passes own different things:

- The running statistics come from the first pass. It is the one at the parameters that evaluation
  will use; the second would mix in the statistics of a network that exists for one gradient only,
  and every step would count twice in the moving average.
- The second pass normalises with the statistics of its own batch, as training does, and what it
  would write is thrown away. (Normalising with the running ones would be another loss, and the
  difference of the two gradients would no longer be the Hessian's product with ε.)
- Both passes drop the same units, from one key. With two keys the gradients would differ by the
  masks, at an ε of 0 already, and that noise would drown what GR looks for. The key is folded from
  the step's number, so steps differ.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gnp import transforms

tx = optax.chain(
    transforms.gradient_regularization(radius=0.05, ratio=0.8),
    optax.clip_by_global_norm(1.0),
    transforms.adams(optax.cosine_decay_schedule(0.01, 200), weight_decay=5e-4),
)


class Model(nn.Module):
    """A perceptron with one hidden layer: float32[B, 8] to logits float32[B, 3]."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The logits."""
        x = nn.Dense(32)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


model = Model()


@jax.jit
def train_step(
    variables: dict[str, Any], opt_state: optax.OptState, x: jax.Array, y: jax.Array, key: jax.Array
) -> tuple[dict[str, Any], optax.OptState, jax.Array]:
    """One update of the parameters and of the running statistics, and the loss before it."""
    params, running = variables["params"], variables["batch_stats"]

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, written = model.apply(
            {"params": params, "batch_stats": running},
            *(x, True),
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, written["batch_stats"]

    def grad_fn(params: Any) -> Any:
        grads, _ = jax.grad(loss_fn, has_aux=True)(params)  # writes no statistics
        return grads

    (loss, running), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    params = optax.apply_updates(params, updates)
    return {"params": params, "batch_stats": running}, opt_state, loss


def main() -> None:
    """Trains on a batch of random points, and evaluates with the running statistics."""
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.argmax(x[:, :3] ** 2, axis=1)
    variables = model.init(jax.random.key(1), x, False)
    opt_state = tx.init(variables["params"])
    for step in range(200):
        key = jax.random.fold_in(jax.random.key(2), step)
        variables, opt_state, loss = train_step(variables, opt_state, x, y, key)
        if step % 50 == 0 or step == 199:
            error = jnp.mean(jnp.argmax(model.apply(variables, x, False), axis=1) != y)
            print(f"{step:3d}  loss {loss:.3f}  error {error:.3f}")


if __name__ == "__main__":
    main()
