"""Types: their notation, what is assignable to what, conversion and inference."""

from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.language.inference import is_average_compatible, is_sum_compatible, template
from fedjax_core.language.types import (
    is_shape_assignable,
)

INT, FLOAT = fc.TensorType(np.int32), fc.TensorType(np.float32)


class Point(NamedTuple):
    x: object
    y: object


def at_clients(t, all_equal=None):
    return fc.FederatedType(t, fc.CLIENTS, all_equal)


def at_server(t, all_equal=None):
    return fc.FederatedType(t, fc.SERVER, all_equal)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (fc.TensorType(np.int32, (2, None)), "int32[2,?]"),  # C-01
        (fc.StructType([("a", np.int32), np.bool_, ("c", [])]), "<a=int32,bool,c=<>>"),  # C-03
        (fc.FunctionType(None, np.int32), "( -> int32)"),  # C-05
        (
            at_clients(fc.SequenceType(fc.StructType([np.float32, np.int32]))),
            "{<float32,int32>*}@CLIENTS",
        ),  # C-07
        (
            fc.SequenceType(OrderedDict(x=(np.float32, [None, 784]), y=(np.int32, [None]))),
            "<x=float32[?,784],y=int32[?]>*",
        ),  # C-09
        (
            fc.StructType(
                [fc.StructType([fc.StructType([np.int32, np.float32]), np.bool_]), np.str_]
            ),
            "<<<int32,float32>,bool>,str>",
        ),  # C-11
        (fc.PlacementType(), "placement"),  # C-13
        (fc.StructType([]), "<>"),  # C-13
        (at_clients(np.float32), "{float32}@CLIENTS"),
        (at_clients(np.float32, True), "float32@CLIENTS"),
        (at_server(np.float32), "float32@SERVER"),
        (at_server(np.float32, False), "{float32}@SERVER"),
        (fc.FunctionType(fc.AbstractType("T"), fc.AbstractType("U")), "(T -> U)"),
        (fc.TensorType(jnp.bfloat16, [3]), "bfloat16[3]"),
        (fc.infer_type(jax.random.key(0)), "key<fry>"),
    ],
)
def test_notation(t, expected):
    """C-01 to C-13."""
    assert str(t) == expected


INT_PAIR = fc.to_type([("a", np.int32), ("b", np.int32)])


@pytest.mark.parametrize(
    ("target", "source", "expected"),
    [
        (fc.TensorType(np.int32, None), fc.TensorType(np.int32, (2,)), True),  # C-15
        (fc.TensorType(np.int32, (2,)), fc.TensorType(np.int32, None), False),  # C-15
        (fc.TensorType(np.int64), INT, False),  # C-17
        (fc.TensorType(np.float64), FLOAT, False),  # C-17
        (INT_PAIR, fc.to_type([("b", np.int32), ("a", np.int32)]), False),  # C-19
        (INT_PAIR, fc.to_type((np.int32, np.int32)), True),
        (fc.to_type((np.int32, np.int32)), INT_PAIR, False),
        (INT_PAIR, fc.to_type({"a": np.int32, "b": np.int32}), True),
        (fc.to_type((np.int32, np.int32)), fc.to_type([INT, INT]), True),
        (INT_PAIR, fc.to_type([INT]), False),
        (INT_PAIR, INT, False),
        (at_clients(INT), at_clients(INT, True), True),  # C-21
        (at_clients(INT, True), at_clients(INT), False),  # C-21
        (at_server(INT), at_clients(INT, True), False),  # C-21
        (fc.FunctionType(None, (np.int32, [None])), fc.FunctionType(None, (np.int32, [3])), True),
        (fc.FunctionType(None, np.int32), fc.FunctionType(np.int32, np.int32), False),  # C-23
        (
            fc.FunctionType((np.int32, [3]), np.int32),
            fc.FunctionType((np.int32, [None]), np.int32),
            True,
        ),
        (
            fc.FunctionType((np.int32, [None]), np.int32),
            fc.FunctionType((np.int32, [3]), np.int32),
            False,
        ),
        (fc.SequenceType((np.int32, [None])), fc.SequenceType((np.int32, [4])), True),
        (fc.SequenceType(np.int32), INT, False),
        (INT, fc.AbstractType("T"), False),
        (fc.PlacementType(), fc.PlacementType(), True),
        (fc.PlacementType(), INT, False),
    ],
)
def test_assignability(target, source, expected):
    """C-15 to C-23: strict dtypes, unknown dimensions, names, placements, contravariance."""
    assert target.is_assignable_from(source) is expected


def test_abstract_types_are_not_comparable():
    """C-25."""
    with pytest.raises(TypeError, match=r"Abstract types are not comparable\."):
        fc.AbstractType("T").is_assignable_from(fc.AbstractType("T"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: at_server(at_clients(INT)),
        lambda: at_server(fc.FunctionType(None, INT)),
        lambda: fc.SequenceType(fc.SequenceType(INT)),
        lambda: fc.SequenceType(at_clients(INT)),
        lambda: at_clients([("a", at_server(INT))]),
        lambda: fc.SequenceType([INT, [fc.FunctionType(None, INT)]]),
    ],
)
def test_types_that_may_not_stand_inside_others(make):
    """C-27: refused as a ValueError, at any depth."""
    with pytest.raises(ValueError, match="Expected no"):
        make()


@pytest.mark.parametrize(
    ("t", "can_sum", "can_average"),
    [
        (INT, True, False),  # C-29
        (fc.TensorType(jnp.bfloat16), True, True),  # C-29
        (fc.to_type((np.complex128, np.float32, np.float64)), True, True),  # C-29
        (at_clients(INT), True, False),  # C-29
        (fc.to_type((np.complex64, [np.float16])), True, True),
        (fc.TensorType(np.bool_), False, False),
        (fc.TensorType(np.str_), False, False),
        (fc.TensorType(np.float32, (None,)), False, False),
        (fc.TensorType(np.float32, None), False, False),
        (fc.SequenceType(np.float32), False, False),
        (fc.FunctionType(None, np.float32), False, False),
        (fc.AbstractType("T"), False, False),
        (fc.PlacementType(), False, False),
        (fc.infer_type(jax.random.key(0)), False, False),
        (fc.to_type([INT, np.bool_]), False, False),
        (fc.StructType([]), True, True),
    ],
)
def test_what_can_be_summed_and_averaged(t, can_sum, can_average):
    """C-29 and the reasons to refuse."""
    assert is_sum_compatible(t) is can_sum
    assert is_average_compatible(t) is can_average


@pytest.mark.parametrize(
    ("target", "source", "expected"),
    [
        ((2, None), (2, 3), True),
        (None, (2, 3), True),
        (None, (), True),
        ((2, 3), (), False),
        ((2, 3), (20, 3), False),
        ((), (None, None), False),
        ((None, None), (), False),
        ((None,), (0,), True),
        ((2, 3), (2, None), False),
    ],
)
def test_shapes(target, source, expected):
    """C-31; an unknown dimension of the source fits no known one."""
    assert is_shape_assignable(target, source) is expected


def test_equality_knows_the_container_and_equivalence_does_not():
    as_tuple, as_list = fc.to_type((INT, INT)), fc.to_type([INT, INT])
    assert as_tuple != as_list
    assert as_tuple.is_equivalent_to(as_list)
    assert as_tuple == fc.to_type((INT, INT))
    assert hash(as_tuple) == hash(fc.to_type((INT, INT)))
    assert not fc.TensorType(np.int32, (None,)).is_equivalent_to(fc.TensorType(np.int32, (2,)))


def test_check_names_both_types():
    with pytest.raises(TypeError, match=r"`w` to be assignable to type int32, got type float32"):
        INT.check_assignable_from(FLOAT, "`w`")
    assert INT.check_assignable_from(INT) is INT


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (np.float32, "float32"),
        (np.dtype("int8"), "int8"),
        (jnp.bfloat16, "bfloat16"),
        (np.float64, "float64"),
        ((np.float32, [3, None]), "float32[3,?]"),
        ((np.float32, []), "float32"),
        ((np.int32, np.float32), "<int32,float32>"),
        ([np.int32], "<int32>"),
        (("a", np.int32), "<a=int32>"),
        ([("b", np.int32), ("a", np.bool_)], "<b=int32,a=bool>"),
        ({"b": np.int32, "a": [np.bool_]}, "<a=<bool>,b=int32>"),
        (OrderedDict(b=np.int32, a=np.bool_), "<b=int32,a=bool>"),
        (Point(np.int32, (np.bool_, [2])), "<x=int32,y=bool[2]>"),
        (jax.ShapeDtypeStruct((4,), jnp.int8), "int8[4]"),
        ((), "<>"),
        ([], "<>"),
    ],
)
def test_to_type(spec, expected):
    """Specifications of tensors and of Python containers."""
    assert str(fc.to_type(spec)) == expected


@pytest.mark.parametrize(
    "spec", [float, int, None, np.zeros(3), jnp.zeros(3), "abc", 3, object(), np.float32(1)]
)
def test_to_type_refuses_values(spec):
    """C-39: Python's types and concrete values are no types, and the message says what is."""
    with pytest.raises(TypeError, match="Expected"):
        fc.to_type(spec)


@pytest.mark.parametrize("dtype", [object, "datetime64[s]", np.void, "no such dtype"])
def test_dtypes_that_do_not_exist(dtype):
    with pytest.raises(TypeError, match="dtype"):
        fc.TensorType(dtype)


def test_fields_have_different_names():
    with pytest.raises(TypeError, match=r"\['a'\] more than once"):
        fc.StructType([("a", INT), ("a", FLOAT)])


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


def test_contains():
    t = at_clients([("a", fc.SequenceType(np.float32))])
    assert t.contains(fc.SequenceType)
    assert t.contains(fc.FederatedType)
    assert not t.contains(fc.FunctionType)


def test_placements_are_checked():
    with pytest.raises(TypeError, match="CLIENTS or SERVER"):
        fc.FederatedType(np.float32, "clients")
    with pytest.raises(TypeError, match="CLIENTS or SERVER"):
        fc.Federated(np.zeros(3), "clients")
