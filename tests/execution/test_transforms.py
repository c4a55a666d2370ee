"""JAX transforms around lowered computations: grad, jacobians, vmap, scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fedjax_core as fc

F32 = fc.FederatedType(np.float32, fc.CLIENTS)


def clients(value):
    return fc.Federated(value, fc.CLIENTS)


@fc.federated_computation(F32)
def mean(x):
    return fc.federated_mean(x)


compiled_mode = pytest.mark.parametrize(
    "execution",
    [
        fc.Execution(mode="stacked"),
        fc.Execution(lanes=2),
        *(pytest.param(fc.Execution(lanes=lanes), marks=pytest.mark.slow) for lanes in (1, 5)),
    ],
    ids=lambda e: f"{e.mode}-{e.lanes}",
)


@compiled_mode
def test_grad_through_a_lowered_computation(execution):
    """J-55 with other numbers: d/ds of mean((s x)^2) = 2 s mean(x^2)."""

    @fc.federated_computation(F32, fc.FederatedType(np.float32, fc.SERVER))
    def loss(x, s):
        scaled = fc.federated_map(jnp.multiply, x, fc.federated_broadcast(s))
        return fc.federated_mean(fc.federated_map(jnp.square, scaled))

    lowered = loss.lower(execution)
    x = np.float32([1, 2, 4])

    def value(x, s):
        return lowered(clients(x), fc.Federated(s, fc.SERVER))[0].value

    by_x, by_s = jax.jit(jax.grad(value, argnums=(0, 1)))(x, jnp.float32(3))
    np.testing.assert_allclose(by_s, 2 * 3 * 7.0, rtol=1e-6)
    np.testing.assert_allclose(by_x, 2 * 9 * x / 3, rtol=1e-6)
    forward = jax.jacfwd(value, argnums=1)(x, jnp.float32(3))
    np.testing.assert_allclose(forward, by_s, rtol=1e-6)


def test_gradients_of_a_mean_by_its_weights_are_finite():
    """J-03: no NaN in gradients where the weights are zero."""
    weighted_mean = fc.federated_computation(fc.federated_mean, F32, F32)
    lowered = weighted_mean.lower()

    def value(x, w):
        return lowered(clients(x), clients(w))[0].value

    gradient = jax.grad(value, argnums=(0, 1))
    by_x, by_w = gradient(jnp.float32([1, 2]), jnp.zeros(2))
    assert np.isfinite(by_x).all()
    assert np.isfinite(by_w).all()
    by_x, by_w = gradient(jnp.float32([1, 2]), jnp.float32([1, 3]))
    np.testing.assert_allclose(by_x, [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(by_w, [(1 - 1.75) / 4, (2 - 1.75) / 4], rtol=1e-6)


def test_broadcast_to_many_clients_has_ones_as_jacobian():
    """J-53: broadcast 1.0 to 100 clients."""

    @fc.federated_computation(fc.FederatedType(np.float32, fc.SERVER))
    def spread(s):
        return fc.federated_map(lambda s: s + 0, fc.federated_broadcast(s))

    def value(s):
        return spread.lower()(fc.Federated(s, fc.SERVER), num_clients=100)[0].value

    assert value(jnp.float32(1)).tolist() == [1] * 100
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert jacobian(value)(jnp.float32(1)).tolist() == [1] * 100


def test_one_step_of_fed_avg_differentiates_through_the_learning_rate():
    """J-59: w=0, data [1,2,3], lr .5, loss (w - x)^2 / 2 x 2: w -> 1.0, d/dlr 2.0, d/dw .5."""
    scalar = fc.FederatedType(np.float32, fc.SERVER)

    @fc.federated_computation(F32, scalar, scalar)
    def train(x, w, rate):
        def local(x, w, rate):
            return w - rate * jax.grad(lambda w: 0.5 * (w - x) ** 2)(w)

        at_clients = fc.federated_broadcast(w), fc.federated_broadcast(rate)
        return fc.federated_mean(fc.federated_map(local, x, *at_clients))

    def value(w, rate):
        placed = (fc.Federated(v, fc.SERVER) for v in (w, rate))
        return train.lower()(clients(np.float32([1, 2, 3])), *placed)[0].value

    new, (by_w, by_rate) = jax.value_and_grad(value, argnums=(0, 1))(
        jnp.float32(0), jnp.float32(0.5)
    )
    np.testing.assert_allclose([new, by_rate, by_w], [1.0, 2.0, 0.5], rtol=1e-6)


@compiled_mode
def test_vmap_over_whole_cohorts(execution):
    """Several cohorts of one size at once, and their bits."""
    lowered = mean.lower(execution)
    cohorts = np.arange(12, dtype=np.float32).reshape(4, 3)
    result, ledger = jax.vmap(lambda x: lowered(clients(x)))(cohorts)
    assert result.value.tolist() == cohorts.mean(axis=1).tolist()
    assert ledger[0].low.tolist() == [96] * 4


@compiled_mode
def test_scan_over_rounds(execution):
    """A whole training loop is one scan: w moves halfway to the mean each round."""

    @fc.federated_computation(F32, fc.FederatedType(np.float32, fc.SERVER))
    def round_of(x, w):
        average = fc.federated_mean(x)
        return fc.federated_map(lambda m, w: (m + w) / 2, average, w)

    lowered = round_of.lower(execution)

    def step(w, x):
        result, ledger = lowered(clients(x), fc.Federated(w, fc.SERVER))
        return result.value, ledger[0]

    cohorts = np.full((5, 3), 8, np.float32)
    w, bits = jax.jit(lambda w: lax.scan(step, w, cohorts))(jnp.float32(0))
    assert float(w) == 8 * (1 - 2**-5)
    assert int(bits.sum()) == 5 * 96
