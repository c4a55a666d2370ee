"""Training and test sets: pairs of federated datasets, and how to make one by holding out."""

from typing import NamedTuple

import numpy as np

from fedjax_core.datasets import checks
from fedjax_core.datasets import cohort as cohorts
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.errors import FederatedTypeError


class Splits(NamedTuple):
    """A federated dataset in two parts.

    Attributes:
      train: what clients train on.
      test: held out, of the same clients or of others.
    """

    train: FederatedDataset
    test: FederatedDataset


def check_dataset(dataset: object, where: str) -> None:
    """Raises a FederatedTypeError, begun with `where`, unless this is a `FederatedDataset`."""
    if not isinstance(dataset, FederatedDataset):
        remedy = "pass .train" if isinstance(dataset, Splits) else "make one with from_clients"
        raise FederatedTypeError(
            f"{where}: expected a FederatedDataset, got {type(dataset).__name__}; {remedy}"
        )


def holdout(dataset: FederatedDataset, fraction: float, seed: int = 0) -> Splits:
    """Holds out a random part of each client's examples.

    A client of `n` examples gives ``round(fraction * n)`` of them (halves up) to the test set, but
    always keeps one to train on. Both sets have all clients, some maybe empty, and keep the order
    of the examples.

    Args:
      dataset: what to split.
      fraction: the part to hold out, strictly in (0, 1).
      seed: an integer of at least 0; the same seed gives the same split.

    Returns:
      `Splits` of copies in memory.

    Raises:
      ArgumentError: `fraction` outside (0, 1), or a negative seed.

    Examples:
      >>> from fedjax_core.datasets import from_clients
      >>> splits = holdout(from_clients({"a": {"x": range(10)}, "b": {"x": [7]}}), 0.2)
      >>> splits.train.num_examples.tolist(), splits.test.num_examples.tolist()
      ([8, 1], [2, 0])
    """
    check_dataset(dataset, "holdout")
    fraction = checks.checked_fraction("fraction", fraction)
    sizes = dataset.num_examples
    held = np.floor(fraction * sizes + 0.5).astype(np.int64)
    held = np.clip(held, 0, np.maximum(sizes - 1, 0))
    is_test = _random_rank(sizes, checks.checked_seed(seed)) < np.repeat(held, sizes)
    return Splits(
        train=_rows_where(dataset, ~is_test, sizes - held, "train"),
        test=_rows_where(dataset, is_test, held, "test"),
    )


def _random_rank(sizes: np.ndarray, seed: int) -> np.ndarray:
    """For each row its place in a random order of its client's rows: int64 ``[num_examples]``."""
    client = np.repeat(np.arange(len(sizes)), sizes)
    draws = np.random.Philox(np.random.SeedSequence(seed)).random_raw(int(sizes.sum()))
    order = np.lexsort((draws, client))
    rank = np.empty(len(order), np.int64)
    # `order` goes client by client, so a row's place is counted from where its client starts.
    rank[order] = cohorts.slice_rows(np.zeros_like(sizes), sizes)
    return rank


def _rows_where(
    dataset: FederatedDataset, mask: np.ndarray, sizes: np.ndarray, part: str
) -> FederatedDataset:
    examples = {name: x[mask] for name, x in dataset.examples.items()}
    offsets = checks.offsets_of(sizes)
    return FederatedDataset(examples, offsets, dataset.client_ids, f"{dataset.name}/{part}")
