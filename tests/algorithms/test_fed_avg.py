"""Federated averaging against hand-computed trajectories and its own promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError


def linear_regression() -> fc.models.Model:
    """``x . W + b`` from zeros, loss ``0.5 mean squared error`` (the model of the golden cases)."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {"W": jnp.zeros((2, 1)), "b": jnp.zeros(())}

    def apply(variables, batch, key, train):
        return batch["x"] @ variables["W"] + variables["b"]

    def loss(predictions, batch):
        return 0.5 * (predictions - batch["y"])[:, 0] ** 2

    spec = {
        "x": jax.ShapeDtypeStruct((2,), jnp.float32),
        "y": jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    return fc.models.from_functions(init, apply, loss=loss, input_spec=spec)


def rows(num_rows: int, x: tuple[float, float], y: float) -> dict[str, np.ndarray]:
    return {
        "x": np.tile(np.float32(x), (num_rows, 1)),
        "y": np.full((num_rows, 1), y, np.float32),
    }


def regression_data(**more: dict[str, np.ndarray]) -> fc.datasets.FederatedDataset:
    return fc.datasets.from_clients({"B": rows(4, (0, 1), 2.0), **more})


def numpy_fed_avg(clients, num_rounds, *, batch_sizes, learning_rate=0.1, momentum=0.0):
    """The same algorithm in NumPy, in float64, for clients of equal examples."""
    w, b = np.zeros((2, 1)), 0.0
    trace_w, trace_b = np.zeros((2, 1)), 0.0
    for _ in range(num_rounds):
        total, mean_w, mean_b = 0, 0.0, 0.0
        for (x, y), size in zip(clients, batch_sizes, strict=True):
            cw, cb = w.copy(), b
            for begin in range(0, len(x), size):
                bx, by = x[begin : begin + size], y[begin : begin + size]
                error = bx @ cw + cb - by
                cw = cw - learning_rate * bx.T @ error / len(bx)
                cb = cb - learning_rate * error.mean()
            total += len(x)
            mean_w, mean_b = mean_w + len(x) * (w - cw), mean_b + len(x) * (b - cb)
        trace_w = momentum * trace_w + mean_w / total
        trace_b = momentum * trace_b + mean_b / total
        w, b = w - trace_w, b - trace_b
    return w[:, 0], b


def client_arrays(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return data["x"].astype(np.float64), data["y"].astype(np.float64)


# C-121 and C-123 train client A in batches of 3 and client B in batches of 2. One batch size serves
# both here: all examples of a client are equal, so what matters is only the number of steps, 4 and
# 2. With batches of 3, A (12 examples) takes 4 steps and B (4 examples) takes 2, the last one
# masked.
GOLDEN = {
    0.0: [
        (0.2214, 0.09, 0.3114),
        (0.3248381, 0.161937, 0.4867751),
        (0.3665469, 0.222745, 0.5892919),
    ],
    0.9: [
        (0.2214, 0.09, 0.3114),
        (0.5240981, 0.242937, 0.767035),
        (0.7320695, 0.4251316, 1.157201),
    ],
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_golden_trajectory(momentum: float) -> None:
    """C-121 (plain averaging) and C-123 (server momentum 0.9)."""
    data = regression_data(A=rows(12, (1, 0), 1.0))
    algorithm = fc.algorithms.fed_avg(
        linear_regression(),
        client_optimizer=optax.sgd(0.1),
        server_optimizer=optax.sgd(1.0, momentum=momentum),
        batch_size=3,
    )
    state = algorithm.init(jax.random.key(0))
    for w0, w1, b in GOLDEN[momentum]:
        state, _ = algorithm.update(state, data.cohort(["A", "B"]))
        expected = jnp.array([w0, w1, b])
        got = jnp.append(state.params["W"][:, 0], state.params["b"])
        np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_golden_case_agrees_with_numpy() -> None:
    """The rule and not the row: the same in NumPy with batches as the case has them."""
    clients = [client_arrays(rows(12, (1, 0), 1.0)), client_arrays(rows(4, (0, 1), 2.0))]
    w, b = numpy_fed_avg(clients, 3, batch_sizes=(3, 2))
    np.testing.assert_allclose([*w, b], GOLDEN[0.0][2], rtol=1e-6)
    data = fc.datasets.from_clients({"A": rows(7, (1, 2), 3.0), "B": rows(5, (-1, 1), 0.5)})
    algorithm = fc.algorithms.fed_avg(
        linear_regression(), client_optimizer=optax.sgd(0.05), batch_size=4
    )
    state = algorithm.init(jax.random.key(0))
    for _ in range(4):
        state, _ = algorithm.update(state, data.cohort(["A", "B"]))
    clients = [client_arrays(data.client("A")), client_arrays(data.client("B"))]
    w, b = numpy_fed_avg(clients, 4, batch_sizes=(4, 4), learning_rate=0.05)
    got = jnp.append(state.params["W"][:, 0], state.params["b"])
    np.testing.assert_allclose(got, [*w, b], rtol=1e-5)


@functools.cache
def default() -> fc.algorithms.Algorithm:
    return fc.algorithms.fed_avg(linear_regression(), client_optimizer=optax.sgd(0.1), batch_size=3)


def make(model: fc.models.Model | None = None, **keywords) -> fc.algorithms.Algorithm:
    if model is None and not keywords:
        return default()  # compiled once for all tests
    keywords = {"client_optimizer": optax.sgd(0.1), "batch_size": 3} | keywords
    return fc.algorithms.fed_avg(model or linear_regression(), **keywords)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def counts(metrics: fc.algorithms.Metrics) -> dict[str, int]:
    return {name: int(x) for name, x in metrics.clients.items()}


def noisy_data(num_clients: int = 10, seed: int = 0) -> fc.datasets.FederatedDataset:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 17, num_clients)
    return fc.datasets.from_clients(
        {
            f"client {i}": {
                "x": rng.normal(size=(n, 2)).astype(np.float32),
                "y": rng.normal(size=(n, 1)).astype(np.float32),
            }
            for i, n in enumerate(sizes)
        }
    )


def test_client_that_is_empty_not_finite_or_not_weighted_counts_for_nothing() -> None:
    """C-119 and its kin: the round is that of the sound clients alone."""
    bad = rows(4, (1, 1), np.nan)
    data = regression_data(A=rows(12, (1, 0), 1.0), empty=rows(0, (0, 0), 0.0), nan=bad)
    algorithm = make()
    state = algorithm.init(jax.random.key(0))
    alone, alone_metrics = algorithm.update(state, data.cohort(["A", "B"]))
    mixed, metrics = algorithm.update(state, data.cohort(["nan", "A", "empty", "B"]))
    np.testing.assert_allclose(flat(mixed.params), flat(alone.params), rtol=1e-6)
    assert counts(metrics) == {
        "num_clients": 4,
        "num_participants": 2,
        "num_empty": 1,
        "num_non_finite": 1,
        "num_not_weighted": 0,
        "update_rejected": 0,
    }
    assert int(metrics.train["num_examples"]) == 16
    np.testing.assert_allclose(metrics.train["loss"], alone_metrics.train["loss"], rtol=1e-6)
    rows_up = metrics.communication.aggregate
    assert int(rows_up["update"]) == int(alone_metrics.communication.aggregate["update"]) == 2 * 96
    # All four clients got the model, and all four said how they fared.
    assert int(metrics.communication.broadcast["params"]) == 4 * 96
    assert int(rows_up["metrics"]) == 2 * int(alone_metrics.communication.aggregate["metrics"])


@pytest.mark.parametrize(
    "weight", [-1.0, 0.0, np.nan, pytest.param(np.inf, marks=pytest.mark.slow)]
)
def test_client_with_such_a_weight_counts_for_nothing(weight: float) -> None:
    """A weighting that fails for client A leaves the round to client B."""

    def weighting(stats):
        n = stats["num_examples"].total
        return jnp.where(n == 12, weight, 1.0)

    data = regression_data(A=rows(12, (1, 0), 1.0))
    algorithm = make(weighting=weighting)
    state = algorithm.init(jax.random.key(0))
    both, metrics = algorithm.update(state, data.cohort(["A", "B"]))
    alone, _ = algorithm.update(state, data.cohort(["B"]))
    np.testing.assert_array_equal(flat(both.params), flat(alone.params))
    assert counts(metrics)["num_not_weighted"] == 1
    assert counts(metrics)["num_participants"] == 1


def test_round_without_participants_changes_only_the_round_number() -> None:
    """All clients empty: nothing to average, nothing to divide by, no state to lose."""
    data = fc.datasets.from_clients({"a": rows(0, (0, 0), 0.0), "b": rows(0, (0, 0), 0.0)})
    algorithm = make(
        server_optimizer=optax.adam(0.1), aggregator=fc.aggregators.robust_aggregator()
    )
    state = algorithm.init(jax.random.key(0))
    new, metrics = algorithm.update(state, data.cohort(["a", "b"]))
    assert int(new.round) == 1
    before, after = (s._replace(round=s.key, key=jax.random.key_data(s.key)) for s in (state, new))
    unchanged = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, after)
    assert all(jax.tree.leaves(unchanged))
    assert counts(metrics)["num_participants"] == 0
    assert int(metrics.communication.aggregate["update"]) == 0
    assert float(metrics.train["loss"]) == 0.0


def test_aggregate_that_is_not_finite_is_rejected() -> None:
    """Two finite updates whose sum overflows: the state is kept, and the metrics say so."""
    data = fc.datasets.from_clients({"a": rows(3, (1, 0), 1e18), "b": rows(3, (1, 0), 1e18)})
    algorithm = make(client_optimizer=optax.sgd(1e20), batch_size=3)
    state = algorithm.init(jax.random.key(0))
    new, metrics = algorithm.update(state, data.cohort(["a", "b"]))
    assert counts(metrics)["num_participants"] == 2
    assert counts(metrics)["update_rejected"] == 1
    np.testing.assert_array_equal(flat(new.params), flat(state.params))
    assert int(new.round) == 1


def test_padding_of_a_cohort_changes_nothing_and_costs_nothing() -> None:
    """Clients that only fill the cohort up are not there: not in the result, not in the bits."""
    data = noisy_data(4)
    algorithm = make()
    state = algorithm.init(jax.random.key(0))
    plain, metrics = algorithm.update(state, data.cohort(data.client_ids))
    padded, padded_metrics = algorithm.update(state, data.cohort(data.client_ids, num_clients=7))
    np.testing.assert_array_equal(flat(plain.params), flat(padded.params))
    assert counts(metrics) == counts(padded_metrics)
    assert int(metrics.communication.broadcast_bits) == int(
        padded_metrics.communication.broadcast_bits
    )


def test_order_of_the_cohort_matters_only_to_the_order_of_summation() -> None:
    """Keys come from ids: a permuted cohort trains each client in the same way."""
    data = noisy_data()
    algorithm = make(num_epochs=2)
    state = algorithm.init(jax.random.key(0))
    one, _ = algorithm.update(state, data.cohort(data.client_ids))
    other, _ = algorithm.update(state, data.cohort(data.client_ids[::-1]))
    np.testing.assert_allclose(flat(one.params), flat(other.params), rtol=1e-5, atol=1e-7)


def test_same_seed_gives_the_same_bits() -> None:
    """Two runs from one key agree bit for bit, and another key gives something else."""
    data = noisy_data()

    def run(seed: int) -> np.ndarray:
        algorithm = make(
            aggregator=fc.aggregators.mean(fc.compression.uniform_quantize(4, min_size=0))
        )
        state = algorithm.init(jax.random.key(seed))
        for _ in range(3):
            state, _ = algorithm.update(state, data.cohort(data.client_ids))
        return flat(state.params)

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


@pytest.mark.parametrize(
    "execution",
    [
        fc.Execution(mode="reference"),
        fc.Execution(mode="stacked"),
        fc.Execution(lanes=4),
        fc.Execution(lanes=10),
    ],
    ids=str,
)
def test_ways_to_execute_agree(execution: fc.Execution) -> None:
    """One client at a time, four or ten side by side, or interpreted: 1e-5 after one round."""
    data = noisy_data()
    state = make().init(jax.random.key(0))
    cohort = data.cohort(data.client_ids)
    expected, expected_metrics = make(execution=fc.Execution(lanes=1)).update(state, cohort)
    got, metrics = make(execution=execution).update(state, cohort)
    np.testing.assert_allclose(flat(got.params), flat(expected.params), rtol=1e-5, atol=1e-6)
    assert counts(metrics) == counts(expected_metrics)
    for row, bits in expected_metrics.communication.aggregate.items():
        assert int(metrics.communication.aggregate[row]) == int(bits)


def test_user_may_jit_vmap_and_scan_update() -> None:
    """A script of a user: rounds in a scan, seeds in a vmap, all in one jit."""
    data = noisy_data()
    algorithm = make()
    cohort = data.cohort(data.client_ids)

    @jax.jit
    def losses(seeds):
        def one_seed(seed):
            def one_round(state, _):
                state, metrics = algorithm.update(state, cohort)
                return state, metrics.train["loss"]

            return jax.lax.scan(one_round, algorithm.init(jax.random.key(seed)), length=3)[1]

        return jax.vmap(one_seed)(seeds)

    got = losses(jnp.arange(2))
    for seed in range(2):
        state = algorithm.init(jax.random.key(seed))
        for number in range(3):
            state, metrics = algorithm.update(state, cohort)
            np.testing.assert_allclose(got[seed, number], metrics.train["loss"], rtol=1e-5)


def test_learning_rates_are_swept_by_vmap_over_states() -> None:
    """`optax.inject_hyperparams` puts the client's rate where a vmap can vary it."""
    data = noisy_data()
    cohort = data.cohort(data.client_ids)
    swept = make(client_optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    rates = jnp.array([0.01, 0.3])

    def run(rate):
        state = swept.init(jax.random.key(0))
        state.hyperparams["client"]["learning_rate"] = rate
        return swept.update(state, cohort)[0].params

    got = jax.vmap(run)(rates)
    for i, rate in enumerate([0.01, 0.3]):
        fixed = make(client_optimizer=optax.sgd(rate))
        state, _ = fixed.update(fixed.init(jax.random.key(0)), cohort)
        np.testing.assert_allclose(
            flat({name: x[i] for name, x in got.items()}), flat(state.params), rtol=1e-5, atol=1e-7
        )


def test_rounds_of_one_shape_compile_once() -> None:
    """Cohorts of different clients, sizes within one bucket, share one program."""
    data = fc.datasets.from_clients({f"c{i}": rows(5 + i % 4, (i, 1), 1.0) for i in range(12)})
    traces = 0
    model = linear_regression()

    def loss(*args):
        nonlocal traces
        traces += 1
        return model.loss(*args)

    algorithm = make(model._replace(loss=loss))
    state = algorithm.init(jax.random.key(0))
    state, _ = algorithm.update(state, data.cohort(["c0", "c1", "c2", "c3"]))
    before = traces
    for i in range(4, 9):
        state, _ = algorithm.update(state, data.cohort([f"c{j}" for j in range(i, i + 4)]))
    assert traces == before


@pytest.mark.slow
def test_uniform_weights_average_clients_not_examples() -> None:
    """With weights of one, 12 examples of A count as much as 4 of B."""
    data = regression_data(A=rows(12, (1, 0), 1.0))
    state = make().init(jax.random.key(0))
    for algorithm in (
        make(weighting="uniform"),
        make(aggregator=fc.aggregators.unweighted_mean()),
    ):
        both, _ = algorithm.update(state, data.cohort(["A", "B"]))
        a, _ = algorithm.update(state, data.cohort(["A"]))
        b, _ = algorithm.update(state, data.cohort(["B"]))
        mean = (flat(a.params) + flat(b.params)) / 2
        np.testing.assert_allclose(flat(both.params), mean, rtol=1e-6)


def test_broadcast_codec_is_applied_and_counted() -> None:
    """8-bit symbols on the way down: a third message, the same for all clients."""
    data = noisy_data(3)
    codec = fc.compression.uniform_quantize(8, min_size=0)
    algorithm = make(broadcast_codec=codec)
    state = algorithm.init(jax.random.key(0))
    new, metrics = algorithm.update(state, data.cohort(data.client_ids))
    # W and b: 2 and 1 symbols of 8 bits, two float32 of range each.
    assert int(metrics.communication.broadcast["params"]) == 3 * (2 * 8 + 64 + 8 + 64)
    assert np.isfinite(flat(new.params)).all()


def test_type_signature_reads_as_in_the_tutorial() -> None:
    """The round is a federated computation whose type prints."""
    computation = make().computation
    text = str(computation.type_signature)
    assert "params=<W=float32[2,1],b=float32>" in text
    assert "{<x=float32[2],y=float32[1]>*}@CLIENTS" in text
    assert "@SERVER>)" in text or "@SERVER" in text.rsplit("->", 1)[1]
    assert "sum[update]" in str(computation.program)


def test_non_weighted_aggregators_are_told_apart() -> None:
    assert fc.aggregators.mean().is_weighted
    assert not fc.aggregators.unweighted_mean().is_weighted
    assert fc.aggregators.compression_aggregator().is_weighted
    assert not fc.aggregators.robust_aggregator(weighted=False).is_weighted


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"batch_size": 0}, "batch_size to be a positive integer"),
        ({"batch_size": 2.0}, "batch_size to be a positive integer"),
        ({"num_epochs": 0}, "num_epochs to be a positive integer"),
        ({"weighting": "examples"}, "'num_examples', 'uniform'"),
        ({"aggregator": "mean"}, "aggregator to be of type Aggregator"),
        ({"broadcast_codec": 8}, "broadcast_codec to be of type Codec"),
    ],
)
def test_bad_arguments_are_refused(keywords, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        make(**keywords)


def test_label_outside_the_classes_names_the_client() -> None:
    """On the host, before anything runs: which row, which client, what to do."""
    image = np.zeros((3, 28, 28, 1), np.uint8)
    data = fc.datasets.from_clients(
        {
            "good": {"image": image, "label": np.arange(3, dtype=np.int32)},
            "bad": {"image": image, "label": np.array([1, 10, 2], np.int32)},
        }
    )
    algorithm = make(fc.models.linear())
    state = algorithm.init(jax.random.key(0))
    with pytest.raises(DataError, match=r"0 \.\. 9.*got 10.*client 1 of the cohort"):
        algorithm.update(state, data.cohort(["good", "bad"]))


def test_wrong_features_are_refused() -> None:
    data = fc.datasets.from_clients(
        {"a": {"x": np.zeros((3, 5), np.float32), "y": np.zeros((3, 1), np.float32)}}
    )
    algorithm = make()
    state = algorithm.init(jax.random.key(0))
    with pytest.raises(FederatedTypeError, match="x"):
        algorithm.update(state, data.cohort(["a"]))
    with pytest.raises(FederatedTypeError, match="Cohort"):
        algorithm.update(state, [1, 2])


def test_aggregate_that_does_not_fit_the_model_is_refused():
    """A decoder that loses the shape would broadcast one number into every parameter."""
    codec = fc.compression.stateless(
        "mean_only",
        fc.compression.identity().traits,
        lambda keys, value: fc.compression.Message(value),
        lambda keys, message: jax.tree.map(jnp.mean, message.payload),
    )
    with pytest.raises(FederatedTypeError, match=r"mean_only.*expected float32\[2, 1\] at \['W'\]"):
        make(aggregator=fc.aggregators.mean(codec=codec))
    mean = fc.aggregators.mean()

    def shrink(*args):
        server, memory, value, measured = mean.aggregate(*args)
        return server, memory, fc.federated_map(lambda v: v["b"], value), measured

    with pytest.raises(FederatedTypeError, match="has to fit the model"):
        make(aggregator=mean._replace(aggregate=shrink))


@pytest.mark.parametrize("key", [0, jax.random.PRNGKey(0)], ids=["int", "old style"])
def test_init_wants_a_key(key):
    with pytest.raises(ArgumentError, match=r"jax\.random\.key"):
        make().init(key)


def test_keys_of_other_generators_work():
    data = regression_data()
    algorithm = make()
    state = algorithm.init(jax.random.key(0, impl="rbg"))
    state, _ = algorithm.update(state, data.cohort(["B"]))
    assert int(state.round) == 1


def test_state_of_another_model_is_refused_by_leaf():
    state = make(fc.models.linear()).init(jax.random.key(0))
    with pytest.raises(FederatedTypeError, match=r"\.params"):
        make().update(state, regression_data().cohort(["B"]))
    with pytest.raises(FederatedTypeError, match="the state that init returned"):
        make().update(state.params, regression_data().cohort(["B"]))


@pytest.mark.parametrize(
    "keywords",
    [
        {"client_optimizer": 0.1},
        {"client_optimizer": optax.adam},
        {"server_optimizer": 1.0},
        {"execution": "stacked"},
    ],
    ids=["number", "not called", "server", "execution"],
)
def test_parts_of_another_kind_are_refused(keywords):
    with pytest.raises(ArgumentError, match=r"Expected"):
        make(**keywords)


def test_full_batches_may_be_asked_for_by_any_number():
    """A batch size beyond the data is one batch, at the cost of one batch."""
    data = noisy_data(3)
    cohort = data.cohort(data.client_ids)
    state = make().init(jax.random.key(0))
    full, metrics = make(batch_size=2**40).update(state, cohort)
    exact, _ = make(batch_size=cohort.capacity).update(state, cohort)
    np.testing.assert_array_equal(flat(full.params), flat(exact.params))
    assert int(metrics.train["num_batches"]) == 3


def test_weights_whose_sum_overflows_are_rejected_and_reported():
    """3e38 twice has no float32 sum: the state is kept rather than moved by zero in silence."""
    data = regression_data(A=rows(12, (1, 0), 1.0))
    algorithm = make(weighting=lambda stats: jnp.float32(3e38))
    state = algorithm.init(jax.random.key(0))
    new, metrics = algorithm.update(state, data.cohort(["A", "B"]))
    assert counts(metrics)["update_rejected"] == 1
    np.testing.assert_array_equal(flat(new.params), flat(state.params))


def test_second_type_of_examples_inside_jit_keeps_no_tracer():
    """A program that is traced while the user's jit is traced must not hold on to that trace."""
    mean = fc.aggregators.mean()

    def offset(keys, server, memory, value, weight):
        constant = fc.federated_value(jnp.ones(3), fc.SERVER)
        server, memory, value, measured = mean.aggregate(keys, server, memory, value, weight)
        value = fc.federated_map(
            lambda v, c: jax.tree.map(lambda x: x + 0 * c[0], v), value, constant
        )
        return server, memory, value, measured

    algorithm = make(fc.models.linear(), aggregator=mean._replace(aggregate=offset))
    state = algorithm.init(jax.random.key(0))
    for size in (2, 5):
        images = np.zeros((size, 28, 28, 1), np.float32)
        client = {"image": images, "label": np.zeros(size, np.int32)}
        cohort = fc.datasets.from_clients({"a": client}).cohort(["a"])
        state, _ = jax.jit(algorithm.update)(state, cohort)
    assert int(state.round) == 2


def test_scheduled_hyperparameters_are_not_offered_for_a_sweep():
    """Their schedule would overwrite whatever a sweep puts there."""
    rate = optax.constant_schedule(0.1)
    scheduled = make(client_optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=rate))
    state = scheduled.init(jax.random.key(0))
    assert state.hyperparams["client"] == ()
    state, metrics = scheduled.update(state, regression_data().cohort(["B"]))
    assert "hyperparams" not in metrics.communication.broadcast
    assert flat(state.params).any()
