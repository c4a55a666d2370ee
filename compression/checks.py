"""Checks of the numbers that codecs are made from."""

import math
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
        raise CodecError(f"expected {name} to be {expected}, got {number!r}{_told(hint)}.")
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
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    # NaN fails the comparison.
    if not is_number or not lowest <= number <= highest or number == math.inf:
        is_open = highest == math.inf
        expected = f"of at least {lowest:g}" if is_open else f"from {lowest:g} to {highest:g}"
        raise CodecError(f"expected {name} to be a number {expected}, got {number!r}{_told(hint)}.")
    return float(number)


def _told(hint: str) -> str:
    return f"; {hint}" if hint else ""
