"""The role of client work: what a client does with the model and its own examples.

    context          = prepare(server, params)                          goes down, and is counted
    memory, output   = work(key, memory, context, params, hyperparams, examples)
    server           = finish(server, mean_extra)

Local training = epochs x batches, shuffled by the client's key x an optimiser that starts afresh.
"""

import functools
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_core.errors import ArgumentError, noted
from fedjax_core.language.values import Sequence
from fedjax_core.learning.batching import num_batches, shuffle, take_batch
from fedjax_core.learning.metrics import Mean, Sum
from fedjax_core.learning.models import Model

if TYPE_CHECKING:
    import optax  # half of the time that importing the library would take

Stats = Mapping[str, Mean | Sum]
Weighting = Literal["num_examples", "uniform"] | Callable[[Stats], jax.Array]


class ClientOutput(NamedTuple):
    """What a client hands to the aggregation.

    Attributes:
      update: initial minus trained variables.
      weight: float32 scalar.
      metrics: stats to sum (see `fedjax_core.learning.metrics`).
      extra: pytree whose mean goes to `ClientWork.finish`; () if none.
    """

    update: Any
    weight: jax.Array
    metrics: Any
    extra: Any = ()


class ClientWork(NamedTuple):
    """The client's part of an algorithm, as pure functions of one client's values.

    Attributes:
      init: `(params) -> (server, memory)`: state at the server, and what each client remembers.
      prepare: `(server, params) -> context`: what goes down beside the model.
      work: `(key, memory, context, params, hyperparams, examples) -> (memory, ClientOutput)`.
      finish: `(server, mean_extra) -> server`.
      hyperparams: `(params) -> pytree`: the initial values of what may be swept, () if nothing.
    """

    init: Callable[[Any], tuple[Any, Any]]
    prepare: Callable[[Any, Any], Any]
    work: Callable[..., tuple[Any, ClientOutput]]
    finish: Callable[[Any, Any], Any]
    hyperparams: Callable[[Any], Any]


def local_training(
    model: Model,
    optimizer: "optax.GradientTransformation",
    *,
    batch_size: int,
    num_epochs: int = 1,
    weighting: Weighting = "num_examples",
) -> ClientWork:
    """Client work that trains for some epochs on the client's own examples.

    Each epoch visits the examples once, in an order drawn from the client's key; the last batch is
    padded and masked, never dropped. A client without examples takes no step.

    Args:
      model: what is trained.
      optimizer: any optax optimiser; its state starts afresh at each client in each round.
        Hyper-parameters injected by `optax.inject_hyperparams`, if it is the outermost
        transformation, are taken from the server's state.
      batch_size: examples a step.
      num_epochs: passes over the client's examples in a round.
      weighting: "num_examples", "uniform" (one for every client), or a function of the client's
        training stats.

    Raises:
      ArgumentError: for numbers that are not positive, or another weighting.
    """
    import optax

    _check_positive(batch_size=batch_size, num_epochs=num_epochs)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ArgumentError(
            f"Expected an optax optimiser such as optax.sgd(0.1) on the clients, got {optimizer!r}."
        )
    weigh = _weigher(weighting)

    def work(
        key: jax.Array, memory: Any, context: Any, params: Any, hyperparams: Any, examples: Sequence
    ) -> tuple[Any, ClientOutput]:
        state = with_hyperparams(optimizer.init(params), hyperparams)
        trained, stats = train_locally(
            key, model, optimizer, params, state, examples, batch_size, num_epochs
        )
        update = jax.tree.map(lambda old, new: old - new, params, trained)
        return memory, ClientOutput(update, weigh(stats), stats)

    return ClientWork(
        init=lambda params: ((), ()),
        prepare=lambda server, params: (),
        work=work,
        finish=lambda server, extra: server,
        hyperparams=lambda params: injected_hyperparams(optimizer.init(params)),
    )


def train_locally(
    key: jax.Array,
    model: Model,
    optimizer: "optax.GradientTransformation",
    variables: Any,
    state: Any,
    examples: Sequence,
    batch_size: int,
    num_epochs: int,
) -> tuple[Any, Stats]:
    """Trains `variables` on one client's examples; returns them and the stats of all batches.

    Args:
      key: the client's own.
      model: gives loss and stats of a batch.
      optimizer: with `state` as its first state.
      variables: to begin with.
      state: of the optimiser.
      examples: of the client.
      batch_size: examples a step.
      num_epochs: passes over the examples.
    """
    import optax

    # A batch holds no more than there is: full batches may be asked for by any large number.
    batch_size = min(batch_size, examples.capacity)
    differentiate = _gradient_of(model.loss)

    def epoch(number: jax.Array, carry: Any) -> Any:
        epoch_key = jax.random.fold_in(key, number)
        order = shuffle(jax.random.fold_in(epoch_key, 0), examples)
        dropout_key = jax.random.fold_in(epoch_key, 1)

        def step(index: jax.Array, carry: Any) -> Any:
            variables, state, stats = carry
            batch, mask = take_batch(examples, order, index, batch_size)
            step_key = jax.random.fold_in(dropout_key, index)
            gradients, (batch_stats, after) = differentiate(step_key, variables, batch, mask)
            updates, state = optimizer.update(gradients, state, variables)
            variables = optax.apply_updates(after, updates)
            return variables, state, jax.tree.map(jnp.add, stats, batch_stats)

        return lax.fori_loop(0, num_batches(examples, batch_size), step, carry)

    def first_step() -> Any:
        order = jnp.arange(examples.capacity)
        return differentiate(key, variables, *take_batch(examples, order, jnp.int32(0), batch_size))

    shapes = jax.eval_shape(first_step)[1][0]
    start = (variables, state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
    # A loop of one step is a loop less for XLA, and for whoever reads the program.
    is_single = num_epochs == 1
    end = epoch(jnp.int32(0), start) if is_single else lax.fori_loop(0, num_epochs, epoch, start)
    variables, _, stats = end
    return variables, stats


# One function for each model: JAX then knows its trace when a round is traced again, for other
# capacities, another aggregator or another optimiser. It is compiled into the loop all the same.
@functools.lru_cache(maxsize=64)
def _gradient_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a model's training loss by its variables, with stats and buffers."""

    def training_loss(key: jax.Array, variables: Any, batch: Any, mask: jax.Array) -> Any:
        with noted("In the model's `loss`."):
            return loss(key, variables, batch, mask, True)

    return jax.jit(jax.grad(training_loss, argnums=1, has_aux=True))


def _weigher(weighting: Weighting) -> Callable[[Stats], jax.Array]:
    if weighting == "uniform":
        return lambda stats: jnp.float32(stats["num_examples"].total > 0)
    if weighting == "num_examples":
        return lambda stats: jnp.float32(stats["num_examples"].total)
    if callable(weighting):
        return lambda stats: _as_weight(weighting(stats))
    raise ArgumentError(
        "Expected weighting to be 'num_examples', 'uniform' or a function of the stats, got "
        f"{weighting!r}."
    )


def _as_weight(weight: Any) -> jax.Array:
    if isinstance(weight, Mean | Sum) or jnp.shape(weight) != () or weight is None:
        raise ArgumentError(
            f"Expected weighting to return one number for a client, got {weight!r}; for a metric, "
            "return its result() or its total."
        )
    return jnp.asarray(weight, jnp.float32)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ArgumentError(f"Expected {name} to be a positive integer, got {number!r}.")


def injected_hyperparams(state: Any) -> Any:
    """What `optax.inject_hyperparams` put into an optimiser's state, () if nothing.

    It has to be the outermost transformation. Scheduled hyper-parameters are not among the result:
    their schedule sets them anew at each step.
    """
    if not _is_injected(state):
        return ()
    scheduled = getattr(state, "hyperparams_states", {})
    return {name: x for name, x in state.hyperparams.items() if name not in scheduled} or ()


def with_hyperparams(state: Any, hyperparams: Any) -> Any:
    """An optimiser's state with the given hyper-parameters injected, if it takes any."""
    if not _is_injected(state):
        return state
    return state._replace(hyperparams={**state.hyperparams, **(hyperparams or {})})


def _is_injected(state: Any) -> bool:
    return "hyperparams" in getattr(state, "_fields", ())
