"""Partitioners: rules that give the rows of one set of examples to clients.

    iid         every client gets a random sample of the whole
    dirichlet   every client has a class mix of its own, drawn from a Dirichlet distribution
    shards      every client gets a few contiguous pieces of the examples sorted by label
    by_key      the examples say themselves whose they are

Each returns a function ``(examples, rng) -> {client id: row numbers}`` for `from_arrays` and
`load`. All of them give every example to exactly one client.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedjax_core.datasets import checks
from fedjax_core.errors import DataError

# No mix of classes drawn with a larger one differs from the mean by an example; sums of larger ones
# overflow in the generator.
_LARGEST_ALPHA = 1e15

Partition = Callable[[Mapping[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]]


def iid(num_clients: int) -> Partition:
    """Shuffles the examples and deals them out evenly.

    Where the sizes do not divide, the first clients get one example more.

    Raises (when applied):
      DataError: there are more clients than examples.

    Examples:
      >>> groups = iid(2)({"x": np.arange(5)}, np.random.default_rng(0))
      >>> {client: len(rows) for client, rows in groups.items()}
      {'client_0': 3, 'client_1': 2}
    """
    num_clients = checks.checked_count("num_clients", num_clients)

    def split(
        examples: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        num_examples = _num_examples(examples)
        _check_enough(num_clients, num_examples, "clients")
        return _named(np.array_split(rng.permutation(num_examples), num_clients))

    return split


def dirichlet(
    num_clients: int,
    alpha: float,
    by: str = "label",
    balanced: bool = True,
    prior: np.ndarray | None = None,
) -> Partition:
    """Clients with different class mixes; the smaller `alpha`, the more different.

    `balanced` (Hsu et al.): all clients have the same number of examples (the first ones one more
    where it does not divide). Each draws a class mix ``q ~ Dir(alpha * prior)`` and takes examples
    of the classes by `q` without replacement; when a class is used up, `q` is renormalised over
    those left. The last clients get what remains.

    Not `balanced` (Yurochkin et al.): each class is cut among the clients in proportions drawn from
    ``Dir(alpha, ..., alpha)``; sizes differ, and clients may be empty.

    Args:
      num_clients: how many clients to make.
      alpha: the concentration, positive. ``alpha -> inf`` gives all clients the same mix.
      by: the feature with the class, integers or booleans ``[num_examples]``.
      balanced: see above.
      prior: weights of the classes in rising order, ``[num_classes]``, not normalised before use;
        by default each class's number of examples over the average class's, so that classes of
        one size draw from ``Dir(alpha, ..., alpha)``. Hsu et al. let their prior sum to 1: pass the
        shares of the classes for their alpha. `balanced` only.

    Raises:
      ArgumentError: `alpha` is not positive and finite.
      DataError (when applied): more clients than examples, no such feature, or a wrong `prior`.

    References:
      Hsu, Qi, Brown. Measuring the effects of non-identical data distribution for federated visual
      classification. 2019. arXiv:1909.06335.
      Yurochkin et al. Bayesian nonparametric federated learning of neural networks. ICML 2019.
      arXiv:1905.12022.
    """
    num_clients = checks.checked_count("num_clients", num_clients)
    alpha = min(checks.checked_fraction("alpha", alpha, high=np.inf), _LARGEST_ALPHA)

    def split(
        examples: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        labels = _labels(examples, by)
        _check_enough(num_clients, len(labels), "clients")
        pools = _shuffled_classes(labels, rng)
        if not balanced:
            return _named(_cut_classes(pools, num_clients, alpha, rng))
        sizes = [len(part) for part in np.array_split(labels, num_clients)]
        weights = _class_prior(prior, pools)
        return _named(_draw_mixes(pools, sizes, alpha * weights, rng))

    return split


def shards(num_clients: int, shards_per_client: int = 2, by: str = "label") -> Partition:
    """Sorts the examples by label, cuts them into equal shards and deals the shards out.

    With two shards most clients see two classes only. Where sizes do not divide, some shards have
    one example more. Examples of one label are shuffled before.

    Raises (when applied):
      DataError: there are more shards than examples, or no such feature.

    References:
      McMahan et al. Communication-efficient learning of deep networks from decentralized data.
      AISTATS 2017. arXiv:1602.05629, section 3.
    """
    num_clients = checks.checked_count("num_clients", num_clients)
    shards_per_client = checks.checked_count("shards_per_client", shards_per_client)
    num_shards = num_clients * shards_per_client

    def split(
        examples: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        labels = _labels(examples, by)
        _check_enough(num_shards, len(labels), "shards")
        pieces = np.array_split(np.concatenate(_shuffled_classes(labels, rng)), num_shards)
        dealt = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
        return _named([np.concatenate([pieces[i] for i in hand]) for hand in dealt])

    return split


def by_key(key: Any) -> Partition:
    """Gives each example to the client that it names: writers, speakers, users, devices.

    Args:
      key: the name of a feature, or an array ``[num_examples]``; integers, booleans, str or bytes.

    Returns:
      A partition with one client for each different key, its id the key as a str, in the order of
      the keys; each client's examples keep their order.

    Raises (when applied):
      DataError: no such feature, or an array of another length or kind.

    Examples:
      >>> by_key(["bob", "ann", "bob"])({"x": np.arange(3)}, np.random.default_rng(0))
      {'ann': array([1]), 'bob': array([0, 2])}
    """

    def split(
        examples: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        del rng  # The keys leave nothing to chance.
        keys = _keys(examples, key)
        names, inverse = np.unique(keys, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        groups = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
        return dict(zip((_text(name) for name in names), groups, strict=True))

    return split


def _named(groups: list[np.ndarray]) -> dict[str, np.ndarray]:
    width = len(str(len(groups) - 1))
    return {f"client_{i:0{width}d}": rows for i, rows in enumerate(groups)}


def _num_examples(examples: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(examples.values())))


def _check_enough(wanted: int, num_examples: int, what: str) -> None:
    if wanted > num_examples:
        raise DataError(
            f"expected at least one example for each of the {wanted} {what}, got {num_examples} "
            f"examples; ask for at most {num_examples} {what}"
        )


def _feature(examples: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in examples:
        raise DataError(f"the partition needs the feature {name!r}, got {list(examples)}")
    return np.asarray(examples[name])


def _labels(examples: Mapping[str, np.ndarray], by: str) -> np.ndarray:
    labels = _feature(examples, by)
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise DataError(
            f"the partition needs one integer label an example in {by!r}, got "
            f"{labels.dtype}{list(labels.shape)}; name the feature with the class in `by`"
        )
    return labels


def _keys(examples: Mapping[str, np.ndarray], key: Any) -> np.ndarray:
    keys = _feature(examples, key) if isinstance(key, str) else checks.to_array("key", key)
    num_examples = _num_examples(examples)
    if keys.shape != (num_examples,):
        raise DataError(
            f"by_key needs one key for each of the {num_examples} examples, got an array of shape "
            f"{list(keys.shape)}"
        )
    # Text stays as objects where it is so: NumPy's own text has no NULs at its end.
    is_object = keys.dtype.kind == "O"
    is_text = is_object and any(all(isinstance(k, kind) for k in keys) for kind in (str, bytes))
    if keys.dtype.kind not in "iubSU" and not is_text:
        raise DataError(
            f"by_key needs keys that are all integers, booleans, str or bytes, got {keys.dtype}"
        )
    return keys


def _text(key: Any) -> str:
    return key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)


def _shuffled_classes(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of each class in random order, classes in rising order."""
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    return np.split(order, np.cumsum(counts)[:-1])


def _class_prior(prior: np.ndarray | None, pools: list[np.ndarray]) -> np.ndarray:
    if prior is None:
        sizes = np.asarray([len(pool) for pool in pools], float)
        return sizes / sizes.mean()
    weights = np.asarray(prior, float)
    if weights.shape != (len(pools),) or not np.isfinite(weights).all() or (weights <= 0).any():
        raise DataError(
            f"prior: expected a positive weight for each of the {len(pools)} classes, got {prior!r}"
        )
    return weights


def _draw_mixes(
    pools: list[np.ndarray],
    sizes: list[int],
    concentration: np.ndarray,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """For each client as many rows as `sizes` says, its class mix drawn from a Dirichlet."""
    used = np.zeros(len(pools), np.int64)
    available = np.asarray([len(pool) for pool in pools])
    groups = []
    for size in sizes:
        taken = _draw_counts(_draw_shares(concentration, rng), available - used, size, rng)
        ends = used + taken
        groups.append(np.concatenate([p[a:b] for p, a, b in zip(pools, used, ends, strict=True)]))
        used = ends
    return groups


def _draw_counts(
    mix: np.ndarray, left: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """How many examples of each class a client of this mix takes, ``[num_classes]``.

    Draws that hit a class that is used up are thrown away and drawn again from the mix over the
    classes left: the same distribution as one draw after the other with renormalisation.
    """
    taken = np.zeros_like(left)
    while (missing := size - taken.sum()) > 0:
        weights = np.where(taken < left, mix, 0.0)
        if not weights.sum() > 0:
            # The classes left have probability 0 to machine precision: take what there is.
            weights = (left - taken).astype(float)
        drawn = rng.multinomial(missing, weights / weights.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


def _draw_shares(concentration: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shares drawn from a Dirichlet distribution, of finite numbers that sum to 1."""
    shares = rng.dirichlet(concentration)
    if np.isfinite(shares).all() and shares.sum() > 0:
        return shares
    # All draws underflowed: in that limit one share is all, each as probable as its concentration.
    odds = concentration / concentration.max()
    return np.eye(len(odds))[rng.choice(len(odds), p=odds / odds.sum())]


def _cut_classes(
    pools: list[np.ndarray], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Each class cut among all clients in proportions drawn from a symmetric Dirichlet."""
    pieces = []
    for pool in pools:
        shares = _draw_shares(np.full(num_clients, alpha), rng)
        cuts = np.rint(np.cumsum(shares)[:-1] * len(pool)).astype(np.int64)
        pieces.append(np.split(pool, cuts))
    return [np.concatenate(client) for client in zip(*pieces, strict=True)]
