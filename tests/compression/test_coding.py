"""Entropy coding as a stage: sizes, values, chains, rounds, and bytes from strangers."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.compression import (
    Coded,
    Keys,
    Message,
    Symbols,
    ans,
    chain,
    elias_delta,
    elias_gamma,
    from_bytes,
    huffman,
    identity,
    lossless,
    rice,
    to_bytes,
    top_k,
    uniform_quantize,
    zero_runs,
)
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))
CODECS = [elias_gamma(), elias_delta(), rice(), rice(2), zero_runs(), huffman(), ans()]
SIZES = (1, 2, 3, 4095, 4096, 4097)

# Others of the same family are in the quick tests.
RARE = {elias_delta().name, rice(2).name, huffman().name, zero_runs().name}
each_codec = pytest.mark.parametrize(
    "codec",
    [
        pytest.param(codec, marks=[pytest.mark.slow] if codec.name in RARE else [], id=codec.name)
        for codec in CODECS
    ],
)


def symbols(codes: np.ndarray, width: int) -> Symbols:
    return Symbols(codes, width, np.dtype(np.float32))


def coded(codec, node: Symbols) -> Message:
    return codec.encode(KEYS, (), (), {"w": node})[1]


@functools.cache
def counter(codec):
    return jax.jit(codec.bits)


def check(codec, node: Symbols) -> int:
    """The bytes of a message."""
    message = coded(codec, node)
    data = to_bytes(codec, message)
    assert int(counter(codec)(message)) == 8 * len(data)
    assert len(data) <= node.num_bytes + 1
    read = from_bytes(codec, data, jax.eval_shape(lambda: message))
    assert jax.tree.structure(read) == jax.tree.structure(message)
    decoded = codec.decode(KEYS, (), read)["w"]
    assert decoded.codes.dtype == node.codes.dtype
    np.testing.assert_array_equal(decoded.codes, node.codes)
    return len(data)


def unsigned(size: int) -> list[Symbols]:
    """Of 8 bits: constants, one-hot, extremes, noise, a bell around 128."""
    rng = np.random.default_rng(size)
    bell = np.clip(rng.normal(128, 5, size), 0, 255)
    rows = [
        np.zeros(size),
        np.full(size, 255),
        128 + np.eye(1, size, size // 2)[0],
        255 * (np.arange(size) % 2),
        rng.integers(0, 256, size),
        bell,
    ]
    return [symbols(row.astype(np.uint8), 8) for row in rows]


@each_codec
@pytest.mark.parametrize("size", SIZES)
def test_case_12_device_bits_are_those_of_the_bytes(codec, size):
    for node in unsigned(size):
        check(codec, node)


@each_codec
@pytest.mark.parametrize(
    ("dtype", "width"), [("uint8", 1), ("uint8", 5), ("uint16", 16), ("int8", 3), ("int32", 31)]
)
def test_all_widths_come_back(codec, dtype, width):
    rng = np.random.default_rng(width)
    low, high = (0, 1 << width) if dtype[0] == "u" else (-(1 << (width - 1)), 1 << (width - 1))
    noise = rng.integers(low, high, 300)
    few = np.where(rng.random(300) < 0.1, noise, noise[0])
    ends = np.where(np.arange(300) % 2, low, high - 1)
    for codes in (noise, few, ends):
        check(codec, symbols(codes.astype(dtype).reshape(3, 100), width))


@each_codec
def test_tensors_without_elements_take_no_bytes(codec):
    assert check(codec, symbols(np.zeros((0, 3), np.uint8), 8)) == 0


@each_codec
def test_noise_takes_one_byte_more_than_packed(codec):
    noise = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    assert check(codec, symbols(noise, 8)) == 5001


def test_sizes_of_a_bell():
    """100,000 symbols of a rounded normal distribution with deviation 5, of 4.369 bits."""
    codes = np.clip(np.round(np.random.default_rng(0).normal(128, 5, 100_000)), 0, 255)
    node = symbols(codes.astype(np.uint8), 8)
    counts = np.bincount(node.codes)
    p = counts[counts > 0] / codes.size
    entropy = -np.sum(p * np.log2(p))
    assert entropy == pytest.approx(np.log2(5 * np.sqrt(2 * np.pi * np.e)), abs=0.01)
    bits = {codec.name: 8 * check(codec, node) / codes.size for codec in CODECS}
    assert bits["ans()"] < entropy + 0.015
    assert bits["huffman()"] < entropy + 0.06
    assert bits["rice()"] < entropy + 0.35
    assert bits["elias_gamma()"] < entropy + 2
    assert bits["ans()"] == min(bits.values())


def test_clustered_zeros_take_runs_less_than_their_entropy():
    codes = np.zeros(100_000, np.int8)
    codes[:10_000] = np.random.default_rng(0).integers(-2, 3, 10_000)
    node = symbols(codes, 8)
    assert check(zero_runs(), node) < check(ans(), node)


def test_signed_symbols_travel_densely():
    codes = np.array([-4, 3, -1, 0], np.int8)
    node = symbols(codes, 3)
    assert node.to_bytes() == (0 | 7 << 3 | 3 << 6 | 4 << 9).to_bytes(2, "little")
    read, used = node.from_bytes(memoryview(node.to_bytes() + b"\1"))
    assert used == 2
    np.testing.assert_array_equal(read.codes, codes)
    with pytest.raises(CodecError, match="expected integers"):
        symbols(np.array([4], np.int8), 3).to_bytes()


def value() -> dict:
    rng = np.random.default_rng(0)
    return {
        "large": jnp.asarray(rng.laplace(size=(30, 100)), jnp.float32),
        "other": jnp.asarray(rng.normal(size=2000), jnp.float32),
        "small": jnp.ones(7),
        "steps": jnp.arange(3),
    }


@each_codec
def test_chains_decode_to_what_they_decode_without_the_last_stage(codec):
    quantise = uniform_quantize(5, min_size=100)
    for stages in ([quantise], [top_k(0.1, min_size=100), quantise]):
        plain, full = chain(*stages, identity()), chain(*stages, codec)

        @jax.jit
        def send(value, plain=plain, full=full):
            expected = plain.decode(KEYS, (), plain.encode(KEYS, (), (), value)[1])
            message = full.encode(KEYS, (), (), value)[1]
            return expected, message, full.bits(message)

        expected, message, bits = send(value())
        data = to_bytes(full, message)
        assert 8 * len(data) == int(bits)
        read = from_bytes(full, data, jax.eval_shape(lambda message=message: message))
        decoded = jax.jit(lambda message, full=full: full.decode(KEYS, (), message))(read)
        jax.tree.map(np.testing.assert_array_equal, decoded, expected)


def test_stages_behind_an_entropy_code_keep_it():
    node = unsigned(4097)[5]
    codec = chain(ans(), identity(), lossless())
    message = coded(codec, node)
    assert isinstance(message.payload["w"], Coded)
    assert len(to_bytes(codec, message)) == check(ans(), node)


def test_traits_of_a_coded_chain():
    codec = chain(uniform_quantize(8), ans())
    assert codec.name == "chain(uniform_quantize(bits=8), ans())"
    assert codec.traits == uniform_quantize(8).traits
    assert not ans().traits.linear
    assert not ans().traits.summable


def test_a_round_counts_what_its_codec_sends():
    codec = chain(uniform_quantize(6, min_size=10, stochastic=False), huffman())
    aggregator = fc.aggregators.mean(codec=codec)
    state, computation = fc.aggregators.as_computation(aggregator, (np.float32, [400]))
    rows = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    result = computation(state, jax.random.key(0), list(rows), [1.0] * 3, [0, 1, 2])
    np.testing.assert_allclose(result.value, rows.mean(0), atol=0.1)
    assert "by value" in str(fc.communication(computation, num_clients=3))


@each_codec
def test_altered_bytes_are_refused_or_decoded(codec):
    rng = np.random.default_rng(0)
    full = chain(uniform_quantize(8, min_size=100), codec)
    message = full.encode(KEYS, (), (), value())[1]
    written = np.frombuffer(to_bytes(full, message), np.uint8)
    like = jax.eval_shape(lambda: message)
    refused = 0
    tracemalloc.start()
    for _ in range(500):
        altered = written.copy()
        count = rng.integers(1, 4)
        altered[rng.integers(0, written.size, count)] = rng.integers(0, 256, count)
        data = altered[: written.size - max(0, rng.integers(-3, 4))].tobytes()
        try:
            read = from_bytes(full, data, like)
        except CodecError:
            refused += 1
            continue
        for before, after in zip(jax.tree.leaves(message), jax.tree.leaves(read), strict=True):
            assert (after.dtype, after.shape) == (before.dtype, before.shape)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 100
    # Tables of 2**20 codewords are the largest thing that is made for so few numbers.
    assert peak < 64 << 20


@pytest.mark.parametrize("tag", [2, 255])
def test_unknown_tags_are_refused(tag):
    message = coded(rice(), unsigned(100)[0])
    with pytest.raises(CodecError, match="tag of 0 or 1"):
        from_bytes(rice(), bytes([tag, 0, 0, 0]), message)


def test_symbols_out_of_range_are_refused():
    """The most frequent symbol is 255 and a number says one more."""
    message = coded(rice(0), symbols(np.array([0, 255] * 50, np.uint8), 8))
    # 2 in unary, which stands for 255 + 1, and then 99 times 0.
    data = b"\1\xff" + sum(1 << i for i in range(2, 102)).to_bytes(13, "little")
    with pytest.raises(
        CodecError, match=r"expected symbols of 8 bits, got a range of \[255, 256\]"
    ):
        from_bytes(rice(0), data, message)


@pytest.mark.parametrize("parameter", [-1, 31, 1.0, True, "2"])
def test_parameter_out_of_range_is_refused(parameter):
    with pytest.raises(CodecError, match="expected parameter"):
        rice(parameter)


def test_too_many_symbols_are_refused():
    node = symbols(jax.ShapeDtypeStruct(((1 << 28) + 1,), np.uint8), 8)
    with pytest.raises(CodecError, match=r"at most 2\*\*28 symbols"):
        coded(ans(), node)


def test_values_without_symbols_are_left_as_they_are():
    raw = {"w": jnp.arange(5.0)}
    codec = ans()
    message = codec.encode(KEYS, (), (), raw)[1]
    assert to_bytes(codec, message) == np.arange(5, dtype=np.float32).tobytes()
