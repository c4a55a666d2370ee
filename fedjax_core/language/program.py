"""The program of a federated computation: immutable records in static single assignment.

One value is one whole pytree with its type. A program knows neither the number of clients nor a
clients axis. Printing it shows one operation a line:

    %0 = parameter                : {float32}@CLIENTS
    %1 = sum(%0)                  : float32@SERVER
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import inference
from fedjax_core.language.feeding import leaves_of
from fedjax_core.language.local import Local
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.types import FederatedType, FunctionType, StructType, TensorType, Type


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """What the language knows of a codec on an edge: how messages are received and counted.

    Attributes:
      name: for printing.
      receive: `(*context, message) -> (value, stats)`, at the receiver of one message.
      bits: `(message) -> BitCount`, the exact size of one message.
      travel: `(message, bits) -> message` on the host, through the bytes of a frame; None where
        messages have no bytes.
      frame_bits: what a frame adds to a message.
    """

    name: str
    receive: Local
    bits: Local
    travel: Callable[[Any, int], Any] | None = None
    frame_bits: int = 0


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """One operation; `inputs` are positions of earlier operations."""

    type: Type
    inputs: tuple[int, ...] = ()
    location: str = ""

    def describe(self) -> str:
        """The operation and its inputs, as printed."""
        return f"{type(self).__name__.lower()}({', '.join(f'%{i}' for i in self.inputs)})"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Parameter(Op):
    """An argument of the computation."""

    def describe(self) -> str:
        """See `Op.describe`."""
        return "parameter"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Constant(Op):
    """A pytree of arrays, placed."""

    value: Any

    def describe(self) -> str:
        """See `Op.describe`."""
        return "constant"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Map(Op):
    """A local computation, at each client or at the server."""

    local: Local

    def describe(self) -> str:
        """See `Op.describe`."""
        return f"map[{self.local.name}]({', '.join(f'%{i}' for i in self.inputs)})"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Zip(Op):
    """A struct made of values at one placement, in the structure `tree`."""

    tree: Any


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Get(Op):
    """One field of a struct."""

    position: int

    def describe(self) -> str:
        """See `Op.describe`."""
        return f"get[{self.position}](%{self.inputs[0]})"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Place(Op):
    """An unplaced value, put at the server."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Apply(Op):
    """A call of a function that is a parameter: `inputs[0]`, on the others.

    Where the arguments are placed and the function's own parameters are not, it is mapped.
    """


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Edge(Op):
    """A crossing between placements: `inputs[0]` is what travels."""

    label: str = "value"
    codec: Codec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            raise FederatedTypeError(
                f"Expected the name of an edge to be a string, got {self.label!r}; pass name='...'."
            )

    def describe(self) -> str:
        """See `Op.describe`."""
        codec = f", codec={self.codec.name}" if self.codec else ""
        inputs = ", ".join(f"%{i}" for i in self.inputs)
        return f"{type(self).__name__.lower()}[{self.label}{codec}]({inputs})"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Broadcast(Edge):
    """Down: inputs are the message, then what the clients need to decode it."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Sum(Edge):
    """Up: inputs are the message, the context of `codec.receive`, and last, if any, who is present.

    Without a codec the result is the sum. With one it is a struct `Received` of the sum of the
    decoded messages, how many arrived, their bits, and the sum of their statistics.
    """

    has_presence: bool = False


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Count(Op):
    """How many clients there are, or are present. Costs no bits: the server sees who answers."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Aggregate(Edge):
    """Up: a general fold. Inputs are the value and, at the server, the zero."""

    accumulate: Local
    merge: Local
    report: Local


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Extreme(Edge):
    """Up: the smallest or the largest value, element by element. Inputs as those of `Sum`."""

    is_max: bool
    has_presence: bool = False

    def describe(self) -> str:
        """See `Op.describe`."""
        inputs = ", ".join(f"%{i}" for i in self.inputs)
        return f"{'max' if self.is_max else 'min'}[{self.label}]({inputs})"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SecureSum(Edge):
    """Up, blind: a sum of integers of which the server sees the total only.

    The result is a struct `SecureTotal`. The input is a struct of integers.

    Attributes:
      lower: for each leaf of the input the smallest value that a client may send.
      upper: likewise the largest. Values outside are clipped, and counted.
      modulus: for each leaf the modulus of the sum; None for a sum that is not modular.
      is_checked: whether a value outside of the bounds is an error of the caller.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    modulus: tuple[int, ...] | None = None
    is_checked: bool = True


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Collect(Edge):
    """Up, in clear: every client's value, as a sequence at the server."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Request(Edge):
    """Up, in clear: the keys that a client asks the server for. The value stays at the client."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Select(Edge):
    """Down: what the server has for each key of a request, as a sequence.

    Inputs are the request, the number of keys that exist and, at the server, what to select from.
    """

    select: Local


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A typed program over placed values.

    Attributes:
      name: of the function that it was traced from.
      ops: the operations in order; the first `len(parameters)` are the parameters.
      parameter_tree: the arguments' structure with positions in `ops` at the leaves.
      result_tree: the result's structure, likewise.
      type_signature: the `FunctionType` of the whole.
      parameter_names: of the arguments, where they have names.
    """

    name: str
    ops: tuple[Op, ...]
    parameter_tree: Any
    result_tree: Any
    type_signature: FunctionType
    parameter_names: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (f"%{i} = {op.describe()}", str(op.type), op.location) for i, op in enumerate(self.ops)
        ]
        width = min(max((len(left) for left, _, _ in rows), default=0), 60)
        lines = [
            f"{left:<{width}} : {t}" + (f"  # {where}" if where else "") for left, t, where in rows
        ]
        result = jax.tree.map(lambda i: f"%{i}", self.result_tree)
        return "\n".join([f"{self.name}: {self.type_signature}", *lines, f"return {result}"])

    @property
    def edges(self) -> tuple[tuple[int, Edge], ...]:
        """The crossings, each with its position in `ops`."""
        return tuple((i, op) for i, op in enumerate(self.ops) if isinstance(op, Edge))

    def message_type(self, op: Edge) -> Type:
        """The type of what one client sends, or is sent, on an edge."""
        source = self.ops[op.inputs[0]].type
        if not isinstance(op, Select):
            return source
        (num_keys,) = cast(Any, source).member.shape
        return StructType([op.select.result] * num_keys)

    @property
    def parameters(self) -> tuple[int, ...]:
        """The positions of the parameters."""
        return tuple(i for i, op in enumerate(self.ops) if isinstance(op, Parameter))

    def leaves_of(self, args: tuple[Any, ...]) -> list[Any]:
        """What `args` hold for each of `parameters`.

        Raises:
          FederatedTypeError: for another number of arguments, or another structure.
        """
        expected = self.argument_types
        if len(args) != len(expected):
            raise FederatedTypeError(
                f"`{self.name}` expected {len(expected)} arguments of type "
                f"{self.type_signature.parameter}, got {len(args)}."
            )
        return [
            leaf
            for index, (arg, t) in enumerate(zip(args, expected, strict=True))
            for leaf in leaves_of(arg, t, self.name_of_argument(index))
        ]

    def name_of_argument(self, index: int) -> str:
        """What errors call an argument."""
        names = self.parameter_names
        called = f" `{names[index]}`" if index < len(names) else ""
        return f"argument {index}{called} of `{self.name}`"

    @property
    def argument_types(self) -> tuple[Type, ...]:
        """The types of the arguments, one for each."""
        packed = self.type_signature.parameter
        if packed is None:
            return ()
        return (packed,) if len(self.parameter_tree) == 1 else tuple(packed.children())

    @property
    def types(self) -> tuple[Type, ...]:
        """The types of all operations."""
        return tuple(op.type for op in self.ops)

    @property
    def results(self) -> tuple[int, ...]:
        """The positions of the results, in the order of the leaves of `result_tree`."""
        return tuple(jax.tree.leaves(self.result_tree))


def type_bits(t: Type) -> int:
    """The size in bits of one member's raw value of type `t`: its elements times their width.

    Raises:
      FederatedTypeError: for a type without a fixed size, such as a sequence.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.language.types import to_type
      >>> type_bits(to_type({"w": (np.float32, [3, 2]), "n": np.int8}))
      200
    """
    if isinstance(t, FederatedType):
        return type_bits(t.member)
    if isinstance(t, StructType):
        return sum(type_bits(child) for child in t.children())
    if isinstance(t, TensorType) and t.shape is not None and None not in t.shape:
        leaf = inference.template(t)
        return 8 * leaf.dtype.itemsize * leaf.size
    raise FederatedTypeError(
        f"Expected a type of fixed size on an edge, got {t}; reduce the sequence at the client "
        "first."
    )


def goes_up(op: Op) -> bool:
    """Whether `op` makes one value at the server of those at the clients."""
    return isinstance(op, Sum | Count | Extreme | SecureSum | Aggregate | Collect)


class SecurePart(NamedTuple):
    """Numbers of a secure sum that travel alike.

    Attributes:
      size: how many.
      span: of a bounded one the largest distance of two values; of a modular one None.
      width: bits of a value by itself.
    """

    size: int
    span: int | None
    width: int


def secure_parts(op: SecureSum, member: Type) -> list[SecurePart]:
    """What one client sends for a secure sum of values of type `member`.

    Where the values out of bounds are counted, so are the two counts, each at most all numbers.
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(inference.template(member))]
    if op.modulus is not None:
        widths = [log2_ceil(modulus) for modulus in op.modulus]
        parts = [SecurePart(size, None, width) for size, width in zip(sizes, widths, strict=True)]
    else:
        spans = [upper - lower for lower, upper in zip(op.lower, op.upper, strict=True)]
        parts = [
            SecurePart(n, span, span.bit_length()) for n, span in zip(sizes, spans, strict=True)
        ]
    if op.is_checked:
        return parts
    return [*parts, SecurePart(2, sum(sizes), sum(sizes).bit_length())]


def secure_sum_bits(op: SecureSum, member: Type, num_clients: int) -> int:
    """The bits that one of `num_clients` clients sends for a secure sum of values of type `member`.

    An element takes a number of the field that the sum is computed in. That of a modular sum is
    known; that of a bounded one has to hold the sum over n clients: ``ceil(log2(n * span + 1))``
    bits, where two values differ by at most `span`.
    """
    clients = max(num_clients, 1)
    return sum(
        part.size * (part.width if part.span is None else (clients * part.span).bit_length())
        for part in secure_parts(op, member)
    )


def log2_ceil(n: int) -> int:
    """The smallest `k` with `2**k >= n`; 0 for `n < 2`."""
    return max(n - 1, 0).bit_length()


def is_at_clients(op: Op) -> bool:
    """Whether the value of `op` lives at the clients."""
    return isinstance(op.type, FederatedType) and op.type.placement is CLIENTS


def is_at_server(op: Op) -> bool:
    """Whether the value of `op` lives at the server."""
    return isinstance(op.type, FederatedType) and op.type.placement is SERVER


def round_trips(program: Program) -> tuple[int, ...]:
    """For each operation, how many aggregations any path to it has passed.

    Client values of level `k` can be computed once the sums of level `k` (from passes below `k`)
    are at the server; an aggregation of them has level `k + 1`.
    """
    levels: list[int] = []
    for op in program.ops:
        level = max((levels[i] for i in op.inputs), default=0)
        levels.append(level + 1 if goes_up(op) else level)
    return tuple(levels)
