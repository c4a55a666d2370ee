"""Compiling whole rounds: what XLA is asked for beyond its defaults.

Programs with convolutions on CPU ask for two things. XLA has two implementations of convolutions
there: that of YNNPACK is twice as fast for those of a client's step; from jax 0.11 on it is the
default, in jax 0.10 it has to be asked for. It is slower for the small matrix products of a linear
model. And XLA copies the parameters in every step of a loop unless it may look closer at who reads
them, as it does on TPUs: a twentieth of a round of the FedAvg CNN.

The options are XLA's own, and one that is not known is an error: versions of JAX that are not
known yet are asked for nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.core import Tracer

from fedjax_core.execution.convolutions import convolutions_of
from fedjax_core.language.program import Program

_FEWER_COPIES = {"xla_cpu_copy_insertion_use_region_analysis": True}
_FAST_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
_FAST_BY_DEFAULT = (0, 11)
_UNKNOWN = (0, 13)


def compiler_options(program: Program, platform: str) -> dict[str, Any]:
    """What to give to `jax.jit` as `compiler_options` for a program on a platform."""
    version = jax.__version_info__[:2]
    if platform != "cpu" or version >= _UNKNOWN or not convolutions_of(program):
        return {}
    return {**_FEWER_COPIES, **(_FAST_CONVOLUTIONS if version < _FAST_BY_DEFAULT else {})}


def jit(
    function: Callable[..., Any], options: Callable[[], dict[str, Any]], **settings: Any
) -> Callable[..., Any]:
    """`jax.jit` with compiler options where it is called from outside of JAX's transformations.

    JAX refuses options on a function that is part of another one: there it is compiled as the
    program around it is.

    Args:
      function: to be compiled.
      options: asked at the first call, when it is known which backend there is.
      **settings: of `jax.jit`.
    """
    plain = jax.jit(function, **settings)

    @functools.cache
    def outermost() -> Callable[..., Any]:
        asked = options()
        return jax.jit(function, compiler_options=asked, **settings) if asked else plain

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        compiled = outermost()
        if compiled is not plain and _is_traced(args, kwargs):
            compiled = plain
        return compiled(*args, **kwargs)

    return call


def _is_traced(*args: Any) -> bool:
    """Whether a JAX transformation is at work, on the arguments or around the call."""
    is_staged = isinstance(lax.full((), 0), Tracer)
    return is_staged or any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
