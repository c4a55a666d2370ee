"""Numbers at the ends of their dtypes, and values that are almost right."""

import dataclasses
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import ArgumentError, FederatedTypeError

F32, F16 = (fc.FederatedType(t, fc.CLIENTS) for t in (np.float32, np.float16))
I32 = fc.FederatedType(np.int32, fc.CLIENTS)
ROWS = fc.FederatedType(fc.SequenceType(np.float32), fc.CLIENTS)


def define(body: Any, *types: Any) -> fc.Computation:
    return fc.federated_computation(body, *types)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A value, and a factor that is part of its type."""

    value: Any
    factor: int = dataclasses.field(metadata={"static": True})


def test_weights_of_integers_sum_beyond_their_dtype():
    """The mean of ones is one, whatever the weights."""
    mean = define(lambda x, w: fc.federated_mean(x, w), F32, I32)
    assert mean(np.ones(4, np.float32), np.full(4, 2**30, np.int32)) == 1.0


@pytest.mark.parametrize("weights", [None, [1000.0] * 1000])
def test_means_of_small_floats_do_not_overflow(weights):
    """100 in float16, 1,000 times: sums and products pass 65,504, the mean does not."""
    values = np.full(1000, 100, np.float16)
    if weights is None:
        mean = define(fc.federated_mean, F16)
        assert fc.communication(mean, num_clients=1)[0].bits_per_client == 16
        assert mean(values) == 100
    else:
        assert define(lambda x, w: fc.federated_mean(x, w), F16, F32)(values, weights) == 100
    assert str(define(fc.federated_mean, F16).type_signature.result) == "float16@SERVER"


def test_the_derivative_of_a_mean_by_a_weight_of_zero():
    """d/dw_i of sum(w x) / sum(w) is (x_i - mean) / sum(w): mean 1.5, sum 2."""
    mean = define(lambda x, w: fc.federated_mean(x, w), F32, F32)
    gradient = fc.grad(mean, argnums=1)([1.0, 2.0, 5.0], [1.0, 1.0, 0.0])
    np.testing.assert_allclose(gradient, [-0.25, 0.25, 1.75], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("mode", ["reference", "stacked", "streamed"])
def test_extremes_of_dtypes_without_infinity(dtype, mode):
    smallest = define(fc.federated_min, fc.FederatedType(dtype, fc.CLIENTS))
    run = smallest.lower(fc.Execution(mode=mode))
    result, _ = run(fc.Federated(jnp.asarray([2, 1], dtype), fc.CLIENTS))
    assert float(result.value) == 1.0


@pytest.mark.parametrize("valid", [np.ones((3, 1), bool), np.array(True), np.ones(3), "abc"])
@pytest.mark.parametrize("mode", ["reference", "stacked", "streamed"])
def test_valid_is_a_bool_for_each_client(valid, mode):
    run = define(fc.federated_sum, F32).lower(fc.Execution(mode=mode))
    with pytest.raises(ArgumentError, match="`valid` to be a bool for each client"):
        run(fc.Federated(np.ones(3, np.float32), fc.CLIENTS), valid=valid)


def test_lengths_of_sequences_are_kept_within_their_capacity():
    total = define(lambda x: fc.federated_sum(fc.sequence_reduce(x, 0.0, jnp.add)), ROWS)
    rows = np.array([[1, 2, 4]] * 2, np.float32)
    sequences = fc.Sequence(rows, np.zeros(2, np.int32), np.array([10, -3], np.int32), 3)
    for mode in ("reference", "stacked", "streamed"):
        run = total.lower(fc.Execution(mode=mode))
        assert float(run(fc.Federated(sequences, fc.CLIENTS))[0].value) == 7.0


def test_static_fields_are_part_of_the_type():
    t = fc.FederatedType(fc.to_type(Scaled(np.float32, 7)), fc.SERVER)
    scale = define(lambda s: fc.federated_map(lambda s: s.value * s.factor, s), t)
    assert scale(Scaled(2.0, 7)) == 14.0
    for other in (Scaled(2.0, 8), fc.Federated(Scaled(jnp.float32(2), 8), fc.SERVER)):
        with pytest.raises(FederatedTypeError, match=r"static"):
            scale(other)


def test_floats_have_to_fit():
    with pytest.raises(FederatedTypeError, match=r"client 0: .*float32 holds.*1e\+300"):
        define(fc.federated_sum, F32)([np.float64(1e300)])


def test_functions_of_placed_values_need_no_types():
    signature = fc.FunctionType(F32, fc.FederatedType(np.float32, fc.SERVER))
    apply = define(lambda f, x: f(x), signature, F32)
    assert apply(fc.federated_mean, [1.0, 2.0]) == 1.5
    assert apply(lambda x: fc.federated_sum(x), [1.0, 2.0]) == 3.0
    assert apply(fc.federated_computation(lambda x: fc.federated_max(x)), [1.0, 2.0]) == 2.0


def test_placed_arguments_are_those_of_a_call():
    total = define(lambda x, s: fc.federated_sum(fc.sequence_sum(x)), ROWS, np.float32)
    placed = total.place([[1.0], [2.0, 3.0]], 5)
    result, _ = jax.jit(total.lower())(*placed)
    assert float(result.value) == total([[1.0], [2.0, 3.0]], 5) == 6.0


def test_sequences_of_tracers():
    total = define(lambda x: fc.federated_sum(fc.sequence_sum(x)), ROWS)
    assert float(jax.jit(lambda x: total([[x, x], [x]]).value)(2.0)) == 6.0


def test_a_zero_at_the_server_is_neutral_too():
    def body(x: Any) -> Any:
        zero = fc.federated_value(np.float32(5), fc.SERVER)
        return fc.federated_aggregate(x, zero, jnp.add, jnp.add, lambda total: total)

    with pytest.raises(FederatedTypeError, match=r"merge\(zero, zero\) to be zero"):
        define(body, F32)


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_names_of_edges_are_strings(name):
    with pytest.raises(FederatedTypeError, match="name of an edge to be a string"):
        define(lambda x: fc.federated_sum(x, name=name), F32)


def test_bounds_leave_values_of_the_dtype():
    int8 = fc.FederatedType(np.int8, fc.CLIENTS)
    with pytest.raises(ArgumentError, match=r"values of int8 between them, got 200 and 300"):
        define(lambda x: fc.federated_secure_sum(x, 300, min_input=200), int8)


@pytest.mark.slow
def test_dead_computations_take_their_arrays_with_them():
    """A captured array is not kept alive by a cache of compiled functions of ours."""

    def run_once() -> weakref.ref[jax.Array]:
        array = jnp.arange(1000.0)
        add = define(lambda x: fc.federated_sum(fc.federated_map(lambda x: x + array, x)), F32)
        add([1.0])
        return weakref.ref(array)

    watched = run_once()
    jax.clear_caches()
    gc.collect()
    assert watched() is None


def test_containers_keep_their_fields():
    """A pytree that exchanges its fields would let a value take the place of another."""

    class Exchanged:
        def __init__(self, fields: Any) -> None:
            self.fields = fields

    jax.tree_util.register_pytree_node(
        Exchanged, lambda x: (x.fields, None), lambda _, fields: Exchanged(fields[::-1])
    )
    with pytest.raises(FederatedTypeError, match="flatten undoes its unflatten"):
        define(lambda x, y: fc.federated_zip(Exchanged((x, y))), F32, F32)


def test_functions_are_bound_before_lowering():
    apply = define(
        lambda f, x: fc.federated_map(f, x), fc.FunctionType(np.float32, np.float32), F32
    )
    for use in (apply.lower, lambda: apply.place(jnp.sin, [1.0])):
        with pytest.raises(FederatedTypeError, match=r"argument 0 `f` .*first, with bind"):
            use()
    assert len(apply.bind(jnp.sin).place([1.0, 2.0])) == 1


def test_arguments_that_contain_themselves():
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(FederatedTypeError, match="argument 0 `value` of `federated_sum`"):
        define(fc.federated_sum, F32)(endless)
    assert define(fc.federated_sum, F32)([1.0]) == 1.0
