"""Rounds whose messages travel as bytes give what those in memory give, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.compression import (
    PRESETS,
    bfloat16,
    chain,
    error_feedback,
    float8,
    hadamard_rotation,
    lossless,
    preset,
    qsgd,
    step_quantize,
    top_k,
    uniform_quantize,
    zero_runs,
)

CODECS = {name: preset(name) for name in PRESETS}
MORE = {
    codec.name: codec
    for codec in (
        lossless(),
        bfloat16(min_size=0),
        float8(min_size=0),
        uniform_quantize(6, min_size=0, rounding="dither"),
        chain(hadamard_rotation(min_size=0), qsgd(7, min_size=0)),
        chain(step_quantize(0.5, rounding="stochastic", min_size=0), zero_runs()),
        error_feedback(top_k(0.1, min_size=0)),
    )
}


def cohorts(num_rounds: int) -> tuple[fc.datasets.FederatedDataset, list]:
    rng = np.random.default_rng(0)
    sizes = (5, 3, 1, 4, 6, 2)
    data = fc.datasets.from_clients(
        {
            str(i): {
                "image": rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, n).astype(np.int32),
            }
            for i, n in enumerate(sizes)
        }
    )
    ids = [[str((i + r) % 6) for i in range(4)] for r in range(num_rounds)]
    return data, [data.cohort(members) for members in ids]


def trained(codec, *, secure=False, broadcast=None, model=None, rounds=3, **execution):
    data, given = cohorts(rounds)
    algorithm = fc.algorithms.fed_avg(
        fc.models.linear() if model is None else model,
        client_optimizer=optax.sgd(0.1),
        batch_size=2,
        aggregator=fc.aggregators.mean(codec=codec, secure=secure),
        broadcast_codec=broadcast,
        execution=fc.Execution(**execution),
    )
    state, metrics = algorithm.init(jax.random.key(0), data.num_clients), []
    for cohort in given:
        state, measured = algorithm.update(state, cohort)
        metrics.append(measured)
    return state, metrics


def plain_array(x):
    """`x`, or the data of a key."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def check_same(wired, plain) -> None:
    """States to the bit; and the ledger, but for the framing."""
    (state, metrics), (expected, measured) = wired, plain
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        a, b = map(plain_array, (a, b))
        np.testing.assert_array_equal(a, b)
    for a, b in zip(metrics, measured, strict=True):
        for direction in ("aggregate", "broadcast"):
            ours, theirs = (getattr(x.communication, direction) for x in (a, b))
            assert ours.keys() - {"framing"} == theirs.keys()
            assert all(int(ours[name]) == int(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in CODECS if name in ("entropy", "secure")),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in CODECS
            if name not in ("entropy", "secure")
        ),
    ],
)
def test_presets_through_bytes(name):
    """Reference case 13."""
    is_secure = name == "secure"
    plain = trained(CODECS[name], secure=is_secure)
    check_same(trained(CODECS[name], secure=is_secure, wire=True), plain)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 3, "stacked", "dispatched", "unrolled"])
@pytest.mark.parametrize("name", [*CODECS, *MORE])
def test_all_ways_to_run_through_bytes(name, lanes):
    how = {"mode": lanes} if isinstance(lanes, str) else {"lanes": lanes}
    codec = {**CODECS, **MORE}[name]
    check_same(trained(codec, wire=True, **how), trained(codec, **how))


def test_both_ways_through_bytes():
    """The model comes down as bytes too, once for all."""
    codec, down = (
        uniform_quantize(8, min_size=0),
        uniform_quantize(12, min_size=0, stochastic=False),
    )
    wired, plain = (trained(codec, broadcast=down, wire=wire) for wire in (True, False))
    check_same(wired, plain)
    framing = wired[1][0].communication
    assert int(framing.broadcast["framing"]) % 4 == 0 < int(framing.broadcast["framing"])


def test_framing_is_a_row_for_each_message_that_arrives():
    from fedjax_core.compression import Keys, frame_bits

    codec = uniform_quantize(8, min_size=0)
    state, metrics = trained(codec, wire=True)
    keys = Keys(jax.random.key(0), jax.random.key(1))
    message = jax.eval_shape(lambda v: codec.encode(keys, (), (), v)[1], state.params)
    each = frame_bits(codec, message)
    assert [int(m.communication.aggregate["framing"]) for m in metrics] == [4 * each] * 3


def test_devices_of_a_mesh_through_bytes():
    mesh = jax.make_mesh((4,), ("clients",))
    wired, plain = (trained(preset("entropy"), wire=wire, mesh=mesh) for wire in (True, False))
    check_same(wired, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_cnn_through_bytes(name):
    wired, plain = (
        trained(CODECS[name], secure=name == "secure", model=fc.models.emnist_cnn(), wire=wire)
        for wire in (True, False)
    )
    check_same(wired, plain)


@pytest.mark.slow
def test_raw_rounds_have_no_frames():
    wired, plain = (trained(None, wire=wire) for wire in (True, False))
    check_same(wired, plain)
    assert "framing" not in wired[1][0].communication.aggregate
