"""Datasets by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from fedjax_core.datasets.digits import load_digits
from fedjax_core.datasets.emnist import load_emnist
from fedjax_core.datasets.splits import Splits
from fedjax_core.errors import ArgumentError


class Description(NamedTuple):
    """What a person wants to know of a dataset before loading it.

    Attributes:
      name: what `load` takes.
      summary: one line.
      source: where it comes from, and how much is downloaded.
      features: name, dtype and shape of each feature, as text.
      settings: the keywords that `load` takes with it, and their defaults.
    """

    name: str
    summary: str
    source: str
    features: str
    settings: dict[str, Any]


class _Source(NamedTuple):
    load: Callable[..., Splits]
    summary: str
    source: str
    features: str


_SOURCES = {
    "digits": _Source(
        load_digits,
        "1,797 handwritten digits, 10 classes; clients by a partitioner",
        "bundled with scikit-learn, no download",
        "image uint8[28, 28, 1], label int32",
    ),
    "emnist": _Source(
        load_emnist,
        "handwritten digits, or digits and letters: 3,383 or 3,400 writers, one a client",
        "TensorFlow Federated's public file, 170 MB once, or a local copy of it",
        "image float32[28, 28, 1] (background 1.0), label int32",
    ),
}


def load(name: str, **settings: Any) -> Splits:
    """A federated dataset by name, in training and test part.

    Args:
      name: "digits" or "emnist"; `available` lists them.
      **settings: see `load_digits` (num_clients, partition, seed, data_dir) and `load_emnist`
        (only_digits, data_dir, path).

    Returns:
      `Splits` with `train` and `test`.

    Raises:
      ArgumentError: no such dataset, or a setting that it does not have.
      StorageError: files that cannot be read, written or downloaded.

    Examples:
      >>> train, test = load("digits", num_clients=10)  # doctest: +SKIP
    """
    if not isinstance(name, str) or name not in _SOURCES:
        close = difflib.get_close_matches(str(name), _SOURCES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "for other sets see from_tfds"
        raise ArgumentError(f"no dataset {name!r}, there are {list(_SOURCES)}; {hint}")
    source = _SOURCES[name]
    unknown = sorted(settings.keys() - _settings(source).keys())
    if unknown:
        raise ArgumentError(
            f"the dataset {name!r} has no setting {unknown[0]!r}; it has {list(_settings(source))}"
        )
    return source.load(**settings)


def available() -> tuple[Description, ...]:
    """The datasets that `load` knows.

    Examples:
      >>> [description.name for description in available()]
      ['digits', 'emnist']
    """
    return tuple(
        Description(name, s.summary, s.source, s.features, _settings(s))
        for name, s in _SOURCES.items()
    )


def _settings(source: _Source) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(source.load).parameters.values()}
