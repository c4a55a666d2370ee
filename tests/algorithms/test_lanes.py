"""Real networks: clients side by side give what they give one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.compression import Keys
from fedjax_core.learning.client_work import local_training
from fedjax_core.learning.rounds import client_key

QUANTIZE = fc.compression.uniform_quantize(8)


def image_data(num_clients: int, sizes: tuple[int, ...]) -> fc.datasets.FederatedDataset:
    rng = np.random.default_rng(0)
    return fc.datasets.from_clients(
        {
            f"writer {i}": {
                "image": rng.integers(0, 256, (sizes[i % len(sizes)], 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, sizes[i % len(sizes)]).astype(np.int32),
            }
            for i in range(num_clients)
        }
    )


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("lanes", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_cnn_rounds_agree_over_lanes(lanes: int) -> None:
    """1e-5 after one round of the FedAvg CNN without quantisation, clients of unequal sizes."""
    data = image_data(10, (3, 5, 1))
    cohort = data.cohort(data.client_ids)

    def params_after_a_round(lanes: int) -> np.ndarray:
        algorithm = fc.algorithms.fed_avg(
            fc.models.emnist_cnn(),
            client_optimizer=optax.sgd(0.1),
            batch_size=4,
            execution=fc.Execution(lanes=lanes),
        )
        return flat(algorithm.update(algorithm.init(jax.random.key(0)), cohort)[0].params)

    np.testing.assert_allclose(params_after_a_round(lanes), params_after_a_round(1), atol=1e-5)


def messages(lanes: int):
    """What each client sends after local training and quantisation."""
    model = fc.models.two_nn()
    work = local_training(model, optax.sgd(0.1), batch_size=4).work
    params = model.init(jax.random.key(0))
    data = image_data(10, (9, 4, 6))
    cohort = data.cohort(data.client_ids)

    def encode(params, examples, uid):
        key = client_key(jax.random.key(1), uid)
        update = work(key, (), (), params, (), examples)[1].update
        return QUANTIZE.encode(Keys(key, key), (), (), update)[1]

    @fc.federated_computation(
        fc.FederatedType(fc.infer_type(params), fc.SERVER),
        fc.FederatedType(fc.SequenceType(fc.to_type(dict(model.input_spec))), fc.CLIENTS),
        fc.FederatedType((np.uint32, [2]), fc.CLIENTS),
    )
    def send(params, examples, uid):
        return fc.federated_map(encode, fc.federated_broadcast(params), examples, uid)

    lowered = jax.jit(send.lower(fc.Execution(lanes=lanes)))
    result, _ = lowered(
        fc.Federated(params, fc.SERVER),
        fc.Federated(cohort.sequence(), fc.CLIENTS),
        fc.Federated(cohort.uid, fc.CLIENTS),
    )
    return result.value


@pytest.mark.slow
def test_quantised_symbols_hardly_depend_on_lanes() -> None:
    """Another order of summation may flip a rounding: at most 1e-4 of the symbols."""

    def symbols(lanes: int) -> np.ndarray:
        payload = messages(lanes).payload
        return np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(payload) if x.dtype == jnp.uint8]
        )

    expected = symbols(1)
    assert expected.size >= 10 * 784 * 200
    assert len(np.unique(expected)) > 100
    for lanes in (4, 10):
        assert np.mean(symbols(lanes) != expected) <= 1e-4
