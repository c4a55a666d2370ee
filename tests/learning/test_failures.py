"""What the user's own functions raise comes through as it is, with a note; nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import aggregators, datasets, models
from fedjax_core.learning.algorithm import federated_learning
from fedjax_core.learning.client_work import local_training

MODEL = models.linear(num_classes=2, input_shape=(3,))
OPTIMIZER = optax.sgd(0.1)
WORK = local_training(MODEL, OPTIMIZER, batch_size=4)
QUANTIZE = fc.compression.uniform_quantize(8, min_size=0)


class UsersOwnError(Exception):
    """Nothing that the library knows."""


def fail(*args, **kwargs):
    raise UsersOwnError("as I wrote it")


def make(model=MODEL, work=WORK, aggregator=None, server=OPTIMIZER):
    return federated_learning(model, work, aggregator or aggregators.mean(), server)


def train_with_loss(loss):
    model = MODEL._replace(loss=loss)
    return make(model, local_training(model, OPTIMIZER, batch_size=4))


BROKEN = optax.GradientTransformation(OPTIMIZER.init, fail)


@pytest.mark.parametrize(
    ("build", "notes"),
    [
        (
            lambda: train_with_loss(fail),
            ["In the model's `loss`.", "tracing `work`", "federated_map"],
        ),
        (lambda: make(MODEL._replace(init=fail)), ["In the model's `init`."]),
        (lambda: make(work=WORK._replace(work=fail)), ["tracing `work`", "federated_map"]),
        (lambda: make(work=WORK._replace(prepare=fail)), ["tracing `fail`", "federated_map"]),
        (
            lambda: make(aggregator=aggregators.mean()._replace(aggregate=fail)),
            ["In the aggregator's `aggregate`."],
        ),
        (
            lambda: make(aggregator=aggregators.mean(codec=QUANTIZE._replace(encode=fail))),
            ["In `encode` of codec uniform_quantize(bits=8).", "tracing `encode`"],
        ),
        (
            lambda: make(aggregator=aggregators.mean(codec=QUANTIZE._replace(decode=fail))),
            ["tracing `receive`"],
        ),
        (lambda: make(server=BROKEN), ["tracing `server_step`"]),
        (
            lambda: make(work=local_training(MODEL, BROKEN, batch_size=4)),
            ["tracing `work`", "federated_map"],
        ),
    ],
)
def test_an_error_while_an_algorithm_is_traced(build, notes):
    with pytest.raises(UsersOwnError, match="as I wrote it") as caught:
        build()
    assert str(caught.value) == "as I wrote it"
    found = "\n".join(caught.value.__notes__)
    assert [note for note in notes if note not in found] == []


def test_the_algorithm_and_the_state_stay_usable():
    """A loss that fails for large batches alone: they are first met when a round runs."""
    traced = []

    def loss(key, variables, batch, mask, is_training):
        traced.append(mask.shape)
        if mask.shape[0] > 4:
            raise UsersOwnError("as I wrote it")
        return MODEL.loss(key, variables, batch, mask, is_training)

    model = MODEL._replace(loss=loss)
    algorithm = make(model, local_training(model, OPTIMIZER, batch_size=16))
    rows = {"image": np.ones((16, 3), np.float32), "label": np.zeros(16, np.int32)}
    few = {name: x[:3] for name, x in rows.items()}
    data = datasets.from_clients({"many": rows, "few": few})
    state = algorithm.init(jax.random.key(0))
    before = algorithm.update(state, data.cohort(["few"]))[0]
    compiled = algorithm.compiled()
    for _ in range(2):
        with pytest.raises(UsersOwnError, match="as I wrote it") as caught:
            algorithm.update(state, data.cohort(["many"]))
        assert "In the model's `loss`." in caught.value.__notes__
        with pytest.raises(UsersOwnError):
            algorithm.run(state, data, lambda r: ["many"], num_rounds=2)
    assert algorithm.compiled() == compiled
    again = algorithm.update(state, data.cohort(["few"]))[0]
    jax.tree.map(np.testing.assert_array_equal, again.params, before.params)
    assert not jnp.isnan(jax.tree.leaves(again.params)[0]).any()


def test_a_sampler_that_fails_names_the_round_and_leaves_the_state():
    rows = {"image": np.ones((2, 3), np.float32), "label": np.zeros(2, np.int32)}
    data = datasets.from_clients({"a": rows})
    algorithm = make()
    state = algorithm.init(jax.random.key(0))

    def sampler(number):
        return fail() if number == 3 else ["a"]

    with pytest.raises(UsersOwnError, match="as I wrote it") as caught:
        algorithm.run(state, data, sampler, num_rounds=5, rounds_per_dispatch=1)
    assert caught.value.__notes__ == ["This happened in round 3."]
    assert int(algorithm.run(state, data, sampler, num_rounds=3)[0].round) == 3
