"""Features against the specification of one example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.learning.features import (
    as_float,
    check_lengths,
    check_names,
    conform,
    fill_padding,
    to_input_spec,
)

SPEC = {
    "image": jax.ShapeDtypeStruct((28, 28, 1), jnp.uint8),
    "label": jax.ShapeDtypeStruct((), jnp.int32),
}


def test_uint8_is_scaled_by_one_255th():
    every = np.arange(256, dtype=np.uint8)
    scaled = as_float(every)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, every / 255.0, rtol=1.2e-7)
    assert float(scaled[0]) == 0.0
    assert float(scaled[255]) == 1.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_floats_are_taken_as_they_are(dtype):
    image = jnp.array([-1.0, 0.5, 300.0], dtype)
    assert as_float(image) is image


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint16, np.bool_])
def test_other_images_are_refused(dtype):
    with pytest.raises(FederatedTypeError, match=r"uint8.*or as floats; got \w+"):
        as_float(np.zeros(3, dtype))


@pytest.mark.parametrize("bad", [None, {}, [1], {"image": (28, 28)}, {"image": 3.0}])
def test_input_spec_that_is_none(bad):
    with pytest.raises(ArgumentError, match="input_spec"):
        to_input_spec(bad)


def test_input_spec_from_arrays():
    spec = to_input_spec({"x": np.zeros((2, 3), np.float32)})
    assert spec == {"x": jax.ShapeDtypeStruct((2, 3), jnp.float32)}


def test_conform_adds_and_removes_trailing_axes_of_one():
    batch = {"image": np.zeros((4, 28, 28), np.uint8), "label": np.zeros((4, 1), np.int64)}
    result = conform(batch, SPEC, image_key="image", where="test")
    assert result["image"].shape == (4, 28, 28, 1)
    assert result["label"].shape == (4,)


def test_conform_leaves_out_what_the_model_does_not_know():
    batch = {"label": np.zeros(2, np.int32), "writer": np.array(["a", "b"])}
    assert set(conform(batch, SPEC, image_key="image", where="test")) == {"label"}


@pytest.mark.parametrize("shape", [(4, 28, 27), (4, 784), (4, 1, 28, 28), (), (4,)])
def test_conform_refuses_other_shapes(shape):
    with pytest.raises(FederatedTypeError, match=r"test: feature 'image' must have the shape"):
        conform({"image": np.zeros(shape, np.uint8)}, SPEC, image_key="image", where="test")


@pytest.mark.parametrize(
    ("name", "dtype", "image_key", "fits"),
    [
        ("image", np.uint8, "image", True),
        ("image", np.float32, "image", True),
        ("image", np.float64, "image", True),
        ("image", jnp.bfloat16, "image", True),
        ("image", np.int32, "image", False),
        ("image", np.bool_, "image", False),
        ("image", np.int32, None, True),
        ("image", np.float32, None, False),
        ("label", np.int64, "image", True),
        ("label", np.uint8, "image", True),
        ("label", np.float32, "image", False),
        ("label", np.bool_, "image", False),
    ],
)
def test_kinds_of_dtype(name, dtype, image_key, fits):
    batch = {name: np.zeros((2, *SPEC[name].shape), dtype)}
    if fits:
        assert name in conform(batch, SPEC, image_key=image_key, where="test")
    else:
        with pytest.raises(FederatedTypeError, match=f"feature '{name}' must be"):
            conform(batch, SPEC, image_key=image_key, where="test")


def test_conform_refuses_what_is_no_array():
    with pytest.raises(FederatedTypeError, match="'label' must be an array; got list"):
        conform({"label": [1, 2]}, SPEC, image_key="image", where="test")


def test_names_and_lengths():
    check_names({"image": 0, "label": 0, "more": 0}, SPEC, where="test")
    with pytest.raises(DataError, match=r"\['label'\] are missing from \['image'\]"):
        check_names({"image": 0}, SPEC, where="test")
    assert check_lengths({"a": np.zeros(3), "b": np.zeros((3, 2))}, where="test") == 3
    with pytest.raises(DataError, match=r"\{'a': 3, 'b': 2\}"):
        check_lengths({"a": np.zeros(3), "b": np.zeros(2)}, where="test")


def filled_by_hand(rows, mask):
    kept = [row for row, keep in zip(rows, mask, strict=True) if keep]
    if not kept:
        return [0.0 for _ in rows]
    return [
        row if keep else kept[index % len(kept)]
        for index, (row, keep) in enumerate(zip(rows, mask, strict=True))
    ]


@pytest.mark.slow
@given(st.lists(st.booleans(), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_padding_is_filled_with_kept_rows(mask):
    rows = [float(i) if keep else np.nan for i, keep in enumerate(mask)]
    filled = fill_padding({"x": jnp.array(rows)}, jnp.array(mask))["x"]
    np.testing.assert_array_equal(filled, filled_by_hand(rows, mask))


def test_padding_keeps_dtypes_and_trailing_axes():
    batch = {"image": jnp.ones((3, 2, 2), jnp.uint8), "label": jnp.arange(3)}
    filled = fill_padding(batch, jnp.array([False, False, True]))
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, batch)
    assert filled["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(filled["label"], [2, 2, 2])
