"""What a run of rounds leaves behind: plain Python numbers, one record a round."""

import collections.abc
import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import jax
import numpy as np

from fedjax_core.bits import BitCount, format_bits

Numbers = Mapping[str, float]
_NO_NUMBERS: Numbers = MappingProxyType({})


class RoundRecord(NamedTuple):
    """One round, as a person wants to see it.

    Attributes:
      round: the number of the round, from 0.
      train: training metrics of the round, `loss` among them; counts are ints.
      broadcasted_bits: bits that went down since the run began, exact.
      aggregated_bits: bits that went up since the run began, exact.
      communication: this round's bits by row, under ``broadcast/<row>`` and ``aggregate/<row>``.
      aggregator: measurements of the aggregator, nested names joined by ``/``.
      clients: counts of clients (how many took part, were empty, not finite ...).
      test: metrics of the evaluation after the round, empty where there was none.
      seconds: wall-clock time of the round, without the evaluation.
    """

    round: int
    train: Numbers
    broadcasted_bits: int
    aggregated_bits: int
    communication: Numbers = _NO_NUMBERS
    aggregator: Numbers = _NO_NUMBERS
    clients: Numbers = _NO_NUMBERS
    test: Numbers = _NO_NUMBERS
    seconds: float = 0.0

    def line(self) -> str:
        """The record as one line, bits in binary units and counted since the run began.

        Example:
          >>> print(RoundRecord(0, {"loss": 2.3101934}, 532278400, 134640000).line())
          round  0, train_metrics=(loss=2.3102), broadcasted_bits=507.62Mibit,
          aggregated_bits=128.40Mibit
        """
        parts = [
            f"round {self.round:2d}",
            f"train_metrics=({_listed(self.train)})",
            f"broadcasted_bits={format_bits(self.broadcasted_bits)}",
            f"aggregated_bits={format_bits(self.aggregated_bits)}",
        ]
        if self.test:
            parts.append(f"test_metrics=({_listed(self.test)})")
        return ", ".join(parts)

    def scalars(self) -> dict[str, float]:
        """All numbers of the record by the name under which a log shows them.

        Training metrics keep their names, others carry a prefix: ``test_``, ``aggregator/``,
        ``clients/`` and ``communication/``.
        """
        bits = {"broadcasted_bits": self.broadcasted_bits, "aggregated_bits": self.aggregated_bits}
        return {
            **self.train,
            **bits,
            **{f"test_{name}": value for name, value in self.test.items()},
            **{f"aggregator/{name}": value for name, value in self.aggregator.items()},
            **{f"clients/{name}": value for name, value in self.clients.items()},
            **{f"communication/{name}": value for name, value in self.communication.items()},
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True)
class History(collections.abc.Sequence[RoundRecord]):
    """The records of a run, oldest first.

    Attributes:
      records: one record for each completed round.
      interrupted: whether Ctrl-C ended the run before its last round.

    Example:
      >>> history = History((RoundRecord(0, {"loss": 2.5}, 64, 32),))
      >>> len(history), history[-1].train["loss"], history.interrupted
      (1, 2.5, False)
    """

    records: tuple[RoundRecord, ...]
    interrupted: bool = False

    @overload
    def __getitem__(self, index: int) -> RoundRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RoundRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> RoundRecord | tuple[RoundRecord, ...]:
        return self.records[index]

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def last_test(self) -> Numbers:
        """The metrics of the last evaluation, empty if there was none."""
        return next((record.test for record in reversed(self.records) if record.test), {})


def flat_numbers(tree: Any) -> dict[str, float]:
    """A pytree of scalars on the host as one flat dict of Python numbers.

    Args:
      tree: mappings and named tuples, nested as deep as one likes. An array of several elements is
        a list of scalars, a `BitCount` is one exact number.

    Returns:
      The numbers by their path, joined with ``/``.

    Example:
      >>> flat_numbers({"clipping": {"norm": np.float32(0.5), "clipped": np.int32([3, 4])}})
      {'clipping/clipped/0': 3, 'clipping/clipped/1': 4, 'clipping/norm': 0.5}
    """
    numbers = jax.tree.map(_to_python, tree, is_leaf=_is_bit_count)
    leaves = jax.tree_util.tree_leaves_with_path(numbers)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_bit_count(value: Any) -> bool:
    return isinstance(value, BitCount)


def _to_python(leaf: Any) -> Any:
    return int(leaf) if _is_bit_count(leaf) else np.asarray(leaf).tolist()


def _listed(numbers: Numbers) -> str:
    return ", ".join(
        f"{name}={value}" if isinstance(value, int) else f"{name}={value:.4f}"
        for name, value in numbers.items()
    )
