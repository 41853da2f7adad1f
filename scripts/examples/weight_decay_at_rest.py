"""Vanilla weight decay does not come to rest under a learning-rate schedule; coupled decay does.

    python scripts/examples/weight_decay_at_rest.py

Theorem 1 of the SWD paper: gradient descent with vanilla decay, θ ← (1 − λ) θ − η_t g, converges
to no nonzero stationary point if |η_t − η_{t+1}| ≥ δ for some δ > 0 and all t. The reason: it rests
where g + (λ/η_t) θ = 0, which moves with η_t; from where it rests with η, the step with η' goes by
λ (η'/η − 1) θ. Coupled decay, θ ← (1 − η_t λ) θ − η_t g, rests at the minimum of L + λ/2 ‖θ‖²
whatever η_t is.

Here L is a quadratic, and η_t falls to 0 as a cosine: it changes at every step, though not always
by δ. Vanilla decay has the strength η_0 λ, so that both head for the same point at first.

Reference: Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them",
NeurIPS 2023, Theorem 1.
"""

import jax
import jax.numpy as jnp
import optax

CURVATURE = jnp.array([0.5, 1.0, 4.0])  # L(θ) = ½ Σ a (θ − c)² with curvature a and centre c
CENTRE = jnp.array([1.0, -2.0, 0.5])
LEARNING_RATE, WEIGHT_DECAY, STEPS = 0.1, 0.1, 2000


def vanilla(learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Decay that the learning rate does not scale: after it in the chain."""
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(scale, optax.add_decayed_weights(-weight_decay))


def coupled(learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Decay that the learning rate scales: before it in the chain."""
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optax.add_decayed_weights(weight_decay), scale)


def resting_point(strength: float) -> jax.Array:
    """The minimum of L + ½ strength ‖θ‖²; the strength is λ if coupled, λ/η if vanilla."""
    return CURVATURE * CENTRE / (CURVATURE + strength)


def descend(tx: optax.GradientTransformation, steps: int) -> jax.Array:
    """The iterates of descent on L from θ₀ = 0, [steps + 1, 3]."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(CURVATURE * (params - CENTRE), state, params)
        return (optax.apply_updates(params, updates), state), params

    start = jnp.zeros_like(CENTRE)
    (last, _), before = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return jnp.vstack([before, last])


if __name__ == "__main__":
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, STEPS)
    first = descend(vanilla(schedule, LEARNING_RATE * WEIGHT_DECAY), STEPS)
    second = descend(coupled(schedule, WEIGHT_DECAY), STEPS)
    minimum, every = resting_point(WEIGHT_DECAY), STEPS // 10
    print("to the minimum of L + λ/2 ‖θ‖², and from the row before:")
    print("  step       η | vanilla: distance    drift | coupled: distance    drift")
    for t in range(every, STEPS + 1, every):
        away = [jnp.linalg.norm(x[t] - minimum) for x in (first, second)]
        drift = [jnp.linalg.norm(x[t] - x[t - every]) for x in (first, second)]
        columns = [f" | {a:17.1e} {d:8.1e}" for a, d in zip(away, drift, strict=True)]
        print(f"{t:6d} {schedule(t):7.4f}", *columns, sep="")
