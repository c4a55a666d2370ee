"""Entropy codes that learn their model from the tensor and send it: Huffman and rANS.

    message = table of the tokens that occur + codewords or state + extra bits of long numbers

The table names each token by its distance to the one before, and gives it a frequency (of 14 bits)
or the length of its codeword, all in Elias gamma.

References:
  Huffman. A method for the construction of minimum-redundancy codes. Proceedings of the IRE 40(9),
  1952.

  Duda. Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
  compression rate of arithmetic coding. 2013, arXiv:1311.2540.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression import frequencies as model
from fedjax_core.compression import rans
from fedjax_core.compression.bitstreams import BitReader, BitWriter, altered, bit_length
from fedjax_core.compression.universal import Code, read_gammas, write_gammas

# No Huffman code of frequencies with the sum 2**14 has a longer codeword.
_LONGEST = 20


@dataclasses.dataclass(frozen=True)
class Huffman(Code):
    """A canonical Huffman code of the tokens' frequencies."""

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        histogram, extra = _histogram(numbers, width)
        found = model.frequencies(histogram, numbers.size)
        lengths = model.huffman_lengths(found)
        codewords = BitCount(jnp.zeros_like(lengths), lengths).times(histogram).sum()
        table = model.table_bits(jnp.where(found > 0, lengths + 1, 0))
        return table + codewords + extra

    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """See `Code`."""
        tokens, histogram, found = _measure(numbers, width)
        lengths = np.asarray(model.huffman_lengths(found.astype(np.uint32))).astype(np.int64)
        num_bits = int((histogram * (lengths + model.extra_bits(np.arange(found.size)))).sum())
        if num_bits >= 8 * limit:
            return None
        codewords = _codewords(lengths, found > 0).astype(np.uint64)
        writer = BitWriter()
        write_table(writer, np.where(found > 0, lengths + 1, 0))
        writer.fields(codewords[tokens], lengths.astype(np.uint64)[tokens])
        _write_extra(writer, numbers, tokens, width)
        return writer.to_bytes() if writer.num_bits <= 8 * (limit - 1) else None

    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """See `Code`."""
        reader = BitReader(data)
        entries = read_table(reader, model.num_tokens(width), _LONGEST + 1)
        tokens = _read_codewords(reader, entries - 1, entries > 0, size)
        return _read_extra(reader, tokens), reader.finish()


@dataclasses.dataclass(frozen=True)
class Ans(Code):
    """Range asymmetric numeral systems, by the coder of `constriction`.

    Its length depends on the order of the numbers by less than a byte or so. A tensor takes what
    the frequencies promise and 40 bits, filled up with zeros, so its size is known before it is
    coded. Numbers in an order for which that is too little are coded in another order.
    """

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        histogram, extra = _histogram(numbers, width)
        found = model.frequencies(histogram, numbers.size)
        header = model.table_bits(found) + BitCount.of(_length_bits(numbers.size) + 8)
        state = model.ideal_bits(histogram, found, numbers.size) + BitCount.of(rans.STATE_BITS)
        is_alone = (found > 0).sum() < 2
        state = BitCount(jnp.where(is_alone, 0, state.high), jnp.where(is_alone, 0, state.low))
        return header.whole_bytes() + state.whole_bytes() + extra

    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """See `Code`."""
        tokens, histogram, found = _measure(numbers, width)
        ideal = int(model.ideal_bits(histogram, found.astype(np.uint32), numbers.size))
        num_bytes = -(-(ideal + rans.STATE_BITS) // 8) if np.count_nonzero(found) > 1 else 0
        if num_bytes >= limit:
            return None
        order, state = rans.in_some_order(
            lambda order: _encode(rans.reorder(tokens, order), found), num_bytes
        )
        header, lower = BitWriter(), BitWriter()
        write_table(header, found)
        header.integers(np.array([num_bytes]), _length_bits(numbers.size))
        header.integers(np.array([order]), 8)
        _write_extra(lower, numbers, tokens, width)
        written = header.to_bytes() + state + lower.to_bytes()
        return written if len(written) < limit else None

    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """See `Code`."""
        header = BitReader(data)
        sum_bits = model.precision(size)
        found = read_table(header, model.num_tokens(width), sum_bits + 1)
        if int(found.sum()) != 1 << sum_bits:
            raise altered(f"frequencies with the sum 2**{sum_bits}")
        num_bytes = int(header.integers(1, _length_bits(size))[0])
        order = int(header.integers(1, 8)[0])
        begin = header.finish()
        state = data[begin : begin + num_bytes]
        if order >= rans.NUM_ORDERS or len(state) < num_bytes:
            raise altered(f"{num_bytes} bytes of a coder's state")
        tokens = _decode(bytes(state), found, size)
        lower = BitReader(data[begin + num_bytes :])
        shuffled = _read_extra(lower, rans.restore(tokens, order))
        return shuffled, begin + num_bytes + lower.finish()


def write_table(writer: BitWriter, entries: np.ndarray) -> None:
    """Appends a table: how many entries are positive, their distances, the entries themselves."""
    places = np.flatnonzero(entries)
    writer.integers(np.array([places.size]), entries.size.bit_length())
    write_gammas(writer, np.concatenate([np.diff(places, prepend=-1), entries[places]]))


def read_table(reader: BitReader, num_entries: int, width: int) -> np.ndarray:
    """int64 ``[num_entries]``, each below ``2**width``, at least one of them positive."""
    count = int(reader.integers(1, num_entries.bit_length())[0])
    if not 0 < count <= num_entries:
        raise altered(f"a table of 1 to {num_entries} tokens")
    numbers = read_gammas(reader, 2 * count, max(width, num_entries.bit_length()))
    places = np.cumsum(numbers[:count]) - 1
    if places[-1] >= num_entries or int(numbers[count:].max()) >> width:
        raise altered(f"tokens below {num_entries} with entries below 2**{width}")
    entries = np.zeros(num_entries, np.int64)
    entries[places] = numbers[count:]
    return entries


def _histogram(numbers: jax.Array, width: int) -> tuple[jax.Array, BitCount]:
    """How often each token occurs, uint32, and how many extra bits there are."""
    size = model.num_tokens(width)
    lengths = jnp.uint32(32) - jax.lax.clz(numbers)
    tokens, _ = model.tokenize(numbers, lengths, jnp)
    histogram = jnp.zeros(size, jnp.uint32).at[tokens].add(jnp.uint32(1))
    extra = jnp.asarray(model.extra_bits(np.arange(size)).astype(np.uint32))
    return histogram, BitCount(jnp.zeros_like(extra), extra).times(histogram).sum()


def _measure(numbers: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens of numbers, how often each occurs, uint32, and their frequencies, int64."""
    tokens, size = numbers, model.num_tokens(width)
    if int(numbers.max()) >= model.NUM_DIRECT:
        tokens, _ = model.tokenize(numbers, bit_length(numbers).astype(np.uint32), np)
    histogram = np.bincount(tokens, minlength=size).astype(np.uint32)
    found = model.frequencies(histogram, numbers.size)
    return tokens, histogram, np.asarray(found).astype(np.int64)


def _write_extra(writer: BitWriter, numbers: np.ndarray, tokens: np.ndarray, width: int) -> None:
    """Appends what the tokens of numbers do not hold."""
    if model.num_tokens(width) < 1 << width and int(tokens.max()) >= model.NUM_DIRECT:
        extra = model.extra_bits(tokens)
        writer.fields(numbers & ((np.int64(1) << extra) - 1), extra)


def _read_extra(reader: BitReader, tokens: np.ndarray) -> np.ndarray:
    """The numbers of tokens whose extra bits come next: uint32."""
    if int(tokens.max()) < model.NUM_DIRECT:
        return tokens.astype(np.uint32)
    extra = model.extra_bits(tokens)
    if not extra.any():
        return tokens.astype(np.uint32)
    return model.detokenize(tokens, reader.fields(extra)).astype(np.uint32)


def _codewords(lengths: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The canonical codeword of each token, its first bit lowest: int64."""
    order = np.lexsort((np.arange(lengths.size), lengths, ~present))[: np.count_nonzero(present)]
    spans = 1 << (_LONGEST - lengths[order])
    begins = np.cumsum(spans) - spans
    codewords = np.zeros(lengths.size, np.int64)
    for bit in range(_LONGEST):
        codewords[order] |= ((begins >> (_LONGEST - 1 - bit)) & 1) << bit
    return codewords


def _read_codewords(
    reader: BitReader, lengths: np.ndarray, present: np.ndarray, size: int
) -> np.ndarray:
    """The tokens of the next codewords."""
    (tokens,) = np.nonzero(present)
    longest = int(lengths.max())
    if longest > _LONGEST or int((1 << (_LONGEST - lengths[tokens])).sum()) != 1 << _LONGEST:
        raise altered("the lengths of a complete prefix code")
    if tokens.size == 1:
        return np.full(size, tokens[0])
    codewords = _codewords(lengths, present)
    token_of = np.zeros(1 << longest, np.int64)
    for token in tokens:
        token_of[codewords[token] :: 1 << lengths[token]] = token
    length_of = lengths[token_of].astype(np.uint8)
    mask = np.uint32((1 << longest) - 1)

    def table(data: np.ndarray) -> np.ndarray:
        padded = np.concatenate([data, np.zeros(3, np.uint8)]).astype(np.uint32)
        words = padded[:-3] | padded[1:-2] << 8 | padded[2:-1] << 16 | padded[3:] << 24
        return length_of[(words[:, None] >> np.arange(8, dtype=np.uint32)) & mask].ravel()

    starts = reader.codeword_starts(size, table)
    if starts.size <= size:
        raise altered(f"{size} codewords")
    reader.skip_to(int(starts[-1]))
    return token_of[reader.windows(starts[:-1]) & mask]


def _length_bits(size: int) -> int:
    """The width of a field for the bytes of a coder's state: no number takes more than 14 bits."""
    return (2 * size + 8).bit_length()


def _encode(tokens: np.ndarray, found: np.ndarray) -> bytes:
    """The state of the coder, without the zero bytes at its end."""
    coder = rans.new_coder()
    ranks = (np.cumsum(found > 0) - 1).astype(np.int32)
    coder.encode_reverse(ranks[tokens], rans.categorical(found))
    return rans.state_of(coder)


def _decode(state: bytes, found: np.ndarray, size: int) -> np.ndarray:
    """int64, the tokens."""
    (tokens,) = np.nonzero(found)
    if tokens.size == 1:
        if state:
            raise altered("no state for a tensor of one token")
        return np.full(size, tokens[0])
    coder = rans.coder_from(state)
    ranks = coder.decode(rans.categorical(found), size)
    if not rans.is_empty(coder):
        raise altered("a coder's state to end where it began")
    return tokens[ranks]
