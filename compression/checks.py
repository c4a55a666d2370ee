"""Checks of the numbers that codecs are made from."""

import math
import reprlib
from numbers import Real

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
        raise CodecError(
            f"expected {name} to be {expected}, got {reprlib.repr(number)}{_told(hint)}."
        )
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
        got = f"{reprlib.repr(number)}{_told(hint)}"
        raise CodecError(f"expected {name} to be a number {expected}, got {got}.")
    return exact


def flag(name: str, value: bool) -> bool:
    """`value` itself, if it is True or False.

    Raises:
      CodecError: it is something else.
    """
    if not isinstance(value, bool | np.bool):
        raise CodecError(f"expected {name} to be True or False, got {reprlib.repr(value)}.")
    return bool(value)


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


def _told(hint: str) -> str:
    return f"; {hint}" if hint else ""
