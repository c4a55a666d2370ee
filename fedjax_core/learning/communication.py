"""The ledger of a round: the exact bits that went down and up, by row."""

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

from fedjax_core.bits import BitCount
from fedjax_core.language.program import Broadcast, Program, Select


class Communication(NamedTuple):
    """The bits of one round, over all clients.

    Attributes:
      broadcast: from the server down, by the name of the edge: params, seed, hyperparams, ...
      aggregate: from the clients up: update, weight, metrics, ...
    """

    broadcast: dict[str, BitCount]
    aggregate: dict[str, BitCount]

    @property
    def broadcast_bits(self) -> BitCount:
        """All bits that went down."""
        return _total(self.broadcast.values())

    @property
    def aggregate_bits(self) -> BitCount:
        """All bits that went up."""
        return _total(self.aggregate.values())


def itemise(program: Program, ledger: tuple[BitCount, ...]) -> Communication:
    """Names what a run of `program` sent: one row for each name of an edge, in each direction.

    Args:
      program: what was run.
      ledger: the bits of each of `program.edges`.
    """
    rows = Communication({}, {})
    for (_, edge), bits in zip(program.edges, ledger, strict=True):
        direction = rows.broadcast if isinstance(edge, Broadcast | Select) else rows.aggregate
        direction[edge.label] = direction.get(edge.label, BitCount.zero()) + bits
    return rows


def _total(rows: Iterable[BitCount]) -> BitCount:
    return functools.reduce(operator.add, rows, BitCount.zero())
