"""Several instances of a computation at once, and what cannot be transformed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution.transforms import grad, value_and_grad, vmap
from fedjax_core.language.operators import (
    federated_collect,
    federated_max,
    federated_min,
)
from fedjax_core.language.program import Broadcast, Count, Sum

F32 = np.float32


def server(t):
    return fc.FederatedType(t, fc.SERVER)


def clients(t):
    return fc.FederatedType(t, fc.CLIENTS)


SCALAR, SCALARS = server(F32), clients(F32)
SEQUENCES = clients(fc.SequenceType(F32))

every_mode = pytest.mark.parametrize(
    "execution",
    [
        fc.Execution(mode="reference"),
        fc.Execution(mode="stacked"),
        fc.Execution(lanes=2),
        *(pytest.param(fc.Execution(lanes=lanes), marks=pytest.mark.slow) for lanes in (1, 3)),
    ],
    ids=lambda e: f"{e.mode}-{e.lanes}",
)


@fc.federated_computation(server((F32, [3])), clients((F32, [3])))
def loss(w, x):
    here = fc.federated_broadcast(w, name="params")
    return fc.federated_mean(fc.federated_map(lambda w, x: jnp.vdot(w, x) ** 2, here, x))


W = np.arange(6, dtype=F32).reshape(2, 3)
X = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 2], [1, 1, 1]])


def plain(w):
    return jnp.mean(jnp.dot(X, w) ** 2)


def run(computation, execution, *args):
    types = [computation.program.ops[i].type for i in computation.program.parameters]
    placed = [fc.Federated(a, t.placement) for a, t in zip(args, types, strict=True)]
    return computation.lower(execution)(*placed)[0]


@every_mode
def test_several_models_on_the_same_clients(execution):
    several = vmap(loss, in_axes=(0, None), axis_size=2)
    assert str(several.type_signature) == (
        "(<w=float32[2,3]@SERVER,x={float32[3]}@CLIENTS> -> float32[2]@SERVER)"
    )
    result = run(several, execution, W, X)
    np.testing.assert_allclose(result.value, [plain(w) for w in W], rtol=1e-6)


@every_mode
def test_gradients_of_several_models(execution):
    """vmap of a gradient; and the gradient of a sum over instances is the same."""
    several = vmap(grad(loss), in_axes=(0, None), axis_size=2)
    expected = np.stack([jax.grad(plain)(w) for w in W])
    np.testing.assert_allclose(run(several, execution, W, X).value, expected, rtol=1e-6)
    inner = vmap(loss, in_axes=(0, None), axis_size=2)

    @fc.federated_computation(server((F32, [2, 3])), clients((F32, [3])))
    def total(w, x):
        return fc.federated_map(jnp.sum, inner(w, x))

    outer = grad(total)
    np.testing.assert_allclose(run(outer, execution, W, X).value, expected, rtol=1e-6)
    for computation in (several, outer):
        edges = {type(op) for _, op in computation.program.edges}
        assert edges == {Broadcast, Sum}


def test_size_is_read_from_the_arguments():
    several = vmap(loss, in_axes=(0, None))
    assert str(several.type_signature.result) == "float32[?]@SERVER"
    np.testing.assert_allclose(several(W, X), [plain(w) for w in W], rtol=1e-6)
    placed = several(fc.Federated(W[:1], fc.SERVER), fc.Federated(X, fc.CLIENTS))
    np.testing.assert_allclose(placed.value, [plain(W[0])], rtol=1e-6)

    @fc.federated_computation(server((F32, [2, 3])), clients((F32, [3])))
    def best(w, x):
        return fc.federated_map(jnp.min, several(w, x))

    np.testing.assert_allclose(best(W, X), min(plain(w) for w in W), rtol=1e-6)


def test_axis_of_the_clients_values():
    """The new axis is one of each client's value, wherever it stands in it."""
    total = fc.federated_computation(fc.federated_sum, clients((F32, [3])))
    values = np.arange(4 * 3 * 2, dtype=F32).reshape(4, 3, 2)
    last = vmap(total, in_axes=-1)
    assert str(last.for_axis_size(2).type_signature) == (
        "({float32[3,2]}@CLIENTS -> float32[2,3]@SERVER)"
    )
    np.testing.assert_allclose(last(values), values.sum(axis=0).T)
    np.testing.assert_allclose(last(list(values)), values.sum(axis=0).T)


def test_instances_of_instances():
    twice = vmap(vmap(loss, in_axes=(0, None), axis_size=2), in_axes=(None, 0))
    cohorts = np.stack([X, 2 * X], axis=1)
    by_model = np.float32([plain(w) for w in W])
    np.testing.assert_allclose(twice(W, cohorts), [by_model, 4 * by_model], rtol=1e-6)


def test_structs_keep_their_names():
    @fc.federated_computation(server({"a": F32, "b": (F32, [3])}), {"x": SCALARS})
    def both(w, data):
        return {"sum": fc.federated_sum(data["x"]), "w": w, "a": w.a}

    several = vmap(both, in_axes=(0, None))
    result = several({"a": W[:, 0], "b": W}, {"x": [1.0, 2.0]})
    assert result["sum"].tolist() == [3, 3]
    assert result["w"]["b"].tolist() == W.tolist()
    assert result["a"].tolist() == [0, 3]


def test_results_stay_where_they_are():
    @fc.federated_computation(F32, SCALAR, SCALARS)
    def everywhere(rate, w, x):
        here = fc.federated_broadcast(w)
        half = fc.jax_computation(lambda rate: rate / 2)(rate)
        return half, w, here, fc.federated_map(jnp.add, here, x)

    several = vmap(everywhere, axis_size=2)
    assert str(several.type_signature.result) == (
        "<float32[2],float32[2]@SERVER,float32[2]@CLIENTS,{float32[2]}@CLIENTS>"
    )
    vector = F32([1, 2])
    half, w, here, each = several(vector, 10 * vector, [vector, 2 * vector])
    assert half.tolist() == [0.5, 1]
    assert w.tolist() == here.tolist() == [10, 20]
    assert [row.tolist() for row in each] == [[11, 22], [12, 24]]


@every_mode
def test_presence_that_differs_between_instances(execution):
    """Where an instance decides who is present, absent values become zeros, or are counted."""

    @fc.federated_computation(SCALAR, SCALARS)
    def above(limit, x):
        present = fc.federated_map(jnp.greater, x, fc.federated_broadcast(limit))
        aggregates = (
            fc.federated_mean(x, present=present),
            fc.federated_count(present),
            federated_max(x, present=present),
            federated_min(x, present=present),
        )
        return fc.federated_map(lambda values: jnp.stack(values), aggregates)

    x = F32([1, 2, 4, 7])
    several = vmap(above, in_axes=(0, None), axis_size=3)
    actual = run(several, execution, F32([0, 1.5, 5]), x).value
    kept = [x, x[1:], x[3:]]
    expected = [[k.mean(), len(k), k.max(), k.min()] for k in kept]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_shared_presence_costs_no_more():
    @fc.federated_computation(SCALAR, SCALARS)
    def present(w, x):
        each = fc.federated_map(jnp.multiply, fc.federated_broadcast(w), x)
        return fc.federated_mean(each, present=fc.federated_map(lambda x: x > 0, x))

    several = vmap(present, in_axes=(0, None), axis_size=2)
    (edge,) = (op for _, op in several.program.edges if isinstance(op, Sum))
    assert edge.has_presence
    assert any(isinstance(op, Count) for op in several.program.ops)
    assert several(F32([1, 2]), [1.0, -1.0, 3.0]).tolist() == [2, 4]


def test_sequences_are_shared_by_all_instances():
    @fc.federated_computation(SCALAR, SEQUENCES)
    def scaled(w, rows):
        def each(w, rows):
            return rows.reduce(0.0, lambda total, x: total + w * x)

        return fc.federated_sum(fc.federated_map(each, fc.federated_broadcast(w), rows))

    several = vmap(scaled, in_axes=(0, None))
    assert several(F32([1, 10]), [[1.0, 2.0, 3.0], [], [4.0]]).tolist() == [10, 100]
    with pytest.raises(
        FederatedTypeError, match=r"expected arrays along the new axis, got float32\*"
    ):
        vmap(scaled)


def test_all_instances_alike():
    several = vmap(loss, in_axes=None, axis_size=3)
    np.testing.assert_allclose(several(W[0], X), [plain(W[0])] * 3, rtol=1e-6)
    with pytest.raises(ArgumentError, match="pass axis_size="):
        vmap(loss, in_axes=None)(W[0], X)


@pytest.mark.parametrize("in_axes", [(0,), (0, 0, 0), "0", (0, True), 1.5])
def test_in_axes_have_to_fit(in_axes):
    with pytest.raises(ArgumentError, match="in_axes"):
        vmap(loss, in_axes=in_axes)


def test_axis_has_to_exist():
    with pytest.raises(ArgumentError, match="expected an axis from 0 to 1"):
        vmap(loss, in_axes=(2, None))
    with pytest.raises(ArgumentError, match="positive axis_size"):
        vmap(loss, axis_size=0)


@pytest.mark.parametrize("argnums", [2, -3, (), (0, 0), (0, 2), True, "w", 1.5, (0, -2)])
def test_argnums_have_to_exist(argnums):
    with pytest.raises(ArgumentError, match=r"`loss`: expected argnums .* 2 arguments"):
        grad(loss, argnums=argnums)


def test_negative_argnums_count_from_the_end():
    by_x = grad(loss, argnums=-1)(W[1], X)
    expected = jax.grad(lambda x: jnp.mean(jnp.dot(x, W[1]) ** 2))(X)
    np.testing.assert_allclose(np.stack(by_x), expected, rtol=1e-6)


MIXED = clients({"x": F32, "n": {"label": np.int32}})


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (MIXED, r"argument 1 `x` of `f`: .* got int32 for the leaf `\['n'\]\['label'\]`"),
        (clients(jax.random.key(0).dtype), r"argument 1 `x`.* got key<fry> for the leaf `itself`"),
        (SEQUENCES, r"argument 1 `x`.*which has a sequence"),
        (clients(np.complex64), r"argument 1 `x`.* got complex64"),
    ],
    ids=["integer", "key", "sequence", "complex"],
)
def test_only_floats_are_differentiated(t, message):
    """The error names the leaf that is none."""

    def f(w, x):
        del x
        return w

    computation = fc.federated_computation(f, SCALAR, t)
    with pytest.raises(FederatedTypeError, match=message):
        grad(computation, argnums=1)
    assert grad(computation).type_signature.result == SCALAR


@pytest.mark.parametrize(
    "result",
    [
        lambda w, x: x,
        lambda w, x: fc.federated_broadcast(w),
        lambda w, x: (w, w),
        lambda w, x: fc.federated_count(),
        lambda w, x: fc.federated_map(lambda w: jnp.stack([w, w]), w),
    ],
    ids=["clients", "all-equal", "struct", "integer", "vector"],
)
def test_result_has_to_be_one_scalar_at_the_server(result):
    computation = fc.federated_computation(result, SCALAR, SCALARS)
    with pytest.raises(FederatedTypeError, match=r"expected one floating-point scalar at the serv"):
        value_and_grad(computation)


def test_edges_without_a_derivative_are_named():
    def mean(x):
        def accumulate(total, x):
            return total + x

        return fc.federated_aggregate(x, F32(0), accumulate, accumulate, lambda total: total)

    def collected(x):
        return fc.federated_map(lambda rows: jnp.sum(rows.elements), federated_collect(x))

    for function, operator in ((mean, "aggregate"), (collected, "collect")):
        computation = fc.federated_computation(function, SCALARS)
        for transform in (grad, lambda c: vmap(c, axis_size=2)):
            with pytest.raises(FederatedTypeError) as error:
                transform(computation)
            assert f"got a {operator}, {operator}[value](%0" in str(error.value)
            assert "test_transforms.py:" in str(error.value)
            assert "computation.lower" in str(error.value)


def test_edge_with_a_codec_is_named():
    codec = fc.compression.identity()

    @fc.federated_computation(SCALAR)
    def sent(w):
        return fc.federated_sum(fc.federated_broadcast(w, codec=codec))

    with pytest.raises(FederatedTypeError, match=r"broadcast with a codec.* without the codec"):
        grad(sent)


def test_an_edge_that_no_result_needs_does_no_harm():
    @fc.federated_computation(SCALAR, SCALARS)
    def unused(w, x):
        federated_collect(x)
        return w

    assert grad(unused)(3.0, [1.0]) == 1


def test_types_and_functions_have_to_be_known():
    @fc.federated_computation
    def polymorphic(x):
        return fc.federated_mean(x)

    with pytest.raises(FederatedTypeError, match="choose its types with for_types"):
        grad(polymorphic)
    assert grad(polymorphic.for_types(SCALARS))([1.0, 2.0]) == [0.5, 0.5]
    with pytest.raises(FederatedTypeError, match="for_axis_size"):
        grad(vmap(loss))
    with pytest.raises(FederatedTypeError, match="federated_computation"):
        grad(lambda x: x)

    @fc.federated_computation(fc.FunctionType(F32, F32), SCALARS)
    def applied(f, x):
        return fc.federated_mean(fc.federated_map(f, x))

    with pytest.raises(FederatedTypeError, match="bind it first"):
        grad(applied, argnums=1)
    bound = applied.bind(jnp.square)
    assert grad(bound)([1.0, 2.0]) == [1, 2]


def test_capacity_may_not_decide_what_is_sent():
    """A local computation that looks at the capacity, which differs from call to call."""

    @fc.federated_computation(SCALAR, SEQUENCES)
    def peeks(w, rows):
        def each(w, rows):
            return w * w if rows.capacity <= 2 else jnp.zeros(())

        return fc.federated_mean(fc.federated_map(each, fc.federated_broadcast(w), rows))

    gradient = grad(peeks)
    assert gradient(3.0, [[1.0]]) == 6
    with pytest.raises(FederatedTypeError, match="the same edges whatever the capacity"):
        gradient(3.0, [[1.0] * 5])
