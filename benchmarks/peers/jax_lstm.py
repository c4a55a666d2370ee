"""The character LSTM as a function of its parameters, for the workers that run JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.workloads import HIDDEN, NUM_LAYERS


def losses(params: Any, tokens: jax.Array) -> jax.Array:
    """The mean loss of the next character of each sequence, ``[batch]``.

    Args:
      params: ``{layer: {name: array}}``, see `workloads.shapes`.
      tokens: int32 ``[batch, length + 1]``.
    """
    inputs, labels = tokens[:, :-1].T, tokens[:, 1:].T
    hidden = params["Embed_0"]["embedding"][inputs]  # [length, batch, features] from here on
    for layer in range(NUM_LAYERS):
        hidden = _layer(params[f"LSTM_{layer}"], hidden)
    logits = hidden @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    scores = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    return -jnp.mean(chosen, axis=0)


def _layer(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    def step(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
        output, cell = carry
        enter, keep, new, leave = jnp.split(x + output @ params["hidden"], 4, axis=-1)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        output = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (output, cell), output

    zeros = jnp.zeros((inputs.shape[1], HIDDEN))
    return lax.scan(step, (zeros, zeros), inputs @ params["input"] + params["bias"])[1]
