"""A language model with long short-term memory.

Reference: Zaremba, Sutskever & Vinyals, "Recurrent Neural Network Regularization", 2014
(arXiv:1409.2329).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnp.errors import UserError
from gnp.models import layers
from gnp.models.layers import Dtype

# Of the paper's medium LSTM, for all parameters.
_uniform = layers.uniform(0.05)


class LSTM(nn.Module):
    """One layer: [B, T, inputs] to [B, T, hidden_size].

    For each time t, with σ the logistic function and ⊙ elementwise products (paper, Section 3):

        i, f, o, g = σ, σ, σ, tanh of x_t W + h_{t−1} U + b
        c_t = f ⊙ c_{t−1} + i ⊙ g
        h_t = o ⊙ tanh(c_t)

    The state (c, h), float32[B, hidden_size] each, is read from the collection "carry", and written
    to it where that is mutable; it is zero where there is none. Nothing is differentiated beyond
    the call: that is truncated back-propagation through time.
    """

    hidden_size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        carries = self.is_mutable_collection("carry")
        zeros = jnp.zeros((x.shape[0], self.hidden_size))
        if carries:
            self.variable("carry", "c", lambda: zeros)
            self.variable("carry", "h", lambda: zeros)
        state = (self.get_variable("carry", "c", zeros), self.get_variable("carry", "h", zeros))
        inputs = nn.Dense(
            4 * self.hidden_size,
            kernel_init=_uniform,
            bias_init=_uniform,
            dtype=self.dtype,
            name="input",
        )(x)
        kernel = self.param("recurrent", _uniform, (self.hidden_size, 4 * self.hidden_size))
        kernel = kernel.astype(self.dtype)

        def step(
            state: tuple[jax.Array, jax.Array], inputs: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            c, h = state
            gates = (inputs + h.astype(self.dtype) @ kernel).astype(jnp.float32)
            i, f, o, g = jnp.split(gates, 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * nn.tanh(g)
            h = nn.sigmoid(o) * nn.tanh(c)
            return (c, h), h.astype(self.dtype)

        # The products with the inputs are one, before the loop; only h U has to wait for h.
        state, outputs = jax.lax.scan(step, state, inputs.swapaxes(0, 1))
        if carries and not self.is_initializing():
            self.put_variable("carry", "c", state[0])
            self.put_variable("carry", "h", state[1])
        return outputs.swapaxes(0, 1)


class LanguageModel(nn.Module):
    """Predicts each next word: words int32[B, T] to logits float32[B, T, num_classes].

    An embedding, layers of LSTM, and a dense layer, with dropout on what goes into and out of each
    layer but not on what it remembers. All parameters are drawn from U(−0.05, 0.05), as in the
    medium LSTM of the paper.

    Attributes:
      num_classes: words of the vocabulary.
      embedding_size: features of an embedded word.
      hidden_size: features of a layer's state.
      depth: layers.
      dropout: rate.
      dtype: of the matrix products; parameters, states and logits are float32.
    """

    num_classes: int
    embedding_size: int
    hidden_size: int
    depth: int
    dropout: float = 0.5
    dtype: Dtype = jnp.float32

    @classmethod
    def for_tokens(cls, **fields: Any) -> "LanguageModel":
        """The model, its sizes checked."""
        model = cls(**fields)
        for field in ("embedding_size", "hidden_size", "depth"):
            if getattr(model, field) < 1:
                raise UserError(f"model.{field} is {getattr(model, field)}; it must be 1 or more")
        return model

    @nn.compact
    def __call__(self, words: jax.Array, train: bool = False) -> jax.Array:
        def dropout(x: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        x = nn.Embed(
            self.num_classes,
            self.embedding_size,
            embedding_init=_uniform,
            dtype=self.dtype,
            name="embedding",
        )(words)
        for i in range(self.depth):
            x = LSTM(self.hidden_size, self.dtype, name=f"layers_{i}")(dropout(x))
        return nn.Dense(
            self.num_classes,
            kernel_init=_uniform,
            bias_init=_uniform,
            dtype=jnp.float32,
            name="head",
        )(dropout(x))
