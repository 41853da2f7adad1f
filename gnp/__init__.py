"""gnp: gradient regularization and scheduled weight decay for training in JAX, Flax and Optax."""

__version__ = "0.1.0"
