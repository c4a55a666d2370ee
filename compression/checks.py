"""Checks of the numbers that codecs are made from."""

import math
import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np

from fedjax_core.errors import CodecError


def whole(name: str, number: int, lowest: int, highest: int, hint: str = "") -> int:
    """`number` itself, as a Python integer.

    Args:
      name: of the argument.
      number: what was passed.
      lowest: the smallest that is allowed.
      highest: the largest that is allowed.
      hint: what the number means, for the message.

    Returns:
      The number.

    Raises:
      CodecError: it is no integer, or outside the range.
    """
    is_integer = isinstance(number, int | np.integer) and not isinstance(number, bool)
    if not is_integer or not lowest <= number <= highest:
        expected = f"an integer from {lowest} to {highest}"
        raise CodecError(f"expected {name} to be {expected}, got {told(number)}{_hint(hint)}.")
    return int(number)


def real(
    name: str, number: float, lowest: float, highest: float = math.inf, hint: str = ""
) -> float:
    """`number` itself, as a Python float.

    Args:
      name: of the argument.
      number: what was passed.
      lowest: the smallest that is allowed.
      highest: the largest that is allowed; infinity for any that is finite.
      hint: what the number means, for the message.

    Returns:
      The number.

    Raises:
      CodecError: it is no number, NaN, infinite, or outside the range.
    """
    exact = as_float(number)
    # NaN fails the comparison.
    if not lowest <= exact <= highest or exact == math.inf:
        is_open = highest == math.inf
        expected = f"of at least {lowest:g}" if is_open else f"from {lowest:g} to {highest:g}"
        got = f"{told(number)}{_hint(hint)}"
        raise CodecError(f"expected {name} to be a number {expected}, got {got}.")
    return exact


def flag(name: str, value: bool) -> bool:
    """`value` itself, if it is True or False.

    Raises:
      CodecError: it is something else.
    """
    if not isinstance(value, bool | np.bool):
        raise CodecError(f"expected {name} to be True or False, got {told(value)}.")
    return bool(value)


def choice(name: str, value: str, options: Sequence[str]) -> None:
    """Checks that a value is one of some texts.

    Raises:
      CodecError: it is not.
    """
    if not isinstance(value, str) or value not in options:
        *most, last = (f'"{option}"' for option in options)
        expected = f"{', '.join(most)} or {last}"
        raise CodecError(f"expected {name} to be {expected}, got {told(value)}.")


def check_given(what: str, name: str, state: Any, value: Any) -> None:
    """Checks that a codec called by hand was given what it keeps from round to round.

    Args:
      what: `memory` or `hints`.
      name: of the codec.
      state: what was passed.
      value: that is to be encoded.

    Raises:
      CodecError: nothing was passed.
    """
    if jax.tree.leaves(value) and not jax.tree.leaves(state):
        raise CodecError(
            f"expected the {what} of {name}, got none; `server, memory = codec.init(value)` makes "
            "the first one, and `codec.hints(server)` the hints."
        )


def told(value: Any) -> str:
    """A value for a message, in few characters."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return "an integer of thousands of digits"


def shown(number: float) -> str:
    """The number in as few digits as tell it from all others."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def as_float(number: float) -> float:
    """The number, NaN if it is none, and infinity if it is too large."""
    if not isinstance(number, Real) or isinstance(number, bool):
        return math.nan
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _hint(hint: str) -> str:
    return f"; {hint}" if hint else ""
