"""One table of all codecs, against one list of contracts."""

import functools

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.bits import BitCount
from fedjax_core.compression import (
    Keys,
    Message,
    Report,
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

SIZES = {
    jnp.float32: (1, 2, 3, 4095, 4096, 4097),
    jnp.float16: (4097,),
    jnp.bfloat16: (3,),
}
CLIENTS = 6

# Those whose sizes follow from shapes, and those whose sizes depend on values.
STATIC = [
    identity(),
    *(uniform_quantize(bits, min_size=2) for bits in (1, 5, 8, 16)),
    uniform_quantize(8, min_size=2, stochastic=False),
    top_k(1.0, min_size=0),
    chain(identity(), uniform_quantize(4, min_size=0)),
    chain(uniform_quantize(4, min_size=0), identity()),
    chain(uniform_quantize(4, min_size=0), uniform_quantize(8, min_size=0)),
    chain(identity(), identity()),
    lossless(),
]
BY_VALUE = [
    top_k(0.004, min_size=0),
    chain(top_k(0.1, min_size=2), uniform_quantize(8, min_size=2)),
    chain(top_k(0.5, min_size=2), top_k(0.5, min_size=2), uniform_quantize(3, min_size=2)),
    chain(chain(top_k(0.3, min_size=0), identity()), uniform_quantize(7, min_size=0)),
    *(
        chain(uniform_quantize(6, min_size=2), code)
        for code in (elias_gamma(), elias_delta(), rice(), rice(1), zero_runs(), huffman(), ans())
    ),
    chain(top_k(0.1, min_size=2), uniform_quantize(8, min_size=2), ans()),
]
CODECS = [*STATIC, *BY_VALUE]

each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def contents(size: int, dtype: jax.typing.DTypeLike) -> np.ndarray:
    """One row for each kind of tensor: ``[clients, size]``."""
    rng = np.random.default_rng(size)
    limit = float(jnp.finfo(dtype).max)
    one_hot = np.eye(1, size, size // 2)[0]
    extremes = np.where(np.arange(size) % 2, limit, -limit)
    rows = [
        np.zeros(size),
        one_hot,
        np.full(size, 3.25),
        extremes,
        rng.normal(size=size),
        -np.abs(rng.standard_t(3, size)),
    ]
    return np.stack(rows).astype(dtype)


def values() -> dict:
    """A stacked value with all sizes and dtypes, and tensors that no codec may touch."""
    floats = {
        jnp.dtype(dtype).name: [jnp.asarray(contents(size, dtype)) for size in sizes]
        for dtype, sizes in SIZES.items()
    }
    integers = jnp.arange(CLIENTS * 5, dtype=jnp.int32).reshape(CLIENTS, 5)
    return {**floats, "integers": integers, "flags": integers % 2 == 0, "empty": integers[:, :0]}


def keys() -> Keys:
    shared = jnp.broadcast_to(jax.random.key(1), (CLIENTS,))
    return Keys(shared, jax.random.split(jax.random.key(2), CLIENTS))


def one(stacked: object, client: int) -> object:
    return jax.tree.map(lambda x: x[client], stacked)


def encode(codec, keys: Keys, value):
    _, memory = codec.init(jax.eval_shape(lambda x: x, value))
    return codec.encode(keys, memory, (), value)[1]


@functools.cache
def jitted_encode(codec):
    """Of the first client."""
    return jax.jit(lambda value: encode(codec, one(keys(), 0), value))


@functools.cache
def jitted_bits(codec):
    return jax.jit(codec.bits)


def as_bytes(tree) -> list[tuple]:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


@pytest.fixture(scope="module")
def encoded():
    """The stacked message of each codec, from one compiled program each."""
    done = {}

    def get(codec):
        if codec not in done:
            done[codec] = jax.jit(jax.vmap(lambda k, v: encode(codec, k, v)))(keys(), values())
        return done[codec]

    return get


@each_codec
def test_bits_are_the_bytes_that_travel(codec, encoded):
    messages = encoded(codec)
    counted = jax.jit(jax.vmap(codec.bits))(messages)
    for client in range(CLIENTS):
        message = one(messages, client)
        bits = 8 * len(to_bytes(codec, message))
        assert int(one(counted, client)) == bits or not codec.traits.exact_bits
        assert int(one(counted, client)) >= bits


@pytest.mark.parametrize("codec", STATIC, ids=lambda codec: codec.name)
def test_sizes_that_follow_from_shapes_need_no_values(codec, encoded):
    message = one(encoded(codec), 0)
    types = jax.eval_shape(lambda: message)
    assert int(codec.bits(types)) == int(codec.bits(message))


@each_codec
def test_bytes_give_the_same_message_and_the_same_value(codec, encoded):
    decode = jax.jit(lambda keys, message: codec.decode(keys, (), message))
    for client in range(CLIENTS):
        message, own = one(encoded(codec), client), one(keys(), client)
        like = jax.eval_shape(lambda message=message: message)
        read = from_bytes(codec, to_bytes(codec, message), like)
        assert jax.tree.structure(read) == jax.tree.structure(message)
        assert as_bytes(read) == as_bytes(message)
        assert as_bytes(decode(own, read)) == as_bytes(decode(own, message))


@each_codec
def test_value_comes_back_in_its_structure_shapes_and_dtypes(codec, reconstructed):
    decoded, value = reconstructed(codec), values()
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, value)
    for name in ("integers", "flags", "empty"):
        np.testing.assert_array_equal(decoded[name], value[name])


@pytest.fixture(scope="module")
def reconstructed(encoded):
    """The stacked value that the receiver has of each codec's messages."""
    done = {}

    def undo(codec, keys, message):
        report = Report(jnp.int32(1), codec.bits(message), message.stats)
        return codec.finish(keys.shared, (), codec.decode(keys, (), message), report)[1]

    def get(codec):
        if codec not in done:
            run = jax.jit(jax.vmap(lambda k, m: undo(codec, k, m)))
            done[codec] = run(keys(), encoded(codec))
        return done[codec]

    return get


@each_codec
def test_finite_values_stay_finite_and_inside_their_range(codec, reconstructed):
    pairs = zip(jax.tree.leaves(values()), jax.tree.leaves(reconstructed(codec)), strict=True)
    for before, after in pairs:
        if jnp.issubdtype(before.dtype, jnp.floating):
            low, high = jnp.minimum(before.min(1), 0), jnp.maximum(before.max(1), 0)
            assert jnp.all((after >= low[:, None]) & (after <= high[:, None]))


@each_codec
def test_zeros_and_one_hot_come_back_exactly(codec, reconstructed):
    pairs = zip(jax.tree.leaves(values()), jax.tree.leaves(reconstructed(codec)), strict=True)
    for before, after in pairs:
        np.testing.assert_array_equal(after[:2], before[:2])


@each_codec
def test_clients_do_not_disturb_each_other(codec):
    rows = jax.random.normal(jax.random.key(3), (CLIENTS, 8))
    stacked = jax.jit(jax.vmap(lambda k, v: encode(codec, k, v)))(keys(), rows)
    assert as_bytes(jitted_encode(codec)(rows[0])) == as_bytes(one(stacked, 0))


@each_codec
def test_second_call_does_not_trace_again(codec):
    traced = []

    @jax.jit
    def round_trip(keys, value):
        traced.append(value)
        return codec.decode(keys, (), encode(codec, keys, value))

    for client in range(2):
        round_trip(one(keys(), client), {"w": client + jnp.arange(8.0)})
    assert len(traced) == 1


@each_codec
def test_state_and_hints_of_stateless_codecs_are_empty(codec):
    assert codec.init({"w": jax.ShapeDtypeStruct((8,), jnp.float32)}) == ((), ())
    assert codec.hints(()) == ()


@pytest.mark.parametrize("codec", [*STATIC[:7], top_k(0.004, min_size=0)], ids=lambda c: c.name)
def test_message_without_payload_counts_its_side_alone(codec, encoded):
    """A chain counts its earlier stages so."""
    message = one(encoded(codec), 0)
    parts = [message._replace(payload=()), Message(message.payload)]
    assert sum(int(codec.bits(part)) for part in parts) == int(codec.bits(message))


# Few shapes, for each is compiled for each codec.
FLOATS = st.one_of(hnp.arrays(np.float32, 8), hnp.arrays(np.float16, 3))


@each_codec
@settings(max_examples=15, deadline=None, derandomize=True)
@given(value=FLOATS)
def test_any_tensor_survives_the_wire(codec, value):
    """NaN with any payload, infinities, subnormals and negative zeros among them."""
    message = jitted_encode(codec)(value)
    written = to_bytes(codec, message)
    assert 8 * len(written) == int(jitted_bits(codec)(message)) or not codec.traits.exact_bits
    assert as_bytes(from_bytes(codec, written, message)) == as_bytes(message)


@each_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_never_decodes_to_a_finite_one(codec, bad):
    value = jnp.array([1.0, bad, -2.0, 5.0, 0.5, 0.0, 3.0, -7.0])
    assert not jnp.all(jnp.isfinite(codec.decode(one(keys(), 0), (), jitted_encode(codec)(value))))


@each_codec
@pytest.mark.parametrize("cut", [-1, 1])
def test_bytes_of_the_wrong_length_are_refused(codec, cut):
    message = jitted_encode(codec)(jnp.arange(8.0))
    written = to_bytes(codec, message)
    wrong = written[:cut] if cut < 0 else written + b"\0"
    with pytest.raises(ValueError, match="expected"):
        from_bytes(codec, wrong, message)


def test_report_bits_are_sums_of_message_bits():
    codec = uniform_quantize(8, min_size=0)
    messages = jax.vmap(lambda k: encode(codec, k, jnp.arange(100.0)))(keys())
    assert int(jax.vmap(codec.bits)(messages).sum()) == CLIENTS * (800 + 64)
    assert isinstance(codec.bits(one(messages, 0)), BitCount)
