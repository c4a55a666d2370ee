"""Evaluation: one result for every batch size, and errors before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_core import datasets
from fedjax_core.algorithms import fed_avg
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.learning.evaluation import check_examples, evaluate
from fedjax_core.learning.metrics import Sum
from fedjax_core.models import from_functions, linear

SHAPE = (6, 6, 1)
COUNT = 23


@pytest.fixture(scope="module")
def model():
    return linear(num_classes=4, input_shape=SHAPE)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (COUNT, *SHAPE)).astype(np.uint8),
        "label": rng.integers(0, 4, COUNT),
    }


def by_hand(params, data):
    layer = params["Dense_0"]
    pixels = data["image"].reshape(COUNT, -1) / 255.0
    logits = pixels @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -log_softmax[np.arange(COUNT), data["label"]]
    return losses.mean(), (logits.argmax(axis=-1) == data["label"]).mean()


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 500])
def test_every_batch_size_gives_the_mean_over_examples(model, params, data, batch_size):
    result = evaluate(model, params, data, batch_size=batch_size)
    loss, accuracy = by_hand(params, data)
    assert set(result) == {"loss", "accuracy", "num_examples"}
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["accuracy"] == accuracy
    assert result["num_examples"] == COUNT
    assert {type(value) for value in result.values()} <= {float, int}


def test_a_dataset_is_its_pooled_examples(model, params, data):
    dataset = datasets.from_arrays(data, partition=datasets.partition.iid(1))
    assert evaluate(model, params, dataset) == pytest.approx(evaluate(model, params, data))


def test_the_padding_of_a_cohort_is_no_data(model, params, data):
    # 23 examples lie in 32 rows.
    dataset = datasets.from_arrays(data, partition=datasets.partition.iid(1))
    with pytest.raises(DataError, match=r"got Cohort.*dataset\.select\(ids\)"):
        evaluate(model, params, dataset.cohort(dataset.client_ids))
    with pytest.raises(DataError, match=r"got Splits.*\.test"):
        evaluate(model, params, datasets.holdout(dataset, 0.2))


def test_only_variables_are_evaluated(model, params, data):
    algorithm = fed_avg(model, client_optimizer=optax.sgd(0.1), batch_size=5)
    state = algorithm.init(jax.random.key(0))
    for wrong in (state, None, algorithm, model):
        with pytest.raises(FederatedTypeError, match=r"Pass state\.params"):
            evaluate(model, wrong, data)
    assert evaluate(model, state.params, data)["num_examples"] == COUNT


def test_batches_may_be_counted_by_numpy(model, params, data):
    assert evaluate(model, params, data, np.int64(23)) == evaluate(model, params, data, 23)


def test_data_on_disk_and_on_the_device(model, params, data, tmp_path):
    expected = evaluate(model, params, data)
    np.save(tmp_path / "image.npy", data["image"])
    on_disk = data | {"image": np.load(tmp_path / "image.npy", mmap_mode="r")}
    assert evaluate(model, params, on_disk) == expected
    assert evaluate(model, params, jax.tree.map(jnp.asarray, data)) == expected


def test_features_that_the_model_does_not_know_are_ignored(model, params, data):
    more = data | {"writer": np.array(["someone"] * COUNT), "note": np.zeros(3)}
    assert evaluate(model, params, more) == evaluate(model, params, data)


def counting_model():
    """A model that counts how often its function is traced."""
    traces = []

    def apply(variables, batch, key, train):
        traces.append(train)
        return batch["x"] * variables

    model = from_functions(
        lambda key: jnp.ones(()),
        apply,
        loss=lambda predictions, batch: predictions,
        input_spec={"x": jax.ShapeDtypeStruct((), jnp.float32)},
        metrics={"big": lambda p, batch, mask: Sum(jnp.sum((p > 10) & mask))},
    )
    return model, traces


def test_one_program_for_a_model_and_a_batch_size():
    model, traces = counting_model()
    for count in (40, 17, 16):
        x = np.arange(count, dtype=np.float32)
        result = evaluate(model, jnp.ones(()), {"x": x}, batch_size=16)
        assert result["loss"] == (count - 1) / 2
        assert result["big"] == max(0, count - 11)
    assert traces == [False]


def test_small_data_share_few_programs():
    model, traces = counting_model()
    for count in range(1, 17):
        x = np.arange(count, dtype=np.float32)
        assert evaluate(model, jnp.ones(()), {"x": x})["loss"] == (count - 1) / 2
    assert len(traces) == 5  # batches of 1, 2, 4, 8, 16


def test_many_batches_add_up_in_double_precision():
    # A batch sums to 2**23 + 8, exactly; their float32 total would step by 256 in the end.
    model, _ = counting_model()
    x = np.full(4096, 2.0**19 + 0.5, np.float32)
    assert evaluate(model, jnp.ones(()), {"x": x}, batch_size=16)["loss"] == 2.0**19 + 0.5


def test_no_examples(model, params, data):
    empty = {name: value[:0] for name, value in data.items()}
    with pytest.raises(DataError, match="there are no examples"):
        evaluate(model, params, empty)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_batch_size_out_of_range(model, params, data, batch_size):
    with pytest.raises(ArgumentError, match=f"positive integer; got {batch_size}"):
        evaluate(model, params, data, batch_size=batch_size)


def test_features_of_unequal_length(model, params, data):
    data["label"] = data["label"][:-1]
    with pytest.raises(DataError, match=r"\{'image': 23, 'label': 22\}"):
        evaluate(model, params, data)


def test_missing_feature(model, params, data):
    renamed = {"pixels": data["image"], "label": data["label"]}
    with pytest.raises(DataError, match=r"\['image'\] are missing from \['label', 'pixels'\]"):
        evaluate(model, params, renamed)


@pytest.mark.parametrize(("bad", "row"), [(4, 7), (-1, 0), (99, 22)])
def test_label_outside_the_classes(model, params, data, bad, row):
    data["label"][row] = bad
    with pytest.raises(DataError, match=rf"'label' must be in 0 .. 3.*got {bad} in row {row}"):
        evaluate(model, params, data)


def test_wrong_shape_and_dtype(model, params, data):
    with pytest.raises(FederatedTypeError, match=r"'image' must have the shape.*\[23, 36\]"):
        evaluate(model, params, data | {"image": data["image"].reshape(COUNT, 36)})
    with pytest.raises(FederatedTypeError, match="'image' must be uint8 or floats; got int32"):
        evaluate(model, params, data | {"image": data["image"].astype(np.int32)})
    with pytest.raises(FederatedTypeError, match="'label' must be the kind of int32; got float32"):
        evaluate(model, params, data | {"label": data["label"].astype(np.float32)})


@pytest.mark.parametrize("bad", [None, 3, [np.zeros(3)]])
def test_data_that_is_none(model, params, bad):
    with pytest.raises(DataError, match="data must be a dict of arrays"):
        evaluate(model, params, bad)


def test_check_begins_with_who_asks(model, data):
    check_examples(model, data, where="update")
    data["label"][3] = 4
    with pytest.raises(DataError, match=r"^update: feature 'label'.*row 3 \(1 such rows\)"):
        check_examples(model, data, where="update")


def test_under_a_transformation_values_are_not_looked_at(model, data):
    data["label"][0] = 77

    @jax.jit
    def traced(examples):
        check_examples(model, examples, where="update")
        return examples["label"].sum()

    traced(data)
    with pytest.raises(FederatedTypeError, match="update: feature 'image'"):
        traced(data | {"image": data["image"][:, :5]})
