"""The role of an aggregator: from the clients' values and weights to one value at the server.

    (server, memory) = init(template)
    server, memory, value, measurements = aggregate(keys, server, memory, value, weight)

`init` is an ordinary function; `aggregate` is written with the operators of the language, on placed
values, and so becomes part of the federated computation that uses it. A wrapper is a function from
an aggregator to an aggregator; `chain` applies wrappers from the outside in.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from fedjax_core.compression.edges import PlacedKeys
from fedjax_core.errors import ArgumentError
from fedjax_core.language.operators import federated_map
from fedjax_core.language.tracing import Value

Measurements = dict[str, Any]


class AggregateFn(Protocol):
    """The placed part of an aggregator."""

    def __call__(
        self, keys: PlacedKeys, server: Value, memory: Value, value: Value, weight: Value
    ) -> tuple[Value, Value, Value, Measurements]:
        """Aggregates one round.

        Args:
          keys: the round's randomness.
          server: the aggregator's state, at the server.
          memory: what each client remembers, at the clients.
          value: the clients' values, `{T}@CLIENTS`.
          weight: `{float32}@CLIENTS`. A client whose weight is not positive is absent: it sends
            nothing and counts for nothing. Aggregators that are not weighted use it for that alone.

        Returns:
          `(server, memory, value, measurements)`: the new state and memory, the aggregate
          `T@SERVER`, and a dict of scalars at the server, keyed by the part of the aggregator that
          measured them.
        """
        ...


class Aggregator(NamedTuple):
    """A pair of functions that aggregates the clients' values.

    Attributes:
      is_weighted: whether the weights matter beyond being positive.
      init: `(template) -> (server, memory)`, from the `jax.ShapeDtypeStruct`s of one client's
        value.
      aggregate: see `AggregateFn`.
    """

    is_weighted: bool
    init: Callable[[Any], tuple[Any, Any]]
    aggregate: AggregateFn


Wrapper = Callable[[Aggregator], Aggregator]


def chain(*parts: Wrapper | Aggregator) -> Aggregator:
    """Composes wrappers around an aggregator, from the outside in.

    `chain(zero_by_norm(10.0), clip_by_global_norm(1.0), mean())` zeroes first, then clips, then
    averages.

    Args:
      *parts: wrappers, and last an aggregator.

    Raises:
      ArgumentError: if the last part is no aggregator, or an earlier one is.
    """
    aggregator = parts[-1] if parts else None
    if not isinstance(aggregator, Aggregator):
        raise ArgumentError(
            f"Expected an aggregator such as mean() as the last part of a chain, got {parts[-1:]}."
        )
    for wrapper in reversed(parts[:-1]):
        if isinstance(wrapper, Aggregator) or not callable(wrapper):
            raise ArgumentError(
                "Expected wrappers such as clip_by_global_norm(1.0) before the last part of a "
                f"chain, got {wrapper!r}."
            )
        aggregator = wrapper(aggregator)
    return aggregator


def is_present(weight: Value) -> Value:
    """Who takes part: `{bool}@CLIENTS`, where the weight is positive."""
    return federated_map(_is_positive, weight)


def _is_positive(weight: Any) -> Any:
    return weight > 0


def merge_measurements(name: str, own: Mapping[str, Value], inner: Measurements) -> Measurements:
    """The measurements of a wrapper before those of what it wraps, under a name not taken yet."""
    taken, number = name, 2
    while taken in inner:
        taken, number = f"{name}_{number}", number + 1
    return {taken: dict(own), **inner}
