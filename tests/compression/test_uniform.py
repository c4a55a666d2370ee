"""Uniform quantisation: counts, exactness, and the moments of stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.bits import format_bits
from fedjax_core.compression import Keys, from_bytes, identity, tff_8bit, to_bytes, uniform_quantize
from fedjax_core.errors import CodecError

# The FedAvg CNN: kernels and biases, 1,663,370 parameters.
CNN = [
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in [
        (5, 5, 1, 32),
        (32,),
        (5, 5, 32, 64),
        (64,),
        (3136, 512),
        (512,),
        (512, 10),
        (10,),
    ]
]
SHARED = jax.random.key(0)


def keys(seed: int = 0) -> Keys:
    return Keys(SHARED, jax.random.key(seed))


def message_type(codec, template):
    return jax.eval_shape(lambda k, v: codec.encode(k, (), (), v)[1], keys(), template)


def round_trip(codec, value, seed: int = 0):
    _, message = codec.encode(keys(seed), (), (), value)
    return codec.decode(keys(seed), (), message)


def many(codec, value, count: int):
    """Reconstructions by `count` independent clients: ``[count, *shape]``."""

    def run(key):
        own = Keys(SHARED, key)
        return codec.decode(own, (), codec.encode(own, (), (), value)[1])

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(7), count))


def test_bits_of_the_cnn():
    """C-112, C-113 and reference cases 1 and 3.

    Raw: 32 * 1,663,370. Quantised: 8 bits for each of 51,200 + 1,605,632 elements of the two
    tensors above 20,000, 2 * 32 for the range of each, and 32 for each of the other 6,538 elements.
    """
    raw, quantised = identity(), uniform_quantize(8)
    assert int(raw.bits(message_type(raw, CNN))) == 53_227_840
    bits = quantised.bits(message_type(quantised, CNN))
    assert int(bits) == 8 * (51_200 + 1_605_632) + 2 * 64 + 32 * 6_538 == 13_464_000
    assert format_bits(bits.times(10)) == "128.40Mibit"


def test_bits_of_tff():
    """Reference case 2: 28 bits in a word of 32, and real bytes as long."""
    codec = tff_8bit()
    bits = int(codec.bits(message_type(codec, CNN)))
    words = -(-51_200 * 8 // 28) + -(-1_605_632 * 8 // 28)
    assert bits == 32 * words + 2 * 64 + 32 * 6_538 == 15_357_536
    assert 53_227_840 / bits == pytest.approx(3.46591, abs=5e-6)
    assert format_bits(10 * bits) == "146.46Mibit"


def test_bytes_of_tff():
    codec, plain = tff_8bit(), uniform_quantize(8)
    value = [jax.random.normal(jax.random.key(1), (20_001,)), jnp.arange(5.0)]
    _, message = codec.encode(keys(), (), (), value)
    written = to_bytes(codec, message)
    assert 8 * len(written) == int(codec.bits(message)) == 32 * 5_715 + 64 + 160
    # The symbols, and so the reconstruction, are those of the dense packing.
    decoded = codec.decode(keys(), (), from_bytes(codec, written, message))
    np.testing.assert_array_equal(decoded[0], round_trip(plain, value)[0])
    np.testing.assert_array_equal(decoded[1], value[1])


@pytest.mark.parametrize(("width", "bits"), [(1, 2**15), (3, 3 * 2**15), (16, 2**19)])
def test_bits_of_other_widths(width, bits):
    codec = uniform_quantize(width)
    assert int(codec.bits(message_type(codec, jax.ShapeDtypeStruct((2**15,), jnp.float32)))) == (
        bits + 64
    )


def test_threshold_is_strict():
    codec = uniform_quantize(8, min_size=100)
    template = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (100, 101)]
    assert int(codec.bits(message_type(codec, template))) == 3200 + 808 + 64


def test_integers_travel_raw_whatever_their_size():
    value = {"count": jnp.arange(64, dtype=jnp.int32), "w": jnp.arange(64.0)}
    codec = uniform_quantize(1, min_size=10)
    decoded = round_trip(codec, value)
    np.testing.assert_array_equal(decoded["count"], value["count"])
    assert set(np.asarray(decoded["w"]).tolist()) == {0.0, 63.0}


def test_one_bit_gives_the_two_ends():
    """C-105."""
    value = [jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])]
    first, second = round_trip(uniform_quantize(1, min_size=0), value)
    assert set(first.tolist()) == {0.0, 2.0}
    assert set(second.tolist()) == {1.0, 5.0}


@pytest.mark.parametrize("stochastic", [True, False])
def test_four_bits_give_sixteen_levels(stochastic):
    """C-107."""
    value = jax.random.uniform(jax.random.key(3), (10_000,), maxval=15.0)
    value = value.at[0].set(0.0).at[1].set(15.0)
    decoded = round_trip(uniform_quantize(4, min_size=0, stochastic=stochastic), value)
    assert sorted(set(decoded.tolist())) == list(range(16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("constant", [3.25, 4.0, -0.1, 0.0])
def test_constant_tensors_are_exact(constant, bits, dtype):
    """C-109 and J-09."""
    value = jnp.full((5,), constant, dtype)
    np.testing.assert_array_equal(round_trip(uniform_quantize(bits, min_size=0), value), value)


def test_subnormal_numbers_are_zeros_at_worst():
    """Devices may flush them."""
    value = jnp.array([1e-40, 2e-40, -3e-41, 0.0])
    decoded = round_trip(uniform_quantize(8, min_size=0), value)
    assert float(jnp.abs(decoded - value).max()) <= float(jnp.finfo(jnp.float32).tiny)


@pytest.mark.parametrize("seed", range(5))
def test_values_on_the_levels_are_unchanged(seed):
    """J-07, and a grid of four levels in the manner of J-11."""
    for bits, value in [
        (1, [0.0, 2.0, 2.0]),
        (2, [0.0, 1.0, 2.0, 3.0]),
        (2, [-1.0, 0.5, 2.0, 3.5]),
    ]:
        assert (
            round_trip(uniform_quantize(bits, min_size=0), jnp.array(value), seed).tolist() == value
        )


def test_exact_integers_never_move():
    """Not one in two million, where floor(t + u) in float32 would move about one in 2**17."""
    value = jnp.concatenate([jnp.full((2_000_000,), 254.0), jnp.arange(256.0)])
    decoded = round_trip(uniform_quantize(8), value)
    np.testing.assert_array_equal(decoded, value)


def test_maximum_is_never_rounded_down():
    """Where the division by the step misses the last level by an ulp."""
    highs = np.random.default_rng(0).uniform(0.1, 10, 20_000).astype(np.float32)
    codec = uniform_quantize(16, min_size=0)

    def ends(high):
        value = jnp.stack([-high / 3, high])
        own = keys()
        return codec.decode(own, (), codec.encode(own, (), (), value)[1]) - value

    np.testing.assert_array_equal(jax.jit(jax.vmap(ends))(highs), np.zeros((20_000, 2)))


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_widest_range_does_not_overflow(bits, dtype):
    limit = jnp.finfo(dtype).max
    value = jnp.array([-limit, limit, 0, limit], dtype)
    decoded = round_trip(uniform_quantize(bits, min_size=0), value)
    assert jnp.all(jnp.isfinite(decoded))
    np.testing.assert_array_equal(decoded[jnp.array([0, 1, 3])], value[jnp.array([0, 1, 3])])


def test_suresh_binary_error():
    """Reference case 15: sum (M - x)(x - m) of (0, 1, 2, 3) is 0 + 2 + 2 + 0 = 4.

    The squared error of each inner value is 4 or 1 with probabilities 1/3 and 2/3, so its variance
    is 2, and that of the sum 4. Five standard errors over 20,000 clients: false alarms at 6e-7.
    """
    value = jnp.arange(4.0)
    decoded = many(uniform_quantize(1, min_size=0), value, 20_000)
    error = jnp.sum((decoded - value[None]) ** 2, axis=1)
    assert abs(float(error.mean()) - 4) < 5 * 2 / np.sqrt(20_000)


@pytest.mark.parametrize("remainder", [0.25, 0.5, 0.9])
def test_stochastic_rounding_has_the_moments_of_its_remainder(remainder):
    """Reference case 16: mean x, variance f (1 - f) of a step.

    Five standard errors of the mean, and of the variance estimate of a two-valued variable, over
    200,000 elements: false alarms at 1.2e-6.
    """
    count, variance = 200_000, remainder * (1 - remainder)
    value = jnp.full((count,), 3 + remainder).at[0].set(0.0).at[1].set(255.0)
    decoded = np.asarray(round_trip(uniform_quantize(8), value)[2:], np.float64)
    assert set(decoded) == {3.0, 4.0}
    assert abs(decoded.mean() - 3 - remainder) < 5 * np.sqrt(variance / count)
    spread = np.sqrt(variance * (1 - 4 * variance) / count) + 25 * variance / count
    assert abs(decoded.var() - variance) < 5 * spread


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_mean_over_clients_is_unbiased(bits):
    """64 coordinates, each within 5.5 standard errors of 4,000 clients: false alarms at 2.5e-6."""
    value = jax.random.normal(jax.random.key(5), (64,))
    codec = uniform_quantize(bits, min_size=0)
    assert codec.traits.unbiased
    step = (value.max() - value.min()) / (2**bits - 1)
    remainder = np.asarray((value - value.min()) / step % 1)
    error = np.asarray(many(codec, value, 4_000).mean(0) - value)
    standard_error = np.asarray(step) * np.sqrt(remainder * (1 - remainder) / 4_000)
    assert np.all(np.abs(error) < 5.5 * standard_error + 1e-6)


def test_rounding_to_nearest_takes_halves_to_even():
    codec = uniform_quantize(8, min_size=0, stochastic=False)
    assert not codec.traits.unbiased
    value = jnp.array([0.0, 0.5, 1.5, 2.5, 2.51, 255.0])
    assert round_trip(codec, value).tolist() == [0.0, 0.0, 2.0, 2.0, 3.0, 255.0]


def test_rounding_to_nearest_misses_by_half_a_step():
    value = jax.random.normal(jax.random.key(4), (1_000,))
    decoded = round_trip(uniform_quantize(6, min_size=0, stochastic=False), value)
    half_step = float(value.max() - value.min()) / 63 / 2
    assert float(jnp.abs(decoded - value).max()) <= half_step * 1.0001


@pytest.mark.parametrize("kind", ["constant", "zero", "laplace"])
@pytest.mark.parametrize("bits", [3, 8])
def test_error_of_dither_is_uniform_whatever_the_value(kind, bits):
    """Reference case 17: variance step^2 / 12, and the whole distribution.

    Five standard errors of the variance; a Kolmogorov-Smirnov distance that uniform errors exceed
    with probability 1e-6.
    """
    count, levels = 100_000, 2**bits - 1
    rng = np.random.default_rng(bits)
    laplace = np.clip(rng.laplace(levels / 2, 1, count), 0, levels)
    rows = {"constant": np.full(count, 2.3), "zero": np.zeros(count), "laplace": laplace}
    # The ends of the grid are part of the value, so that a step is 1.
    value = jnp.asarray(np.concatenate([[0.0, levels], rows[kind]]), jnp.float32)
    codec = uniform_quantize(bits, min_size=0, rounding="dither")
    assert codec.traits.unbiased
    assert codec.traits.needs_seed
    error = np.sort(np.asarray(round_trip(codec, value) - value, np.float64))
    assert abs(error.var() - 1 / 12) < 5 * np.sqrt((1 / 80 - 1 / 144) / count)
    ranks = np.arange(len(error)) / len(error)
    assert np.abs(error + 0.5 - ranks).max() < 2.7 / np.sqrt(count)


def test_dither_of_another_sender_gives_another_value():
    codec, value = uniform_quantize(2, min_size=0, rounding="dither"), jnp.arange(64.0)
    _, message = codec.encode(keys(1), (), (), value)
    right, wrong = (codec.decode(keys(seed), (), message) for seed in (1, 2))
    assert float(jnp.abs(right - value).max()) <= 63 / 3 / 2 * 1.0001
    assert float(jnp.abs(wrong - value).max()) > 63 / 3 / 2


def test_common_range_holds_all_large_tensors():
    codec = uniform_quantize(2, min_size=2, range="common")
    value = [jnp.array([0.0, 0.9, 1.1]), jnp.array([3.0, 2.0, 0.1]), jnp.array([50.0, 7.0])]
    _, message = codec.encode(keys(), (), (), value)
    # One range, two tensors of three symbols, one raw tensor.
    assert int(codec.bits(message)) == 64 + 8 + 8 + 64 == 8 * len(to_bytes(codec, message))
    read = from_bytes(codec, to_bytes(codec, message), message)
    decoded = codec.decode(keys(), (), read)
    assert set(decoded[0].tolist()) <= {0.0, 1.0, 2.0}
    assert decoded[1].tolist()[:2] == [3.0, 2.0]
    np.testing.assert_array_equal(decoded[2], value[2])


def test_common_range_of_nothing_takes_no_bits():
    codec = uniform_quantize(8, range="common")
    value = [jnp.arange(3.0)]
    assert int(codec.bits(message_type(codec, value))) == 96
    np.testing.assert_array_equal(round_trip(codec, value)[0], value[0])


def test_common_range_spreads_what_is_not_finite():
    codec = uniform_quantize(8, min_size=0, range="common")
    decoded = round_trip(codec, [jnp.arange(3.0), jnp.array([1.0, jnp.nan])])
    assert not any(jnp.any(jnp.isfinite(x)) for x in decoded)


def test_rounding_to_nearest_has_two_spellings():
    first = uniform_quantize(4, stochastic=False)
    assert first.name == uniform_quantize(4, rounding="nearest").name
    assert not first.traits.unbiased


@pytest.mark.parametrize(
    "wrong", [{"rounding": "up"}, {"range": "global"}, {"rounding": "dither", "stochastic": False}]
)
def test_rounding_and_range_that_are_none_are_refused(wrong):
    with pytest.raises(CodecError, match="expected"):
        uniform_quantize(8, **wrong)


def test_randomness_depends_on_client_and_leaf_alone():
    codec = uniform_quantize(1, min_size=0)
    row = jnp.arange(64.0)
    first, second = round_trip(codec, [row, row])
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, round_trip(codec, [row, row[:3]])[0])
    np.testing.assert_array_equal(first, round_trip(codec, [row, row])[0])
    assert not np.array_equal(first, round_trip(codec, [row, row], seed=1)[0])


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        value = jnp.array([1.0, 1e300, 0.1, 1 / 3], jnp.float64)
        codec = uniform_quantize(8, min_size=0)
        _, message = codec.encode(keys(), (), (), value)
        decoded = codec.decode(keys(), (), message)
        assert decoded.dtype == jnp.float64
        assert decoded[1] == 1e300
        assert int(codec.bits(message)) == 4 * 8 + 2 * 64


@pytest.mark.parametrize("bits", [0, 17, -1, 8.0, True, "8", None])
def test_bits_out_of_range_are_refused(bits):
    """C-109."""
    with pytest.raises(CodecError, match="expected bits to be an integer from 1 to 16"):
        uniform_quantize(bits)


@pytest.mark.parametrize("min_size", [-1, 2.5, True, None])
def test_min_size_out_of_range_is_refused(min_size):
    with pytest.raises(CodecError, match="expected min_size to be an integer of at least 0"):
        uniform_quantize(8, min_size=min_size)


@pytest.mark.parametrize("leaf", [1.5, "weights", jax.random.key(0), np.array(["a"]), object()])
@pytest.mark.parametrize("codec", [identity(), uniform_quantize(8)], ids=lambda codec: codec.name)
def test_leaf_that_is_no_array_is_named(codec, leaf):
    with pytest.raises(
        CodecError, match=r"value\['layer'\]\['bias'\]; convert it with jnp.asarray"
    ):
        codec.encode(keys(), (), (), {"layer": {"bias": leaf}})
