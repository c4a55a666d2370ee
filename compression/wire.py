"""From pytrees of tensors to bytes and back: the one place that knows how a tensor is written.

| leaf | written as | bytes |
|---|---|---|
| array | its elements, little-endian | size * itemsize |
| `Symbols` | `width` bits an element, densely | ceil(size * width / 8) |
| `Symbols` of another packing | see `packing` | see `packing` |
| `Positions` | a tag, then the shortest of four forms | by value |
| `Coded` | a tag, then a code of symbols, or as `Symbols` if shorter | by value |
| `Shuffled` | a tag, then zstd of the bytes by place | at most 1 + size * itemsize |

Every leaf starts at a byte and says itself where it ends. The last three count with `jnp` what
depends on their values, so that a size is known inside any program. Reading checks all that the
bytes of a message satisfy, and never takes more memory than a small multiple of what `like`
describes: a message is rejected rather than misread.
"""

import abc
import dataclasses
import math
from typing import Any, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression.packing import PACKINGS, Packing, PackingName
from fedjax_core.errors import CodecError


class Packed(abc.ABC):
    """A leaf of a message that is written in its own way: a frozen dataclass and a pytree."""

    @property
    @abc.abstractmethod
    def num_elements(self) -> int:
        """Of the tensor that it stands for."""

    @abc.abstractmethod
    def count(self) -> BitCount:
        """The exact size, or a bound of it where the codec's traits say so; a multiple of 8.

        It works under `jit` and `vmap`, and, if no value matters, on `jax.ShapeDtypeStruct`.
        """

    @abc.abstractmethod
    def to_bytes(self) -> bytes:
        """What travels."""

    @abc.abstractmethod
    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """Reads a leaf of the same shape.

        Args:
          data: its bytes, and perhaps more; not trusted.

        Returns:
          The leaf, its arrays NumPy's, and how many bytes it took.

        Raises:
          CodecError: `data` is too short, or does not decode. What decodes need not be what
            `to_bytes` writes: another code of the same symbols may be.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Symbols(Packed):
    """The symbols that stand for the elements of a tensor.

    Attributes:
      codes: in the shape of the tensor: uint8 or uint16, each below ``2**width``, or int8, int16 or
        int32, each in ``[-2**(width - 1), 2**(width - 1))``.
      width: static, bits a symbol; at most 16, or 31 if they are signed.
      dtype: static, the dtype of the tensor that the symbols stand for.
      packing: static, how the symbols are written.
    """

    codes: Any
    width: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    packing: PackingName = dataclasses.field(default="dense", metadata={"static": True})

    @property
    def num_elements(self) -> int:
        """See `Packed`."""
        return self.size

    @property
    def size(self) -> int:
        """The number of symbols."""
        return math.prod(self.codes.shape)

    @property
    def is_signed(self) -> bool:
        """Whether symbols may be negative."""
        return np.dtype(self.codes.dtype).kind == "i"

    @property
    def num_bytes(self) -> int:
        """The size of what travels."""
        return self._packing.num_bytes(self.size, self.width)

    def count(self) -> BitCount:
        """See `Packed`."""
        return BitCount.of(8 * self.num_bytes)

    def to_bytes(self) -> bytes:
        """See `Packed`."""
        codes = np.asarray(self.codes)
        if not self.is_signed:
            return self._packing.pack(codes, self.width)
        # Moved up, so that the range is that of unsigned numbers, and what is outside is refused.
        return self._packing.pack(codes.astype(np.int64) + (1 << (self.width - 1)), self.width)

    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """See `Packed`."""
        data = take(data, self.num_bytes)
        codes = self._packing.unpack(bytes(data), self.size, self.width)
        if self.is_signed:
            codes = codes.astype(np.int64) - (1 << (self.width - 1))
        return self.with_codes(codes), self.num_bytes

    def with_codes(self, codes: np.ndarray) -> Self:
        """The same with other codes, of which there are as many."""
        codes = codes.astype(self.codes.dtype).reshape(self.codes.shape)
        return dataclasses.replace(self, codes=codes)

    @property
    def _packing(self) -> Packing:
        return PACKINGS[self.packing]


def leaves(tree: Any) -> list[Any]:
    """The tensors of a pytree, those that are `Packed` whole."""
    return jax.tree.leaves(tree, is_leaf=is_packed)


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


def count(tree: Any) -> BitCount:
    """The number of bits of a pytree of arrays: exact, or a bound if a leaf's count is one.

    If no leaf's size depends on its values the tree may be of `jax.ShapeDtypeStruct`.
    """
    packed = [leaf for leaf in leaves(tree) if is_packed(leaf)]
    raw = sum(_num_bytes(leaf) for leaf in leaves(tree) if not is_packed(leaf))
    return sum((leaf.count() for leaf in packed), BitCount.of(8 * raw))


def to_bytes(tree: Any) -> bytes:
    """The bytes of a pytree of arrays, leaf after leaf."""
    # JAX runs on little-endian machines only, so the bytes in memory are the bytes on the wire.
    return b"".join(
        leaf.to_bytes() if is_packed(leaf) else np.asarray(leaf).tobytes() for leaf in leaves(tree)
    )


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
    templates, structure = jax.tree.flatten(like, is_leaf=is_packed)
    rest, read = memoryview(data), []
    for template in templates:
        if is_packed(template):
            leaf, used = template.from_bytes(rest)
        else:
            leaf, used = array_from_bytes(template, rest)
        read.append(leaf)
        rest = rest[used:]
    return jax.tree.unflatten(structure, read), bytes(rest)


def take(data: memoryview, num_bytes: int) -> memoryview:
    """The first bytes of what is left.

    Raises:
      CodecError: there are fewer.
    """
    if len(data) < num_bytes:
        raise CodecError(
            f"expected {num_bytes} bytes, got {len(data)}: the message was cut short; "
            "pass all bytes of one message, and the `like` of the value that was encoded."
        )
    return data[:num_bytes]


def array_from_bytes(like: Any, data: memoryview) -> tuple[np.ndarray, int]:
    """An array of the same shape and dtype from its own bytes, and how many these are."""
    num_bytes = _num_bytes(like)
    own = take(data, num_bytes)
    if like.dtype == np.bool_ and max(own, default=0) > 1:
        raise CodecError(
            "expected the bytes of a boolean tensor to be 0 or 1; "
            "the bytes were altered, or belong to another message."
        )
    return np.frombuffer(own, dtype=np.dtype(like.dtype)).reshape(like.shape), num_bytes


def is_packed(node: Any) -> TypeGuard[Packed]:
    """Whether a node of a pytree is a leaf that is written in its own way."""
    return isinstance(node, Packed)


def _is_tensor(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype of numbers, also as a tracer or a ShapeDtypeStruct."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        return False
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return jnp.issubdtype(dtype, np.number) or dtype == np.bool_


def _num_bytes(array: Any) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize
