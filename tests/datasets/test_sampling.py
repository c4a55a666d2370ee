import numpy as np
import pytest

from fedjax_core import datasets
from fedjax_core.datasets import sampling
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError


def _dataset(num_clients):
    return datasets.from_clients({f"c{i}": {"x": [i]} for i in range(num_clients)})


def test_clients_of_a_round_are_different():
    sample = sampling.uniform(_dataset(20), 10)
    for round_number in range(50):
        ids = sample(round_number)
        assert len(ids) == len(set(ids)) == 10


def test_rounds_may_be_asked_for_in_any_order_and_again():
    forward = sampling.uniform(_dataset(30), 5, seed=7)
    backward = sampling.uniform(_dataset(30), 5, seed=7)
    rounds = [forward(r) for r in range(20)]
    assert [backward(r) for r in reversed(range(20))] == rounds[::-1]
    assert len({tuple(r) for r in rounds}) == 20


def test_seeds_differ():
    data = _dataset(50)
    first, second = (sampling.uniform(data, 10, seed=s) for s in (0, 1))
    assert [first(r) for r in range(3)] != [second(r) for r in range(3)]
    # Seed and round are not simply added up.
    assert sampling.uniform(data, 10, seed=1)(0) != sampling.uniform(data, 10, seed=0)(1)


def test_the_draw_is_philox_bits_sorted():
    # NumPy guarantees the bits of a seeded Philox, so this holds with every version.
    keys = np.random.Philox(np.random.SeedSequence([3, 4])).random_raw(12)
    expected = [f"c{i}" for i in np.argsort(keys)[:5]]
    assert sampling.uniform(_dataset(12), 5, seed=3)(4) == expected


def test_every_client_and_pair_is_equally_likely():
    # 2 of 5 clients over 4,000 rounds: a client's count has mean 1,600 and standard deviation 31, a
    # pair's 400 and 19; 5.5 standard deviations over 15 counts: false-alarm rate below 1e-6.
    sample = sampling.uniform(_dataset(5), 2)
    pairs = np.zeros((5, 5))
    for round_number in range(4_000):
        a, b = (int(i[1:]) for i in sample(round_number))
        pairs[a, b] += 1
    both = (pairs + pairs.T)[np.triu_indices(5, 1)]
    assert abs((pairs + pairs.T).sum(0) - 1_600).max() < 5.5 * 31
    assert abs(both - 400).max() < 5.5 * 19


def test_all_clients_of_a_dataset():
    assert sorted(sampling.uniform(_dataset(4), 4)(0)) == ["c0", "c1", "c2", "c3"]


def test_more_clients_than_there_are_is_refused():
    with pytest.raises(DataError, match=r"clients_per_round=5.*ask for at most 4"):
        sampling.uniform(_dataset(4), 5)


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_settings_out_of_range_are_refused(size, seed):
    with pytest.raises(ArgumentError):
        sampling.uniform(_dataset(4), size, seed)


def test_settings_of_the_wrong_type_are_refused():
    with pytest.raises(FederatedTypeError, match="clients_per_round"):
        sampling.uniform(_dataset(4), 1.5)
    with pytest.raises(FederatedTypeError, match="round_number"):
        sampling.uniform(_dataset(4), 1)("0")
    with pytest.raises(ArgumentError, match="round_number"):
        sampling.uniform(_dataset(4), 1)(-1)
    assert sampling.uniform(_dataset(4), np.int64(2), np.int64(0))(np.int32(3))


def test_both_parts_of_a_dataset_are_not_one():
    data = datasets.from_clients({"a": {"x": [1, 2]}, "b": {"x": [3]}})
    with pytest.raises(FederatedTypeError, match=r"got Splits; pass \.train"):
        datasets.sampling.uniform(datasets.holdout(data, 0.5), 1)
