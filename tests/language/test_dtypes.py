"""The dtypes and shapes of tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.types import is_shape_assignable, is_shape_compatible


@pytest.mark.parametrize(
    "dtype",
    [
        object,
        "datetime64[s]",
        np.timedelta64,
        np.void,
        "no such dtype",
        "\ud800",
        "int32,float32",
        [("a", np.int32)],
        np.dtype((np.int32, 3)),
        np.longdouble,
        jax.dtypes.float0,
        None,
        int,
        float,
        complex,
        5,
        np.zeros(3),
    ],
    ids=str,
)
def test_dtypes_that_do_not_exist(dtype):
    """Neither NumPy's own ones, nor Python's types, whose number of bits is not known."""
    with pytest.raises(FederatedTypeError, match=r"Expected a dtype .*np\.float32"):
        fc.TensorType(dtype)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (">i4", "int32"),
        ("bfloat16", "bfloat16"),
        (jnp.float8_e4m3fn, "float8_e4m3fn"),
        (jnp.int4, "int4"),
        (jnp.uint2, "uint2"),
        (np.bytes_, "str"),
        ("U7", "str"),
        (bool, "bool"),
        (jax.random.key(0, impl="rbg").dtype, "key<rbg>"),
    ],
)
def test_dtypes_have_one_form(dtype, expected):
    t = fc.TensorType(dtype)
    assert str(t) == expected
    assert t == fc.TensorType(t.dtype)
    assert str(fc.TensorType(dtype, None)) == f"'{expected}'(shape=None)"


@pytest.mark.parametrize(
    "shape",
    [(-1,), (2, True), (1.0,), (2, "3"), 3, "ab", {2}, (2**63,), (10**5000,), (np.inf,), ((),)],
    ids=lambda shape: str(shape)[:20] if shape != (10**5000,) else "huge",
)
def test_shapes_that_do_not_exist(shape):
    with pytest.raises(FederatedTypeError, match=r"None .*if it is unknown|None for an unknown"):
        fc.TensorType(np.float32, shape)


def test_shapes_are_tuples_of_ints():
    t = fc.TensorType(np.float32, [np.int64(3), None, 0])
    assert t.shape == (3, None, 0)
    assert [type(n) for n in t.shape or ()] == [int, type(None), int]
    assert str(fc.to_type((np.float32, None))) == "'float32'(shape=None)"


@pytest.mark.parametrize("spec", [(np.float32, [-1]), (np.float32, [True]), (np.float32, [1.5])])
def test_pairs_that_look_like_tensors_name_the_size(spec):
    with pytest.raises(FederatedTypeError, match="dimension 0 of a shape"):
        fc.to_type(spec)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((2, 3), (2, None), True),
        ((2, 3), None, True),
        ((), None, True),
        (None, None, True),
        ((None, 3), (2, None), True),
        ((2, 3), (), False),
        ((2, 3), (20, 3), False),
        ((), (None, None), False),
        ((0,), (1,), False),
    ],
)
def test_compatible_shapes(first, second, expected):
    """C-31, in both directions."""
    assert is_shape_compatible(first, second) is expected
    assert is_shape_compatible(second, first) is expected


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
