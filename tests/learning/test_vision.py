"""The built-in image classifiers against counts by hand and computations in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from fedjax_core.errors import FederatedTypeError
from fedjax_core.learning.networks import ConvPool, DenseNetwork, FedAvgCNN, max_pool_2x2
from fedjax_core.models import emnist_cnn, linear, two_nn

KEY = jax.random.key(0)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28, 1)).astype(np.uint8)


def count_parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, KEY)))


@pytest.mark.parametrize(("only_digits", "classes"), [(True, 10), (False, 62)])
def test_parameters_of_the_cnn(only_digits, classes):
    convolutions = (5 * 5 * 1 * 32 + 32) + (5 * 5 * 32 * 64 + 64)
    # Two poolings leave 7 x 7 of the 28 x 28.
    dense = (7 * 7 * 64 * 512 + 512) + (512 * classes + classes)
    model = emnist_cnn(only_digits)
    assert count_parameters(model) == convolutions + dense
    assert convolutions + dense == {10: 1_663_370, 62: 1_690_046}[classes]
    assert model.num_classes == classes


def test_tensors_of_the_cnn_are_float32():
    leaves = jax.tree.leaves(jax.eval_shape(emnist_cnn().init, KEY))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert sorted(leaf.shape for leaf in leaves) == sorted(
        [(5, 5, 1, 32), (32,), (5, 5, 32, 64), (64,), (3136, 512), (512,), (512, 10), (10,)]
    )


def test_parameters_of_the_dense_networks():
    assert count_parameters(linear()) == 784 * 10 + 10
    assert count_parameters(linear(3, (8, 8))) == 64 * 3 + 3
    assert count_parameters(two_nn()) == 199_210
    assert count_parameters(two_nn(62, hidden=10)) == 784 * 10 + 10 + 10 * 10 + 10 + 10 * 62 + 62


@pytest.mark.parametrize("network", [FedAvgCNN(10), DenseNetwork(10, (5,))])
def test_no_images_give_no_logits(network):
    variables = network.init(KEY, jnp.ones((1, 28, 28, 1)))
    assert network.apply(variables, jnp.ones((0, 28, 28, 1))).shape == (0, 10)


def test_pooling_is_that_of_flax():
    x = jax.random.normal(KEY, (2, 8, 6, 3))
    cotangent = jax.random.normal(jax.random.key(1), (2, 4, 3, 3))
    ours, ours_back = jax.vjp(max_pool_2x2, x)
    flax, flax_back = jax.vjp(lambda x: linen.max_pool(x, (2, 2), (2, 2)), x)
    np.testing.assert_array_equal(ours, flax)
    np.testing.assert_array_equal(ours_back(cotangent)[0], flax_back(cotangent)[0])


def test_pooling_shares_its_gradient_at_ties():
    gradient = jax.grad(lambda x: max_pool_2x2(x).sum())(jnp.zeros((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient.ravel(), [0.25] * 4)


def test_pooling_keeps_what_is_not_a_number():
    x = jnp.zeros((1, 2, 2, 1)).at[0, 1, 0, 0].set(jnp.nan)
    gradient = jax.grad(lambda x: max_pool_2x2(x).sum() * jnp.nan)(x)
    assert jnp.isnan(max_pool_2x2(x)).all()
    assert jnp.isnan(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("inputs", [1, 3])
def test_dtypes_of_the_cnn_are_those_of_flax(inputs, dtype):
    """Images of other dtypes, parameters of other dtypes, and parameters under x64."""
    x = jnp.ones((2, 8, 6, inputs), dtype)
    ours, flax = ConvPool(5), linen.Conv(5, (5, 5))
    with jax.enable_x64(True):
        variables = flax.init(KEY, x)
        dtypes = lambda tree: jax.tree.map(lambda v: v.dtype, tree)  # noqa: E731
        assert dtypes(ours.init(KEY, x)) == dtypes(variables)
    for own in (variables, jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables)):
        assert ours.apply(own, x).dtype == flax.apply(own, x).dtype


@pytest.mark.parametrize("shape", [(2, 7, 6, 1), (2, 8, 5, 3), (8, 8, 1)])
def test_images_that_cannot_be_pooled_by_two_are_refused(shape):
    with pytest.raises(FederatedTypeError, match="even height and width"):
        ConvPool(5).init(KEY, jnp.ones(shape))


@pytest.mark.parametrize("inputs", [1, 3])
def test_convolution_with_pooling_is_that_of_flax(inputs):
    """Bias and ReLU after pooling, and one channel by its windows: the same function and gradient.

    Background of one colour makes ties in whole windows: ReLU's, where the bias is negative, too.
    """
    x = jnp.maximum(jax.random.normal(KEY, (2, 8, 6, inputs)), 0).at[:, :4].set(0)
    ours, flax = ConvPool(5), linen.Conv(5, (5, 5))
    variables = ours.init(jax.random.key(1), x)
    variables["params"]["bias"] = jnp.array([-0.3, -0.1, 0.0, 0.1, 0.3])

    def of_flax(variables, x):
        return linen.max_pool(jax.nn.relu(flax.apply(variables, x)), (2, 2), (2, 2))

    def run(function, x):
        # The gradient at zero, where the bias is zero too, is a choice: that bias is left out.
        loss = lambda variables: jnp.sin(function(variables, x)).sum()  # noqa: E731
        gradients = jax.grad(loss)(variables)["params"]
        gradients["bias"] = gradients["bias"].at[2].set(0)
        return function(variables, x), gradients

    expected = run(of_flax, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        run(ours.apply, x),
        expected,
    )
    tangents = jax.tree.map(jnp.ones_like, variables)
    forward = lambda function: jax.jvp(lambda v: function(v, x), (variables,), (tangents,))[1]  # noqa: E731
    around = np.s_[:, 2:]  # without ties
    np.testing.assert_allclose(
        forward(ours.apply)[around], forward(of_flax)[around], rtol=1e-4, atol=1e-4
    )


def convolve(x, kernel, bias):
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias


def pool(x):
    return np.maximum.reduce([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def test_cnn_by_hand():
    model = emnist_cnn()
    variables = model.init(KEY)
    layers = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    hidden = images(2) / 255.0
    for name in ("Conv_0", "Conv_1"):
        hidden = pool(np.maximum(convolve(hidden, **layers[name]), 0))
    hidden = hidden.reshape(2, -1) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"]
    logits = np.maximum(hidden, 0) @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    np.testing.assert_allclose(model.predict(variables, {"image": images(2)}), logits, atol=1e-4)


def test_two_nn_by_hand():
    model = two_nn()
    variables = model.init(KEY)
    hidden = images(3).reshape(3, -1) / 255.0
    for index in range(3):
        layer = variables[f"Dense_{index}"]
        hidden = hidden @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        hidden = hidden if index == 2 else np.maximum(hidden, 0)
    np.testing.assert_allclose(model.predict(variables, {"image": images(3)}), hidden, atol=1e-4)


@pytest.mark.parametrize("make", [pytest.param(emnist_cnn, marks=pytest.mark.slow), linear, two_nn])
def test_all_zero_parameters_give_the_loss_of_guessing(make):
    model = make()
    zeros = jax.tree.map(jnp.zeros_like, model.init(KEY))
    batch = {"image": images(4), "label": np.arange(4)}
    loss, (stats, _) = model.loss(None, zeros, batch, jnp.ones(4, bool), True)
    assert float(loss) == pytest.approx(math.log(10), rel=1e-6)
    assert float(stats["accuracy"].result()) == 0.25


@pytest.mark.parametrize(
    "make",
    [
        emnist_cnn,
        pytest.param(linear, marks=pytest.mark.slow),
        pytest.param(two_nn, marks=pytest.mark.slow),
    ],
)
def test_initial_loss_is_near_that_of_guessing(make):
    model = make()
    batch = {"image": images(20), "label": np.arange(20) % 10}
    loss, _ = model.loss(None, model.init(KEY), batch, jnp.ones(20, bool), True)
    assert abs(float(loss) - math.log(10)) < 1


def test_images_may_be_stored_in_any_of_the_usual_ways():
    model = linear()
    variables = model.init(KEY)
    stored = images(5)
    ways = [
        stored,
        stored[..., 0],
        (stored / 255.0).astype(np.float32),
        (stored / 255.0)[..., 0],
    ]
    first, *others = (model.predict(variables, {"image": way}) for way in ways)
    for other in others:
        np.testing.assert_allclose(first, other, atol=1e-5)


@pytest.mark.slow
def test_cnn_ignores_padding_of_floats():
    model = emnist_cnn()
    variables = model.init(KEY)
    image = (images(4) / 255.0).astype(np.float32)
    mask = jnp.array([True, True, True, False])

    @jax.jit
    def measure(image, label):
        return jax.value_and_grad(model.loss, argnums=1, has_aux=True)(
            None, variables, {"image": image, "label": label}, mask, True
        )

    clean = measure(image, np.array([1, 2, 3, 4]))
    image_with_nan = np.where(np.arange(4)[:, None, None, None] < 3, image, np.nan)
    soiled = measure(image_with_nan, np.array([1, 2, 3, -7]))
    jax.tree.map(np.testing.assert_array_equal, clean, soiled)
    (three, _), _ = jax.value_and_grad(model.loss, argnums=1, has_aux=True)(
        None, variables, {"image": image[:3], "label": np.array([1, 2, 3])}, mask[:3], True
    )
    assert float(clean[0][0]) == pytest.approx(float(three), rel=1e-5)


def test_metrics_of_the_user_replace_accuracy():
    model = linear(metrics={})
    batch = {"image": images(2), "label": np.arange(2)}
    _, (stats, _) = model.loss(None, model.init(KEY), batch, jnp.ones(2, bool), True)
    assert set(stats) == {"loss", "num_examples", "num_batches"}
