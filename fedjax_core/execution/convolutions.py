"""Convolutions on CPU: every one in the single layout that XLA runs fast wherever it stands.

XLA's CPU backend gives a convolution its fast form only in the entry computation of a program. In
the body of a loop the gradients of a convolution keep the unusual dimension orders that
differentiation gave them, and run as naive loops, 15 to 40 times slower. Re-binding each one with
explicit transposes, so that it reads NHWC x HWIO -> NHWC, makes them fast in loops too. In that
layout, filters of a few rows take fewer multiplications: see `winograd`.
"""

import functools
from collections.abc import Sequence as AbstractSequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from fedjax_core.execution import winograd
from fedjax_core.language.program import Program

# Equations whose inner jaxprs can be replaced by others of the same signature.
_CONTROL_FLOW = frozenset({"scan", "while", "cond", "checkpoint", "remat2"})
_CUSTOM_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})
_WITH_JAXPRS = _CONTROL_FLOW | _CUSTOM_DERIVATIVES
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})


def rewrite_convolutions(jaxpr: jex_core.ClosedJaxpr) -> jex_core.ClosedJaxpr:
    """The same computation but for rounding, its convolutions in the layout NHWC x HWIO -> NHWC.

    Those for which a precision is asked are summed directly. Convolutions with groups stay as they
    are, and so do those in the rules of custom derivatives, which are not traced yet.

    Args:
      jaxpr: any traced function.

    Returns:
      `jaxpr` itself if there is nothing to rewrite.
    """
    if not _has_convolution(jaxpr.jaxpr):
        return jaxpr

    def evaluate(*args: Any) -> list[Any]:
        return _evaluate(jaxpr.jaxpr, jaxpr.consts, args)

    return jax.make_jaxpr(evaluate)(*jaxpr.in_avals)


def convolutions_of(program: Program) -> int:
    """How many convolutions the local computations of a program have."""
    return sum(
        count_convolutions(traced.jaxpr.jaxpr)
        for op in program.ops
        if (local := getattr(op, "local", None)) is not None
        for traced in local.traces.values()
    )


def count_convolutions(jaxpr: Any) -> int:
    """How many convolutions a jaxpr has, those inside of its loops and calls counted once."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "conv_general_dilated"
        count += sum(map(count_convolutions, jex_core.jaxprs_in_params(eqn.params)))
    return count


def _has_convolution(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            return True
        if any(map(_has_convolution, jex_core.jaxprs_in_params(eqn.params))):
            return True
    return False


def _evaluate(jaxpr: Any, consts: AbstractSequence[Any], args: AbstractSequence[Any]) -> list[Any]:
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        outputs = _evaluate_equation(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(eqn: Any, inputs: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return [_convolve(*inputs, **eqn.params)]
    params = eqn.params
    if any(map(_has_convolution, jex_core.jaxprs_in_params(eqn.params))):
        if name in _CALLS:
            inner = eqn.params["jaxpr"]
            return _evaluate(inner.jaxpr, inner.consts, inputs)
        if name in _WITH_JAXPRS:
            params = {key: _rewrite_param(value) for key, value in params.items()}
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _rewrite_param(value: Any) -> Any:
    if isinstance(value, jex_core.ClosedJaxpr):
        return rewrite_convolutions(value)
    if isinstance(value, jex_core.Jaxpr) and not value.constvars:
        rewritten = rewrite_convolutions(jex_core.ClosedJaxpr(value, ()))
        return value if rewritten.consts else rewritten.jaxpr
    if isinstance(value, tuple):
        return tuple(map(_rewrite_param, value))
    return value


def _convolve(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """`lax.conv_general_dilated` with its operands transposed to NHWC and HWIO, its result back."""
    if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return lax.conv_general_dilated_p.bind(
            lhs, rhs, dimension_numbers=dimension_numbers, **params
        )
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    last = lhs.ndim - 1
    spatial = tuple(range(1, last))
    result = _convolve_images(
        lax.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])),
        lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])),
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, last, *spatial), (last, last - 1, *range(last - 1)), (0, last, *spatial)
        ),
        **params,
    )
    order = [0] * result.ndim
    order[out_spec[0]], order[out_spec[1]] = 0, last
    for axis, position in zip(spatial, out_spec[2:], strict=True):
        order[position] = axis
    return lax.transpose(result, order)


def _convolve_images(images: Any, kernel: Any, **params: Any) -> Any:
    """A convolution NHWC x HWIO -> NHWC, with fewer multiplications where that is faster."""
    direct = functools.partial(lax.conv_general_dilated_p.bind, **params)
    padding = params["padding"]
    tiling = winograd.find_tiling(images, kernel, padding) if _is_plain(**params) else None
    if tiling is None:
        return direct(images, kernel)
    fewer = functools.partial(winograd.convolve, padding=padding, tiling=tiling)
    # What is exported from a CPU may run elsewhere, where the direct one is faster and exact.
    return lax.platform_dependent(images, kernel, cpu=fewer, default=direct)


def _is_plain(
    *,
    window_strides: AbstractSequence[int],
    lhs_dilation: AbstractSequence[int],
    rhs_dilation: AbstractSequence[int],
    precision: Any,
    preferred_element_type: Any,
    **_: Any,
) -> bool:
    """Whether every output is a sum over neighbours, and as exact as the backend likes."""
    is_dense = set(window_strides) | set(lhs_dilation) | set(rhs_dilation) == {1}
    return is_dense and precision is None and preferred_element_type in (None, jnp.float32)
