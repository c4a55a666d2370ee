import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_core import datasets
from fedjax_core.datasets import partition
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError

PARTITIONS = {
    "iid": partition.iid(7),
    "dirichlet": partition.dirichlet(7, alpha=0.3),
    "dirichlet with tiny alpha": partition.dirichlet(7, alpha=1e-6),
    "dirichlet with huge alpha": partition.dirichlet(7, alpha=1e6),
    "dirichlet, unbalanced": partition.dirichlet(7, alpha=0.3, balanced=False),
    "dirichlet, symmetric": partition.dirichlet(7, alpha=1.0, prior=np.ones(10)),
    "shards": partition.shards(7, shards_per_client=3),
    "by_key": partition.by_key("label"),
}
EQUAL = [name for name in PARTITIONS if name not in ("dirichlet, unbalanced", "by_key", "shards")]


def _examples(num_examples=501):
    labels = np.random.default_rng(3).integers(0, 10, num_examples)
    return {"row": np.arange(num_examples), "label": labels}


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_example_goes_to_exactly_one_client(name):
    groups = PARTITIONS[name](_examples(), np.random.default_rng(0))
    rows = np.concatenate(list(groups.values()))
    np.testing.assert_array_equal(np.sort(rows), np.arange(501))


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_decides(name):
    split = PARTITIONS[name]
    first = split(_examples(), np.random.default_rng(5))
    again = split(_examples(), np.random.default_rng(5))
    assert list(first) == list(again)
    for client_id in first:
        np.testing.assert_array_equal(first[client_id], again[client_id])
    if name != "by_key":
        other = split(_examples(), np.random.default_rng(6))
        assert any(not np.array_equal(first[i], other[i]) for i in first)


@pytest.mark.parametrize("name", EQUAL)
def test_sizes_differ_by_one_at_most(name):
    sizes = [len(r) for r in PARTITIONS[name](_examples(), np.random.default_rng(0)).values()]
    assert sorted(set(sizes)) == [71, 72]
    assert sizes[:4] == [72] * 4


def test_ids_sort_like_their_numbers():
    ids = list(partition.iid(11)(_examples(), np.random.default_rng(0)))
    assert ids[0] == "client_00"
    assert ids[10] == "client_10"
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    "split",
    [
        partition.iid(9),
        partition.dirichlet(9, alpha=1.0),
        partition.dirichlet(9, alpha=1.0, balanced=False),
        partition.shards(5, shards_per_client=2),
    ],
)
def test_more_clients_than_examples_are_refused(split):
    with pytest.raises(DataError, match=r"got 8 examples; ask for at most 8"):
        split(_examples(8), np.random.default_rng(0))


def test_as_many_clients_as_examples():
    for split in (partition.iid(8), partition.dirichlet(8, 0.1), partition.shards(4)):
        groups = split(_examples(8), np.random.default_rng(0))
        assert sum(map(len, groups.values())) == 8


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.data())
def test_any_labels_are_dealt_out_completely(data):
    labels = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=60)))
    num_clients = data.draw(st.integers(1, len(labels)))
    alpha = data.draw(st.sampled_from([1e-300, 1e-8, 0.1, 1.0, 1e8, 1e300]))
    splits = [
        partition.iid(num_clients),
        partition.dirichlet(num_clients, alpha),
        partition.dirichlet(num_clients, alpha, balanced=False),
        partition.shards(num_clients, 1),
        partition.by_key("label"),
    ]
    for split in splits:
        groups = split({"label": labels}, np.random.default_rng(0))
        rows = np.concatenate(list(groups.values()))
        np.testing.assert_array_equal(np.sort(rows), np.arange(len(labels)))


def _mixes(alpha, num_classes=4, num_clients=2_000, **settings):
    """Class shares of clients that draw 50 examples of a supply that is practically endless."""
    labels = np.repeat(np.arange(num_classes), 100_000)
    split = partition.dirichlet(len(labels) // 50, alpha, **settings)
    groups = split({"label": labels}, np.random.default_rng(0))
    first = list(groups.values())[:num_clients]
    return np.stack([np.bincount(labels[r], minlength=num_classes) / len(r) for r in first])


def test_class_shares_have_the_variance_of_the_dirichlet_multinomial():
    # Shares of n draws from q ~ Dir(a), a0 = sum of a: variance p(1-p)/n * (n + a0)/(1 + a0).
    # With 2,000 clients the sample variance has a relative standard error below 5 %; the bound of
    # 20 % has a false-alarm rate below 1e-4.
    shares_of_four = {"prior": np.full(4, 0.25)}
    for alpha, a0, settings in [(1.0, 4.0, {}), (1.0, 1.0, shares_of_four), (2.0, 8.0, {})]:
        shares = _mixes(alpha, **settings)
        expected = 0.25 * 0.75 / 50 * (50 + a0) / (1 + a0)
        np.testing.assert_allclose(shares.mean(0), 0.25, atol=0.05)
        np.testing.assert_allclose(shares.var(0).mean(), expected, rtol=0.2)


def test_prior_weights_the_classes():
    shares = _mixes(3.0, num_clients=500, prior=np.array([3.0, 1.0, 1.0, 1.0]))
    # Mean shares are 1/2, 1/6, 1/6, 1/6 with a standard error below 0.005.
    np.testing.assert_allclose(shares.mean(0), [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.03)


def test_a_tiny_alpha_gives_one_class_until_it_runs_out():
    labels = np.repeat(np.arange(5), 100)
    split = partition.dirichlet(25, alpha=1e-4)
    groups = split({"label": labels}, np.random.default_rng(0))
    classes = [len(np.unique(labels[rows])) for rows in groups.values()]
    assert classes[0] == 1
    assert np.mean(np.array(classes[:10]) == 1) >= 0.9


def test_unbalanced_shares_follow_the_dirichlet():
    # Each class of n = 10,000 is cut by Dir(a, ..., a) over 10 clients: a share has mean 1/10 and
    # variance m(1-m)/(10 a + 1); with 200 classes x 10 clients the relative error is below 5 %.
    labels = np.repeat(np.arange(200), 1_000)
    split = partition.dirichlet(10, alpha=0.5, balanced=False)
    groups = split({"label": labels}, np.random.default_rng(0))
    shares = np.stack([np.bincount(labels[r], minlength=200) / 1_000 for r in groups.values()])
    np.testing.assert_allclose(shares.mean(), 0.1, atol=1e-9)
    np.testing.assert_allclose(shares.var(), 0.1 * 0.9 / 6, rtol=0.2)


def test_shards_are_runs_of_the_sorted_labels():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    split = partition.shards(100, shards_per_client=2)
    groups = split({"label": labels}, np.random.default_rng(1))
    assert {len(rows) for rows in groups.values()} == {6}
    # 200 shards of 3 divide 60: every shard has one class, so a client has at most two.
    assert max(len(np.unique(labels[rows])) for rows in groups.values()) == 2


def test_by_key_takes_features_and_arrays():
    rng = np.random.default_rng(0)
    examples = {"x": np.arange(4), "writer": np.array([b"z", b"a", b"z", b"b"])}
    groups = partition.by_key("writer")(examples, rng)
    assert {k: v.tolist() for k, v in groups.items()} == {"a": [1], "b": [3], "z": [0, 2]}
    groups = partition.by_key(np.array([10, 9, 10, 9]))(examples, rng)
    assert {k: v.tolist() for k, v in groups.items()} == {"9": [1, 3], "10": [0, 2]}
    groups = partition.by_key(np.array(["é", "b", "b", "b"], dtype=object))(examples, rng)
    assert list(groups) == ["b", "é"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("nobody", "needs the feature 'nobody'"),
        (["a", "b"], "each of the 4 examples"),
        (np.zeros((4, 1), int), r"shape \[4, 1\]"),
        ([0.5, 1.5, 0.5, float("nan")], "float64"),
        ([None, "a", "b", "c"], "object"),
    ],
)
def test_keys_that_do_not_fit_are_refused(key, words):
    with pytest.raises(DataError, match=words):
        partition.by_key(key)({"x": np.arange(4)}, np.random.default_rng(0))


@pytest.mark.parametrize("labels", [np.zeros(9), np.zeros((9, 2), int), np.array(["a"] * 9)])
def test_labels_must_be_integers(labels):
    for split in (partition.dirichlet(2, 1.0), partition.shards(2)):
        with pytest.raises(DataError, match="one integer label an example in 'label'"):
            split({"label": labels}, np.random.default_rng(0))


def test_a_missing_label_feature_is_named():
    with pytest.raises(DataError, match=r"needs the feature 'digit', got \['label'\]"):
        partition.dirichlet(2, 1.0, by="digit")(
            {"label": np.zeros(4, int)}, np.random.default_rng()
        )


@pytest.mark.parametrize("prior", [np.ones(3), -np.ones(2), [np.nan, 1], [0, 1]])
def test_a_prior_that_does_not_fit_is_refused(prior):
    with pytest.raises(DataError, match="positive weight for each of the 2 classes"):
        partition.dirichlet(2, 1.0, prior=prior)(
            {"label": np.array([0, 1])}, np.random.default_rng()
        )


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive_and_finite(alpha):
    with pytest.raises(ArgumentError, match="alpha"):
        partition.dirichlet(2, alpha)


@pytest.mark.parametrize("num_clients", [0, -3])
def test_the_number_of_clients_must_be_positive(num_clients):
    for make in (partition.iid, partition.shards, lambda n: partition.dirichlet(n, 1.0)):
        with pytest.raises(ArgumentError, match="num_clients"):
            make(num_clients)


@pytest.mark.parametrize("num_clients", [2.0, "3", None, True])
def test_the_number_of_clients_must_be_an_integer(num_clients):
    with pytest.raises(FederatedTypeError, match="num_clients"):
        partition.iid(num_clients)


def test_from_arrays_groups_rows_by_client():
    examples = {"x": np.arange(6) * 10, "writer": np.array(["b", "a", "b", "b", "a", "c"])}
    data = datasets.from_arrays(
        examples, partition=partition.by_key("writer"), features=["x"], name="written"
    )
    assert data.client_ids == ("a", "b", "c")
    assert data.client("b")["x"].tolist() == [0, 20, 30]
    assert data.name == "written"
    assert list(data.examples) == ["x"]


def test_from_arrays_is_a_function_of_the_seed():
    make = lambda seed: datasets.from_arrays(_examples(), partition=partition.iid(5), seed=seed)  # noqa: E731
    same, again, other = make(1), make(1), make(2)
    np.testing.assert_array_equal(same.examples["row"], again.examples["row"])
    assert not np.array_equal(same.examples["row"], other.examples["row"])


@pytest.mark.parametrize(
    ("examples", "settings", "words"),
    [
        ({}, {}, "at least one feature"),
        ({"x": [1, 2], "y": [1]}, {}, "unequal length"),
        ({"x": ["a", "b"]}, {}, "encode text"),
        ({"x": [1, 2]}, {"features": ["z"]}, "features must name"),
        ({"x": [1, 2]}, {"features": []}, "features must name"),
        ({"x": [1, 2]}, {"partition": lambda e, r: {}}, "no clients"),
        ({"x": [1, 2]}, {"partition": lambda e, r: {"a": [0], "b": [2]}}, "client 'b' rows"),
        ({"x": [1, 2]}, {"partition": lambda e, r: {"a": [-1]}}, "outside 0..1"),
        ({"x": [1]}, {"partition": partition.iid(2)}, "at most 1 clients"),
        ({"x": [1, 2]}, {"seed": -1}, "seed"),
    ],
)
def test_from_arrays_refuses_what_does_not_fit(examples, settings, words):
    with pytest.raises((DataError, ArgumentError), match=words):
        datasets.from_arrays(examples, **{"partition": partition.iid(1), **settings})


def test_holdout_splits_each_client():
    sizes = [0, 1, 2, 5, 10, 33]
    data = datasets.from_clients(
        {f"c{i}": {"x": 100 * i + np.arange(n, dtype=np.int32)} for i, n in enumerate(sizes)}
    )
    train, test = datasets.holdout(data, 0.2, seed=4)
    # round(0.2 n), halves up, at least one left to train on
    assert test.num_examples.tolist() == [0, 0, 0, 1, 2, 7]
    assert train.num_examples.tolist() == [0, 1, 2, 4, 8, 26]
    assert train.client_ids == test.client_ids == data.client_ids
    for client_id in data.client_ids:
        both = np.concatenate([train.client(client_id)["x"], test.client(client_id)["x"]])
        np.testing.assert_array_equal(np.sort(both), data.client(client_id)["x"])
        assert (np.diff(train.client(client_id)["x"]) > 0).all()
    assert (train.name, test.name) == ("clients/train", "clients/test")


def test_holdout_depends_on_the_seed_alone():
    data = datasets.from_clients({"a": {"x": np.arange(100)}, "b": {"x": np.arange(50)}})
    rows = [datasets.holdout(data, 0.3, seed=s).test.examples["x"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


def test_holdout_is_uniform_over_rows():
    # Each of 10 rows is held out with probability 0.3; over 3,000 clients a row's count has a
    # standard deviation of 25, so 6 of them have a false-alarm rate of 2e-8 over the 10 rows.
    data = datasets.from_clients({str(i): {"x": np.arange(10)} for i in range(3_000)})
    counts = np.bincount(datasets.holdout(data, 0.3).test.examples["x"], minlength=10)
    assert counts.sum() == 9_000
    assert abs(counts - 900).max() < 6 * 25.1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_holdout_fraction_is_checked(fraction):
    data = datasets.from_clients({"a": {"x": [1, 2]}})
    with pytest.raises(ArgumentError, match="fraction"):
        datasets.holdout(data, fraction)


@pytest.mark.parametrize("keys", [[b"a\0", b"a", b"a\0\0"], ["a\0", "a", "a\0\0"]])
def test_keys_that_end_in_nul_are_different(keys):
    for values in (keys, np.array(keys, object)):
        rule = partition.by_key(values)
        groups = rule({"x": np.arange(3)}, np.random.default_rng(0))
        assert {name: rows.tolist() for name, rows in groups.items()} == {
            "a": [1],
            "a\0": [0],
            "a\0\0": [2],
        }
    data = datasets.from_arrays(
        {"x": np.arange(3), "who": keys}, partition=partition.by_key("who"), features=["x"]
    )
    assert data.client_ids == ("a", "a\0", "a\0\0")


def test_keys_of_several_kinds_are_refused():
    with pytest.raises(DataError, match="all integers, booleans, str or bytes"):
        partition.by_key(["1", 1])({"x": np.arange(2)}, np.random.default_rng(0))


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e308])
def test_extreme_concentrations_still_give_every_row_once(alpha, balanced):
    labels = np.repeat([0, 1], 300)
    rule = partition.dirichlet(3, alpha, balanced=balanced)
    groups = rule({"label": labels}, np.random.default_rng(0))
    assert sorted(np.concatenate(list(groups.values()))) == list(range(600))
    if alpha > 1:
        # All mixes are the same in this limit: 100 of each class to each client.
        counts = [np.bincount(labels[rows], minlength=2) for rows in groups.values()]
        assert [int(c.sum()) for c in counts] == [200] * 3
    if alpha > 1 and not balanced:
        np.testing.assert_array_equal(counts, np.full((3, 2), 100))


def test_shards_may_be_counted_by_small_integers():
    rule = partition.shards(np.int8(100), np.int8(2))
    groups = rule({"label": np.arange(400) % 10}, np.random.default_rng(0))
    assert [len(rows) for rows in groups.values()] == [4] * 100
