"""The notation of types: printing, formatting, and reading it again."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.dtypes import known_dtypes
from fedjax_core.language.notation import MAX_DEPTH, parse_type
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.types import (
    AbstractType,
    FederatedType,
    FunctionType,
    PlacementType,
    SequenceType,
    StructType,
    TensorType,
    to_type,
)

NAMES = st.one_of(
    st.none(),
    st.sampled_from(["a", "Dense_0", "", "0", "a,b=c", "int32", "'", "key<fry>"]),
    st.text(),
)
SHAPES = st.none() | st.lists(st.none() | st.integers(0, 2**63 - 1), max_size=3)
TENSORS = st.builds(TensorType, st.sampled_from(sorted(known_dtypes().values(), key=str)), SHAPES)
LABELS = st.builds(AbstractType, st.sampled_from(["T", "U", "Value_1", "Ö"]))


def structs_of(children):
    name_of_field = lambda field: field[0] if field[0] is not None else object()  # noqa: E731
    fields = st.lists(st.tuples(NAMES, children), max_size=4, unique_by=name_of_field)
    return st.builds(StructType, fields)


MEMBERS = st.recursive(TENSORS, structs_of, max_leaves=6)
WITH_SEQUENCES = st.recursive(st.builds(SequenceType, MEMBERS) | TENSORS, structs_of, max_leaves=6)
PLACED = st.builds(FederatedType, WITH_SEQUENCES, st.sampled_from([CLIENTS, SERVER]), st.booleans())
TYPES = st.recursive(
    st.one_of(WITH_SEQUENCES, PLACED, LABELS, st.just(PlacementType())),
    lambda children: structs_of(children) | st.builds(FunctionType, st.none() | children, children),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(TYPES)
def test_both_notations_are_read_back(t):
    """`parse_type` gives an equal type, for these have the containers that it gives."""
    for text in (str(t), t.formatted(), f" {t}\n"):
        again = parse_type(text)
        assert str(again) == str(t)
        assert again == t
        assert hash(again) == hash(t)


@pytest.mark.parametrize(
    "text",
    [
        "int32",
        "int32[2,?]",  # C-01
        "<a=int32,bool,c=<>>",  # C-03
        "( -> int32)",  # C-05
        "{<float32,int32>*}@CLIENTS",  # C-07
        "<x=float32[?,784],y=int32[?]>*",  # C-09
        "<<<int32,float32>,bool>,str>",  # C-11
        "placement",  # C-13
        "<>",  # C-13
        "'int32'(shape=None)",
        "'str'(shape=None)",
        "'key<fry>'(shape=None)",
        "key<fry>[3]",
        "{key<rbg>}@CLIENTS",
        "<key=key<urbg>,placement=placement,int32=bool,T=T>",
        "bfloat16[0]",
        "float32@CLIENTS",
        "{float32}@SERVER",
        "(<(T -> U),{T}@CLIENTS> -> {U}@CLIENTS)",
        "(( -> int32) -> (int32 -> ( -> <>)))",
        "<'Dense_0/kernel'=float32,Dense_0=<float32>,float32>",
        "<''=int32,'0'=int32,'a,b=c'=int32,\"it's\"=int32>",
        "<'\\n\\t\\\\\\x00\\ud800\\U000e0001'=int32>",
    ],
)
def test_notation_is_read(text):
    """The compact notation of the cases, and of names that are no identifiers."""
    assert str(parse_type(text)) == text


@pytest.mark.parametrize("name", sorted(known_dtypes()))
def test_every_dtype_of_jax(name):
    """Every dtype is read by the name that arrays of it print; keys of three implementations."""
    t = parse_type(f"{name}[2]")
    if name.startswith("key<"):
        impl = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}[name[4:-1]]
        assert t.dtype == jax.random.key(0, impl=impl).dtype
    elif name != "str":
        assert t.dtype == jnp.dtype(name)
        assert str(to_type((jnp.dtype(name), [2]))) == f"{name}[2]"


def test_there_is_no_dtype_without_a_name():
    """Those that JAX users meet are among them."""
    expected = {"bool", "int8", "uint64", "bfloat16", "float8_e4m3fn", "int4", "uint2", "str"}
    assert expected | {"complex128", "key<fry>", "key<rbg>"} <= set(known_dtypes())


def test_spaces_and_lines_do_not_matter():
    text = (
        "  ( < a = int32 [ 2 , ? ] ,\n'b c' = 'int32' ( shape = None ) *> ->\t{ bool } @ CLIENTS ) "
    )
    expected = "(<a=int32[2,?],'b c'='int32'(shape=None)*> -> {bool}@CLIENTS)"
    assert str(parse_type(text)) == expected


def test_formatted():
    """TFF's formatted notation: one field a line, and only structs break lines."""
    t = parse_type("(<a=int32,b=<float32,bool>> -> int32)")
    expected = "(<\n  a=int32,\n  b=<\n    float32,\n    bool\n  >\n> -> int32)"
    assert t.formatted() == expected
    t = parse_type("({<x=float32[3],y=<>>*}@CLIENTS -> <float32@SERVER>)")
    assert t.formatted() == ("({<\n  x=float32[3],\n  y=<>\n>*}@CLIENTS -> <\n  float32@SERVER\n>)")
    assert parse_type("(int32 -> bool*)").formatted() == "(int32 -> bool*)"


def test_repr_and_format():
    t = FederatedType(np.float32, CLIENTS)
    assert repr(t) == "FederatedType('{float32}@CLIENTS')"
    assert f"{t:>20}" == "   {float32}@CLIENTS"
    assert f"{t}" == str(t)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"Dense_0/kernel": np.int32}, "<'Dense_0/kernel'=int32>"),
        ({0: np.int32, 1: np.bool_}, "<'0'=int32,'1'=bool>"),
        ({"": np.int32}, "<''=int32>"),
        ({np.str_("a b"): np.int32}, "<'a b'=int32>"),
        ({(0, 1): np.int32}, "<'(0, 1)'=int32>"),
        ({"größe": np.int32}, "<größe=int32>"),
    ],
)
def test_names_that_are_no_identifiers(keys, expected):
    """The keys of dicts may be any string, or anything that has an order."""
    t = to_type(keys)
    assert str(t) == expected
    assert parse_type(expected).is_equivalent_to(t)
    assert jax.tree.unflatten(t.container, list(keys.values())) == keys


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "expected a type, got the end of the text"),
        ("<int32", 6, "expected `,` or `>`, got the end of the text"),
        ("<int32,>", 7, "expected a type, got `>`"),
        ("int32]", 5, r"expected the end of the text, `\*` or `@`, got `]`"),
        ("int32[-1]", 6, "expected a size: .* got `-`"),
        ("int32[]", 6, "expected a size"),
        ("int32[2 3]", 8, "expected `,` or `]`, got `3`"),
        ("int32[2", 7, "expected `,` or `]`"),
        ("int32[9223372036854775808]", 0, r"from 0 to 2\*\*63 - 1"),
        pytest.param("int32[" + "9" * 5000 + "]", 6, "expected a size", id="digits"),
        ("{int32}", 7, "expected `@`"),
        ("int32@MOON", 6, "expected CLIENTS or SERVER, got `MOON`"),
        ("int32@", 6, "expected CLIENTS or SERVER"),
        ("(int32)", 6, "expected `->`"),
        ("(int32 -> )", 10, "expected a type"),
        ("(int32, bool -> bool)", 6, "expected `->`"),
        ("foo32", 0, "got `foo32`, which is no dtype; the known ones are bfloat16, bool"),
        ("key<moon>", 0, "which is no dtype"),
        ("t", 0, "which is no dtype"),
        ("'int32'", 7, r"expected `\(shape=None\)`"),
        ("'int32'(shape=3)", 14, r"expected `\(shape=None\)`"),
        ("'T'(shape=None)", 0, "which is no dtype"),
        ("<'a\\d'=int32>", 1, "a quote without another one"),
        ("<'a=int32>", 1, "a quote without another one"),
        ("<a==int32>", 3, "expected a type, got `=`"),
        ("<a=int32,a=bool>", 0, r"\['a'\] more than once"),
        ("int32**", 6, "no SequenceType inside a sequence"),
        ("{{int32}@CLIENTS}@SERVER", 0, "no FederatedType inside a federated type"),
        ("int32@SERVER@SERVER", 12, "no FederatedType inside a federated type"),
        ("int32\x00", 5, r"got '\\x00'"),
        ("int32 \N{PILE OF POO}", 6, "expected the end of the text"),
    ],
)
def test_errors_show_the_place(text, position, message):
    """The message has the position, the line around it, and a caret under it."""
    with pytest.raises(FederatedTypeError, match=message) as caught:
        parse_type(text)
    problem, shown, caret = str(caught.value).split("\n")
    assert problem.endswith(f", at position {position}:")
    assert caret.strip() == "^"
    under = text[position : position + 1].replace("\x00", " ")
    assert shown[len(caret) - 1 :][:1] == under


def test_the_caret_stands_in_its_own_line():
    with pytest.raises(FederatedTypeError) as caught:
        parse_type("<\n  a=int32,\n  b=boole\n>")
    assert str(caught.value).split("\n")[1:] == ["  ...  b=boole...", " " * 9 + "^"]


@pytest.mark.parametrize("value", [None, 5, b"int32", np.int32, ["int32"]], ids=repr)
def test_only_strings_are_read(value):
    with pytest.raises(FederatedTypeError, match="expected a string such as"):
        parse_type(value)


@pytest.mark.parametrize("opening", ["<", "(", "{", "<a=", "( -> ", "(<"])
def test_deep_nesting_is_an_error_of_its_own(opening):
    """Ten thousand open brackets do not exhaust Python's stack."""
    with pytest.raises(FederatedTypeError, match=f"at most {MAX_DEPTH} deep"):
        parse_type(opening * 10_000)


def test_the_deepest_type_works():
    """A type as deep as can be read prints, compares and hashes, in half of Python's stack."""
    text = "<" * (MAX_DEPTH - 1) + "int32" + ">" * (MAX_DEPTH - 1)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(500 + limit // 2)
    try:
        t = parse_type(text)
        assert str(t) == text
        assert parse_type(t.formatted()) == t
        assert hash(parse_type(text)) == hash(t)
        assert t.is_equivalent_to(parse_type(text))
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("<" + "float32[1024,2048,4096,8192]," * 35_000 + "int32>", id="fields"),
        pytest.param("int32[" + "?," * 400_000 + "?]", id="sizes"),
        pytest.param("<" + "a" * 1_000_000 + "=int32>", id="name"),
        pytest.param("<'" + "a " * 500_000 + "'=int32>", id="quoted-name"),
        pytest.param("<int32>" + " " * 1_000_000, id="spaces"),
    ],
)
def test_a_megabyte_is_read(text):
    """The time is linear in the length: quadratic time would end in the limit of the test run."""
    assert str(parse_type(text)) == text.strip()


@pytest.mark.parametrize("junk", ["'", "'\\", "<'", "x", " ", "9", "*", "int32*", "!"])
def test_a_megabyte_of_junk_is_refused(junk):
    """The message stays short."""
    with pytest.raises(FederatedTypeError) as caught:
        parse_type(junk * (1_000_000 // len(junk)))
    assert len(str(caught.value)) < 2000


def test_dtypes_of_ones_own():
    """Keys of an implementation that the caller defines have a dtype that only the caller knows."""
    like = jax.random.key(0).dtype

    class OwnDtype:
        type = like.type

        def __str__(self):
            return "key<own>"

    own = OwnDtype()
    assert parse_type("key<own>[2]", dtypes=[own]) == TensorType(own, (2,))
    with pytest.raises(FederatedTypeError, match="which is no dtype"):
        parse_type("key<own>[2]")
