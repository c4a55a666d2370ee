"""The coder of asymmetric numeral systems, from `constriction`, on the host.

A coder is a stack: what is encoded last is decoded first. Its state begins at the least one, from
which every symbol costs what its frequency says, and is written without the zero bytes at its end.

References:
  Bamler. Understanding entropy coding with asymmetric numeral systems (ANS): a statistician's
  perspective. 2022, arXiv:2201.01741 (constriction).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_core.errors import CodecError

# Probabilities in constriction's coders have 24 bits, its states 64 in words of 32.
_CODER_BITS = 24
# Bits that a state takes beside the ideal ones, and by how much these may be missed; for shuffled
# symbols that is a random walk of far less than one bit.
STATE_BITS = 32 + 8
# Orders of the symbols that are tried until the length is within the slack.
NUM_ORDERS = 8


def new_coder() -> Any:
    """A coder that holds nothing."""
    return _constriction().stack.AnsCoder(np.array([0, 1], np.uint32))


def state_of(coder: Any) -> bytes:
    """The state of a coder, without the zero bytes at its end."""
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def coder_from(state: bytes) -> Any:
    """The coder of a state, with or without zero bytes at its end."""
    stripped = state.rstrip(b"\0")
    words = np.frombuffer(stripped.ljust(-(-len(stripped) // 4) * 4, b"\0"), "<u4")
    return _constriction().stack.AnsCoder(words.astype(np.uint32))


def is_empty(coder: Any) -> bool:
    """Whether all that was encoded has been decoded."""
    return coder.get_compressed().tolist() == [0, 1]


def categorical(found: np.ndarray) -> Any:
    """The model whose probabilities are exactly those of the frequencies."""
    # constriction makes cumulative sums of 24 bits: it scales floats to the sum 2**24 - m, m their
    # number, rounds down, and adds 1 to each. Such integers are therefore kept as they are.
    present = found[found > 0]
    scale = (1 << _CODER_BITS) // int(present.sum())
    widths = (present * scale - 1).astype(np.float64)
    return _constriction().model.Categorical(widths, perfect=False, lazy=False)


def in_some_order(encode: Callable[[int], bytes], num_bytes: int) -> tuple[int, bytes]:
    """The first order in which the state fits, and the state filled up with zeros.

    Args:
      encode: from the number of an order to the state.
      num_bytes: into which the state must fit; 0 if there is nothing to encode.

    Returns:
      `(order, state)`.

    Raises:
      CodecError: it fits in no order.
    """
    for order in range(NUM_ORDERS if num_bytes else 0):
        state = encode(order)
        if len(state) <= num_bytes:
            return order, state.ljust(num_bytes, b"\0")
    if num_bytes:
        raise CodecError(
            f"expected the state of a coder to fit into {num_bytes} bytes in one of {NUM_ORDERS} "
            "orders; use huffman() for this value."
        )
    return 0, b""


def reorder(symbols: np.ndarray, order: int) -> np.ndarray:
    """The symbols in one of the orders that are tried; that of number 0 is their own."""
    return symbols if order == 0 else symbols[_order_of(symbols.size, order)]


def restore(symbols: np.ndarray, order: int) -> np.ndarray:
    """What undoes `reorder`."""
    if order == 0:
        return symbols
    restored = np.empty_like(symbols)
    restored[_order_of(symbols.size, order)] = symbols
    return restored


def _order_of(size: int, order: int) -> np.ndarray:
    """A permutation that takes neighbours far apart: steps of about the golden section."""
    step = int(size * 0.6180339887) + order
    while np.gcd(step, size) > 1:
        step += 1
    return np.arange(size, dtype=np.int64) * step % size


def _constriction() -> Any:
    import constriction

    # The module is compiled and has no types.
    return constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
