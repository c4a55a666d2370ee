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
    flagship,
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
    threshold,
    to_bytes,
    top_k,
    uniform_quantize,
    zero_runs,
)

SIZES = {jnp.float32: (1, 2, 3, 4095, 4096, 4097), jnp.bfloat16: (3,)}
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
    threshold(1.0, min_size=0),
    bounded_support(2, min_size=0),
    step_quantize(0.5, min_size=0),
    step_quantize(2.0, correction="alignment", min_size=2),
    chain(step_quantize(1.0, correction="centroids", dead_zone=0.1, min_size=2), ans()),
    chain(step_quantize(1.0, rounding="stochastic", min_size=2), zero_runs()),
    chain(step_quantize(1.0, rounding="dither", min_size=2), huffman()),
    sparse_ternary(0.1, min_size=0),
    flagship(0.5),
    chain(top_k(0.1, min_size=0), hadamard_rotation(min_size=2), scaled_sign(min_size=0)),
]
STATIC = [*BOUNDED, *SPARING, *OTHERS]
BOUNDED = [*BOUNDED, *BY_VALUE]
CODECS = [*BOUNDED, *SPARING, *OTHERS, *OTHERS_BY_VALUE]

# Those that share a family with another one.
RARE = {
    *(uniform_quantize(bits).name for bits in (5, 16)),
    uniform_quantize(4, range="common").name,
    chain(identity(), uniform_quantize(4)).name,
    chain(uniform_quantize(4), identity()).name,
    chain(uniform_quantize(4), uniform_quantize(8)).name,
    chain(identity(), identity()).name,
    chain(chain(top_k(0.3), identity()), uniform_quantize(7)).name,
    chain(top_k(0.1), uniform_quantize(8)).name,
    chain(uniform_quantize(6), elias_delta()).name,
    chain(uniform_quantize(6), rice(1)).name,
    chain(uniform_quantize(6), huffman()).name,
    qsgd(7).name,
    tern_grad(None).name,
    drive().name,
    rand_k(0.3, common=False, unbiased=False).name,
    step_quantize(0.5).name,
    step_quantize(2.0, correction="alignment").name,
    chain(step_quantize(1.0, rounding="stochastic"), zero_runs()).name,
    chain(top_k(0.1), hadamard_rotation(), scaled_sign()).name,
    fixed_point(8, limit=10.0).name,
    uniform_quantize(8, stochastic=False).name,
    bfloat16().name,
    eden(0.1).name,
    common_seed(eden(1)).name,
    chain(top_k(0.5), top_k(0.5), uniform_quantize(3)).name,
    chain(uniform_quantize(6), elias_gamma()).name,
    chain(uniform_quantize(6), rice()).name,
    chain(uniform_quantize(6), ans()).name,
    hadamard_rotation().name,
    tff_8bit().name,
    qsgd(300, bucket=512).name,
    uniform_quantize(1).name,
    chain(uniform_quantize(6), zero_runs()).name,
    chain(step_quantize(1.0, rounding="dither"), huffman()).name,
    flagship(0.5).name,
    chain(step_quantize(1.0, correction="centroids", dead_zone=0.1), ans()).name,
    top_k(0.004).name,
    chain(top_k(0.1), uniform_quantize(8), ans()).name,
    chain(hadamard_rotation(64), rand_k(0.5), qsgd(3)).name,
    chain(hadamard_rotation(), fixed_point(12, limit=100.0)).name,
}


def each(codecs: list) -> pytest.MarkDecorator:
    """One test for each codec; all of one run in one process, which compiles it once."""

    def marks(codec) -> list:
        group = pytest.mark.xdist_group(codec.name)
        return [group, pytest.mark.slow] if codec.name in RARE else [group]

    params = [pytest.param(codec, marks=marks(codec), id=codec.name) for codec in codecs]
    return pytest.mark.parametrize("codec", params)


each_codec = each(CODECS)


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


@functools.cache
def values() -> dict:
    """A stacked value with all sizes and dtypes, and tensors that no codec may touch."""
    floats = {
        jnp.dtype(dtype).name: [contents(size, dtype) for size in sizes]
        for dtype, sizes in SIZES.items()
    }
    integers = np.arange(CLIENTS * 5, dtype=np.int32).reshape(CLIENTS, 5)
    return {**floats, "integers": integers, "flags": integers % 2 == 0, "empty": integers[:, :0]}


@functools.cache
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


def round_trip(codec, keys: Keys, value):
    """The message, its size, and what the receiver has of it."""
    message = encode(codec, keys, value)
    return message, codec.bits(message), undo(codec, keys, message)


# To compile takes most of the time here, and what is compiled runs a few times.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Programs:
    """What is compiled for a codec: a message of many tensors, and of one small vector.

    Attributes:
      codec: the codec.
      traces: how often a small vector was traced.
    """

    def __init__(self, codec) -> None:
        self.codec = codec
        self.traces = 0
        self.undo = jit(lambda keys, message: undo(codec, keys, message))
        self.small = jit(self._small)
        self.many = jit(jax.vmap(lambda k, v: round_trip(codec, k, v)))

    def _small(self, keys: Keys, value):
        self.traces += 1
        return round_trip(self.codec, keys, value)

    @functools.cached_property
    def large(self):
        """The stacked messages of `values()`, and their sizes."""

        def encoded(keys: Keys, value):
            message = encode(self.codec, keys, value)
            return message, self.codec.bits(message)

        return jax.device_get(jit(jax.vmap(encoded))(keys(), values()))

    @functools.cached_property
    def reconstructed(self):
        """What the receiver has of them, stacked."""
        rows = [self.undo(one(keys(), k), one(self.large[0], k)) for k in range(CLIENTS)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(rows))

    def draw(self, value, num_draws: int, seed: int) -> np.ndarray:
        """What receivers have of so many messages about one small vector, in float64."""
        parts = []
        for draws in jax.random.split(jax.random.key(seed), num_draws).reshape(-1, BATCH):
            batch = jnp.broadcast_to(value, (BATCH, value.size))
            parts.append(np.asarray(self.many(Keys(draws, draws), batch)[2], np.float64))
        return np.concatenate(parts)


# The products in a rotation are rounded in another order beside others.
ROTATING = ("hadamard", "bounded", "eden", "drive")
# How many small vectors are encoded at once.
BATCH = 500


@functools.cache
def programs(codec) -> Programs:
    return Programs(codec)


def as_bytes(tree) -> list[tuple]:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


@each_codec
def test_bits_are_the_bytes_that_travel(codec):
    """Reference case 12."""
    messages, counted = programs(codec).large
    for client in range(CLIENTS):
        bits = 8 * len(to_bytes(codec, one(messages, client)))
        assert int(one(counted, client)) == bits or not codec.traits.exact_bits
        assert bits <= int(one(counted, client))


@each(STATIC)
def test_sizes_that_follow_from_shapes_need_no_values(codec):
    messages, counted = programs(codec).large
    types = jax.eval_shape(lambda: one(messages, 0))
    assert int(codec.bits(types)) == int(one(counted, 0))


@each_codec
def test_bytes_give_the_same_message_and_the_same_value(codec):
    for client in range(CLIENTS):
        message, own = one(programs(codec).large[0], client), one(keys(), client)
        like = jax.eval_shape(lambda message=message: message)
        read = from_bytes(codec, to_bytes(codec, message), like)
        assert jax.tree.structure(read) == jax.tree.structure(message)
        assert as_bytes(read) == as_bytes(message)
        expected = one(programs(codec).reconstructed, client)
        assert as_bytes(programs(codec).undo(own, read)) == as_bytes(expected)


@each_codec
def test_value_comes_back_in_its_structure_shapes_and_dtypes(codec):
    decoded, value = programs(codec).reconstructed, values()
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, value)
    for name in ("integers", "flags", "empty"):
        np.testing.assert_array_equal(decoded[name], value[name])


@each(BOUNDED)
def test_values_stay_inside_their_range(codec):
    before, after = (jax.tree.leaves(x) for x in (values(), programs(codec).reconstructed))
    for x, y in zip(before, after, strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
            assert np.all((y >= low[:, None]) & (y <= high[:, None]))


@each_codec
def test_finite_values_stay_finite(codec):
    """All but the extremes, of which an unbiased reconstruction may be larger than any number."""
    for after in jax.tree.leaves(programs(codec).reconstructed):
        assert np.all(np.isfinite(np.delete(after, EXTREMES, axis=0).astype(np.float64)))


@each_codec
def test_zeros_come_back_exactly(codec):
    decoded = programs(codec).reconstructed
    for after in jax.tree.leaves([decoded[jnp.dtype(dtype).name] for dtype in SIZES]):
        assert not np.any(after[0])


@each([*BOUNDED, *SPARING])
def test_one_hot_comes_back_exactly(codec):
    before, after = (jax.tree.leaves(x) for x in (values(), programs(codec).reconstructed))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(y[1], x[1])


@each_codec
def test_clients_do_not_disturb_each_other(codec):
    draws = jax.random.split(jax.random.key(2), BATCH)
    rows = jax.random.normal(jax.random.key(3), (BATCH, 8))
    stacked = programs(codec).many(Keys(draws, draws), rows)
    for row in (0, BATCH - 1):
        alone = programs(codec).small(Keys(draws[row], draws[row]), rows[row])
        beside = one(stacked[:2], row)
        if any(name in codec.name for name in ROTATING):
            chex.assert_trees_all_close(alone[:2], beside, rtol=1e-5, atol=1e-5)
        else:
            assert as_bytes(alone[:2]) == as_bytes(beside)


@each_codec
def test_second_call_does_not_trace_again(codec):
    programs(codec).small(one(keys(), 0), jnp.arange(8.0))
    traces = programs(codec).traces
    programs(codec).small(one(keys(), 1), 1 + jnp.arange(8.0))
    assert programs(codec).traces == traces


@each_codec
def test_state_and_hints_of_stateless_codecs_are_empty(codec):
    assert codec.init({"w": jax.ShapeDtypeStruct((8,), jnp.float32)}) == ((), ())
    assert codec.hints(()) == ()


@each([*STATIC[:7], top_k(0.004, min_size=0)])
def test_message_without_payload_counts_its_side_alone(codec):
    """A chain counts its earlier stages so."""
    message = one(programs(codec).large[0], 0)
    parts = [message._replace(payload=()), Message(message.payload)]
    assert sum(int(codec.bits(part)) for part in parts) == int(codec.bits(message))


# Few shapes, for each is compiled for each codec.
FLOATS = st.one_of(hnp.arrays(np.float32, 8), hnp.arrays(np.float16, 3))


@each_codec
@settings(max_examples=15, deadline=None, derandomize=True)
@given(value=FLOATS)
def test_any_tensor_survives_the_wire(codec, value):
    """NaN with any payload, infinities, subnormals and negative zeros among them."""
    message, counted, _ = programs(codec).small(one(keys(), 0), value)
    written = to_bytes(codec, message)
    assert 8 * len(written) == int(counted) or not codec.traits.exact_bits
    assert as_bytes(from_bytes(codec, written, message)) == as_bytes(message)


@each_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_never_decodes_to_a_finite_one(codec, bad):
    value = jnp.array([1.0, bad, -2.0, 5.0, 0.5, 0.0, 3.0, -7.0])
    assert not np.all(np.isfinite(programs(codec).small(one(keys(), 0), value)[2]))


@each_codec
@pytest.mark.parametrize("cut", [-1, 1])
def test_bytes_of_the_wrong_length_are_refused(codec, cut):
    message = programs(codec).small(one(keys(), 0), jnp.arange(8.0))[0]
    written = to_bytes(codec, message)
    wrong = written[:cut] if cut < 0 else written + b"\0"
    with pytest.raises(ValueError, match="expected"):
        from_bytes(codec, wrong, message)


@each([c for c in CODECS if c.traits.linear])
def test_message_of_the_sum_is_the_sum_of_messages(codec):
    """Reference case 29; messages of linear codecs are decoded once. Fixed point rounds."""
    assert codec.traits.summable
    rows = jax.random.normal(jax.random.key(3), (BATCH, 8)).at[CLIENTS:].set(0)
    shared = jax.random.key(4)
    own = Keys(jnp.broadcast_to(shared, (BATCH,)), jax.random.split(shared, BATCH))
    messages, _, decoded = programs(codec).many(own, rows)
    total = jax.tree.map(lambda x: x.sum(0), messages)
    if "fixed_point" not in codec.name:
        expected = programs(codec).small(one(own, 0), rows.sum(0))[0]
        chex.assert_trees_all_close(total, expected, atol=1e-5)
    chex.assert_trees_all_close(undo(codec, Keys(shared, shared), total), decoded.sum(0), atol=1e-5)


@each([c for c in CODECS if c.traits.unbiased])
def test_unbiased_codecs_are_right_on_average(codec):
    """Each of eight coordinates, of two values, within 6 standard errors of 4,000 messages.

    False alarms at 1e-7 a codec, were the means Gaussian. A linear codec draws from the shared key.
    """
    for value in (jnp.array([3.0, -1, 0.5, 0, 2, -2.5, 0.25, 1]), jnp.eye(8)[2]):
        decoded = programs(codec).draw(value, 4_000, seed=5)
        limit = 6 * decoded.std(0) / np.sqrt(len(decoded)) + 1e-5
        assert np.all(np.abs(decoded.mean(0) - value) <= limit)


@each([c for c in CODECS if c.traits.contractive])
def test_contractive_codecs_lose_less_than_there_is(codec):
    """On average over the draws, of values of very different shapes."""
    rows = [jnp.arange(8.0), -jnp.ones(8), jnp.eye(8)[3], 10.0 ** -jnp.arange(8), jnp.eye(8)[0] - 1]
    for value in rows:
        lost = (programs(codec).draw(value, BATCH, seed=6) - value[None]) ** 2
        assert lost.sum(1).mean() < 0.999 * jnp.sum(value**2)


@each([c for c in CODECS if not c.traits.needs_seed])
def test_receiver_needs_no_key_of_the_sender(codec):
    own = one(keys(), 0)
    message, _, decoded = programs(codec).small(own, jnp.arange(8.0))
    other = own._replace(client=jax.random.key(99))
    np.testing.assert_allclose(programs(codec).undo(other, message), decoded, rtol=1e-6)


def test_report_bits_are_sums_of_message_bits():
    codec = uniform_quantize(8, min_size=0)
    messages = jax.vmap(lambda k: encode(codec, k, jnp.arange(100.0)))(keys())
    assert int(jax.vmap(codec.bits)(messages).sum()) == CLIENTS * (800 + 64)
    assert isinstance(codec.bits(one(messages, 0)), BitCount)
