"""Codecs on the operators' own edges: the short forms."""

import jax
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import CodecError

VECTOR = (np.float32, [4])
CLIENTS, SERVER = fc.FederatedType(VECTOR, fc.CLIENTS), fc.FederatedType(VECTOR, fc.SERVER)


def quantize(**keywords):
    return fc.compression.uniform_quantize(2, min_size=0, stochastic=False, **keywords)


def test_sum_and_mean_of_what_the_server_decodes():
    """2 bits on [0, 3] hold integers exactly; 0.4 goes to 0, 2.6 to 3."""

    @fc.federated_computation(CLIENTS)
    def both(values):
        return fc.federated_sum(values, codec=quantize()), fc.federated_mean(
            values, codec=quantize()
        )

    total, mean = both([[0.0, 0.4, 2.6, 3.0], [3.0, 2.0, 1.0, 0.0]])
    np.testing.assert_allclose(total, [3, 2, 4, 3], rtol=1e-6)
    np.testing.assert_allclose(mean, [1.5, 1, 2, 1.5], rtol=1e-6)
    report = fc.communication(both, num_clients=2)
    assert [edge.bits_per_client for edge in report] == [8 + 64, 8 + 64]


def test_broadcast_of_what_the_clients_decode():
    @fc.federated_computation(SERVER)
    def send(value):
        return fc.federated_broadcast(value, codec=quantize())

    got = send([0.0, 0.4, 2.6, 3.0], num_clients=3)
    np.testing.assert_allclose(np.asarray(got), [0, 0, 3, 3], rtol=1e-6)
    assert fc.communication(send, num_clients=3).broadcast_bits == 3 * (8 + 64)


def test_linear_codec_is_undone_after_the_sum():
    """A linear codec's messages are summed first, and `finish` sees the sum."""
    doubled = fc.compression.identity()._replace(
        encode=lambda keys, memory, hints, value: (
            memory,
            fc.compression.Message(jax.tree.map(lambda x: 2 * x, value)),
        ),
        finish=lambda key, server, total, report: (
            server,
            jax.tree.map(lambda x: x / 2 + report.count, total),
        ),
    )

    @fc.federated_computation(CLIENTS)
    def total(values):
        return fc.federated_sum(values, codec=doubled)

    np.testing.assert_allclose(total([[1.0, 2, 3, 4], [1.0, 1, 1, 1]]), [4, 5, 6, 7])


def test_codec_that_draws_is_refused_with_the_remedy():
    stochastic = fc.compression.uniform_quantize(2, min_size=0)
    for codec in (
        stochastic,
        fc.compression.chain(fc.compression.top_k(0.5, min_size=0), stochastic),
    ):
        with pytest.raises(CodecError, match=r"draws no random numbers.*compression\.uplink"):
            fc.federated_computation(lambda v, c=codec: fc.federated_sum(v, codec=c), CLIENTS)


def test_codec_with_memory_is_refused_with_the_remedy():
    keeping = fc.compression.identity()._replace(init=lambda template: ((), template))
    with pytest.raises(CodecError, match="without state and memory"):
        fc.federated_computation(lambda v: fc.federated_sum(v, codec=keeping), CLIENTS)
