"""Metrics: closed forms, and the laws of a commutative monoid."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.learning.metrics import (
    Mean,
    Sum,
    accuracy,
    cross_entropy,
    finish,
    merge,
    safe_div,
    softmax_cross_entropy,
)

# Whole numbers below 2**12: their float32 sums are exact, so the laws hold with equality.
WHOLE = st.integers(0, 4095).map(float)
MEANS = st.builds(Mean, WHOLE, WHOLE)


def test_safe_div_values():
    result = safe_div(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(result, [0.0, 2.0, 1.5])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_safe_div_gradients_without_nan(transform):
    def total(numerator, denominator):
        return jnp.sum(safe_div(numerator, denominator))

    with jax.debug_nans(True):
        by_numerator, by_denominator = transform(jax.grad(total, argnums=(0, 1)))(
            jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0])
        )
    np.testing.assert_array_equal(by_numerator, [0.0, 1.0, 0.5])
    np.testing.assert_array_equal(by_denominator, [0.0, -2.0, -0.75])


def test_safe_div_of_integers_and_a_scalar_denominator():
    assert float(safe_div(3, 2)) == 1.5
    np.testing.assert_array_equal(safe_div(jnp.array([2.0, 4.0]), 0), [0.0, 0.0])


def test_means_merge_by_weight():
    assert float((Mean(1.0, 2.0) + Mean(2.0, 3.0)).result()) == pytest.approx(0.6)
    assert float((Mean(1.0, 2.0) + Mean(3.0, 6.0)).result()) == 0.5


def test_mean_of_nothing_is_zero():
    assert float(Mean(0.0, 0.0).result()) == 0.0
    assert float(Mean.of(jnp.array([jnp.nan]), jnp.array([False])).result()) == 0.0


def test_mean_reduces_what_the_mask_keeps():
    mean = Mean.of(jnp.array([1.0, 2.0, 4.0]), jnp.array([True, True, False]))
    assert (float(mean.total), float(mean.weight)) == (3.0, 2.0)
    assert float(mean.result()) == 1.5


@pytest.mark.parametrize("dropped", [math.nan, math.inf, -math.inf])
def test_mean_ignores_what_the_mask_drops(dropped):
    values, mask = jnp.array([1.0, dropped]), jnp.array([True, False])
    assert float(Mean.of(values, mask).result()) == 1.0
    gradient = jax.grad(lambda v: Mean.of(v, mask).result())(values)
    np.testing.assert_array_equal(gradient, [1.0, 0.0])


def test_mean_is_float32_whatever_it_measures():
    mask = jnp.array([True, True])
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_):
        mean = Mean.of(jnp.array([1, 0], dtype), mask)
        assert [leaf.dtype for leaf in jax.tree.leaves(mean)] == [jnp.float32] * 2
        assert float(mean.result()) == 0.5


@given(MEANS, MEANS, MEANS)
@settings(max_examples=50, deadline=None)
def test_means_are_a_commutative_monoid(a, b, c):
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + Mean(0.0, 0.0) == a
    assert jax.tree.map(operator.add, a, b) == a + b


def test_sums_add_and_keep_their_dtype():
    total = Sum(jnp.int32(2)) + Sum(jnp.int32(3))
    assert jax.tree.leaves(total) == [5]
    assert jax.tree.leaves(total)[0].dtype == jnp.int32


def test_stats_are_pytrees_that_add_up_over_a_stacked_axis():
    stats = {
        "loss": Mean(jnp.array([1.0, 2.0]), jnp.array([2.0, 3.0])),
        "n": Sum(jnp.array([4, 5])),
    }
    total = jax.tree.map(lambda x: x.sum(axis=0), stats)
    numbers = finish(total)
    assert float(numbers["loss"]) == pytest.approx(0.6)
    assert int(numbers["n"]) == 9


def test_merge_and_finish():
    left, right = {"a": Mean(1.0, 2.0), "n": Sum(1)}, {"a": Mean(2.0, 3.0), "n": Sum(2)}
    merged = merge(left, right)
    assert merged == {"a": Mean(3.0, 5.0), "n": Sum(3)}
    assert finish(merged)["n"] == 3


def test_cross_entropy_of_two_logits():
    losses = softmax_cross_entropy(jnp.array([[1.2, 0.4]]), jnp.array([1]))
    np.testing.assert_allclose(losses, [1.1711007], rtol=1e-6)
    np.testing.assert_allclose(losses, [math.log1p(math.exp(0.8))], rtol=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    logits = np.array([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]], np.float32)
    labels = np.array([2, 0])
    gradient = jax.grad(lambda x: softmax_cross_entropy(x, jnp.asarray(labels)).sum())(logits)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient, softmax - np.eye(3)[labels], atol=1e-6)


def test_cross_entropy_of_huge_logits_stays_finite():
    losses = softmax_cross_entropy(jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.array([0, 0]))
    np.testing.assert_array_equal(losses, [0.0, 1e4])


def test_cross_entropy_is_measured_in_float32():
    logits = jnp.array([[1.0, 2.0]], jnp.bfloat16)
    losses = softmax_cross_entropy(logits, jnp.array([0]))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, [math.log1p(math.e)], rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 2, 300])
def test_a_label_out_of_range_gives_nan(label):
    assert np.isnan(softmax_cross_entropy(jnp.array([[1.2, 0.4]]), jnp.array([label])))


def test_labels_may_have_any_integer_dtype():
    logits = jnp.zeros((1, 300))
    for dtype in (jnp.uint8, jnp.int8, jnp.int16, jnp.uint32, jnp.int32):
        losses = softmax_cross_entropy(logits, jnp.array([7], dtype))
        np.testing.assert_allclose(losses, [math.log(300)], rtol=1e-6)


def test_masked_accuracy():
    predictions = jnp.array([[1.0, 2.0], [1.0, 2.0], [3.0, 0.0]])
    batch = {"label": jnp.array([1, 0, 0])}
    kept = jnp.array([True, True, False])
    assert float(accuracy(predictions, batch, kept).result()) == 0.5


def test_accuracy_ties_go_to_the_first_class():
    mask = jnp.array([True, True])
    mean = accuracy(jnp.zeros((2, 3)), {"label": jnp.array([0, 1])}, mask)
    assert float(mean.result()) == 0.5


def test_metrics_read_the_named_label():
    predictions, mask = jnp.array([[1.2, 0.4]]), jnp.array([True])
    batch = {"target": jnp.array([1])}
    assert float(accuracy(predictions, batch, mask, label_key="target").result()) == 0.0
    mean = cross_entropy(predictions, batch, mask, label_key="target")
    assert float(mean.result()) == pytest.approx(1.1711007, rel=1e-6)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.data())
@settings(max_examples=25, deadline=None)
def test_any_grouping_of_examples_gives_one_result(examples, data):
    labels, kept = (np.array(column) for column in zip(*examples, strict=True))
    logits = np.random.default_rng(0).normal(size=(len(labels), 4)).astype(np.float32)
    cut = data.draw(st.integers(0, len(labels)))

    def measure(rows):
        batch = {"label": jnp.asarray(labels[rows])}
        args = (jnp.asarray(logits[rows]), batch, jnp.asarray(kept[rows]))
        return {"accuracy": accuracy(*args), "loss": cross_entropy(*args)}

    whole = finish(measure(slice(None)))
    parts = finish(merge(measure(slice(cut)), measure(slice(cut, None))))
    assert float(parts["accuracy"]) == float(whole["accuracy"])
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
