"""Entropy coding: the last stage of a chain writes the symbols of the stage before it shorter.

| codec | good for | excess over the entropy |
|---|---|---|
| `elias_gamma()`, `elias_delta()` | small numbers of unknown scale | 0.4 to 3.4 bits a symbol |
| `rice()` | Laplace and geometric symbols | 0.1 to 0.25 bits a symbol |
| `zero_runs()` | mostly zeros, in clusters | below 0 if zeros cluster |
| `huffman()` | more than 2 bits a symbol | 0.03 to 0.25 bits a symbol |
| `ans()` | everything | 5 to 6 bytes a tensor, and its table |

Each tensor of `Symbols` is coded by itself: as integers around its most frequent symbol, which is
sent too, or around 0 if symbols are signed. Where that is not shorter, the tensor is packed as it
would have been, so no tensor grows by more than a byte. Other tensors are left as they are.

All sizes are exact on the device: universal codes by the position of the highest bit, Huffman codes
by building the code, ANS by the frequencies it is given, which decide its size to the byte.

References: see `universal` (Elias, Golomb, Rice) and `statistical` (Huffman, Duda).
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression.base import Codec, Keys, Message, Traits, stateless
from fedjax_core.compression.lengths import unzigzag, zigzag
from fedjax_core.compression.statistical import Ans, Huffman
from fedjax_core.compression.universal import Code, EliasDelta, EliasGamma, Rice, ZeroRuns
from fedjax_core.compression.wire import Packed, Symbols, check_tensors, take
from fedjax_core.errors import CodecError

_PLAIN, _CODED = 0, 1
# Sums over more elements would not fit the words they are computed in.
_MAX_SIZE = 1 << 28
_MAX_PARAMETER = 30

LOSSLESS = Traits(
    unbiased=True,
    contractive=True,
    linear=False,
    summable=False,
    exact_bits=True,
    needs_seed=False,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded(Packed):
    """Symbols that travel in a code.

    Attributes:
      symbols: at most 2**28 of them.
      code: static.
    """

    symbols: Symbols
    code: Code = dataclasses.field(metadata={"static": True})

    @property
    def num_elements(self) -> int:
        """See `Packed`."""
        return self.symbols.size

    @property
    def width(self) -> int:
        """The integers that are coded are below two to the power of this."""
        return self.symbols.width + (not self.symbols.is_signed)

    @property
    def num_center_bytes(self) -> int:
        """What the most frequent symbol takes."""
        return 0 if self.symbols.is_signed else -(-self.symbols.width // 8)

    def count(self) -> BitCount:
        """See `Packed`."""
        if self.symbols.size == 0:
            return BitCount.zero()
        codes = jnp.ravel(self.symbols.codes).astype(jnp.int32)
        if not self.symbols.is_signed:
            histogram = jnp.zeros(1 << self.symbols.width, jnp.int32).at[codes].add(1)
            codes = codes - jnp.argmax(histogram).astype(jnp.int32)
        coded = self.code.count(zigzag(codes), self.width)
        coded = coded.whole_bytes() + BitCount.of(8 * self.num_center_bytes)
        both = (coded, self.symbols.count())
        return jax.tree.map(lambda *words: jnp.stack(words), *both).min() + BitCount.of(8)

    def to_bytes(self) -> bytes:
        """See `Packed`."""
        if self.symbols.size == 0:
            return b""
        codes, center = np.ravel(self.symbols.codes), 0
        if self.symbols.is_signed:
            numbers = _zigzag(codes)
        else:
            center = int(np.argmax(np.bincount(codes)))
            numbers = _zigzag(np.arange(1 << self.symbols.width, dtype=np.int32) - center)[codes]
        limit = self.symbols.num_bytes - self.num_center_bytes
        body = self.code.write(numbers, self.width, limit)
        if body is None:
            return bytes([_PLAIN]) + self.symbols.to_bytes()
        return bytes([_CODED]) + center.to_bytes(self.num_center_bytes, "little") + body

    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """See `Packed`."""
        if self.symbols.size == 0:
            codes = np.zeros(0, np.int64)
            return dataclasses.replace(self, symbols=self.symbols.with_codes(codes)), 0
        tag = take(data, 1)[0]
        if tag == _PLAIN:
            symbols, used = self.symbols.from_bytes(data[1:])
        elif tag == _CODED:
            # What is coded is shorter than what is packed.
            symbols, used = self._read(data[1 : 1 + self.symbols.num_bytes])
        else:
            raise CodecError(
                f"expected a coded tensor to begin with a tag of 0 or 1, got {tag}; "
                "the bytes were altered, or belong to another message."
            )
        return dataclasses.replace(self, symbols=symbols), 1 + used

    def _read(self, data: memoryview) -> tuple[Symbols, int]:
        header = take(data, self.num_center_bytes)
        center = int.from_bytes(header, "little")
        numbers, used = self.code.read(data[len(header) :], self.symbols.size, self.width)
        codes = unzigzag(numbers) + center
        width = self.symbols.width
        low = -(1 << (width - 1)) if self.symbols.is_signed else 0
        if codes.min() < low or codes.max() >= low + (1 << width) or center >> width:
            raise CodecError(
                f"expected symbols of {width} bits, got a range of [{codes.min()}, {codes.max()}]; "
                "the bytes were altered, or belong to another message."
            )
        return self.symbols.with_codes(codes), len(header) + used


def elias_gamma() -> Codec:
    """Codes symbols in Elias gamma.

    A symbol at distance u from the most frequent one, by `zigzag`, takes 2 floor(log2(u + 1)) + 1
    bits.

    Returns:
      A lossless codec.

    Example:
      >>> from fedjax_core.compression import chain, uniform_quantize
      >>> codec = chain(uniform_quantize(8, min_size=0), elias_gamma())
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.zeros(800).at[0].set(1.0))
      >>> int(codec.bits(message))  # a range, a tag, the symbol 0, 799 ones and 17 bits
      896
    """
    return _entropy_code("elias_gamma()", EliasGamma())


def elias_delta() -> Codec:
    """Codes symbols in Elias delta: shorter than Elias gamma for u of 31 and more.

    Returns:
      A lossless codec.
    """
    return _entropy_code("elias_delta()", EliasDelta())


def rice(parameter: int | None = None) -> Codec:
    """Codes symbols in Golomb-Rice code: (u >> k) + 1 + k bits.

    Args:
      parameter: k, 0 to 30; None takes the best one for each tensor, and 5 bits to say which.

    Returns:
      A lossless codec.

    Raises:
      CodecError: `parameter` is out of range.
    """
    is_integer = isinstance(parameter, int | np.integer) and not isinstance(parameter, bool)
    if parameter is not None and not (is_integer and 0 <= parameter <= _MAX_PARAMETER):
        raise CodecError(
            f"expected parameter to be an integer from 0 to {_MAX_PARAMETER} or None, "
            f"got {parameter!r}."
        )
    name = "rice()" if parameter is None else f"rice({parameter})"
    return _entropy_code(name, Rice(None if parameter is None else int(parameter)))


def zero_runs() -> Codec:
    """Codes the runs of the most frequent symbol, and what is between them, in Elias gamma.

    Another symbol takes ``gamma(z + 1) + 1 + gamma(|q|)`` bits behind z of the most frequent ones.

    Returns:
      A lossless codec.
    """
    return _entropy_code("zero_runs()", ZeroRuns())


def huffman() -> Codec:
    """Codes symbols in a canonical Huffman code for each tensor, whose lengths are sent.

    Returns:
      A lossless codec.
    """
    return _entropy_code("huffman()", Huffman())


def ans() -> Codec:
    """Codes symbols by asymmetric numeral systems with frequencies for each tensor, which are sent.

    A tensor takes the sum of -log2 of the frequencies of its symbols, 40 bits, and the table of
    these frequencies.

    Returns:
      A lossless codec.

    Example:
      >>> from fedjax_core.compression import chain, uniform_quantize
      >>> chain(uniform_quantize(8), ans()).traits.exact_bits
      True
    """
    return _entropy_code("ans()", Ans())


def _entropy_code(name: str, code: Code) -> Codec:
    def encode(keys: Keys, value: Any) -> Message:
        del keys
        check_tensors(value)
        return Message(jax.tree.map(lambda node: _code(node, code), value, is_leaf=_is_symbols))

    def decode(keys: Keys, message: Message) -> Any:
        del keys
        return jax.tree.map(
            lambda node: node.symbols if isinstance(node, Coded) else node,
            message.payload,
            is_leaf=lambda node: isinstance(node, Coded),
        )

    return stateless(name, LOSSLESS, encode, decode)


def _code(node: Any, code: Code) -> Any:
    if not _is_symbols(node):
        return node
    if node.size > _MAX_SIZE:
        raise CodecError(
            f"expected at most 2**28 symbols in a tensor, got {node.size}; split the tensor."
        )
    return Coded(node, code)


def _zigzag(integers: np.ndarray) -> np.ndarray:
    """As `zigzag`, on the host; what does not fit into integers of this size wraps as it should."""
    size = integers.dtype.itemsize
    folded = (integers << 1) ^ (integers >> (8 * size - 1))
    return folded.view(f"u{size}").astype(np.uint32)


def _is_symbols(node: Any) -> bool:
    return isinstance(node, Symbols)
