"""From pytrees of tensors to bytes and back: the one place that knows how a tensor is written.

| leaf | written as | bytes |
|---|---|---|
| array | its elements, little-endian | size * itemsize |
| `Symbols` | `width` bits an element, densely | ceil(size * width / 8) |
| `Symbols` of another packing | see `packing` | see `packing` |
| `Positions` | a mask, or k indices if shorter | ceil(min(size, k * ceil(log2 size)) / 8) |

Every leaf starts at a byte. Sizes depend on shapes alone, so they are known while tracing. Reading
checks all that the bytes of a message satisfy: a message is rejected rather than misread.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.packing import (
    PACKINGS,
    Packing,
    PackingName,
    pack_bits,
    unpack_bits,
)
from fedjax_core.errors import CodecError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Symbols:
    """The symbols that stand for the elements of a tensor.

    Attributes:
      codes: uint8 or uint16, each below ``2**width``, in the shape of the tensor.
      width: static, bits a symbol.
      dtype: static, the dtype of the tensor that the symbols stand for.
      packing: static, how the symbols are written.
    """

    codes: Any
    width: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    packing: PackingName = dataclasses.field(default="dense", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Which elements of a tensor are sent.

    Attributes:
      indices: int32 ``[k]``, positions in the flat tensor, strictly increasing.
      size: static, the number of elements of the tensor.
    """

    indices: Any
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def width(self) -> int:
        """Bits of one position by its index: ceil(log2 size)."""
        return (self.size - 1).bit_length()

    @property
    def is_mask(self) -> bool:
        """Whether one bit an element of the tensor is shorter than k indices."""
        return self.size < math.prod(self.indices.shape) * self.width


def leaves(tree: Any) -> list[Any]:
    """The tensors of a pytree, `Symbols` and `Positions` whole."""
    return jax.tree.leaves(tree, is_leaf=_is_packed)


def check_tensors(value: Any) -> Any:
    """`value` itself, if all its leaves are arrays that have bytes.

    Raises:
      CodecError: a leaf is a Python scalar, a string, a typed key, or an array of objects.
    """
    for path, leaf in jax.tree.leaves_with_path(value):
        if not _is_tensor(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise CodecError(
                f"expected every leaf to be an array of numbers, got {kind} at "
                f"value{jax.tree_util.keystr(path)}; convert it with jnp.asarray "
                "(a typed key with jax.random.key_data)."
            )
    return value


def num_bytes(tree: Any) -> int:
    """The exact number of bytes of a pytree of arrays, or of their `jax.ShapeDtypeStruct`."""
    return sum(_leaf_bytes(leaf) for leaf in leaves(tree))


def to_bytes(tree: Any) -> bytes:
    """The bytes of a pytree of arrays, leaf after leaf."""
    return b"".join(_write(leaf) for leaf in leaves(tree))


def from_bytes(like: Any, data: bytes) -> tuple[Any, bytes]:
    """The pytree that `to_bytes` wrote.

    Args:
      like: a pytree of the same structure, shapes and dtypes.
      data: its bytes, and perhaps more.

    Returns:
      The pytree of NumPy arrays, and the bytes that follow it.

    Raises:
      CodecError: `data` is too short, or holds what `to_bytes` never writes.
    """
    expected = num_bytes(like)
    if len(data) < expected:
        raise CodecError(
            f"expected {expected} bytes, got {len(data)}: the message was cut short; "
            "pass all bytes of one message, and the `like` of the value that was encoded."
        )
    templates, structure = jax.tree.flatten(like, is_leaf=_is_packed)
    read, offset = [], 0
    for template in templates:
        end = offset + _leaf_bytes(template)
        read.append(_read(template, data[offset:end]))
        offset = end
    return jax.tree.unflatten(structure, read), data[expected:]


def _is_packed(node: Any) -> bool:
    return isinstance(node, Symbols | Positions)


def _is_tensor(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype of numbers, also as a tracer or a ShapeDtypeStruct."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        return False
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return jnp.issubdtype(dtype, np.number) or dtype == np.bool_


def _leaf_bytes(leaf: Any) -> int:
    if isinstance(leaf, Symbols):
        return _packing(leaf).num_bytes(math.prod(leaf.codes.shape), leaf.width)
    if isinstance(leaf, Positions):
        fixed = math.prod(leaf.indices.shape) * leaf.width
        return -(-min(leaf.size, fixed) // 8)
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _write(leaf: Any) -> bytes:
    if isinstance(leaf, Symbols):
        return _packing(leaf).pack(np.asarray(leaf.codes), leaf.width)
    if isinstance(leaf, Positions):
        indices = np.asarray(leaf.indices)
        return (
            pack_bits(_mask(indices, leaf.size), 1)
            if leaf.is_mask
            else pack_bits(indices, leaf.width)
        )
    # JAX runs on little-endian machines only, so the bytes in memory are the bytes on the wire.
    return np.asarray(leaf).tobytes()


def _packing(symbols: Symbols) -> Packing:
    return PACKINGS[symbols.packing]


def _read(like: Any, data: bytes) -> Any:
    if isinstance(like, Symbols):
        codes = _packing(like).unpack(data, math.prod(like.codes.shape), like.width)
        codes = codes.astype(like.codes.dtype).reshape(like.codes.shape)
        return dataclasses.replace(like, codes=codes)
    if isinstance(like, Positions):
        return dataclasses.replace(like, indices=_read_positions(like, data))
    if like.dtype == np.bool_ and max(data, default=0) > 1:
        raise CodecError(
            "expected the bytes of a boolean tensor to be 0 or 1; "
            "the bytes were altered, or belong to another message."
        )
    return np.frombuffer(data, dtype=np.dtype(like.dtype)).reshape(like.shape)


def _read_positions(like: Positions, data: bytes) -> np.ndarray:
    """The indices in `data`, checked: as many as expected, increasing, inside the tensor."""
    count = math.prod(like.indices.shape)
    if like.is_mask:
        indices = np.flatnonzero(unpack_bits(data, like.size, 1))
    else:
        indices = unpack_bits(data, count, like.width)
    is_increasing = bool(np.all(np.diff(indices.astype(np.int64)) > 0))
    if len(indices) != count or not is_increasing or np.any(indices >= like.size):
        raise CodecError(
            f"expected {count} increasing positions below {like.size}, got {len(indices)} that "
            "are not; the bytes were altered, or belong to another message."
        )
    return indices.astype(like.indices.dtype).reshape(like.indices.shape)


def _mask(indices: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[indices] = 1
    return mask
