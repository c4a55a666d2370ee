"""Which tensors a lossy codec touches: the floating ones with more than `min_size` elements.

Small tensors (biases, scales) hold few bits and much meaning, so they travel as they are: the rule
of the TFF research tutorial. Sizes are judged on the original tensor, also behind a stage that
sparsifies or rotates.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression import wire
from fedjax_core.compression.base import (
    Codec,
    Keys,
    Message,
    Rotated,
    Survivors,
    Traits,
    stateless,
)
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


def tensorwise(
    name: str,
    traits: Traits,
    min_size: int,
    encode_tensor: Callable[[jax.Array, jax.Array], tuple[Any, Any]],
    decode_tensor: Callable[[jax.Array, Any, Any], jax.Array],
    kind: type = wire.Symbols,
) -> Codec:
    """A codec that encodes each large floating tensor for itself.

    Args:
      name: how the codec was made.
      traits: what holds for every value.
      min_size: tensors with strictly more elements are encoded, all others travel raw.
      encode_tensor: ``(key, tensor) -> (encoded, side)`` with the sender's key for this tensor.
      decode_tensor: ``(key, encoded, side) -> tensor`` with the same key.
      kind: the type of what `encode_tensor` makes.

    Returns:
      The codec.

    Raises:
      CodecError: `min_size` is not a number of elements.
    """
    threshold = check_min_size(min_size)

    def encode(keys: Keys, value: Any) -> Message:
        def encode_one(index: int, tensor: jax.Array) -> tuple[Any, Any]:
            return encode_tensor(jax.random.fold_in(keys.client, index), tensor)

        return encode_large(value, threshold, encode_one)

    def decode(keys: Keys, message: Message) -> Any:
        def decode_one(index: int, encoded: Any, side: Any) -> jax.Array:
            return decode_tensor(jax.random.fold_in(keys.client, index), encoded, side)

        return decode_large(message, kind, decode_one)

    return stateless(name, traits, encode, decode)


def encode_large(
    value: Any, min_size: int, encode_tensor: Callable[[int, jax.Array], tuple[Any, Any]]
) -> Message:
    """Encodes the large floating tensors of `value`, and leaves the others as they are.

    Args:
      value: pytree of arrays, perhaps with `Survivors` or `Rotated` of an earlier stage.
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
    tensors, structure = jax.tree.flatten(value, is_leaf=wire.is_packed)
    payload, side = [], []
    for index, (tensor, is_large) in enumerate(
        zip(tensors, _are_large(value, min_size), strict=True)
    ):
        encoded, extra = encode_tensor(index, jnp.asarray(tensor)) if is_large else (tensor, None)
        payload.append(encoded)
        side.append(extra)
    return Message(jax.tree.unflatten(structure, payload), tuple(side))


def large_tensors(value: Any, min_size: int) -> list[jax.Array]:
    """The tensors that `encode_large` encodes, in its order."""
    tensors = jax.tree.leaves(value, is_leaf=wire.is_packed)
    are_large = _are_large(value, min_size)
    return [jnp.asarray(x) for x, is_large in zip(tensors, are_large, strict=True) if is_large]


def decode_large(
    message: Message,
    kind: type,
    decode_tensor: Callable[[int, Any, Any], jax.Array],
) -> Any:
    """Decodes what `encode_large` encoded.

    Args:
      message: the message of `encode_large`.
      kind: the type of what `encode_tensor` made.
      decode_tensor: ``(leaf_index, encoded, side) -> tensor``.

    Returns:
      The value.
    """
    nodes, structure = _flatten_to(kind, message.payload)
    value = [
        # What was read from bytes is NumPy's, whose arithmetic may round differently.
        node if side is None else decode_tensor(index, *jax.tree.map(jnp.asarray, (node, side)))
        for index, (node, side) in enumerate(zip(nodes, message.side, strict=True))
    ]
    return jax.tree.unflatten(structure, value)


def decode_linear(
    payload: Any,
    min_size: int,
    kind: type,
    decode_tensor: Callable[[int, Any], jax.Array],
) -> Any:
    """Decodes the payload of `encode_large`, or a sum of payloads, where there is no side.

    Args:
      payload: of a message, or summed.
      min_size: of the encoder.
      kind: the type of what `encode_tensor` made.
      decode_tensor: ``(leaf_index, encoded) -> tensor``.

    Returns:
      The value.
    """
    nodes, structure = _flatten_to(kind, payload)
    # An earlier stage may have made nodes of the same kind from tensors that this one left alone.
    sizes = _original_sizes(payload)
    value = [
        decode_tensor(index, jax.tree.map(jnp.asarray, node))
        if size > min_size and isinstance(node, kind)
        else node
        for index, (node, size) in enumerate(zip(nodes, sizes, strict=True))
    ]
    return jax.tree.unflatten(structure, value)


def _flatten_to(kind: type, payload: Any) -> tuple[list[Any], Any]:
    """The tensors of a payload, whole where the last stage that makes nodes of `kind` made one."""

    def holds(tree: Any) -> bool:
        inner = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
        return any(isinstance(node, kind) for node in inner)

    def is_innermost(node: Any) -> bool:
        is_last = isinstance(node, kind) and not holds(getattr(node, "values", ()))
        return is_last or wire.is_packed(node)

    return jax.tree.flatten(payload, is_leaf=is_innermost)


def _are_large(value: Any, min_size: int) -> list[bool]:
    """For each tensor, whether a codec touches it."""
    tensors = jax.tree.leaves(value, is_leaf=wire.is_packed)
    sizes = _original_sizes(value)
    return [size > min_size and _is_floating(x) for x, size in zip(tensors, sizes, strict=True)]


def _is_floating(tensor: Any) -> bool:
    return not wire.is_packed(tensor) and jnp.issubdtype(tensor.dtype, jnp.floating)


def _original_sizes(value: Any) -> list[int]:
    """For each tensor, the elements of the tensor it was before any stage."""
    kinds = Survivors | Rotated | wire.Packed
    nodes = jax.tree.leaves(value, is_leaf=lambda node: isinstance(node, kinds))
    return [node.num_elements if wire.is_packed(node) else node.size for node in nodes]
