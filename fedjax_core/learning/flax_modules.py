"""Flax modules, linen and nnx, as pure functions of their parameters and buffers.

Buffers are everything that a module stores besides its parameters, the running statistics of batch
normalisation above all; random streams are no buffers. How a module is told whether it trains:

* A ``__call__`` that takes ``train`` (or ``training``, ``deterministic``, ``use_running_average``)
  gets it by name.
* nnx modules have their attributes ``deterministic`` and ``use_running_average`` set besides.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_core.errors import ArgumentError

InitFn = Callable[[Array], Any]
# (variables, inputs, key, train) -> (predictions, variables with updated buffers)
RunFn = Callable[[Any, Array, Array | None, bool], tuple[Any, Any]]


class FlaxFunctions(NamedTuple):
    """A module as pure functions.

    Attributes:
      init: ``(key) -> (params, buffers)``; `buffers` maps a collection's name to its tree and is
        empty for plain modules.
      run: ``(params, buffers, inputs, key, train, frozen) -> (predictions, buffers)``. `key` may be
        None where nothing random happens. With `frozen` the buffers are used but never updated.
    """

    init: Callable[[Array], tuple[Any, dict[str, Any]]]
    run: Callable[..., tuple[Any, dict[str, Any]]]


def flax_functions(module: Any, example: np.ndarray, rngs: Sequence[str]) -> FlaxFunctions:
    """The pure functions of `module`.

    Args:
      module: a linen module; an nnx module; or a function of ``rngs`` that makes an nnx module.
      example: inputs of one example with a batch axis of 1, to initialise with.
      rngs: the random streams that a linen module draws from while it trains.

    Raises:
      ArgumentError: `module` is none of these.
    """
    # Each costs a quarter of a second to import; who uses one does not pay for the other.
    from flax import linen

    if isinstance(module, linen.Module):
        return linen_functions(module, example, rngs)
    from flax import nnx

    if isinstance(module, nnx.Module) or callable(module):
        return nnx_functions(module)
    raise ArgumentError(
        "module must be a flax linen module, an nnx module, or a function rngs -> nnx module; got "
        f"{module!r}. For anything else there is from_functions."
    )


def call_flags(call: Callable[..., Any], train: bool, frozen: bool) -> dict[str, bool]:
    """The flags of its mode that `call` takes by name.

    Without a flag of its own for the running averages, a module with frozen buffers is run in
    evaluation mode altogether: no other way keeps its buffers in use.
    """
    names = inspect.signature(call).parameters
    train_flag = train and (not frozen or "use_running_average" in names)
    flags = {
        "train": train_flag,
        "training": train_flag,
        "deterministic": not train_flag,
        "use_running_average": not train or frozen,
    }
    return {name: value for name, value in flags.items() if name in names}


def linen_functions(module: Any, example: np.ndarray, rngs: Sequence[str]) -> FlaxFunctions:
    """The pure functions of a linen module; see `flax_functions`."""

    def streams(key: Array | None) -> dict[str, Array]:
        if key is None:
            return {}
        return {name: jax.random.fold_in(key, index) for index, name in enumerate(rngs)}

    def init(key: Array) -> tuple[Any, dict[str, Any]]:
        flags = call_flags(module.__call__, train=False, frozen=False)
        variables = module.init({**streams(key), "params": key}, example, **flags)
        buffers = {name: tree for name, tree in variables.items() if name != "params"}
        return variables.get("params", {}), buffers

    def run(
        params: Any,
        buffers: dict[str, Any],
        inputs: Array,
        key: Array | None,
        train: bool,
        frozen: bool,
    ) -> tuple[Any, dict[str, Any]]:
        flags = call_flags(module.__call__, train, frozen)
        variables = {"params": params, **buffers}
        if not train or frozen or not buffers:
            return module.apply(variables, inputs, rngs=streams(key), **flags), buffers
        return module.apply(variables, inputs, rngs=streams(key), mutable=list(buffers), **flags)

    return FlaxFunctions(init, run)


def nnx_functions(module: Any) -> FlaxFunctions:
    """The pure functions of an nnx module, or of a function that makes one; see `flax_functions`.

    A module brings its parameters along, so ``init`` gives these whatever the key.
    """
    from flax import nnx

    is_built = isinstance(module, nnx.Module)
    graph, *states = _split_nnx(module if is_built else _abstract_nnx(module))
    if is_built:
        # What the module is now: its owner may go on training it.
        states = jax.tree.map(jnp.copy, states)

    def init(key: Array) -> tuple[Any, dict[str, Any]]:
        params, _, buffers = states if is_built else _split_nnx(module(rngs=nnx.Rngs(key)))[1:]
        # Copies, so that a caller may donate what it got.
        params, buffers = jax.tree.map(jnp.copy, (params, buffers))
        return _to_dict(nnx.to_pure_dict(params)), _to_collections(buffers)

    def run(
        params: Any,
        buffers: dict[str, Any],
        inputs: Array,
        key: Array | None,
        train: bool,
        frozen: bool,
    ) -> tuple[Any, dict[str, Any]]:
        model = nnx.merge(
            graph,
            _replaced(states[0], params),
            _fresh_streams(states[1], key),
            _replaced(states[2], buffers.get("buffers", {})),
        )
        model.set_attributes(
            deterministic=not train,
            use_running_average=not train or frozen,
            raise_if_not_found=False,
        )
        predictions = model(inputs, **call_flags(type(model).__call__, train, frozen))
        update = train and not frozen
        return predictions, _to_collections(_split_nnx(model)[3]) if update else buffers

    return FlaxFunctions(init, run)


def _abstract_nnx(make: Callable[..., Any]) -> Any:
    """The module that `make` makes, without its arrays."""
    from flax import nnx

    module = nnx.eval_shape(lambda key: make(rngs=nnx.Rngs(key)), jax.random.key(0))
    if not isinstance(module, nnx.Module):
        raise ArgumentError(
            "module must be a flax module, or a function rngs -> nnx module; got a function that "
            f"gives {type(module).__name__}."
        )
    return module


def _split_nnx(module: Any) -> Any:
    """``(graph, params, random streams, buffers)`` of an nnx module."""
    from flax import nnx

    return nnx.split(module, nnx.Param, (nnx.RngState, nnx.Intermediate), ...)


def _to_collections(buffers: Any) -> dict[str, Any]:
    from flax import nnx

    tree = _to_dict(nnx.to_pure_dict(buffers))
    return {"buffers": tree} if tree else {}


def _to_dict(tree: Any) -> Any:
    """Names the members of lists by strings: they travel and are saved under names."""
    if not isinstance(tree, dict):
        return tree
    return {str(name): _to_dict(value) for name, value in tree.items()}


def _replaced(state: Any, tree: Any) -> Any:
    """`state` with the values of `tree`, as `_to_dict` made it."""
    from flax import nnx

    def named_as(like: Any, tree: Any) -> Any:
        if not isinstance(like, dict):
            return tree
        return {name: named_as(value, tree[str(name)]) for name, value in like.items()}

    copy = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(copy, named_as(nnx.to_pure_dict(state), tree))
    return copy


def _fresh_streams(streams: Any, key: Array | None) -> Any:
    """The state of an nnx module's random streams with new keys, folded from `key`."""
    key = jax.random.key(0) if key is None else key
    leaves, treedef = jax.tree.flatten(streams)

    def fresh(index: int, leaf: Any) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        folded = jax.random.fold_in(key, index)
        return jax.random.split(folded, leaf.shape) if leaf.shape else folded

    return jax.tree.unflatten(treedef, [fresh(i, leaf) for i, leaf in enumerate(leaves)])


def place_buffers(functions: FlaxFunctions, mutable: str | None) -> tuple[InitFn, RunFn]:
    """Where the buffers of a module live: nowhere, in a constant, or in the variables."""
    if mutable not in (None, "average", "frozen"):
        raise ArgumentError(f'mutable must be "average", "frozen" or None; got {mutable!r}.')
    _, buffers = jax.eval_shape(functions.init, jax.random.key(0))
    if buffers and mutable is None:
        raise ArgumentError(
            f"The module has buffers besides its parameters: {_leaf_names(buffers)}. Say what is "
            'to become of them in from_flax: mutable="average" aggregates them over clients like '
            'parameters, mutable="frozen" keeps their initial values; or use a normalisation '
            "without them, such as GroupNorm or LayerNorm."
        )
    if buffers and mutable == "average":
        return _averaged_buffers(functions, buffers)
    return _constant_buffers(functions, has_buffers=bool(buffers))


def _leaf_names(tree: Any) -> str:
    return ", ".join(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    )


def _constant_buffers(functions: FlaxFunctions, *, has_buffers: bool) -> tuple[InitFn, RunFn]:
    buffers: dict[str, Any] = {}
    if has_buffers:
        # Compiled, so that the parameters of a large module are never made for the buffers' sake.
        initial = jax.jit(lambda key: functions.init(key)[1])(jax.random.key(0))
        buffers = jax.device_get(initial)

    def run(variables: Any, inputs: Array, key: Array | None, train: bool) -> tuple[Any, Any]:
        predictions, _ = functions.run(variables, buffers, inputs, key, train, has_buffers)
        return predictions, variables

    return lambda key: functions.init(key)[0], run


def _averaged_buffers(functions: FlaxFunctions, buffers: Any) -> tuple[InitFn, RunFn]:
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(buffers)):
        raise ArgumentError(
            f"Only floating buffers can be averaged; the module has {_leaf_names(buffers)}, of "
            'which some are not. Use mutable="frozen".'
        )

    def init(key: Array) -> Any:
        params, buffers = functions.init(key)
        return {"params": params, **buffers}

    def run(variables: Any, inputs: Array, key: Array | None, train: bool) -> tuple[Any, Any]:
        params = variables["params"]
        buffers = {name: tree for name, tree in variables.items() if name != "params"}
        # Statistics are measured, not descended: their gradient is exactly 0.
        buffers = jax.lax.stop_gradient(buffers)
        predictions, updated = functions.run(params, buffers, inputs, key, train, False)
        after = {**variables, **jax.lax.stop_gradient(dict(updated))} if train else variables
        return predictions, after

    return init, run
