"""Which tensors a lossy codec touches: the floating ones with more than `min_size` elements.

Small tensors (biases, scales) hold few bits and much meaning, so they travel as they are: the rule
of the TFF research tutorial. Sizes are judged on the original tensor, also behind a sparsifying
stage.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression import wire
from fedjax_core.compression.base import Message, Survivors
from fedjax_core.errors import CodecError


def check_min_size(min_size: int) -> int:
    """`min_size` itself, if it is a number of elements.

    Raises:
      CodecError: it is negative or not an integer.
    """
    if isinstance(min_size, bool) or not isinstance(min_size, int | np.integer) or min_size < 0:
        raise CodecError(
            f"expected min_size to be an integer of at least 0, got {min_size!r}; "
            "tensors with more elements than min_size are compressed."
        )
    return int(min_size)


def encode_large(
    value: Any, min_size: int, encode_tensor: Callable[[int, jax.Array], tuple[Any, Any]]
) -> Message:
    """Encodes the large floating tensors of `value`, and leaves the others as they are.

    Args:
      value: pytree of arrays, perhaps with `Survivors` of an earlier stage.
      min_size: tensors with strictly more elements are encoded.
      encode_tensor: ``(leaf_index, tensor) -> (encoded, side)``.

    Returns:
      A message whose payload is `value` with the encoded tensors in place, and whose side is a
      tuple with one entry for each leaf: its side information, or None where the tensor is as it
      was.

    Raises:
      CodecError: a leaf is not an array.
    """
    wire.check_tensors(value)
    tensors, structure = jax.tree.flatten(value, is_leaf=_is_symbols)
    payload, side = [], []
    for index, (tensor, size) in enumerate(zip(tensors, _original_sizes(value), strict=True)):
        is_large = size > min_size and _is_floating(tensor)
        encoded, extra = encode_tensor(index, jnp.asarray(tensor)) if is_large else (tensor, None)
        payload.append(encoded)
        side.append(extra)
    return Message(jax.tree.unflatten(structure, payload), tuple(side))


def decode_large(
    message: Message,
    is_encoded: Callable[[Any], bool],
    decode_tensor: Callable[[Any, Any], jax.Array],
) -> Any:
    """Decodes what `encode_large` encoded.

    Args:
      message: the message of `encode_large`.
      is_encoded: whether a node of the payload may be what `encode_tensor` made.
      decode_tensor: ``(encoded, side) -> tensor``.

    Returns:
      The value.
    """
    nodes, structure = jax.tree.flatten(
        message.payload, is_leaf=lambda node: is_encoded(node) or _is_symbols(node)
    )
    value = [
        # What was read from bytes is NumPy's, whose arithmetic may round differently.
        node if side is None else decode_tensor(*jax.tree.map(jnp.asarray, (node, side)))
        for node, side in zip(nodes, message.side, strict=True)
    ]
    return jax.tree.unflatten(structure, value)


def _is_symbols(node: Any) -> bool:
    return isinstance(node, wire.Symbols)


def _is_floating(tensor: Any) -> bool:
    return not _is_symbols(tensor) and jnp.issubdtype(tensor.dtype, jnp.floating)


def _original_sizes(value: Any) -> list[int]:
    """For each tensor, the elements of the tensor it was before any sparsifying stage."""
    nodes = jax.tree.leaves(value, is_leaf=lambda node: isinstance(node, Survivors | wire.Symbols))
    return [node.codes.size if _is_symbols(node) else node.size for node in nodes]
