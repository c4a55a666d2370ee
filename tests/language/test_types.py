"""Types: their notation, what is assignable to what, conversion and inference."""

from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.notation import parse_type

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
        (fc.TensorType(np.int32, None), fc.TensorType(np.int32, None), True),
        (fc.TensorType(np.int32, None), fc.TensorType(np.int64, (2,)), False),
        (fc.TensorType(np.int32, (None, 3)), fc.TensorType(np.int32, (2, None)), False),
        (fc.StructType([("a", INT), INT]), fc.to_type((INT, INT)), True),
        (fc.to_type((INT, INT)), fc.StructType([("a", INT), INT]), False),
        (fc.StructType([]), fc.StructType([]), True),
        (fc.StructType([]), fc.to_type(((),)), False),
        (at_server(INT), INT, False),
        (INT, at_server(INT), False),
        (at_server(INT, False), at_server(INT), True),
        (at_server(INT), at_server(INT, False), False),
        (at_clients((np.int32, [None])), at_clients((np.int32, [3]), True), True),
        (at_clients(INT), at_server(INT), False),
        (fc.FunctionType(INT, INT), fc.FunctionType(None, INT), False),
        (fc.FunctionType(None, INT), INT, False),
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


@pytest.mark.parametrize("elements", [5, "ab", None, [5], [("a", 5)], [("a", None)]], ids=str)
def test_structs_have_types_as_fields(elements):
    with pytest.raises(FederatedTypeError, match="Expected"):
        fc.StructType(elements)


def test_the_container_has_as_many_fields():
    with pytest.raises(FederatedTypeError, match="a container of 1 fields"):
        fc.StructType([INT], jax.tree.structure((0, 0)))


@pytest.mark.parametrize("label", ["", "t", "1", "T U", "T*", 5, None])
def test_labels_begin_with_an_upper_case_letter(label):
    """So that no label is a dtype, and a misspelt dtype no label."""
    with pytest.raises(FederatedTypeError, match="upper-case"):
        fc.AbstractType(label)


def test_keys_of_a_dict_have_an_order():
    with pytest.raises(FederatedTypeError, match="keys of a dict one type"):
        fc.to_type({1: INT, "a": INT})


def test_a_named_tuple_of_a_dtype_and_nothing_is_a_struct():
    """It is no pair of a dtype and a shape."""
    assert str(fc.to_type(Point(np.int32, ()))) == "<x=int32,y=<>>"


def test_all_equal_is_a_truth_value():
    with pytest.raises(FederatedTypeError, match="as all_equal, got 'yes'"):
        at_clients(INT, "yes")
    assert at_clients(INT, np.True_) == at_clients(INT, True)


def test_types_are_immutable_and_hashable():
    """Equal types have equal hashes, so that they work as keys."""
    texts = ["int32[2]", "<a=int32>", "int32*", "{int32}@CLIENTS", "(T -> <T>)", "placement"]
    types = {parse_type(text): text for text in texts}
    for text in texts:
        assert types[parse_type(text)] == text
        t = parse_type(text)
        with pytest.raises((AttributeError, TypeError)):
            t.shape = ()


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (
            "<a=int32,b=<w=float32[3]>>",
            "<a=int32,b=<w=float32[4]>>",
            r"at \.b\.w expected float32\[3\], got float32\[4\]",
        ),
        (
            "<'x/y'=<int32,int32>>",
            "<'x/y'=<int32,bool>>",
            r"at \['x/y'\]\[1\] expected int32, got bool",
        ),
        (
            "<a=int32,b=int32>",
            "<b=int32,a=int32>",
            r"at \[0\] .* called 'a', got a field called 'b'",
        ),
        (
            "<int32>",
            "<a=int32>",
            r"at \[0\] expected a field without a name, got a field called 'a'",
        ),
        ("<int32,a=bool>", "<int32>", r"at \[1\] expected a=bool, got no further field"),
        ("<int32>", "<int32,bool>", r"at \[1\] expected no further field, got bool"),
        ("{<x=int32*>}@CLIENTS", "{<x=bool*>}@CLIENTS", r"at \.x\[\*\] expected int32, got bool"),
        (
            "(<int32[3]> -> bool)",
            "(<bool> -> bool)",
            r"at \(parameter\)\[0\] expected int32\[3\], got bool",
        ),
        ("(int32 -> <bool>)", "(int32 -> <int32>)", r"at \(result\)\[0\] expected bool, got int32"),
    ],
)
def test_the_first_leaf_that_does_not_fit_is_named(target, source, message):
    with pytest.raises(FederatedTypeError, match=message) as caught:
        parse_type(target).check_assignable_from(parse_type(source), "`w`")
    assert f"Expected `w` to be assignable to type {target}, got type {source}: " in str(
        caught.value
    )


def test_messages_about_huge_types_are_short():
    fields = ",".join(f"layer_{i}=<kernel=float32[100,100],bias=float32[100]>" for i in range(999))
    target = parse_type(f"<{fields},last=int32>")
    with pytest.raises(FederatedTypeError, match=r" \.\.\. .*at \.last expected int32") as caught:
        target.check_assignable_from(parse_type(f"<{fields},last=bool>"))
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("int32", "int64", "equivalent to int32, got type int64"),
        ("<a=int32[?]>", "<a=int32[3]>", r"at \.a expected int32\[\?\], got int32\[3\]"),
        ("<a=int32[3]>", "<a=int32[?]>", r"at \.a expected int32\[3\], got int32\[\?\]"),
        ("<a=int32>", "<int32>", "at .0. expected a field called 'a', got a field without a name"),
        ("{int32}@CLIENTS", "int32@CLIENTS", "equivalent to {int32}@CLIENTS, got type int32@"),
    ],
)
def test_check_equivalent_to(first, second, message):
    """Both directions count, and the message always has the first type as the expected one."""
    t = parse_type(first)
    with pytest.raises(FederatedTypeError, match=message):
        t.check_equivalent_to(parse_type(second))
    assert t.check_equivalent_to(parse_type(first)) is t


def test_fields_have_different_names():
    with pytest.raises(TypeError, match=r"\['a'\] more than once"):
        fc.StructType([("a", INT), ("a", FLOAT)])


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


def containing_themselves():
    """A list in itself, twice, a dict, a list of named fields, one in another; and a deep nest."""
    once, twice, named, fields = [], [], {}, []
    once.append(once)
    twice.extend([twice, twice])
    named["a"] = named
    fields.append(("a", fields))
    deep = np.float32
    for _ in range(20_000):
        deep = [deep]
    return {
        "once": once,
        "twice": twice,
        "dict": named,
        "fields": fields,
        "in": (once,),
        "deep": deep,
    }


@pytest.mark.parametrize("name", ["once", "twice", "dict", "fields", "in", "deep"])
def test_what_contains_itself_has_no_type(name):
    """JAX would follow it until the interpreter's stack ends."""
    nest = containing_themselves()[name]
    for convert in (fc.to_type, fc.infer_type, fc.StructType, fc.Sequence.from_elements):
        with pytest.raises(FederatedTypeError, match=r"at most 100 deep, .* or contains itself"):
            convert(nest if convert is not fc.StructType else [nest])
    if name == "fields":  # the name is a value here, and has no clients axis
        return
    for value in (fc.Federated(nest, fc.CLIENTS), fc.Sequence(nest, 0, 0, 2)):
        with pytest.raises(FederatedTypeError, match=r"at most 100 deep, .* or contains itself"):
            fc.infer_type(value)


def test_100_containers_inside_one_another_have_a_type():
    spec, value = np.int32, 1
    for _ in range(100):
        spec, value = [spec], [value]
    assert str(fc.to_type(spec)) == "<" * 100 + "int32" + ">" * 100
    assert fc.infer_type(value) == fc.to_type(spec)
    with pytest.raises(FederatedTypeError, match="at most 100 deep"):
        fc.to_type([spec])
