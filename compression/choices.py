"""Which of two ways to take, by what each has cost in earlier rounds.

    round:  0       1         2, 3, ...    every 16th
    takes:  first   second    the cheaper  the other one

What a way costs changes slowly, as training goes on, so it is measured again now and then.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_PERIOD = 16
# Of what is known of a cost when it is measured again.
_KEPT = 0.5


class Choices(NamedTuple):
    """What is known of the costs.

    Attributes:
      round: int32, the number of rounds so far that had a sender.
      costs: float32 ``[2, choices]``, of the first way and the second.
    """

    round: jax.Array
    costs: jax.Array


def init(num_choices: int) -> Choices:
    """Nothing is known."""
    return Choices(jnp.int32(0), jnp.zeros((2, num_choices)))


def current(state: Choices) -> jax.Array:
    """Whether a round takes the first way: bool ``[choices]``."""
    is_cheaper = state.costs[0] <= state.costs[1]
    is_probe = state.round % _PERIOD == _PERIOD - 1
    later = jnp.where(is_probe, ~is_cheaper, is_cheaper)
    return jnp.where(state.round < 2, state.round == 0, later)


def update(state: Choices, total: jax.Array, count: jax.Array) -> Choices:
    """What is known after a round.

    Args:
      state: with which the round began.
      total: float32 ``[choices]``, the sum of what the senders' choices cost.
      count: how many senders there were; after a round of none nothing changes.
    """
    mean = (total / jnp.maximum(count, 1))[None]
    taken = jnp.stack([current(state), ~current(state)])
    weight = jnp.where(state.round < 2, 0.0, _KEPT)
    costs = jnp.where(taken, weight * state.costs + (1 - weight) * mean, state.costs)
    has_sender = (count > 0) & jnp.all(jnp.isfinite(mean))
    return Choices(state.round + has_sender, jnp.where(has_sender, costs, state.costs))
