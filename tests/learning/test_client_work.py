"""Local training: steps, epochs, stats and hyper-parameters against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.errors import ArgumentError
from fedjax_core.language.values import Sequence
from fedjax_core.learning.client_work import local_training


def location_model() -> fc.models.Model:
    """One number w, loss ``0.5 (w - x)^2``: SGD moves it ``lr`` of the way to the mean."""
    return fc.models.from_functions(
        lambda key: jnp.float32(0.0),
        lambda w, batch, key, train: jnp.full_like(batch["x"], w),
        loss=lambda predictions, batch: 0.5 * (predictions - batch["x"]) ** 2,
        input_spec={"x": jax.ShapeDtypeStruct((), jnp.float32)},
    )


def run(values, *, learning_rate=0.5, hyperparams=(), optimizer=None, **keywords):
    values = np.float32(values)
    padded = np.full(8, np.nan, np.float32)
    padded[: len(values)] = values
    examples = Sequence({"x": jnp.asarray(padded)}, jnp.int32(0), jnp.int32(len(values)), 8)
    keywords = {"batch_size": 8} | keywords
    work = local_training(location_model(), optimizer or optax.sgd(learning_rate), **keywords)
    memory, output = work.work(jax.random.key(0), (), (), jnp.float32(0.0), hyperparams, examples)
    assert memory == ()
    return output


def test_one_step_of_sgd_in_closed_form():
    """J-59: from w = 0 with data 1, 2, 3 and rate 0.5, one step gives 1."""
    output = run([1.0, 2.0, 3.0])
    np.testing.assert_allclose(output.update, -1.0)
    np.testing.assert_allclose(output.weight, 3.0)
    np.testing.assert_allclose(output.metrics["loss"].result(), (0.5 + 2.0 + 4.5) / 3)
    assert int(output.metrics["num_batches"].total) == 1


@pytest.mark.parametrize("num_epochs", [1, 2, 5])
def test_epochs_contract_towards_the_mean(num_epochs):
    """Full batches: after E epochs ``w = mean (1 - (1 - lr)^E)``."""
    output = run([1.0, 2.0, 3.0], num_epochs=num_epochs)
    np.testing.assert_allclose(output.update, -2.0 * (1 - 0.5**num_epochs), rtol=1e-6)
    assert int(output.metrics["num_examples"].total) == 3 * num_epochs


def test_padding_never_enters():
    """Rows past the length are NaN here, and batches reach beyond it."""
    output = run([4.0] * 5, batch_size=3, learning_rate=1.0)
    np.testing.assert_allclose(output.update, -4.0)
    assert int(output.metrics["num_batches"].total) == 2


def test_empty_client_takes_no_step():
    output = run([])
    assert float(output.update) == 0.0
    assert float(output.weight) == 0.0
    assert int(output.metrics["num_batches"].total) == 0


def test_weightings():
    """By examples, one for every client that has any, or a function of the stats."""
    assert float(run([1.0, 2.0], weighting="uniform").weight) == 1.0
    assert float(run([], weighting="uniform").weight) == 0.0
    by_batches = run([1.0, 2.0], weighting=lambda stats: 7 * stats["num_batches"].total)
    assert float(by_batches.weight) == 7.0


def test_injected_learning_rate_comes_from_the_state():
    """`inject_hyperparams` reports its rate, and the rate passed in is the one that is used."""
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    work = local_training(location_model(), optimizer, batch_size=8)
    np.testing.assert_allclose(work.hyperparams(jnp.float32(0.0))["learning_rate"], 0.1)
    output = run([2.0], optimizer=optimizer, hyperparams={"learning_rate": jnp.float32(1.0)})
    np.testing.assert_allclose(output.update, -2.0)


def test_momentum_starts_afresh():
    """Two full-batch epochs of SGD with momentum m: the second step is ``lr (g2 + m g1)``."""
    output = run([1.0], optimizer=optax.sgd(0.5, momentum=0.9), num_epochs=2)
    first = 0.5
    second = first + 0.5 * ((1.0 - first) + 0.9 * 1.0)
    np.testing.assert_allclose(output.update, -second, rtol=1e-6)


def test_bad_weighting_is_refused():
    with pytest.raises(ArgumentError, match="uniform"):
        local_training(location_model(), optax.sgd(0.1), batch_size=1, weighting="size")
