"""EF21 against the recursion of the paper, and gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.compression import (
    Keys,
    ef21,
    error_feedback,
    flagship,
    identity,
    qsgd,
    scaled_sign,
    top_k,
)
from fedjax_core.errors import CodecError

KEY = jax.random.key(0)


def quadratics(num_clients: int, size: int):
    """Clients with f_i(x) = |A_i x - b_i|^2 / 2."""
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(num_clients, 12, size)) / np.sqrt(12)
    return matrices, rng.normal(size=(num_clients, 12))


def gradient(matrix, target, x):
    return matrix.T @ (matrix @ x - target)


class Senders:
    """Senders of one codec, their memory, and the receiver."""

    def __init__(self, codec, num_senders: int, size: int) -> None:
        self._codec = codec
        self.server, memory = codec.init(jax.ShapeDtypeStruct((size,), jnp.float32))
        self.memory = [memory] * num_senders
        self._encode = jax.jit(lambda keys, m, x: self._send(keys, m, x))
        self._finish = jax.jit(codec.finish)
        self.round = 0

    def _send(self, keys, memory, x):
        memory, message = self._codec.encode(keys, memory, (), x)
        decoded = self._codec.decode(keys, (), message)
        return memory, (decoded, self._codec.bits(message), message.stats)

    def mean(self, values: dict[int, np.ndarray]) -> np.ndarray:
        """The mean of what those senders are believed to have."""
        parts = []
        for index, x in values.items():
            key = jax.random.fold_in(jax.random.fold_in(KEY, self.round), index)
            keys = Keys(KEY, key)
            self.memory[index], sent = self._encode(keys, self.memory[index], jnp.float32(x))
            parts.append(sent)
        self.round += 1
        total, bits, stats = jax.tree.map(lambda *x: sum(x), *[(t, (), s) for t, _, s in parts])
        del bits
        report = fc.compression.Report(jnp.int32(len(parts)), parts[0][1], stats)
        self.server, value = self._finish(KEY, self.server, total, report)
        return np.asarray(value, float) / len(parts)


def test_with_the_identity_it_is_gradient_descent():
    """Reference case 33."""
    matrices, targets = quadratics(5, 6)
    senders, x, y = Senders(ef21(identity()), 5, 6), np.zeros(6), np.zeros(6)
    for _ in range(20):
        gradients = {i: gradient(matrices[i], targets[i], x) for i in range(5)}
        x = x - 0.2 * senders.mean(gradients)
        y = y - 0.2 * np.mean([gradient(matrices[i], targets[i], y) for i in range(5)], axis=0)
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
    "codec",
    [top_k(0.34, min_size=0), pytest.param(scaled_sign(min_size=0), marks=pytest.mark.slow)],
    ids=lambda c: c.name,
)
def test_it_converges_where_the_bare_codec_does_not(codec):
    """Heterogeneous quadratics: the messages of what no longer changes vanish."""
    matrices, targets = quadratics(5, 6)
    best = np.linalg.lstsq(matrices.reshape(-1, 6), targets.ravel(), rcond=None)[0]
    distances = []
    for wrap in (ef21, lambda codec: codec):
        senders, x = Senders(wrap(codec), 5, 6), np.zeros(6)
        for _ in range(400):
            x = x - 0.1 * senders.mean({i: gradient(matrices[i], targets[i], x) for i in range(5)})
        distances.append(np.linalg.norm(x - best))
    assert distances[0] < 1e-4
    assert distances[1] > 100 * distances[0]


def test_absent_senders_count_with_what_is_known_of_them():
    """The receiver's sum is that of all beliefs, and a mean is over all that were ever heard."""
    rng = np.random.default_rng(0)
    codec, known = ef21(top_k(0.5, min_size=0)), {}
    senders = Senders(codec, 4, 8)
    for present in ([0, 1], [1, 2], [0], [2, 0, 1], [3]):
        mean = senders.mean({i: rng.normal(size=8) for i in present})
        known.update({i: np.asarray(senders.memory[i][0], float) for i in present})
        np.testing.assert_allclose(mean, sum(known.values()) / len(known), atol=1e-5)
    assert int(senders.server[1]) == 4


def test_in_rounds_absent_clients_keep_their_memory():
    rng = np.random.default_rng(0)
    data = fc.datasets.from_clients(
        {
            str(i): {
                "image": rng.integers(0, 256, (3, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, 3).astype(np.int32),
            }
            for i in range(4)
        }
    )
    algorithm = fc.algorithms.fed_avg(
        fc.models.linear(),
        client_optimizer=optax.sgd(0.1),
        batch_size=3,
        aggregator=fc.aggregators.unweighted_mean(codec=ef21(top_k(0.1, min_size=0))),
    )
    state = algorithm.init(KEY, 4)
    for present in (["0", "1"], ["1", "2"], ["3", "0"]):
        before = state.clients.aggregator
        state, metrics = algorithm.update(state, data.cohort(present))
        absent = np.array([i for i in range(4) if str(i) not in present])
        for old, new in zip(*map(jax.tree.leaves, (before, state.clients.aggregator)), strict=True):
            np.testing.assert_array_equal(new[absent], old[absent])
        believed = jax.tree.map(lambda x: jnp.sum(x, axis=0), state.clients.aggregator[0])
        for a, b in zip(*map(jax.tree.leaves, (believed, state.aggregator[0])), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert int(state.aggregator[1]) == 4
    assert int(metrics.communication.aggregate["update"]) < 2 * 7850 * 8


def test_what_is_not_finite_shows_once():
    senders = Senders(ef21(identity()), 1, 3)
    assert np.isnan(senders.mean({0: np.array([1, np.inf, 2])})).tolist() == [False, True, False]
    np.testing.assert_allclose(senders.mean({0: np.array([1, 5, 2])}), [1, 5, 2])


def test_other_dtypes_pass():
    codec = ef21(top_k(0.5, min_size=0))
    value = {"w": jnp.array([3.0, 2.0], jnp.bfloat16), "n": jnp.arange(3)}
    server, memory = codec.init(jax.eval_shape(lambda: value))
    memory, message = codec.encode(Keys(KEY, KEY), memory, (), value)
    report = fc.compression.Report(jnp.int32(1), codec.bits(message), message.stats)
    decoded = codec.decode(Keys(KEY, KEY), (), message)
    _, received = codec.finish(KEY, server, decoded, report)
    assert received["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(received["n"], value["n"])


@pytest.mark.parametrize("codec", [qsgd(1), flagship()], ids=lambda c: c.name)
def test_codecs_that_do_not_contract_are_refused(codec):
    with pytest.raises(CodecError, match="expected a contractive codec under ef21"):
        ef21(codec)


def test_codecs_with_memory_are_refused():
    codec = error_feedback(top_k(0.1, min_size=0))
    with pytest.raises(CodecError, match="without state or memory under ef21"):
        ef21(codec).init(jax.ShapeDtypeStruct((64,), jnp.float32))
