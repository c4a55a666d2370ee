"""Presets: their sizes on real models, counted on the device and written as bytes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.compression import (
    PRESETS,
    Keys,
    Report,
    from_bytes,
    identity,
    preset,
    tff_8bit,
    to_bytes,
    uniform_quantize,
)
from fedjax_core.errors import CodecError


class Block(nn.Module):
    """A block of a transformer."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))


class CharacterLstm(nn.Module):
    """Predicts the next of 90 characters."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.RNN(nn.LSTMCell(128))(nn.Embed(90, 8)(tokens))
        return nn.Dense(90)(x)


def cnn():
    return jax.eval_shape(lambda: fc.models.emnist_cnn().init(jax.random.key(0)))


def lstm():
    tokens = jax.ShapeDtypeStruct((1, 10), jnp.int32)
    return jax.eval_shape(CharacterLstm().init, jax.random.key(0), tokens)


def transformer_block():
    x = jax.ShapeDtypeStruct((1, 10, 64), jnp.float32)
    return jax.eval_shape(Block().init, jax.random.key(0), x)


def update(template, seed=0):
    """Like that of a network: in each tensor many zeros, and heavy tails."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        x = rng.standard_t(3, leaf.shape) * rng.lognormal() * (rng.random(leaf.shape) > 0.3)
        return np.float32(0.01 * x)

    return jax.tree.map(draw, template)


@functools.cache
def sent(name, model):
    """The codec, an update, its message and size, and the receiver's value."""
    codec, value = preset(name), update(model())
    server, memory = codec.init(value)
    keys = Keys(jax.random.key(0), jax.random.key(1))

    @jax.jit
    def run(value):
        hints = codec.hints(server)
        _, message = codec.encode(keys, memory, hints, value)
        bits = codec.bits(message)
        report = Report(jnp.int32(1), bits, message.stats)
        total = codec.decode(keys, hints, message)
        return message, bits, codec.finish(keys.shared, server, total, report)[1]

    return codec, value, *jax.device_get(run(value))


# What a message of the CNN loses at most, of the square of its norm.
LOST = {
    "tff_8bit": 0.2,
    "dense_8bit": 0.2,
    "one_bit": 0.6,
    "rotated": 0.03,
    "sparse": 0.7,
    "entropy": 2.0,
    "flagship": 2.0,
    "secure": 0.05,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow]
            if name in ("tff_8bit", "rotated", "flagship", "sparse")
            else [],
        )
        for name in PRESETS
    ],
)
@pytest.mark.parametrize(
    "model",
    [
        cnn,
        pytest.param(lstm, marks=pytest.mark.slow),
        pytest.param(transformer_block, marks=pytest.mark.slow),
    ],
)
def test_device_counts_what_the_host_writes(name, model):
    codec, value, message, bits, received = sent(name, model)
    written = to_bytes(codec, message)
    assert 8 * len(written) == int(bits)
    read = from_bytes(codec, written, like=jax.eval_shape(lambda: message))
    for a, b in zip(jax.tree.leaves(message), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(a, b)
    error = jax.tree.map(lambda x, y: np.sum((x - y) ** 2), value, received)
    lost = sum(jax.tree.leaves(error))
    assert lost <= LOST[name] * sum(np.sum(x**2) for x in jax.tree.leaves(value))


@pytest.mark.parametrize(
    ("codec", "bits", "ratio"),
    [
        (identity(), 53_227_840, 1.0),
        (tff_8bit(), 15_357_536, 3.46591),
        (uniform_quantize(8), 13_464_000, 3.95335),
        (preset("tff_8bit"), 15_357_536, 3.46591),
        (preset("dense_8bit"), 13_464_000, 3.95335),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_sizes_of_the_cnn(codec, bits, ratio):
    """Reference cases 1 to 3: for one client and, in Mibit, for ten."""
    keys = jax.eval_shape(lambda: Keys(jax.random.key(0), jax.random.key(1)))
    message = jax.eval_shape(lambda k, v: codec.encode(k, (), (), v)[1], keys, cnn())
    count = codec.bits(message)
    assert int(count) == bits
    assert 53_227_840 / bits == pytest.approx(ratio, abs=1e-5)
    shown = {53_227_840: "507.62", 15_357_536: "146.46", 13_464_000: "128.40"}[bits]
    assert fc.format_bits(count.times(10)) == f"{shown}Mibit"


def test_one_bit_is_31_times_smaller():
    assert 53_227_840 / int(sent("one_bit", cnn)[3]) >= 31


def test_names_that_are_none_are_refused():
    with pytest.raises(CodecError, match="expected one of tff_8bit, dense_8bit"):
        preset("dense")
    with pytest.raises(CodecError, match="expected one of"):
        preset(8)


def test_the_command_line_knows_them_all():
    from typing import get_args

    from fedjax_core.cli.options import Uplink

    assert set(PRESETS) <= set(get_args(Uplink))
