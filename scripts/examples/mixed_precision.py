"""GR and AdamS in bfloat16: with float32 parameters, and with bfloat16 ones.

    python scripts/examples/mixed_precision.py

The transforms compute norms, the perturbation θ + ε, the mix and v̄ in float32 whatever they are
given, and round only the results: θ + ε to the parameters' dtype, the mixed gradient to the
gradients'. There is nothing to set. What is left to choose is the parameters' dtype:

- float32 parameters, bfloat16 compute (`param_dtype=float32`, `dtype=bfloat16`): the usual one. The
  layers round θ + ε to bfloat16 as they round θ, and since θ lies anywhere between two bfloat16
  numbers, a small ε moves the right share of the weights over to the next: on average all of it
  arrives.
- bfloat16 parameters: θ is itself such a number. An ε_i below half the gap to the next one, about
  |θ_i| / 400, rounds to nothing, and so does an update that small. With n parameters ε_i is about
  r / √n: the larger the model, the less of ε is left, and in the end GR is plain training. Keep the
  moments in float32, as `bfloat16_tx` does: in bfloat16, 0.999 v + 0.001 g² mostly rounds to v.

The last figure of each line is the share of ε that arrives in the layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gnp import transforms

gr = transforms.gradient_regularization(radius=0.01, ratio=1.0)
adams = transforms.adams(0.005, weight_decay=5e-4)
float32_tx = optax.chain(gr, adams)
# Initialised with float32 parameters, `adams` has float32 moments; its updates are float32 too, and
# `optax.apply_updates` rounds their sum with the parameters.
to_float32 = optax.stateless(lambda grads, _: optax.tree.cast(grads, jnp.float32))
bfloat16_tx = optax.chain(gr, to_float32, adams)


def make_model(param_dtype: Any) -> nn.Module:
    """A perceptron that computes in bfloat16, with one hidden layer."""
    kinds = {"dtype": jnp.bfloat16, "param_dtype": param_dtype}
    return nn.Sequential([nn.Dense(64, **kinds), nn.gelu, nn.Dense(3, **kinds)])


def share_that_arrives(params: Any, grads: Any) -> jax.Array:
    """How far the weights that the layers use move along ε, over the length of ε."""
    # With the ratio 1 the transform returns what `grad_fn` does: here θ + ε itself.
    wide = optax.tree.cast(grads, jnp.float32)
    perturbed, state = gr.update(wide, gr.init(params), params, grad_fn=lambda perturbed: perturbed)

    def used(x: jax.Array) -> jax.Array:  # rounded to bfloat16, which a compiler may skip in a cast
        return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)

    moved = jax.tree.map(lambda a, b: used(a) - used(b), perturbed, params)
    return optax.tree.vdot(moved, wide) / state.grad_norm / state.radius


def main() -> None:
    """Trains with each on a batch of random points."""
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.argmax(x[:, :3] ** 2, axis=1)
    for name, tx in (("float32", float32_tx), ("bfloat16", bfloat16_tx)):
        model = make_model(jnp.dtype(name))

        @jax.jit
        def train_step(params, opt_state, model=model, tx=tx):
            def loss_fn(params):
                logits = model.apply(params, x).astype(jnp.float32)  # the loss in float32
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            loss, grads = jax.value_and_grad(loss_fn)(params)
            share = share_that_arrives(params, grads)
            updates, opt_state = tx.update(grads, opt_state, params, grad_fn=jax.grad(loss_fn))
            return optax.apply_updates(params, updates), opt_state, loss, share

        params = model.init(jax.random.key(1), x)
        opt_state = tx.init(optax.tree.cast(params, jnp.float32))
        for step in range(200):
            params, opt_state, loss, share = train_step(params, opt_state)
            if step % 50 == 0 or step == 199:
                print(f"{name:8s} parameters  {step:3d}  loss {loss:.3f}  share {share:.2f}")


if __name__ == "__main__":
    main()
