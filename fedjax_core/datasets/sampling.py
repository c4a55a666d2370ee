"""Which clients take part in a round."""

import dataclasses
from collections.abc import Callable

import numpy as np

from fedjax_core.datasets import checks
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.splits import check_dataset
from fedjax_core.errors import DataError

Sampler = Callable[[int], list[str]]


def uniform(dataset: FederatedDataset, clients_per_round: int, seed: int = 0) -> Sampler:
    """Draws clients uniformly, without replacement within a round, independently over rounds.

    Args:
      dataset: whose clients to draw, empty ones included.
      clients_per_round: how many, at most `dataset.num_clients`.
      seed: an integer of at least 0.

    Returns:
      A function from the number of the round (at least 0) to a list of client ids. It is a pure
      function of seed and round: rounds may be asked for in any order and again, so a training can
      be resumed, and it gives the same clients with every version of NumPy.

    Raises:
      FederatedTypeError: `dataset` is no `FederatedDataset`.
      DataError: more clients a round than the dataset has.
      ArgumentError: a negative seed or round, or less than one client a round.

    Examples:
      >>> from fedjax_core.datasets import from_clients
      >>> data = from_clients({f"client {i}": {"x": [i]} for i in range(5)})
      >>> sample = uniform(data, 3, seed=1)
      >>> len(set(sample(7))), sample(7) == sample(7)
      (3, True)
    """
    check_dataset(dataset, "sampling.uniform")
    size = checks.checked_count("clients_per_round", clients_per_round)
    seed = checks.checked_seed(seed)
    if size > dataset.num_clients:
        raise DataError(
            f"cannot draw {clients_per_round=} without replacement from the {dataset.num_clients} "
            f"clients of {dataset.name!r}; ask for at most {dataset.num_clients}"
        )

    return UniformSampler(dataset, size, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class UniformSampler:
    """What `uniform` makes: called with the number of a round, it returns the ids of its clients.

    Attributes:
      dataset: whose clients are drawn.
      clients_per_round: how many.
      seed: of the draws.
    """

    dataset: FederatedDataset
    clients_per_round: int
    seed: int

    def __call__(self, round_number: int) -> list[str]:
        """The ids of the clients of a round."""
        client_ids = self.dataset.client_ids
        return [client_ids[i] for i in self.positions(round_number).tolist()]

    def positions(self, round_number: int) -> np.ndarray:
        """Their positions in ``dataset.client_ids``: int64 ``[clients_per_round]``."""
        number = checks.checked_count("round_number", round_number, least=0)
        return _first_of_shuffle(self.seed, number, self.dataset, self.clients_per_round)


def _first_of_shuffle(
    seed: int, round_number: int, dataset: FederatedDataset, size: int
) -> np.ndarray:
    # NumPy keeps the raw bits of a bit generator the same over versions, but not what the methods
    # of `Generator` make of them: so the shuffle is ours, by sorting 64-bit random numbers.
    bits = np.random.Philox(np.random.SeedSequence([seed, round_number]))
    return np.argsort(bits.random_raw(dataset.num_clients), kind="stable")[:size]
