"""Rules of composition, one test each: what does not go together is refused, with the reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import aggregators
from fedjax_core.compression import (
    Keys,
    ans,
    chain,
    common_seed,
    drive,
    eden,
    ef21,
    error_feedback,
    fixed_point,
    hadamard_rotation,
    identity,
    qsgd,
    rand_k,
    scaled_sign,
    sparse_ternary,
    step_quantize,
    threshold,
    top_k,
    uniform_quantize,
)
from fedjax_core.errors import CodecError

CONTRACTIVE = [
    identity(),
    top_k(0.2, min_size=0),
    scaled_sign(min_size=0),
    sparse_ternary(0.2, min_size=0),
    threshold(1.0, min_size=0),
    rand_k(0.5, unbiased=False, min_size=0),
    eden(1, scale="mmse", min_size=0),
    step_quantize(1.5, correction="mmse", min_size=0),
    chain(top_k(0.5, min_size=0), scaled_sign(min_size=0)),
]


@pytest.mark.parametrize(
    "codec",
    [
        qsgd(7),
        rand_k(0.1),
        drive(),
        uniform_quantize(8),
        step_quantize(1.0, correction="alignment"),
        step_quantize(3.0, correction="mmse"),
        fixed_point(8, limit=1.0),
        chain(top_k(0.1), qsgd(7)),
    ],
    ids=lambda codec: codec.name,
)
def test_error_feedback_refuses_what_does_not_contract(codec):
    """Reference case 32: errors of such codecs add up without bound."""
    with pytest.raises(CodecError, match="expected a contractive codec under error feedback"):
        error_feedback(codec)


@pytest.mark.parametrize("codec", CONTRACTIVE, ids=lambda codec: codec.name)
def test_error_feedback_telescopes(codec):
    """Reference case 32: all that was sent is the sum of all values but for the last error."""
    fed = error_feedback(codec)
    rng = np.random.default_rng(0)
    _, memory = fed.init(jax.ShapeDtypeStruct((64,), jnp.float32))
    sent, values, norms = np.zeros(64), np.zeros(64), 0.0

    @jax.jit
    def step(key, memory, x):
        keys = Keys(key, jax.random.fold_in(key, 1))
        memory, message = fed.encode(keys, memory, (), x)
        summand = fed.decode(keys, (), message)
        return memory, fed.finish(keys.shared, (), summand, None)[1]

    for number in range(50):
        x = np.float32(rng.normal(size=64) * rng.choice([0.1, 1, 10]))
        memory, received = step(jax.random.fold_in(jax.random.key(0), number), memory, x)
        sent += np.asarray(received, float)
        values += x
        norms += np.linalg.norm(x)
    assert np.linalg.norm(sent + np.asarray(memory, float) - values) < 1e-6 * norms
    if codec.name == "identity()":
        assert not np.any(memory)
    else:
        assert np.linalg.norm(memory) > 0


def test_error_feedback_refuses_memory_and_state():
    with pytest.raises(CodecError, match="without state or memory"):
        error_feedback(error_feedback(top_k(0.1, min_size=0))).init(
            jax.ShapeDtypeStruct((64,), jnp.float32)
        )


@pytest.mark.parametrize(
    ("first", "memory"),
    [
        (top_k(0.5, min_size=0), error_feedback),
        (hadamard_rotation(min_size=0), error_feedback),
        (rand_k(0.5, min_size=0), error_feedback),
        (rand_k(0.5, min_size=0), ef21),
    ],
    ids=lambda x: getattr(x, "name", None) or x.__name__,
)
def test_memory_stands_around_a_chain(first, memory):
    """Behind a stage that moves elements, memory of one would be added to another."""
    codec = chain(first, memory(scaled_sign(min_size=0)))
    with pytest.raises(CodecError, match=r"around a whole chain, got .* behind another stage"):
        codec.init(jnp.ones(8))


def test_error_feedback_leaves_integers_alone():
    codec = error_feedback(top_k(0.5, min_size=0))
    value = {"w": jnp.array([3.0, 2.0]), "n": jnp.arange(3)}
    _, memory = codec.init(jax.eval_shape(lambda: value))
    keys = Keys(jax.random.key(0), jax.random.key(1))
    for _ in range(2):
        memory, message = codec.encode(keys, memory, (), value)
        np.testing.assert_array_equal(codec.decode(keys, (), message)["n"], value["n"])
    assert memory["n"].size == 0


def test_secure_sums_refuse_what_does_not_add():
    with pytest.raises(CodecError, match="expected a codec whose messages add under a secure sum"):
        aggregators.mean(codec=chain(fixed_point(8, limit=1.0), ans()), secure=True)


@pytest.mark.parametrize("make", [aggregators.mean, aggregators.unweighted_mean])
def test_means_refuse_one_seed_for_all(make):
    """Reference case 24: the error of the mean would be that of one message."""
    with pytest.raises(CodecError, match="errors average out"):
        make(codec=common_seed(eden(1)))
    with pytest.raises(CodecError, match="errors average out"):
        make(codec=chain(hadamard_rotation(), common_seed(qsgd(7))))


@pytest.mark.parametrize(("wrap", "expected"), [(lambda c: c, 0.0571), (common_seed, 0.5708)])
def test_ten_messages_with_seeds_of_their_own_have_a_tenth_of_the_error(
    wrap, expected, many, source
):
    """Reference case 24, within 5 %."""
    x = np.asarray(source("normal", 2**17), float)
    mean = many(wrap(eden(1)), jnp.float32(x), 10).mean(0)
    assert np.sum((mean - x) ** 2) / np.sum(x**2) == pytest.approx(expected, rel=0.05)


def test_work_after_the_sum_cannot_stand_behind_what_is_undone_before_it():
    late = fixed_point(8, limit=1.0)._replace(
        traits=fixed_point(8, limit=1.0).traits._replace(linear=False)
    )
    with pytest.raises(CodecError, match="but it finishes after the sum"):
        chain(top_k(0.1), qsgd(3), late)


def test_a_state_that_follows_the_senders_cannot_stand_behind_what_is_undone_before_it():
    codec = chain(top_k(0.5, min_size=0), fixed_point(8))
    with pytest.raises(CodecError, match="to have no server state"):
        codec.init(jax.ShapeDtypeStruct((64,), jnp.float32))
