"""Chains: what each stage sees, where it is undone, and what a chain refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.bits import BitCount
from fedjax_core.compression import (
    Codec,
    Keys,
    Message,
    Report,
    chain,
    from_bytes,
    identity,
    to_bytes,
    top_k,
    uniform_quantize,
)
from fedjax_core.compression.base import keep_total
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))
CNN = [(5, 5, 1, 32), (32,), (5, 5, 32, 64), (64,), (3136, 512), (512,), (512, 10), (10,)]


def scaled(factor: float, **changes) -> Codec:
    """A linear codec that sends the value times a factor, and divides the sum by it.

    It counts its finishes in its state, if it has one, and sends how many values it saw.
    """

    def finish(shared_key, server, total, report):
        del shared_key
        server = jax.tree.map(lambda count: count + report.stats, server)
        return server, jax.tree.map(lambda x: x / factor, total)

    def encode(keys, memory, hints, value):
        del keys, hints
        sent = jax.tree.map(lambda x: x * factor, value)
        return jax.tree.map(lambda seen: seen + 1, memory), Message(sent, (), jnp.int32(1))

    codec = identity()._replace(name=f"scaled({factor})", encode=encode, finish=finish)
    return codec._replace(**changes)


def stateful(template):
    del template
    return jnp.int32(0), jnp.int32(0)


def communicate(codec, rows):
    """The whole way: the state, the memories, and the value that the receiver has of the sum."""
    server, memory = codec.init(jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))
    hints = codec.hints(server)
    count = rows.shape[0]
    memories = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), memory)
    keys = Keys(jnp.broadcast_to(KEYS.shared, (count,)), jax.random.split(KEYS.client, count))
    in_axes = (0, 0, None, 0)
    memories, messages = jax.vmap(codec.encode, in_axes)(keys, memories, hints, rows)
    decoded = jax.vmap(codec.decode, (0, None, 0))(keys, hints, messages)
    total, stats = jax.tree.map(lambda x: x.sum(0), (decoded, messages.stats))
    report = Report(jnp.int32(count), jax.vmap(codec.bits)(messages).sum(), stats)
    server, value = codec.finish(KEYS.shared, server, total, report)
    return server, memories, value


def test_bits_of_the_cnn():
    """By hand.

    Of the 51,200 elements of conv2 and the 1,605,632 of dense1 each takes 8 bits and each range 64;
    each of the other 6,538 elements takes 32.
    """
    codec = chain(identity(), uniform_quantize(8))
    template = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in CNN]
    message = jax.eval_shape(lambda v: codec.encode(KEYS, (), (), v)[1], template)
    symbols = 8 * (51_200 + 1_605_632)
    assert int(codec.bits(message)) == symbols + 2 * 64 + 32 * 6_538 == 13_464_000


def test_bits_of_a_sparse_cnn():
    """Where every tenth element is sent, each position is a gap of 9 in Golomb-Rice code.

    With the parameter 3 that is 5 bits; a mask would take 10 for each of them. Dense1 has 160,563
    such elements and keeps 160,564: its first one too, with a gap of 0 in 4 bits.
    """
    codec = chain(top_k(0.1), uniform_quantize(8))
    value = [jnp.zeros(shape).ravel().at[9::10].set(1.0).reshape(shape) for shape in CNN]
    message = jax.jit(lambda v: codec.encode(KEYS, (), (), v)[1])(value)
    gaps = [5 + 5 * 5_120, 5 + 4 + 5 * 160_563]
    positions = sum(8 + 8 * -(-bits // 8) for bits in gaps)
    symbols = 8 * (5_120 + 160_564)
    assert int(jax.jit(codec.bits)(message)) == positions + symbols + 2 * 64 + 32 * 6_538


@pytest.mark.slow
def test_sizes_are_judged_on_the_original_tensor():
    """3 survivors of 300 elements are quantised above 100, though they are but 3."""
    codec = chain(top_k(0.01, min_size=100), uniform_quantize(4, min_size=100))
    value = {"large": jnp.arange(300.0), "small": jnp.arange(100.0)}
    _, message = codec.encode(KEYS, (), (), value)
    # The gaps 297, 0 and 0 in 19 bits of Elias gamma and a tag, 3 symbols of 4 bits, a range, and
    # the small tensor raw.
    assert int(codec.bits(message)) == 8 + 24 + 16 + 64 + 3200
    decoded = codec.decode(KEYS, (), message)
    np.testing.assert_array_equal(decoded["small"], value["small"])
    assert np.flatnonzero(decoded["large"]).tolist() == [297, 298, 299]


def test_stages_get_keys_folded_with_their_position():
    quantise = uniform_quantize(2, min_size=0)
    value = jax.random.normal(jax.random.key(4), (32,))
    _, message = chain(identity(), quantise).encode(KEYS, (), (), value)
    own = Keys(*(jax.random.fold_in(key, 1) for key in KEYS))
    _, alone = quantise.encode(own, (), (), value)
    np.testing.assert_array_equal(message.payload.codes, alone.payload.codes)


def test_bytes_are_the_sides_in_order_then_the_payload():
    first, second = top_k(0.4, min_size=0), uniform_quantize(8, min_size=0)
    codec = chain(first, second)
    _, message = codec.encode(KEYS, (), (), jnp.array([3.0, 0.0, -5.0, 1.0, 0.5]))
    written = to_bytes(codec, message)
    mask = b"\x01\x05"  # its tag, positions 0 and 2
    bounds = np.float32([-5.0, 3.0]).tobytes()
    assert written == mask + bounds + b"\xff\x00"
    np.testing.assert_array_equal(
        from_bytes(codec, written, message).payload.values.codes, [255, 0]
    )


def test_cut_bytes_name_the_stage_and_what_it_expected():
    codec = chain(top_k(0.4, min_size=0), uniform_quantize(8, min_size=0))
    _, message = codec.encode(KEYS, (), (), jnp.arange(5.0))
    written = to_bytes(codec, message)
    place = r"stage 1, uniform_quantize\(bits=8\), at byte 2 of 11: expected 2 bytes, got 1"
    with pytest.raises(CodecError, match=place):
        from_bytes(codec, written[:-1], message)


def test_leading_linear_stages_are_undone_once_after_the_sum():
    finishes = []
    linear = scaled(4.0)

    def finish(*arguments):
        finishes.append(arguments)
        return linear.finish(*arguments)

    rows = jnp.arange(12.0).reshape(3, 4)
    codec = chain(linear._replace(finish=finish), scaled(0.5), uniform_quantize(8, min_size=0))
    assert not codec.traits.linear
    _, _, value = communicate(codec, rows)
    assert len(finishes) == 1
    step = 4.0 * 0.5 * 3 / 255
    assert float(jnp.abs(value - rows.sum(0)).max()) < 3 * step


def test_chain_of_linear_stages_is_linear():
    codec = chain(scaled(4.0), identity(), scaled(0.5))
    assert codec.traits == identity().traits
    rows = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(communicate(codec, rows)[2], rows.sum(0))


def test_linear_stage_behind_another_kind_is_undone_for_each_message():
    codec = chain(top_k(0.5, min_size=0), scaled(4.0))
    rows = jnp.array([[1.0, 0.0, 8.0, -7.0], [5.0, 6.0, 0.0, 1.0]])
    _, _, value = communicate(codec, rows)
    assert value.tolist() == [5.0, 6.0, 8.0, -7.0]
    assert codec.finish is keep_total


def test_state_memory_and_stats_belong_to_their_stage():
    codec = chain(scaled(2.0, init=stateful), identity(), top_k(1.0, min_size=0))
    server, memories, value = communicate(codec, jnp.ones((3, 4)))
    assert server[0] == 3
    assert server[1:] == ((), ())
    assert memories[0].tolist() == [1, 1, 1]
    assert value.tolist() == [3.0] * 4


def test_bits_count_statistics():
    codec = chain(scaled(2.0), scaled(2.0))
    _, message = codec.encode(KEYS, (), (), jnp.ones(3))
    assert int(codec.bits(message)) == 3 * 32 + 2 * 32 == 8 * len(to_bytes(codec, message))


def test_traits_of_a_chain():
    traits = chain(top_k(0.1), uniform_quantize(8)).traits
    assert traits == uniform_quantize(8).traits._replace(unbiased=False)
    assert chain(identity(), uniform_quantize(8)).traits == uniform_quantize(8).traits
    needing = identity()._replace(traits=identity().traits._replace(needs_seed=True))
    assert chain(identity(), needing).traits.needs_seed


def test_chain_of_nothing_and_of_one():
    assert chain().name == "identity()"
    codec = top_k(0.1)
    assert chain(codec) is codec


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [(uniform_quantize, "call it"), ([identity()], "not a list"), (None, "pass one such as")],
)
def test_what_is_no_codec_is_refused(argument, remedy):
    with pytest.raises(CodecError, match=rf"argument 1 of chain.*{remedy}"):
        chain(identity(), argument)


def test_finish_that_could_not_run_is_refused():
    late = uniform_quantize(8)._replace(name="late", finish=scaled(1.0).finish)
    assert chain(identity(), late).finish is not keep_total
    with pytest.raises(CodecError, match=r"stage 1, late, .* behind top_k\(0.1\)"):
        chain(top_k(0.1), late)


def test_linear_stage_with_state_behind_another_kind_is_refused():
    codec = chain(top_k(0.1), scaled(2.0, init=stateful))
    with pytest.raises(CodecError, match=r"stage 1, scaled\(2.0\), to have no server state"):
        codec.init(jax.ShapeDtypeStruct((3,), jnp.float32))


def test_linear_stage_with_side_information_is_refused():
    def encode(keys, memory, hints, value):
        del keys, hints
        return memory, Message(value, side=jnp.max(value))

    codec = chain(identity()._replace(name="ranged", encode=encode), top_k(0.1))
    with pytest.raises(CodecError, match="stage 0, ranged, to send no side information"):
        codec.encode(KEYS, (), (), jnp.ones(3))


def test_bits_are_counts():
    codec = chain(top_k(0.5, min_size=0), identity())
    _, message = codec.encode(KEYS, (), (), jnp.ones(8))
    assert isinstance(codec.bits(message), BitCount)
