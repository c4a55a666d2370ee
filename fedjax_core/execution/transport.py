"""Programs whose messages travel as bytes.

`wired` puts a callback to the host before each decoder: it writes the message as a frame, and gives
the decoder what it reads from these bytes. What frames add is sent over edges of their own, named
"framing". All else of a program stays where it was, so all readings take it.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.execution.evaluation import call_local
from fedjax_core.language import inference, types
from fedjax_core.language.local import trace_local
from fedjax_core.language.messages import Received
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import Broadcast, Codec, Edge, Program, Sum
from fedjax_core.language.types import FederatedType, TensorType, Type

FRAMING = "framing"


@functools.lru_cache(maxsize=64)
def wired(program: Program) -> Program:
    """The program that sends frames.

    Args:
      program: any.

    Returns:
      A program with the same operations in the same places, and behind them one edge of framing for
      each one with a codec.
    """
    ops, framing = [], []
    for op in program.ops:
        if not isinstance(op, Edge) or op.codec is None or op.codec.travel is None:
            ops.append(op)
            continue
        ops.append(dataclasses.replace(op, codec=_through_bytes(op.codec)))
        framing.append(_framing_of(op))
    return dataclasses.replace(program, ops=(*ops, *framing))


def _through_bytes(codec: Codec) -> Codec:
    like = inference.template(codec.receive.parameters[-1])
    travel = codec.travel
    assert travel is not None

    def on_host(message: Any, bits: BitCount) -> Any:
        return travel(message, int(bits))

    def receive(*args: Any) -> Any:
        *context, message = args
        bits = call_local(codec.bits, message)
        arrived = jax.pure_callback(on_host, like, message, bits, vmap_method="sequential")
        return call_local(codec.receive, *context, arrived)

    local = trace_local(receive, codec.receive.parameters, f"the bytes of {codec.name}")
    return dataclasses.replace(codec, receive=local)


def _framing_of(op: Edge) -> Edge:
    """An edge for what frames add to the messages of `op`."""
    codec = op.codec
    assert codec is not None
    message = codec.receive.parameters[-1:]
    framing = Codec(
        name=FRAMING,
        receive=trace_local(lambda message: ((), ()), message, FRAMING),
        bits=trace_local(lambda message: BitCount.of(codec.frame_bits), message, FRAMING),
    )
    nothing = types.to_type(())
    if isinstance(op, Sum):
        inputs = (op.inputs[0], *op.inputs[-1:]) if op.has_presence else op.inputs[:1]
        received = FederatedType(_received(nothing), SERVER)
        return dataclasses.replace(op, type=received, inputs=inputs, label=FRAMING, codec=framing)
    assert isinstance(op, Broadcast)
    received = FederatedType(nothing, CLIENTS, all_equal=True)
    return dataclasses.replace(
        op, type=received, inputs=op.inputs[:1], label=FRAMING, codec=framing
    )


def _received(nothing: Type) -> Type:
    word: Any = TensorType(np.uint32)
    return types.to_type(Received(nothing, np.int32, BitCount(word, word), nothing))
