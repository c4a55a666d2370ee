"""Gradients of federated computations, which are federated computations again.

Every number is that of jax.grad on an ordinary function of the stacked data, or of a closed form.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import FederatedTypeError
from fedjax_core.execution.transforms import grad, value_and_grad
from fedjax_core.language.operators import federated_max, federated_min
from fedjax_core.language.program import Broadcast, Map, Sum

F32 = np.float32


def server(t):
    return fc.FederatedType(t, fc.SERVER)


def clients(t):
    return fc.FederatedType(t, fc.CLIENTS)


SCALAR, SCALARS = server(F32), clients(F32)
MODEL = server({"w": (F32, [3]), "b": F32})
POINT = clients({"x": (F32, [3]), "y": F32})

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

two_modes = pytest.mark.parametrize(
    "execution",
    [fc.Execution(mode="reference"), fc.Execution(lanes=2)],
    ids=lambda e: f"{e.mode}-{e.lanes}",
)


def points(num_clients, seed=0):
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(num_clients, 3)).astype(F32),
        "y": random.normal(size=num_clients).astype(F32),
    }


def model(seed=0):
    random = np.random.default_rng(seed)
    return {"w": random.normal(size=3).astype(F32), "b": F32(random.normal())}


def squared_error(w, d):
    return (jnp.dot(w["w"], d["x"]) + w["b"] - d["y"]) ** 2


def step(w, d, rate):
    return jax.tree.map(lambda w, g: w - rate * g, w, jax.grad(squared_error)(w, d))


@fc.federated_computation(MODEL, POINT)
def loss(w, d):
    at_clients = fc.federated_broadcast(w, name="params")
    return fc.federated_mean(fc.federated_map(squared_error, at_clients, d), name="loss")


def plain_loss(w, d):
    return jnp.mean(jax.vmap(squared_error, (None, 0))(w, d))


@fc.federated_computation(MODEL, POINT, SCALAR)
def tuned(w, d, rate):
    """Two round trips: the loss after one step of averaged local training."""
    here = fc.federated_broadcast(w), fc.federated_broadcast(rate)
    trained = fc.federated_mean(fc.federated_map(step, here[0], d, here[1]))
    again = fc.federated_broadcast(trained)
    return fc.federated_mean(fc.federated_map(squared_error, again, d))


def plain_tuned(w, d, rate):
    trained = jax.vmap(step, (None, 0, None))(w, d, rate)
    return plain_loss(jax.tree.map(lambda x: jnp.mean(x, axis=0), trained), d)


def run(computation, execution, *args, valid=None, num_clients=None):
    types = [computation.program.ops[i].type for i in computation.program.parameters]
    placed = [fc.Federated(a, t.placement) for a, t in zip(args, types, strict=True)]
    lowered = computation.lower(execution)
    if execution.mode != "reference":
        lowered = jax.jit(lowered, static_argnames="num_clients")
    result, _ = lowered(*placed, valid=valid, num_clients=num_clients)
    return jax.tree.map(lambda f: f.value, result, is_leaf=lambda x: isinstance(x, fc.Federated))


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


def edge_kinds(computation):
    return {type(op) for _, op in computation.program.edges}


def labels(computation):
    return [(type(op).__name__, op.label) for _, op in computation.program.edges]


@fc.federated_computation(SCALAR)
def mean_square(x):
    return fc.federated_mean(fc.federated_map(jnp.square, fc.federated_broadcast(x)))


def test_gradient_of_a_mean_of_squares():
    """J-55: the gradient of mean(broadcast(x)^2) at 3 with 3 clients is 6."""
    gradient = grad(mean_square)
    assert str(gradient.type_signature) == "(float32@SERVER -> float32@SERVER)"
    assert float(gradient(3.0, num_clients=3)) == 6.0


def test_sum_of_a_broadcast_has_the_number_of_clients_as_gradient():
    """J-53: 100 clients have the Jacobian ones(100); nothing has to be sent to know its sum."""

    @fc.federated_computation(SCALAR)
    def total(x):
        return fc.federated_sum(fc.federated_broadcast(x))

    gradient = grad(total)
    assert float(gradient(1.0, num_clients=100)) == 100.0
    assert gradient.program.edges == ()


def test_one_step_of_fed_avg():
    """J-59: w=0, data [1,2,3], rate .5 give 1.0; d/drate = 2.0; d/dw = .5."""

    @fc.federated_computation(SCALARS, SCALAR, SCALAR)
    def fed_avg(x, w, rate):
        def train(x, w, rate):
            return w - rate * jax.grad(lambda w: 0.5 * (w - x) ** 2)(w)

        here = fc.federated_broadcast(w), fc.federated_broadcast(rate)
        return fc.federated_mean(fc.federated_map(train, x, *here))

    value, (by_w, by_rate) = value_and_grad(fed_avg, argnums=(1, 2))([1.0, 2.0, 3.0], 0.0, 0.5)
    np.testing.assert_allclose([value, by_rate, by_w], [1.0, 2.0, 0.5], rtol=1e-6)


def test_gradients_have_the_structure_and_placement_of_the_argument():
    assert str(grad(loss).type_signature.result) == "<b=float32,w=float32[3]>@SERVER"
    assert grad(loss).type_signature.parameter == loss.type_signature.parameter
    value, by_w = value_and_grad(loss)(model(), to_list(points(4)))
    assert_close((value, by_w), jax.value_and_grad(plain_loss)(model(), points(4)))


def to_list(stacked):
    size = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(size)]


def test_gradient_sends_what_a_gradient_costs():
    """One model down and one up, one number a client for the loss; the value itself is not sent."""
    assert labels(grad(loss)) == [("Broadcast", "params"), ("Broadcast", "loss"), ("Sum", "params")]
    assert labels(value_and_grad(loss)) == [
        ("Broadcast", "params"),
        ("Sum", "loss"),
        ("Broadcast", "loss"),
        ("Sum", "params"),
    ]
    report = fc.communication(grad(loss), num_clients=10)
    assert report.broadcast_bits == 10 * (4 * 32 + 32)
    assert report.aggregate_bits == 10 * 4 * 32
    location = grad(loss).program.edges[0][1].location
    assert location == loss.program.edges[0][1].location


def test_one_map_for_each_stage():
    maps = [op for op in value_and_grad(tuned).program.ops if isinstance(op, Map)]
    levels = [(str(op.type.placement), op.local.name) for op in maps]
    assert len(set(levels)) == len(levels)


@every_mode
def test_two_round_trips(execution):
    args = model(), points(5), F32(0.1)
    gradient = value_and_grad(tuned, argnums=(0, 2))
    assert edge_kinds(gradient) == {Broadcast, Sum}
    assert_close(
        run(gradient, execution, *args), jax.value_and_grad(plain_tuned, argnums=(0, 2))(*args)
    )


@two_modes
def test_gradient_by_a_value_at_the_clients(execution):
    gradient = grad(loss_of_examples, argnums=1)
    assert str(gradient.type_signature.result) == "{float32}@CLIENTS"
    w, x = F32(2), F32([1, 2, 4])
    assert_close(run(gradient, execution, w, x), 2 * (x - w) / 3)


@fc.federated_computation(SCALAR, SCALARS)
def loss_of_examples(w, x):
    return fc.federated_mean(
        fc.federated_map(lambda w, x: (x - w) ** 2, fc.federated_broadcast(w), x)
    )


@two_modes
def test_weighted_mean_by_its_weights(execution):
    """d/dw_i of sum(w x) / sum(w) is (x_i - mean) / sum(w)."""
    mean = fc.federated_computation(fc.federated_mean, SCALARS, SCALARS)
    x, w = F32([1, 2, 4]), F32([1, 3, 4])
    by_x, by_w = run(grad(mean, argnums=(0, 1)), execution, x, w)
    average = (x * w).sum() / w.sum()
    assert_close(by_x, w / w.sum())
    assert_close(by_w, (x - average) / w.sum())


def test_gradients_of_a_mean_of_no_weight_are_finite():
    """J-03: no NaN in gradients where the weights are zero."""
    mean = fc.federated_computation(fc.federated_mean, SCALARS, SCALARS)
    for gradient in grad(mean, argnums=(0, 1))([1.0, 2.0], [0.0, 0.0]):
        assert np.isfinite(gradient).all()


@every_mode
def test_padding_may_hold_anything(execution):
    """What NaN rows of padding give is left out of sums, those of gradients among them."""
    d = points(5)
    d["x"][3:], d["y"][3:] = np.nan, np.inf
    valid = np.arange(5) < 3
    args = model(), d, F32(0.1)
    actual = run(value_and_grad(tuned, argnums=(0, 2)), execution, *args, valid=valid)
    kept = jax.tree.map(lambda x: x[:3], d)
    expected = jax.value_and_grad(plain_tuned, argnums=(0, 2))(model(), kept, F32(0.1))
    assert_close(actual, expected)


@two_modes
def test_roots_at_zero_in_padding_do_not_leak(execution):
    """The derivative of a root at zero is infinite, and 0 * inf is NaN; padding is not summed."""

    @fc.federated_computation(SCALAR, SCALARS)
    def root(w, x):
        here = fc.federated_broadcast(w)
        return fc.federated_sum(fc.federated_map(lambda w, x: jnp.sqrt(w * x), here, x))

    x = F32([1, 4, 0, 0])
    gradient = run(grad(root), execution, F32(1), x, valid=x > 0)
    assert_close(gradient, F32(0.5 * (1 + 2)))


@every_mode
def test_empty_cohort_has_no_gradient(execution):
    value, by_w = run(value_and_grad(loss), execution, model(), points(0), num_clients=0)
    assert_close((value, by_w), (F32(0), {"w": np.zeros(3, F32), "b": F32(0)}))


@two_modes
def test_presence(execution):
    """Clients that are not present send nothing, in the gradient's own sums of them too."""

    @fc.federated_computation(SCALAR, SCALARS)
    def present(w, x):
        here = fc.federated_broadcast(w)
        is_present = fc.federated_map(lambda x: x > 0, x)
        error = fc.federated_map(lambda w, x: (w - x) ** 2, here, x)
        return fc.federated_mean(error, present=is_present)

    x = F32([1, -5, 2, -7, 3])
    value, by_w = run(value_and_grad(present), execution, F32(4), x)
    kept = x[x > 0]
    assert_close((value, by_w), (((4 - kept) ** 2).mean(), (2 * (4 - kept)).mean()))
    by_x = run(grad(present, argnums=1), execution, F32(4), x)
    assert_close(by_x, np.where(x > 0, 2 * (x - 4) / 3, 0).astype(F32))


@every_mode
def test_the_absent_may_hold_anything(execution):
    """Who is present may depend on what a client computed; the sums of gradients leave them out."""

    @fc.federated_computation(SCALAR, SCALARS)
    def finite(w, x):
        each = fc.federated_map(lambda w, x: jnp.sqrt(w * x), fc.federated_broadcast(w), x)
        is_finite = fc.federated_map(jnp.isfinite, each)
        return fc.federated_mean(each, present=is_finite)

    x, w = F32([1, np.nan, 4, -1, np.inf]), F32(4)
    value, by_w = run(value_and_grad(finite), execution, w, x)
    assert_close((value, by_w), (F32(3), F32((1 / 4 + 2 / 4) / 2)))
    second = run(grad(grad(finite)), execution, w, x)
    assert_close(second, F32(-(1 + 2) / 4 / 8 / 2))
    down, up = (value_and_grad(finite).program.edges[k][1] for k in (0, -1))
    assert isinstance(down, Broadcast)
    assert up.has_presence


@every_mode
def test_hessian_vector_product(execution):
    """A computation that uses a gradient, and is differentiated again."""
    gradient = grad(tuned)

    @fc.federated_computation(MODEL, MODEL, POINT, SCALAR)
    def along(w, v, d, rate):
        def dot(a, b):
            return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))

        return fc.federated_map(dot, gradient(w, d, rate), v)

    args = model(), model(1), points(4), F32(0.1)
    actual = run(grad(along), execution, *args)
    w, v, d, rate = args
    _, expected = jax.jvp(jax.grad(lambda w: plain_tuned(w, d, rate)), (w,), (v,))
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert edge_kinds(grad(along)) == {Broadcast, Sum}


def test_gradient_of_a_gradient():
    """The third derivative of mean((w x)^4) is 24 w mean(x^4)."""

    @fc.federated_computation(SCALAR, SCALARS)
    def quartic(w, x):
        return fc.federated_mean(
            fc.federated_map(lambda w, x: (w * x) ** 4, fc.federated_broadcast(w), x)
        )

    third = grad(grad(grad(quartic)))
    x = F32([1, 2])
    np.testing.assert_allclose(third(2.0, x), 24 * 2 * (x**4).mean(), rtol=1e-6)


@two_modes
def test_custom_derivatives(execution):
    """Rules of the user's own: the identity, with ten times its gradient."""

    @jax.custom_vjp
    def loud(x):
        return x

    loud.defvjp(lambda x: (x, None), lambda _, g: (10 * g,))

    @jax.custom_jvp
    def louder(x):
        return x

    louder.defjvp(lambda primals, tangents: (primals[0], 100 * tangents[0]))

    @fc.federated_computation(SCALAR, SCALARS)
    def scaled(w, x):
        here = fc.federated_broadcast(w)
        each = fc.federated_map(lambda w, x: louder(loud(w * x)), here, x)
        return fc.federated_sum(each)

    value, by_w = run(value_and_grad(scaled), execution, F32(2), F32([1, 3]))
    assert_close((value, by_w), (F32(8), F32(4000)))


@two_modes
def test_arguments_that_are_no_floats_are_passed_through(execution):
    """Keys and integers where argnums leaves them out."""

    @fc.federated_computation(SCALAR, clients(jax.random.key(0).dtype), clients(np.int32))
    def noisy(w, key, n):
        def each(w, key, n):
            return w * n * jax.random.normal(key)

        return fc.federated_mean(fc.federated_map(each, fc.federated_broadcast(w), key, n))

    keys, n = jax.random.split(jax.random.key(1), 3), np.int32([1, 2, 3])
    expected = jnp.mean(n * jax.vmap(jax.random.normal)(keys))
    assert_close(run(grad(noisy), execution, F32(2), keys, n), np.asarray(expected))


def masked_scan(w, rows):
    """The error of one pass of gradient descent over the rows, in a loop of fixed length."""
    positions, mask = rows.positions()

    def one(w, x):
        row, is_row = x
        moved = w - 0.1 * (w - row)
        return jnp.where(is_row, moved, w), None

    return jax.lax.scan(one, w, (rows.take(positions), mask))[0]


SEQUENCES = clients(fc.SequenceType(F32))


@fc.federated_computation(SCALAR, SEQUENCES)
def scanned(w, rows):
    trained = fc.federated_mean(fc.federated_map(masked_scan, fc.federated_broadcast(w), rows))
    again = fc.federated_map(masked_scan, fc.federated_broadcast(trained), rows)
    return fc.federated_mean(fc.federated_map(lambda w: (w - 1) ** 2, again))


def plain_scanned(w, data):
    def one_pass(w):
        total = 0.0
        for rows in data:
            v = w
            for row in rows:
                v = v - 0.1 * (v - row)
            total = total + v
        return total / len(data), None

    trained, _ = one_pass(w)
    total = 0.0
    for rows in data:
        v = trained
        for row in rows:
            v = v - 0.1 * (v - row)
        total = total + (v - 1) ** 2
    return total / len(data)


@pytest.mark.parametrize(
    "longest",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow), 9],
)
def test_sequences_of_several_capacities(longest):
    """What the backward pass keeps has the capacity's shape; maps are traced again for each."""
    data = [list(np.linspace(0, 1, n).astype(F32)) for n in (longest, 1, 0)]
    value, by_w = value_and_grad(scanned)(2.0, data)
    expected = jax.value_and_grad(plain_scanned)(2.0, data)
    np.testing.assert_allclose([value, by_w], expected, rtol=1e-5)
    second = jax.grad(jax.grad(plain_scanned))(2.0, data)
    np.testing.assert_allclose(grad(grad(scanned))(2.0, data), second, rtol=1e-5)


@every_mode
def test_packed_sequences(execution):
    pool = np.arange(8, dtype=F32)
    start, length = np.int32([0, 3, 4]), np.int32([3, 1, 4])
    rows = fc.Sequence(pool, start, length, capacity=4, packed=True)
    actual = run(value_and_grad(scanned), execution, F32(2), rows)
    data = [pool[a : a + n] for a, n in zip(start, length, strict=True)]
    assert_close(actual, jax.value_and_grad(plain_scanned)(2.0, data))


def test_loops_that_end_with_the_data_have_no_gradient():
    @fc.federated_computation(SCALAR, SEQUENCES)
    def reduced(w, rows):
        def each(w, rows):
            return rows.reduce(0.0, lambda total, x: total + w * x)

        return fc.federated_mean(fc.federated_map(each, fc.federated_broadcast(w), rows))

    with pytest.raises(FederatedTypeError, match=r"reduced.*use Sequence\.scan"):
        grad(reduced)


def test_sequences_at_the_server():
    @fc.federated_computation(SCALAR, server(fc.SequenceType(F32)), SCALARS)
    def loss(w, rows, x):
        start = fc.federated_map(masked_scan, w, rows)
        each = fc.federated_map(lambda w, x: w * w * x, fc.federated_broadcast(start), x)
        return fc.federated_mean(each)

    rows, x = np.array([1, 2, 3], F32), np.array([1, 3], F32)

    def plain(w):
        for row in rows:
            w = w - 0.1 * (w - row)
        return (w * w * x).mean()

    actual = value_and_grad(loss)(F32(4), list(rows), x)
    np.testing.assert_allclose(actual, jax.value_and_grad(plain)(F32(4)), rtol=1e-5)


@every_mode
@pytest.mark.parametrize("extreme", [federated_max, federated_min])
def test_extremes_share_the_gradient_among_ties(execution, extreme):
    computation = fc.federated_computation(extreme, SCALARS)
    x = F32([1, 3, 1, 3, 2])
    best = x.max() if extreme is federated_max else x.min()
    value, by_x = run(value_and_grad(computation), execution, x)
    assert value == best
    assert_close(by_x, np.where(x == best, F32(0.5), F32(0)))


def test_extremes_of_those_present():
    """The largest of |w x| over the clients with x < 3, and no client at all."""

    @fc.federated_computation(SCALAR, SCALARS)
    def largest(w, x):
        each = fc.federated_map(lambda w, x: w * x, fc.federated_broadcast(w), x)
        return federated_max(each, present=fc.federated_map(lambda x: x < 3, x))

    by_w, by_x = grad(largest, argnums=(0, 1))(5.0, [1.0, 2.0, 7.0])
    assert by_w == 2
    assert list(by_x) == [0, 5, 0]
    assert grad(largest)(5.0, []) == 0


def test_unplaced_and_all_equal_arguments():
    """An unplaced value is one of the server; one that all clients share has a gradient at each."""

    @fc.federated_computation(F32, fc.FederatedType(F32, fc.CLIENTS, all_equal=True), SCALARS)
    def product(rate, shared, x):
        here = fc.federated_value(rate, fc.CLIENTS)
        each = fc.federated_map(lambda r, s, x: r * s * x, here, shared, x)
        return fc.federated_sum(each)

    gradient = grad(product, argnums=(0, 1, 2))
    assert str(gradient.type_signature.result) == (
        "<float32@SERVER,{float32}@CLIENTS,{float32}@CLIENTS>"
    )
    by_rate, by_shared, by_x = gradient(2.0, 5.0, F32([1, 3]))
    assert by_rate == 20
    assert list(by_shared) == [2, 6]
    assert list(by_x) == [10, 10]


def test_structs_of_placed_values():
    @fc.federated_computation({"w": SCALAR, "x": SCALARS})
    def product(both):
        here = fc.federated_broadcast(both["w"])
        return fc.federated_sum(fc.federated_map(jnp.multiply, here, both["x"]))

    gradient = grad(product)({"w": 3.0, "x": [1.0, 2.0]})
    assert gradient["w"] == 3
    assert list(gradient["x"]) == [3, 3]


def test_constants_stay_out_of_the_edges():
    table = np.arange(3, dtype=F32)

    @fc.federated_computation(SCALAR)
    def constant(w):
        here = fc.federated_broadcast(fc.federated_value(F32(2), fc.SERVER))
        each = fc.federated_map(
            lambda w, c: c * w * w * jnp.asarray(table).sum(), fc.federated_broadcast(w), here
        )
        return fc.federated_sum(each)

    gradient = grad(constant)
    assert labels(gradient) == [("Broadcast", "value"), ("Sum", "value")]
    assert float(gradient(5.0, num_clients=2)) == 2 * 2 * 2 * 5 * 3


def test_unused_argument_has_gradient_zero():
    @fc.federated_computation(SCALAR, SCALARS)
    def ignores(w, x):
        return fc.federated_mean(x)

    assert float(grad(ignores)(5.0, [1.0, 2.0])) == 0


def test_gradient_inside_jax_transformations():
    """A gradient is traced by jit and vmap as any computation is."""
    gradient = grad(loss_of_examples)
    x = fc.Federated(F32([1, 2, 3]), fc.CLIENTS)

    @jax.jit
    @jax.vmap
    def of(w):
        return gradient(fc.Federated(w, fc.SERVER), x).value

    np.testing.assert_allclose(of(F32([2, 5])), [0, 6], atol=1e-6)

    @jax.jit
    def made_inside(w):
        return grad(loss_of_examples)(fc.Federated(w, fc.SERVER), x).value

    np.testing.assert_allclose(made_inside(F32(5)), 6, rtol=1e-6)


def test_threads():
    """J-63: threads that differentiate and run different programs do not disturb each other."""
    found = {}

    def work(k):
        @fc.federated_computation(SCALAR, SCALARS)
        def scaled(w, x):
            each = fc.federated_map(lambda w, x: k * w * x, fc.federated_broadcast(w), x)
            return fc.federated_sum(each)

        found[k] = [float(grad(scaled)(1.0, [1.0] * n)) for n in (1, 2, 3)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [k, 2 * k, 3 * k] for k in range(1, 5)}
