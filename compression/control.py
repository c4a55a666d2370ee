"""The step of a quantiser from round to round: fixed, by a schedule, or held at a target.

A controller sees the ledger of the round that ends and sets the step of the next one, which goes
down to the senders and is counted. With a target r* of what was measured as r:

    step <- step * (r / r*)^g,   a quarter to four times

The rate of an update falls about as 1 / step, and its error grows somewhat faster than the step.

References:
  Jhunjhunwala, Gadhikar, Joshi, Eldar. Adaptive quantization of model updates for
  communication-efficient federated learning. ICASSP 2021, arXiv:2102.04487 (a step by round).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_core.compression.base import Report
from fedjax_core.compression.checks import real, shown, told
from fedjax_core.errors import CodecError

_SMALLEST, _LARGEST = 1e-3, 1e3
_MOST = 4.0
_RATE_GAIN, _ERROR_GAIN = 1.0, 0.7


class Control(NamedTuple):
    """What sets the step.

    Attributes:
      name: how it was made.
      init: the state of the first round.
      step: of a round, float32, from the state; None if every sender knows it.
      update: ``(state, report, num_elements) -> state`` after a round, where `report.stats` is the
        sum of the senders' relative errors, if it needs them.
      needs_error: whether each sender tells its error.
    """

    name: str
    init: Callable[[], Any]
    step: Callable[[Any], jax.Array] | None
    update: Callable[[Any, Report, int], Any]
    needs_error: bool = False


def target_rate(bits: float, *, start: float = 4.0) -> Control:
    """Holds the size of a message at so many bits for each element of the value.

    Rates below that of the largest step, where hardly more than the largest element is sent, are
    not reached; with stochastic rounding that is several times higher than to the nearest.

    Args:
      bits: of an element, in the mean of a round's messages, 1e-4 to 32.
      start: the step of the first round.

    Returns:
      What `flagship` takes as its step.

    Raises:
      CodecError: an argument is out of range.

    Example:
      >>> target_rate(0.05).name
      'target_rate(0.05)'
    """
    aim = real("bits", bits, 1e-4, 32.0, "it is the size of an element")

    def measured(report: Report, num_elements: int) -> jax.Array:
        total = report.bits.high.astype(jnp.float32) * 2.0**32 + report.bits.low.astype(jnp.float32)
        return total / (jnp.maximum(report.count, 1) * jnp.float32(num_elements))

    return _towards(f"target_rate({shown(aim)})", start, measured, aim, _RATE_GAIN)


def target_error(error: float, *, start: float = 4.0) -> Control:
    """Holds the squared error of a message at so much of the squared norm of the value.

    Args:
      error: in the mean of a round's messages, 1e-4 to 10.
      start: the step of the first round.

    Returns:
      What `flagship` takes as its step. A message takes 32 bits more for its error.

    Raises:
      CodecError: an argument is out of range.
    """
    aim = real("error", error, 1e-4, 10.0, "it is relative to the squared norm")

    def measured(report: Report, num_elements: int) -> jax.Array:
        del num_elements
        return report.stats / jnp.maximum(report.count, 1)

    control = _towards(f"target_error({shown(aim)})", start, measured, aim, -_ERROR_GAIN)
    return control._replace(needs_error=True)


def scheduled(schedule: Callable[[jax.Array], jax.Array]) -> Control:
    """Steps by the round, from a schedule such as those of optax.

    Args:
      schedule: from the number of rounds of this state, int32, to the step; inside `jit`.

    Returns:
      What `flagship` takes as its step.

    Raises:
      CodecError: `schedule` is not callable.

    Example:
      >>> import optax
      >>> control = scheduled(optax.linear_schedule(4.0, 16.0, transition_steps=30))
      >>> float(control.step(jnp.int32(15)))
      10.0
    """
    if not callable(schedule):
        raise CodecError(
            f"expected a function from a round to a step, got {schedule!r}; pass a schedule such "
            "as optax.linear_schedule(4.0, 16.0, transition_steps=30)."
        )

    def step(state: jax.Array) -> jax.Array:
        found = schedule(state)
        try:
            step = jnp.asarray(found, jnp.float32)
        except (TypeError, ValueError) as error:
            raise _no_step(found) from error
        if step.shape:
            raise _no_step(found)
        return _within(step)

    return Control(
        "scheduled(...)",
        init=lambda: jnp.int32(0),
        step=step,
        update=lambda state, report, num_elements: state + 1,
    )


def _no_step(found: Any) -> CodecError:
    return CodecError(
        f"expected one number from the schedule of steps, got {told(found)}; return a scalar, as "
        "optax.linear_schedule(4.0, 16.0, transition_steps=30) does."
    )


def fixed(step: float) -> Control:
    """The same step in every round.

    Raises:
      CodecError: the step is out of range.
    """
    own = _check_step("step", step)
    return Control(shown(own), lambda: (), None, lambda state, report, num_elements: state)


def _towards(
    name: str,
    start: float,
    measured: Callable[[Report, int], jax.Array],
    aim: float,
    gain: float,
) -> Control:
    first = _check_step("start", start)

    def update(step: jax.Array, report: Report, num_elements: int) -> jax.Array:
        ratio = measured(report, num_elements) / aim
        is_known = (report.count > 0) & jnp.isfinite(ratio) & (ratio > 0)
        factor = jnp.clip(jnp.where(is_known, ratio, 1) ** gain, 1 / _MOST, _MOST)
        return _within(step * factor)

    return Control(name, lambda: jnp.float32(first), lambda step: step, update)


def _check_step(name: str, step: float) -> float:
    hint = (
        "it is in root mean squares of the whole value; for one that changes take `scheduled`, "
        "`target_rate` or `target_error`"
    )
    return real(name, step, _SMALLEST, _LARGEST, hint)


def _within(step: jax.Array) -> jax.Array:
    return jnp.clip(step, _SMALLEST, _LARGEST)
