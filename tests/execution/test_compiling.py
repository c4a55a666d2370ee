"""Compiler options: only where they help, and never inside of another program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.execution import compiling


def program_of(model):
    algorithm = fc.algorithms.fed_avg(model, client_optimizer=optax.sgd(0.1), batch_size=2)
    return algorithm.computation.program


def test_only_convolutions_on_cpu_ask(monkeypatch):
    cnn, linear = program_of(fc.models.emnist_cnn()), program_of(fc.models.linear())
    for version, count in (((0, 10, 0), 2), ((0, 12, 1), 1), ((0, 13, 0), 0)):
        monkeypatch.setattr(jax, "__version_info__", version)
        assert len(compiling.compiler_options(cnn, "cpu")) == count
        assert compiling.compiler_options(cnn, "gpu") == {}
        assert compiling.compiler_options(linear, "cpu") == {}


@pytest.fixture
def compiled():
    """A function compiled with an option that every supported version knows."""
    options = {"xla_cpu_enable_fast_min_max": True}
    return compiling.jit(lambda x, n=1: n * x @ x, lambda: options, static_argnames="n")


def test_options_reach_the_compiler():
    bad = compiling.jit(lambda x: x + 1, lambda: {"no_such_option": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        bad(1.0)


def test_a_function_with_options_can_be_transformed(compiled):
    """Alone, in jit, grad, vmap and scan, and in a jit that gives it no tracer."""
    x = jnp.arange(4.0).reshape(2, 2)
    expected = x @ x
    scanned = jax.lax.scan(lambda c, _: (compiled(c), None), x, None, length=1)[0]
    closed = jax.jit(lambda: compiled(x))()
    staged = jax.jit(compiled)(x)
    for got in (compiled(x), staged, closed, jax.vmap(compiled)(x[None])[0], scanned):
        np.testing.assert_allclose(got, expected)
    np.testing.assert_allclose(compiled(x, n=2), 2 * expected)
    gradient = jax.grad(lambda x: compiled(x).sum())(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: (x @ x).sum())(x))


def test_options_are_asked_for_at_the_first_call():
    asked = []
    function = compiling.jit(lambda x: x, lambda: asked.append(1) or {})
    assert not asked
    function(1.0)
    function(2.0)
    assert asked == [1]
