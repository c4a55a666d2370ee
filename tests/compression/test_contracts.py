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
    bfloat16,
    bounded_support,
    chain,
    common_seed,
    drive,
    eden,
    elias_delta,
    elias_gamma,
    fixed_point,
    float8,
    from_bytes,
    hadamard_rotation,
    huffman,
    identity,
    lossless,
    qsgd,
    rand_k,
    rice,
    scaled_sign,
    sparse_ternary,
    step_quantize,
    tern_grad,
    tff_8bit,
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
CLIENTS = 7
EXTREMES = 3

# Their reconstructions stay between zero and the ends of the value.
BOUNDED = [
    identity(),
    *(uniform_quantize(bits, min_size=2) for bits in (1, 5, 8, 16)),
    uniform_quantize(8, min_size=2, stochastic=False),
    top_k(1.0, min_size=0),
    chain(identity(), uniform_quantize(4, min_size=0)),
    chain(uniform_quantize(4, min_size=0), identity()),
    chain(uniform_quantize(4, min_size=0), uniform_quantize(8, min_size=0)),
    chain(identity(), identity()),
    tff_8bit(),
    lossless(),
]
# As well, and their sizes depend on values.
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
# They keep a single element that is not zero.
SPARING = [
    tern_grad(None, min_size=0),
    qsgd(7, min_size=0),
    qsgd(300, bucket=512, min_size=0),
    bfloat16(min_size=0),
    float8(min_size=0),
]
OTHERS = [
    uniform_quantize(8, min_size=2, rounding="dither"),
    uniform_quantize(4, min_size=2, range="common"),
    scaled_sign(min_size=0),
    tern_grad(min_size=2),
    hadamard_rotation(min_size=0),
    drive(min_size=0),
    eden(3, scale="mmse", block=64, min_size=2),
    eden(0.1, min_size=0),
    rand_k(0.3, min_size=0),
    rand_k(0.3, common=False, unbiased=False, min_size=2),
    chain(hadamard_rotation(64, min_size=2), rand_k(0.5, min_size=0), qsgd(3, min_size=2)),
    fixed_point(8, limit=10.0),
    chain(hadamard_rotation(min_size=0), fixed_point(12, limit=100.0)),
    common_seed(eden(1, min_size=2)),
]
OTHERS_BY_VALUE = [
    bounded_support(2, min_size=0),
    step_quantize(0.5, min_size=0),
    step_quantize(2.0, correction="alignment", min_size=2),
    chain(step_quantize(1.0, correction="centroids", dead_zone=0.1, min_size=2), ans()),
    chain(step_quantize(1.0, rounding="stochastic", min_size=2), zero_runs()),
    chain(step_quantize(1.0, rounding="dither", min_size=2), huffman()),
    sparse_ternary(0.1, min_size=0),
    chain(top_k(0.1, min_size=0), hadamard_rotation(min_size=2), scaled_sign(min_size=0)),
]
STATIC = [*BOUNDED, *SPARING, *OTHERS]
BOUNDED = [*BOUNDED, *BY_VALUE]
CODECS = [*BOUNDED, *SPARING, *OTHERS, *OTHERS_BY_VALUE]

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
        rng.integers(-9, 9, size) * float(jnp.finfo(dtype).smallest_subnormal),
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


def undo(codec, keys, message):
    """What the receiver has of one message."""
    report = Report(jnp.int32(1), codec.bits(message), message.stats)
    return codec.finish(keys.shared, (), codec.decode(keys, (), message), report)[1]


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

    def get(codec):
        if codec not in done:
            run = jax.jit(jax.vmap(lambda k, m: undo(codec, k, m)))
            done[codec] = run(keys(), encoded(codec))
        return done[codec]

    return get


@pytest.mark.parametrize("codec", BOUNDED, ids=lambda codec: codec.name)
def test_values_stay_inside_their_range(codec, reconstructed):
    pairs = zip(jax.tree.leaves(values()), jax.tree.leaves(reconstructed(codec)), strict=True)
    for before, after in pairs:
        if jnp.issubdtype(before.dtype, jnp.floating):
            low, high = jnp.minimum(before.min(1), 0), jnp.maximum(before.max(1), 0)
            assert jnp.all((after >= low[:, None]) & (after <= high[:, None]))


@each_codec
def test_finite_values_stay_finite(codec, reconstructed):
    """All but the extremes, of which an unbiased reconstruction may be larger than any number."""
    for after in jax.tree.leaves(reconstructed(codec)):
        assert jnp.all(jnp.isfinite(jnp.delete(after, EXTREMES, axis=0)))


@each_codec
def test_zeros_come_back_exactly(codec, reconstructed):
    decoded = reconstructed(codec)
    for after in jax.tree.leaves([decoded[jnp.dtype(dtype).name] for dtype in SIZES]):
        assert not jnp.any(after[0])


@pytest.mark.parametrize("codec", [*BOUNDED, *SPARING], ids=lambda codec: codec.name)
def test_one_hot_comes_back_exactly(codec, reconstructed):
    pairs = zip(jax.tree.leaves(values()), jax.tree.leaves(reconstructed(codec)), strict=True)
    for before, after in pairs:
        np.testing.assert_array_equal(after[1], before[1])


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
    decoded = undo(codec, one(keys(), 0), jitted_encode(codec)(value))
    assert not jnp.all(jnp.isfinite(decoded))


@each_codec
@pytest.mark.parametrize("cut", [-1, 1])
def test_bytes_of_the_wrong_length_are_refused(codec, cut):
    message = jitted_encode(codec)(jnp.arange(8.0))
    written = to_bytes(codec, message)
    wrong = written[:cut] if cut < 0 else written + b"\0"
    with pytest.raises(ValueError, match="expected"):
        from_bytes(codec, wrong, message)


@pytest.mark.parametrize(
    "codec", [c for c in CODECS if c.traits.linear], ids=lambda codec: codec.name
)
def test_message_of_the_sum_is_the_sum_of_messages(codec):
    """Reference case 29; messages of linear codecs are decoded once. Fixed point rounds."""
    assert codec.traits.summable
    rows = jax.random.normal(jax.random.key(3), (CLIENTS, 100))
    shared = jax.random.key(4)
    own = Keys(jnp.broadcast_to(shared, (CLIENTS,)), jax.random.split(shared, CLIENTS))
    messages = jax.vmap(lambda k, v: encode(codec, k, v))(own, rows)
    total = jax.tree.map(lambda x: x.sum(0), messages)
    if "fixed_point" not in codec.name:
        expected = encode(codec, one(own, 0), rows.sum(0))
        chex.assert_trees_all_close(total, expected, atol=1e-5)
    chex.assert_trees_all_close(
        undo(codec, Keys(shared, shared), total),
        jax.vmap(lambda k, m: undo(codec, k, m))(own, messages).sum(0),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "codec", [c for c in CODECS if c.traits.unbiased], ids=lambda codec: codec.name
)
def test_unbiased_codecs_are_right_on_average(codec):
    """Each of eight coordinates, of two values, within 6 standard errors of 4,000 messages.

    False alarms at 1e-7 a codec, were the means Gaussian. A linear codec draws from the shared key.
    """
    for value in (jnp.array([3.0, -1, 0.5, 0, 2, -2.5, 0.25, 1]), jnp.eye(8)[2]):
        draws = jax.random.split(jax.random.key(5), 4_000)
        each = jax.vmap(lambda k, v=value: undo(codec, Keys(k, k), encode(codec, Keys(k, k), v)))
        decoded = np.asarray(jax.jit(each)(draws), np.float64)
        limit = 6 * decoded.std(0) / np.sqrt(len(draws)) + 1e-5
        assert np.all(np.abs(decoded.mean(0) - value) <= limit)


@pytest.mark.parametrize(
    "codec", [c for c in CODECS if c.traits.contractive], ids=lambda codec: codec.name
)
def test_contractive_codecs_lose_less_than_there_is(codec):
    """On average over the draws, of values of very different shapes."""
    rows = [jnp.arange(8.0), -jnp.ones(8), jnp.eye(8)[3], 10.0 ** -jnp.arange(8), jnp.eye(8)[0] - 1]
    for value in rows:
        draws = jax.random.split(jax.random.key(6), 200)
        each = jax.vmap(lambda k, v=value: undo(codec, Keys(k, k), encode(codec, Keys(k, k), v)))
        lost = jnp.sum((jax.jit(each)(draws) - value[None]) ** 2, axis=1).mean()
        assert lost < 0.999 * jnp.sum(value**2)


@pytest.mark.parametrize(
    "codec", [c for c in CODECS if not c.traits.needs_seed], ids=lambda codec: codec.name
)
def test_receiver_needs_no_key_of_the_sender(codec):
    own, message = one(keys(), 0), jitted_encode(codec)(jnp.arange(8.0))
    other = own._replace(client=jax.random.key(99))
    assert as_bytes(undo(codec, other, message)) == as_bytes(undo(codec, own, message))


def test_report_bits_are_sums_of_message_bits():
    codec = uniform_quantize(8, min_size=0)
    messages = jax.vmap(lambda k: encode(codec, k, jnp.arange(100.0)))(keys())
    assert int(jax.vmap(codec.bits)(messages).sum()) == CLIENTS * (800 + 64)
    assert isinstance(codec.bits(one(messages, 0)), BitCount)
