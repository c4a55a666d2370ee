"""Labels of generic types, and the types that they stand for."""

import pytest

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.generics import (
    MismatchedConcreteTypesError,
    MismatchedStructureError,
    MissingDefiningUsageError,
    NotConcreteTypeError,
    UnassignableConcreteTypesError,
    check_concrete_instance_of,
)
from fedjax_core.language.notation import parse_type

AGGREGATE = "(<{T}@CLIENTS,U,(<U,T> -> U),(<U,U> -> U),(U -> R)> -> R@SERVER)"


def bindings(concrete, generic):
    found = check_concrete_instance_of(parse_type(concrete), parse_type(generic))
    return {label: str(t) for label, t in found.items()}


@pytest.mark.parametrize(
    ("concrete", "generic", "expected"),
    [
        ("(int32 -> int32)", "(T -> T)", {"T": "int32"}),
        ("(<int32,float32> -> float32)", "(<T,U> -> U)", {"T": "int32", "U": "float32"}),
        ("(<a=<>> -> <>)", "(<a=T> -> T)", {"T": "<>"}),
        ("int32[?]", "int32[?]", {}),
        ("( -> placement)", "( -> placement)", {}),
        ("(int32* -> int32)", "(T* -> T)", {"T": "int32"}),
        ("(<bool>@CLIENTS -> bool@SERVER)", "(<T>@CLIENTS -> T@SERVER)", {"T": "bool"}),
        (
            "(<(int32 -> bool),{int32}@CLIENTS> -> {bool}@CLIENTS)",
            "(<(T -> U),{T}@CLIENTS> -> {U}@CLIENTS)",
            {"T": "int32", "U": "bool"},
        ),
        (
            "(<{bool}@CLIENTS,int32,(<int32,bool> -> int32),(<int32,int32> -> int32),"
            "(int32 -> <float32>)> -> <float32>@SERVER)",
            AGGREGATE,
            {"T": "bool", "U": "int32", "R": "<float32>"},
        ),
        ("((int32 -> bool) -> bool)", "((int32 -> U) -> U)", {"U": "bool"}),
    ],
)
def test_bindings(concrete, generic, expected):
    assert bindings(concrete, generic) == expected


@pytest.mark.parametrize(
    ("concrete", "generic"),
    [
        ("(int32[3] -> int32[?])", "(T -> T)"),
        ("(int32[3] -> 'int32'(shape=None))", "(T -> T)"),
        ("(<(int32[?] -> bool),{int32[3]}@CLIENTS> -> bool)", "(<(T -> U),{T}@CLIENTS> -> U)"),
    ],
)
def test_a_usage_may_be_wider_than_the_definition(concrete, generic):
    assert "T" in bindings(concrete, generic)


@pytest.mark.parametrize(
    ("concrete", "generic"),
    [
        ("(int32 -> float32)", "(T -> T)"),  # C-33
        ("(int32[?] -> int32[3])", "(T -> T)"),
        ("(<(int32[3] -> bool),{int32[?]}@CLIENTS> -> bool)", "(<(T -> U),{T}@CLIENTS> -> U)"),
        ("(<{bool}@CLIENTS,(int32 -> bool)> -> bool)", "(<{T}@CLIENTS,(T -> U)> -> U)"),
    ],
)
def test_usages_that_do_not_fit(concrete, generic):
    """C-33: what is used has to be assignable from what is defined."""
    with pytest.raises(UnassignableConcreteTypesError, match=r"assignable from [TU] = "):
        bindings(concrete, generic)


@pytest.mark.parametrize(
    ("concrete", "generic"),
    [
        ("(<int32,float32> -> int32)", "(<T,T> -> T)"),
        ("(<int32[?],int32[3]> -> int32)", "(<T,T> -> T)"),
        ("(<{int32}@CLIENTS,float32@SERVER> -> int32)", "(<{T}@CLIENTS,T@SERVER> -> T)"),
        ("(<int32,( -> float32)> -> int32)", "(<T,( -> T)> -> T)"),
    ],
)
def test_definitions_that_disagree(concrete, generic):
    with pytest.raises(MismatchedConcreteTypesError, match="one type for T"):
        bindings(concrete, generic)


@pytest.mark.parametrize(
    ("concrete", "generic"),
    [
        ("int32", "<int32>"),
        ("<int32>", "int32"),
        ("<a=int32>", "<b=int32>"),
        ("<a=int32>", "<int32>"),
        ("<int32,int32>", "<int32>"),
        ("int32", "float32"),
        ("int32[3]", "int32[?]"),
        ("int32", "placement"),
        ("<int32>", "<>"),
        ("int32", "int32*"),
        ("(int32@CLIENTS -> int32)", "({T}@CLIENTS -> T)"),
        ("({int32}@CLIENTS -> int32)", "({T}@SERVER -> T)"),
        ("(int32 -> int32)", "( -> int32)"),
        ("( -> int32)", "(T -> int32)"),
        ("({int32}@CLIENTS -> int32)", "(T* -> T)"),
    ],
)
def test_another_structure(concrete, generic):
    with pytest.raises(MismatchedStructureError, match="of the form"):
        bindings(concrete, generic)


def test_the_place_is_named():
    with pytest.raises(MismatchedStructureError, match=r"form bool at \(parameter\)\.a\[1\], got"):
        bindings("(<a=<int32,str>> -> int32)", "(<a=<T,bool>> -> T)")


@pytest.mark.parametrize(
    ("concrete", "generic"),
    [
        ("int32", "T"),
        ("( -> int32)", "( -> T)"),
        ("(<int32,bool> -> int32)", "(<T,bool> -> U)"),
        ("((int32 -> bool) -> bool)", "((T -> bool) -> bool)"),
    ],
)
def test_labels_that_no_parameter_defines(concrete, generic):
    with pytest.raises((MissingDefiningUsageError, MismatchedStructureError)):
        bindings(concrete, generic)


def test_labels_only_in_results():
    with pytest.raises(MissingDefiningUsageError, match=r"stands only at \(result\)"):
        bindings("( -> int32)", "( -> T)")
    with pytest.raises(MissingDefiningUsageError, match="stands only at its root"):
        bindings("int32", "T")


@pytest.mark.parametrize("concrete", ["T", "(T -> T)", "(int32 -> <a=<U*>>)"])
def test_what_is_concrete_has_no_labels(concrete):
    with pytest.raises(NotConcreteTypeError, match="without labels"):
        bindings(concrete, "(T -> T)")


def test_only_types_are_compared():
    with pytest.raises(FederatedTypeError, match=r"as `concrete`, got 1 of type int"):
        check_concrete_instance_of(1, parse_type("T"))
    with pytest.raises(FederatedTypeError, match=r"as `generic`, got 'T' of type str"):
        check_concrete_instance_of(parse_type("int32"), "T")
