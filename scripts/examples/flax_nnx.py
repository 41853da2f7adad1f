"""GR under zero-warmup and AdamS with a Flax NNX model.

    python scripts/examples/flax_nnx.py

`nnx.Optimizer.update` hands keyword arguments on to Optax, and Optax sees plain arrays in place of
`nnx.Param`s: so `grad_fn` takes the parameters as plain arrays, puts a model together around them,
and returns its gradients as plain arrays (`nnx.as_pure`). `nnx.merge` makes a new model each time:
what the second pass writes (counts of random streams, running statistics) is dropped with it.

The model is split *before* the first pass, which advances the dropout's random stream: both
gradients then start from the same counts and drop the same units.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gnp import transforms

tx = optax.chain(
    transforms.gradient_regularization(
        *transforms.warmup("zero", radius=0.05, ratio=1.0, warmup_steps=50)
    ),
    transforms.adams(optax.warmup_cosine_decay_schedule(0.0, 0.01, 50, 300), weight_decay=5e-4),
)


class Model(nnx.Module):
    """A perceptron with one hidden layer and dropout: float32[B, 8] to logits float32[B, 3]."""

    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.1):
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits."""
        return self.head(self.dropout(nnx.gelu(self.hidden(x))))


def loss_fn(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy of the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """One update, in place; returns the loss before it."""
    graphdef, _, rest = nnx.as_pure(nnx.split(model, nnx.Param, ...))

    def grad_fn(params: nnx.State) -> nnx.State:
        return nnx.as_pure(nnx.grad(loss_fn)(nnx.merge(graphdef, params, rest), x, y))

    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return loss


def main() -> None:
    """Trains on a batch of random points."""
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.argmax(x[:, :3] ** 2, axis=1)
    model = Model(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(300):
        loss = train_step(model, optimizer, x, y)
        if step % 50 == 0 or step == 299:
            gr = nnx.as_pure(optimizer.opt_state)[0]
            print(f"{step:3d}  loss {loss:.3f}  ratio {gr.ratio:.0f}  |g| {gr.grad_norm:.3f}")


if __name__ == "__main__":
    main()
