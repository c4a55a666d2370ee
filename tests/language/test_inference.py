"""The types of values, and what can be done with values of a type."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.inference import (
    check_sum_compatible,
    infer_type,
    is_average_compatible,
    is_integer_compatible,
    is_min_max_compatible,
    is_sum_compatible,
    template,
    why_not_averageable,
    why_not_integers,
    why_not_orderable,
    why_not_summable,
)
from fedjax_core.language.notation import parse_type


class Point(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaled:
    """A struct that looks like an array."""

    values: object
    shape: tuple = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})


def test_a_pytree_with_a_shape_and_a_dtype_is_a_struct():
    value = Scaled(jnp.zeros((2, 8), jnp.int8), (3, 5), np.dtype(np.float32))
    assert str(infer_type(value)) == "<values=int8[2,8]>"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: object
    right: object


@chex.dataclass
class Checked:
    left: object
    right: object


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (10, "int32"),  # C-35
        (0.5, "float32"),
        (True, "bool"),
        ("abc", "str"),
        (1j, "complex128"),
        (2**31 - 1, "int32"),
        (-(2**31), "int32"),
        (2**31, "int64"),
        (np.array([[10], [20]], np.int64), "int64[2,1]"),  # C-37
        (np.float16(1), "float16"),
        (jnp.zeros((2, 0), jnp.bfloat16), "bfloat16[2,0]"),
        ({"b": 1, "a": (0.5, [True])}, "<a=<float32,<bool>>,b=int32>"),
        (Point(1, ()), "<x=int32,y=<>>"),
        (
            fc.Sequence({"x": np.zeros((4, 2))}, np.int32(0), np.int32(3), 4),
            "<x=float64[2]>*",
        ),
        (fc.Sequence(np.zeros((5, 4, 2)), np.zeros(5), np.zeros(5), 4), "float64[2]*"),
        (fc.Sequence(np.zeros((9, 2)), np.zeros(5), np.zeros(5), 4, packed=True), "float64[2]*"),
    ],
)
def test_infer_type(value, expected):
    """C-35, C-37: Python numbers; arrays keep their dtype; containers; sequences."""
    assert str(fc.infer_type(value)) == expected


def test_integers_beyond_64_bits_have_no_type():
    with pytest.raises(ValueError, match="64 bits"):
        fc.infer_type(2**63)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 1, [object()]])
def test_infer_type_refuses_what_is_no_array(value):
    with pytest.raises(TypeError, match="Expected"):
        fc.infer_type(value)


def test_types_keep_their_python_container():
    """A template has the containers and the dtypes that arrays have without 64 bits."""
    value = {"p": Point(np.zeros(2), [np.int64(1)]), "q": ()}
    blank = template(fc.infer_type(value))
    assert jax.tree.structure(blank) == jax.tree.structure(value)
    assert [x.dtype for x in jax.tree.leaves(blank)] == [np.float32, np.int32]


@pytest.mark.parametrize("t", [fc.TensorType(np.float32, (None,)), fc.TensorType(np.str_)])
def test_no_template_without_a_shape_and_a_dtype(t):
    with pytest.raises(TypeError, match="Expected"):
        template(t)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), "float64"),  # an instance of float
        (np.complex64(1j), "complex64"),
        (np.str_("abc"), "str"),
        (np.array(["a", "b"]), "str[2]"),
        (b"abc", "str"),
        (np.array([[10], [20]]), "int64[2,1]"),  # C-37
        (np.zeros(2, ">f4"), "float32[2]"),
        (np.bool_(True), "bool"),
        (-(2**63), "int64"),
        (2**63 - 1, "int64"),
        (jax.random.key(0), "key<fry>"),
        (jax.random.split(jax.random.key(0, impl="rbg"), 3), "key<rbg>[3]"),
        (jax.ShapeDtypeStruct((2,), jnp.int8), "int8[2]"),
        (jnp.zeros(3, jnp.int4), "int4[3]"),
        (None, "<>"),
        ({"a": None, "b": ()}, "<a=<>,b=<>>"),
        (Pair(1, True), "<left=int32,right=bool>"),
        (Checked(left=1, right=True), "<left=int32,right=bool>"),
        ({0: 1, 1: True}, "<'0'=int32,'1'=bool>"),
        ({"Dense_0/kernel": 1}, "<'Dense_0/kernel'=int32>"),
        (
            optax.adam(0.1).init({"w": jnp.zeros(2)}),
            "<<count=int32,mu=<w=float32[2]>,nu=<w=float32[2]>>,<>>",
        ),
    ],
)
def test_infer_type_of_many_kinds(value, expected):
    """Arrays and scalars of NumPy keep their dtype; every registered pytree is a struct."""
    t = fc.infer_type(value)
    assert str(t) == expected
    assert parse_type(expected).is_equivalent_to(t)


def test_the_container_of_an_optimiser_state_is_kept():
    state = optax.adam(0.1).init({"w": jnp.zeros(2)})
    assert jax.tree.structure(template(fc.infer_type(state))) == jax.tree.structure(state)


def test_infer_type_of_federated_values():
    """There is no clients axis in a type."""
    rows = fc.Sequence(np.zeros((5, 4, 2)), np.zeros(5), np.zeros(5), 4)
    stacked = fc.Federated({"x": np.zeros((5, 3)), "rows": rows}, fc.CLIENTS)
    assert str(fc.infer_type(stacked)) == "{<rows=float64[2]*,x=float64[3]>}@CLIENTS"
    same = fc.Federated(np.zeros((5, 3)), fc.CLIENTS, all_equal=True)
    assert str(fc.infer_type(same)) == "float64[5,3]@CLIENTS"
    assert str(fc.infer_type(fc.Federated(0.5, fc.SERVER))) == "float32@SERVER"
    assert str(fc.infer_type([same, 1])) == "<float64[5,3]@CLIENTS,int32>"
    with pytest.raises(FederatedTypeError, match=r"clients axis .* at \.b; stack"):
        fc.infer_type(fc.Federated({"a": np.zeros(3), "b": 1}, fc.CLIENTS))


@pytest.mark.parametrize(
    "bad",
    [
        object(),
        {1, 2},
        np.array([object()]),
        np.datetime64("2020-01-01"),
        np.float32,
        int,
        "x".join,
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_leaf_without_a_type_is_named(bad):
    with pytest.raises(FederatedTypeError, match=r" at \.a\[1\]\.x\b"):
        fc.infer_type({"a": [1, Point(bad, 1)], "b": object()})


def test_types_are_no_values():
    with pytest.raises(FederatedTypeError, match=r"the type TensorType\('int32'\); use to_type"):
        fc.infer_type(fc.TensorType(np.int32))


def test_integers_beyond_64_bits_are_named():
    with pytest.raises(ValueError, match=r"at most 64 bits at \.a, got one of 65"):
        fc.infer_type({"a": -(2**64)})
    with pytest.raises(ValueError, match="64 bits"):
        fc.infer_type(10**10_000)


@pytest.mark.parametrize(
    ("text", "sum_", "average", "order", "integers"),
    [
        ("int32", True, False, True, True),  # C-29
        ("bfloat16", True, True, True, False),  # C-29
        ("<complex128,float32,float64>", True, True, False, False),  # C-29
        ("{int32}@CLIENTS", True, False, True, True),  # C-29
        ("<complex64,<float16>>", True, True, False, False),
        ("<a=int8,b=<uint64[3]>>", True, False, True, True),
        ("int4", True, False, True, True),
        ("float8_e4m3fn[2]", True, True, True, False),
        ("bool", False, False, False, False),
        ("str", False, False, False, False),
        ("float32[?]", False, False, False, False),
        ("int32[?]", False, False, False, False),
        ("'int32'(shape=None)", False, False, False, False),
        ("int32*", False, False, False, False),
        ("( -> float32)", False, False, False, False),
        ("T", False, False, False, False),
        ("placement", False, False, False, False),
        ("key<fry>", False, False, False, False),
        ("<int32,bool>", False, False, False, False),
        ("<>", True, True, True, True),
    ],
)
def test_what_can_be_done_with_values(text, sum_, average, order, integers):
    """C-29 and the reasons to refuse."""
    t = parse_type(text)
    assert is_sum_compatible(t) is sum_
    assert is_average_compatible(t) is average
    assert is_min_max_compatible(t) is order
    assert is_integer_compatible(t) is integers
    reasons = (why_not_summable, why_not_averageable, why_not_orderable, why_not_integers)
    given = [reason(t) is None for reason in reasons]
    assert given == [sum_, average, order, integers]


@pytest.mark.parametrize(
    ("reason", "text", "expected"),
    [
        (why_not_summable, "{<w=float32,mask=bool>}@CLIENTS", "bool cannot be summed at .mask"),
        (why_not_summable, "bool", "bool cannot be summed"),
        (why_not_summable, "<'a/b'=<int32,str>>", "str cannot be summed at ['a/b'][1]"),
        (why_not_summable, "<float32[?]>", "float32[?] of unknown shape cannot be summed at [0]"),
        (why_not_summable, "<x=int32*>", "int32* cannot be summed at .x"),
        (why_not_averageable, "<a=float32,b=int32>", "int32 cannot be averaged at .b"),
        (why_not_orderable, "<complex64>", "complex64 cannot be ordered at [0]"),
        (why_not_integers, "<a=int32,b=float32>", "float32 cannot be summed securely at .b"),
    ],
)
def test_reasons_name_the_leaf(reason, text, expected):
    assert reason(parse_type(text)) == expected


def test_check_sum_compatible():
    """C-29."""
    for text in ("int32", "bfloat16", "<complex128,float32,float64>", "{int32}@CLIENTS"):
        check_sum_compatible(parse_type(text))
    with pytest.raises(TypeError, match=r"`v` to be numbers .* bool cannot be summed at \.m;"):
        check_sum_compatible(parse_type("<m=bool>"), "`v`")


def test_masked_arrays_have_no_type():
    """Their mask would be lost."""
    masked = np.ma.array([1.0, 2.0], mask=[False, True])
    with pytest.raises(FederatedTypeError, match=r"without a mask at \.x, got a masked one"):
        fc.infer_type({"x": masked})


def test_the_elements_of_a_sequence_are_arrays():
    with pytest.raises(
        FederatedTypeError, match=r"one of rows in a sequence, got 1 at \.rows\[0\]"
    ):
        fc.infer_type({"rows": fc.Sequence([1, 2], np.int32(0), np.int32(2), 2)})
    with pytest.raises(FederatedTypeError, match=r"clients axis .* got 'a'"):
        fc.infer_type(fc.Federated("a", fc.CLIENTS))
