"""Secure sums: totals, bounds, what is reported, and the bits of a field that holds the sum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import ArgumentError, FederatedTypeError

INT = fc.FederatedType(np.int32, fc.CLIENTS)
PAIR = fc.FederatedType((np.int32, [2]), fc.CLIENTS)
MODES = {
    "reference": fc.Execution(mode="reference"),
    "stacked": fc.Execution(mode="stacked"),
    "streamed 1": fc.Execution(mode="streamed", lanes=1),
    "streamed 3": fc.Execution(mode="streamed", lanes=3),
}


def modular(modulus, t=INT):
    return fc.federated_computation(lambda x: fc.federated_secure_modular_sum(x, modulus), t)


def bounded(upper, lower=0, t=INT, **options):
    return fc.federated_computation(
        lambda x: fc.federated_secure_sum(x, upper, min_input=lower, **options), t
    )


def clients(values, dtype=np.int32):
    return fc.Federated(np.asarray(values, dtype), fc.CLIENTS)


@pytest.mark.parametrize(
    ("values", "modulus", "expected"),
    [
        ([1], 5, 1),  # C-61
        ([1, 2], 5, 3),  # C-61
        ([1, 2, 10], 5, 3),  # C-61
        ([0, 5, 10, 15, 20], 5, 0),  # C-61
        ([-1], 5, 4),  # C-61
        ([0, 1, 1], 2, 0),  # C-79
        ([1, 2, 3, 4], 8, 2),  # C-79
        ([220], 22, 0),  # C-79
        ([-1, 7], 22, 6),  # C-79
        ([], 5, 0),
        ([3, 4, 5], 1, 0),
    ],
)
def test_modular_sums(values, modulus, expected):
    """C-61, C-79: each client reduces its value first, negative ones to non-negative ones."""
    total = modular(modulus)
    assert total(values) == expected
    reference = total.lower(fc.Execution(mode="reference"))
    assert int(reference(clients(values))[0].value) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[1, 2], [3, 4], [10, 15]], [4, 0]), ([[1, 2], [3, 4], [10, 14]], [4, 6])],
)
def test_modular_sums_of_structs(values, expected):
    """C-63: a modulus for each leaf; one for all where it is a single int."""
    t = fc.FederatedType((fc.TensorType(np.int32), fc.TensorType(np.int32)), fc.CLIENTS)
    assert list(modular((5, 7), t)([tuple(row) for row in values])) == expected
    assert list(modular([5, 7], t)([tuple(row) for row in values])) == expected
    sums = np.sum(values, axis=0) % 5
    assert modular(5, PAIR)(values).tolist() == sums.tolist()


def test_a_modulus_has_to_fit_the_dtype():
    for dtype, modulus in ((np.int8, 127), (np.uint8, 255), (np.uint32, 2**31 - 1)):
        t = fc.FederatedType(dtype, fc.CLIENTS)
        assert modular(modulus, t)([modulus - 1, 2]) == 1
        with pytest.raises(ArgumentError, match=f"got {modulus + 1}"):
            modular(modulus + 1, t)


def test_bounds_are_checked():
    """C-65: max 1 on [2, 4] is an error; max 30 on [1, 2, 10] is 13. Q10: so are negatives."""
    with pytest.raises(ArgumentError, match="got 0 below and 2 above"):
        bounded(1)([2, 4])
    assert bounded(30)([1, 2, 10]) == 13
    with pytest.raises(ArgumentError, match="got 1 below and 0 above"):
        bounded(30)([-5, 2])
    assert bounded(30, lower=-5)([-5, 2]) == -3
    assert bounded(1)([]) == 0


def test_bounds_are_checked_for_federated_arguments_too():
    with pytest.raises(ArgumentError, match="2 above"):
        bounded(1)(clients([2, 4]))


def test_inside_a_transformation_values_are_clipped():
    """Nothing can be raised there."""
    assert int(jax.jit(bounded(1))(clients([2, 4])).value) == 2
    assert int(bounded(1).lower()(clients([2, 4]))[0].value) == 2


@pytest.mark.parametrize("mode", MODES)
def test_what_is_clipped_is_reported(mode):
    """C-81: bounds of +-1 on [-2, -1, 0, 1, 2, 3] give 1, with 2 above and 1 below."""
    values = [-2, -1, 0, 1, 2, 3]
    total = bounded(1, lower=-1, report_clipped=True)
    assert str(total.type_signature.result) == (
        "<total=int32,num_below=int32,num_above=int32>@SERVER"
    )
    assert tuple(map(int, total(values))) == (1, 1, 2)
    result = total.lower(MODES[mode])(clients(values))[0].value
    assert isinstance(result, fc.SecureTotal)
    assert tuple(map(int, result)) == (1, 1, 2)
    padded = total.lower(MODES[mode])(clients([*values, 9, -9]), valid=np.arange(8) < 6)
    assert tuple(map(int, padded[0].value)) == (1, 1, 2)


def test_bounds_for_each_leaf():
    t = fc.FederatedType({"a": np.int32, "b": (np.int32, [2])}, fc.CLIENTS)
    rows = [{"a": 5, "b": [-3, 3]}, {"a": 1, "b": [0, 9]}]
    total = bounded({"a": 2, "b": 4}, {"a": 0, "b": -1}, t, report_clipped=True)
    result = total(rows)
    assert (result.total["a"], result.total["b"].tolist()) == (3, [-1, 7])
    assert (result.num_below, result.num_above) == (1, 2)
    with pytest.raises(FederatedTypeError, match="struct of ints like <a=int32"):
        bounded({"a": 2}, t=t)


@pytest.mark.parametrize(("bitwidth", "largest"), [(1, 1), (4, 15), (31, 2**31 - 1)])
def test_bit_widths(bitwidth, largest):
    total = fc.federated_computation(lambda x: fc.federated_secure_sum_bitwidth(x, bitwidth), INT)
    assert total([largest, 0]) == largest
    for value in (-1, largest + 1):
        if value <= 2**31 - 1:
            with pytest.raises(ArgumentError, match="secure sum"):
                total([value])


def test_sums_saturate():
    """As other sums of integers do: the field is wide enough, the dtype of the result is not."""
    assert bounded(2**31 - 1)([2**31 - 1, 5]) == 2**31 - 1
    assert bounded(127, t=fc.FederatedType(np.int8, fc.CLIENTS))([100, 100]) == 127


@pytest.mark.parametrize("num_clients", [0, 1, 2, 3, 4, 5, 8, 9, 100])
def test_bits_of_bounded_sums(num_clients):
    """An element takes ceil(log2(n (upper - lower) + 1)) bits: what the sum of n of them takes."""
    for lower, upper in ((0, 1), (0, 255), (0, 256), (-1, 1), (5, 5)):
        each = 2 * math.ceil(math.log2(max(num_clients, 1) * (upper - lower) + 1))
        row = fc.communication(bounded(upper, lower, PAIR), num_clients=num_clients)[0]
        assert (row.bits_per_client, row.bits) == (each, num_clients * each)


@pytest.mark.parametrize("mode", MODES)
def test_ledgers_of_bounded_sums(mode):
    """Padding sends nothing, and makes nobody's numbers longer: 5 clients of 6, 8 + 3 bits."""
    run = bounded(255, t=PAIR).lower(MODES[mode])
    valid = np.array([True, True, False, True, True, True])
    assert int(run(clients(np.zeros((6, 2))), valid=valid)[1][0]) == 5 * 2 * (8 + 3)
    assert int(run(clients(np.zeros((0, 2))))[1][0]) == 0


def test_bits_of_modular_sums():
    """The field is that of the modulus, however many clients there are."""
    for modulus, width in ((1, 0), (2, 1), (5, 3), (8, 3), (9, 4), (2**31 - 1, 31)):
        assert int(modular(modulus, PAIR).lower()(clients(np.zeros((6, 2))))[1][0]) == 12 * width


def test_bits_of_reports():
    """Each count of clipped numbers is a number of the sum as well: 2 elements, 4 clients."""
    total = bounded(15, t=PAIR, report_clipped=True)
    width = (4 + 2) * 2 + (2 + 2) * 2
    assert int(total.lower()(clients(np.zeros((4, 2))))[1][0]) == 4 * width


def test_edges_are_blind():
    def body(x):
        return fc.federated_secure_sum(x, 3), fc.federated_sum(x), fc.federated_collect(x)

    report = fc.communication(fc.federated_computation(body, INT), num_clients=2)
    assert [edge.visibility for edge in report] == ["blind", "clear", "clear"]


def test_secure_sums_meet_other_operators():
    """Quantise, sum securely, and scale back at the server."""

    @fc.federated_computation(fc.FederatedType(np.float32, fc.CLIENTS))
    def average(x):
        steps = fc.federated_map(lambda x: jnp.round(x * 10).astype(jnp.int32), x)
        total = fc.federated_secure_sum(steps, 100, min_input=-100)
        return fc.federated_map(lambda t, n: t / (10 * n), total, fc.federated_count())

    assert average([0.5, -1.0, 2.0]) == pytest.approx(0.5)
