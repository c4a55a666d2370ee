"""The rewriting of convolutions: the same numbers, in one layout, wherever they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex_core

from fedjax_core.execution import winograd
from fedjax_core.execution.convolutions import rewrite_convolutions


def convolutions(jaxpr):
    """All convolutions in a jaxpr, those in the jaxprs of its equations included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from convolutions(inner)


def is_rewritten(eqn):
    lhs, rhs, out = eqn.params["dimension_numbers"]
    last = len(lhs) - 1
    spatial = tuple(range(1, last))
    is_image = lhs == out == (0, last, *spatial)
    return is_image and rhs == (last, last - 1, *range(last - 1))


def check(function, *args, num_convolutions=None):
    """The rewritten function gives the same, and all of its convolutions have the one layout."""
    jaxpr = jax.make_jaxpr(function)(*args)
    rewritten = rewrite_convolutions(jaxpr)
    left = list(convolutions(rewritten.jaxpr))
    assert left
    assert all(map(is_rewritten, left))
    if num_convolutions is not None:
        assert len(left) == num_convolutions
    assert_same(rewritten, jaxpr, *args)
    return rewritten


def assert_same(rewritten, jaxpr, *args):
    both = jax.jit(lambda *xs: [jex_core.jaxpr_as_fun(j)(*xs) for j in (rewritten, jaxpr)])
    for got, expected in zip(*both(*args), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def loss_of(layout, strides, padding, dilation=None, lhs_dilation=None):
    def loss(image, kernel):
        out = lax.conv_general_dilated(
            image,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            lhs_dilation=lhs_dilation,
            dimension_numbers=layout,
        )
        return jnp.sum(jnp.sin(out))

    return loss


CASES = {
    "1-D strided": (("NCW", "OIW", "NCW"), (2, 3, 9), (2, 3, 3), (2,), "VALID", None, None),
    "2-D": (("NHWC", "HWIO", "NHWC"), (2, 6, 5, 3), (3, 3, 3, 4), (1, 1), "SAME", None, None),
    "2-D torch": (("NCHW", "OIHW", "NCHW"), (2, 3, 6, 5), (4, 3, 3, 2), (2, 1), "SAME", None, None),
    "2-D mixed": (
        ("NHWC", "OIHW", "NCHW"),
        (2, 6, 5, 3),
        (4, 3, 2, 3),
        (1, 2),
        "VALID",
        None,
        None,
    ),
    "2-D dilated": (
        *(("NHWC", "HWIO", "NHWC"), (1, 9, 8, 2), (3, 2, 2, 3), (1, 1)),
        *([(2, 1), (0, 3)], (2, 3), None),
    ),
    "2-D transposed": (
        *(("NHWC", "HWIO", "NHWC"), (1, 4, 5, 2), (3, 3, 2, 3), (1, 1)),
        *([(2, 2), (1, 2)], None, (2, 3)),
    ),
    "3-D torch": (
        *(("NCDHW", "OIDHW", "NCDHW"), (1, 2, 4, 5, 6), (3, 2, 2, 3, 2), (2, 1, 1)),
        *("VALID", None, None),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_of_a_convolution(name):
    """Strides, dilations, paddings and layouts: value and both gradients stay the same."""
    layout, image, kernel, strides, padding, dilation, lhs_dilation = CASES[name]
    loss = loss_of(layout, strides, padding, dilation, lhs_dilation)
    both = jax.value_and_grad(loss, argnums=(0, 1))
    check(both, normal(0, image), normal(1, kernel), num_convolutions=3)


def test_vmapped_convolutions_over_images():
    """A batched image alone keeps one group, and is rewritten too."""
    loss = jax.vmap(CONV_LOSS, in_axes=(0, None))
    check(loss, normal(0, (3, 2, 6, 5, 3)), normal(1, (3, 3, 3, 4)))


def test_grouped_convolutions_stay_and_are_right():
    """Convolutions with groups are left in the layout they have."""

    def depthwise(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=3
        ).sum()

    jaxpr = jax.make_jaxpr(jax.grad(depthwise, argnums=(0, 1)))(*DEPTHWISE)
    rewritten = rewrite_convolutions(jaxpr)
    layouts = [eqn.params["dimension_numbers"] for eqn in convolutions(jaxpr.jaxpr)]
    assert [eqn.params["dimension_numbers"] for eqn in convolutions(rewritten.jaxpr)] == layouts
    assert_same(rewritten, jaxpr, *DEPTHWISE)


LAYOUT = ("NHWC", "HWIO", "NHWC")
DEPTHWISE = normal(0, (2, 6, 5, 3)), normal(1, (3, 3, 1, 3))
CONV_LOSS = loss_of(LAYOUT, (1, 1), "SAME")
IMAGE, KERNEL = normal(0, (2, 6, 5, 3)), normal(1, (3, 3, 3, 4))


def step(kernel, image):
    # A small step: a longer one, taken again and again, would blow up what rounding differs by.
    return kernel - 0.001 * jax.grad(CONV_LOSS, argnums=1)(image, kernel)


def in_scan(image, kernel):
    images = jnp.stack([image, image + 1])
    return lax.scan(lambda k, x: (step(k, x), jnp.sum(k)), kernel, images)


def in_while(image, kernel):
    def body(carry):
        position, k = carry
        return position + 1, step(k, image)

    return lax.while_loop(lambda c: c[0] < 2, body, (0, kernel))


def in_cond(image, kernel):
    return lax.cond(jnp.sum(image) > 0, step, lambda k, x: step(2 * k, x), kernel, image)


def in_switch(image, kernel):
    branches = [step, lambda k, x: k, lambda k, x: step(k, 3 * x)]
    return lax.switch(jnp.int32(2), branches, kernel, image)


def in_jit(image, kernel):
    return jax.jit(step)(kernel, image)


def in_checkpoint(image, kernel):
    return jax.value_and_grad(jax.checkpoint(CONV_LOSS), argnums=(0, 1))(image, kernel)


def in_nested_loops(image, kernel):
    def epoch(k, _):
        return in_while(image, jax.jit(lambda k: in_scan(image, k)[0])(k))[1], None

    return lax.scan(epoch, kernel, None, length=2)


def in_custom_jvp(image, kernel):
    return smooth_loss(image, kernel)


def in_gradient_of_custom_jvp(image, kernel):
    return jax.grad(smooth_loss, argnums=1)(image, kernel)


def in_custom_vjp(image, kernel):
    return straight_loss(image, kernel)


def in_gradient_of_custom_vjp(image, kernel):
    return jax.grad(straight_loss, argnums=1)(image, kernel)


@jax.custom_jvp
def smooth_loss(image, kernel):
    return CONV_LOSS(jnp.moveaxis(jnp.moveaxis(image, 3, 1), 1, 3), kernel) + transposed(image)


@smooth_loss.defjvp
def smooth_loss_jvp(primals, tangents):
    return smooth_loss(*primals), 3.0 * jax.jvp(CONV_LOSS, primals, tangents)[1]


def transposed(image):
    """A convolution in another layout, to be rewritten in a forward pass."""
    layout = ("NHWC", "OHWI", "NCHW")
    return loss_of(layout, (1, 1), "SAME")(image, normal(2, (4, 3, 3, 3)))


@jax.custom_vjp
def straight_loss(image, kernel):
    return CONV_LOSS(image, kernel) + transposed(image)


def straight_forward(image, kernel):
    return straight_loss(image, kernel), (image, kernel)


def straight_backward(residuals, cotangent):
    image, kernel = jax.grad(CONV_LOSS, argnums=(0, 1))(*residuals)
    return cotangent * image, 2 * cotangent * kernel


straight_loss.defvjp(straight_forward, straight_backward)


IN_OTHER_PRIMITIVES = [
    in_scan,
    in_while,
    in_cond,
    in_switch,
    in_jit,
    in_checkpoint,
    in_nested_loops,
    in_custom_jvp,
    in_gradient_of_custom_jvp,
    in_custom_vjp,
    in_gradient_of_custom_vjp,
]


@pytest.mark.parametrize("function", IN_OTHER_PRIMITIVES)
def test_convolutions_inside_other_primitives(function):
    """No convolution in another layout remains, however deep it stands, and values agree."""
    check(function, IMAGE, KERNEL)


@pytest.mark.parametrize("function", IN_OTHER_PRIMITIVES)
def test_fewer_multiplications_inside_other_primitives(function, monkeypatch):
    """The gradients of kernels of three rows, as if they were large enough."""
    before = len(list(convolutions(check(function, IMAGE, KERNEL).jaxpr)))
    monkeypatch.setattr(winograd, "_FEWEST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "_FEWEST_MULTIPLICATIONS", 1)
    rewritten = check(function, IMAGE, KERNEL)
    has_gradient = function not in (in_custom_jvp, in_custom_vjp)
    assert (len(list(convolutions(rewritten.jaxpr))) > before) == has_gradient


@pytest.mark.parametrize("loss", [smooth_loss, straight_loss])
def test_custom_derivatives_survive(loss):
    """Differentiating the rewritten function still uses the rule its author gave."""
    rewritten = jex_core.jaxpr_as_fun(rewrite_convolutions(jax.make_jaxpr(loss)(IMAGE, KERNEL)))
    got = jax.grad(lambda k: rewritten(IMAGE, k)[0])(KERNEL)
    np.testing.assert_allclose(got, jax.grad(loss, argnums=1)(IMAGE, KERNEL), rtol=1e-5, atol=1e-5)
    plain = jax.grad(CONV_LOSS, argnums=1)(IMAGE, KERNEL)
    assert np.max(np.abs(got - plain)) > 0.1


def test_a_function_without_convolutions_is_returned_as_it_is():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(jnp.ones(3))
    assert rewrite_convolutions(jaxpr) is jaxpr


def test_captured_constants_and_half_precision():
    """A kernel that the function captures, in bfloat16, keeps its dtype and its values."""
    kernel = normal(1, (3, 3, 3, 4), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x: transposed_half(x, kernel))(IMAGE.astype(jnp.bfloat16))
    rewritten = rewrite_convolutions(jaxpr)
    assert all(map(is_rewritten, convolutions(rewritten.jaxpr)))
    args = [IMAGE.astype(jnp.bfloat16)]
    (got,), (expected,) = (jex_core.jaxpr_as_fun(j)(*args) for j in (rewritten, jaxpr))
    assert got.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2)


def transposed_half(image, kernel):
    layout = ("NHWC", "HWIO", "NCHW")
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)
