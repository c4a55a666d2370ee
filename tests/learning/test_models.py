"""Models of plain functions: the loss, its mask, its metrics and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.learning.metrics import Mean, Sum
from fedjax_core.models import from_functions

SPEC = {
    "x": jax.ShapeDtypeStruct((2,), jnp.float32),
    "y": jax.ShapeDtypeStruct((), jnp.float32),
}
BATCH = {
    "x": jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]]),
    "y": jnp.array([1.0, 0.0, 2.0]),
}
WEIGHTS = jnp.array([0.5, -1.0])


def init(key):
    return jax.random.normal(key, (2,))


def predict(variables, batch, key, train):
    del key, train
    return batch["x"] @ variables


def squared(predictions, batch):
    return (predictions - batch["y"]) ** 2


def regression(**settings):
    return from_functions(init, predict, loss=squared, input_spec=SPEC, **settings)


def loss_and_gradient(model, batch, mask, variables=WEIGHTS, train=True):
    def loss(variables):
        return model.loss(None, variables, batch, mask, train)

    return jax.value_and_grad(loss, has_aux=True)(variables)


def test_loss_and_gradient_are_those_of_the_kept_rows():
    mask = jnp.array([True, True, False])
    (loss, (stats, after)), gradient = loss_and_gradient(regression(), BATCH, mask)
    # Residuals -1.5 - 1 and 2.5 - 0; mean of squares; gradient mean(2 * residual * x).
    residuals, rows = np.array([-2.5, 2.5]), np.array([[1.0, 2.0], [3.0, -1.0]])
    assert float(loss) == pytest.approx(6.25)
    np.testing.assert_allclose(gradient, (2 * residuals[:, None] * rows).mean(axis=0), rtol=1e-6)
    assert stats["loss"] == Mean(12.5, 2.0)
    assert stats["num_examples"] == Sum(2)
    assert stats["num_batches"] == Sum(1)
    assert stats["num_examples"].total.dtype == stats["num_batches"].total.dtype == jnp.int32
    assert set(stats) == {"loss", "num_examples", "num_batches"}
    np.testing.assert_array_equal(after, WEIGHTS)


def test_variables_of_a_model_without_buffers_come_back_themselves():
    _, (_, after) = regression().loss(None, WEIGHTS, BATCH, jnp.array([True] * 3), True)
    assert after is WEIGHTS


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("mask", [(True, True, False), (False, True, True), (False, True, False)])
def test_dropped_rows_change_nothing_whatever_they_hold(garbage, mask):
    mask = jnp.array(mask)
    dirty = {
        "x": jnp.where(mask[:, None], BATCH["x"], garbage),
        "y": jnp.where(mask, BATCH["y"], garbage),
    }
    clean = loss_and_gradient(regression(), BATCH, mask)
    with jax.debug_nans(True):
        soiled = loss_and_gradient(regression(), dirty, mask)
    jax.tree.map(np.testing.assert_array_equal, clean, soiled)


def test_dropped_rows_are_safe_where_zeros_would_not_be():
    # The square root has an infinite slope at 0, so zeros in a padded row would give 0 * inf.
    def root(variables, batch, key, train):
        return jnp.sqrt(batch["x"] @ jnp.abs(variables))

    model = from_functions(init, root, loss=squared, input_spec=SPEC)
    batch = {"x": jnp.array([[1.0, 2.0], [0.0, 0.0]]), "y": jnp.array([1.0, 0.0])}
    _, gradient = loss_and_gradient(model, batch, jnp.array([True, False]))
    assert np.isfinite(gradient).all()


def test_batch_without_examples():
    mask = jnp.zeros(3, bool)
    batch = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), BATCH)
    (loss, (stats, _)), gradient = loss_and_gradient(regression(), batch, mask)
    assert float(loss) == 0.0
    np.testing.assert_array_equal(gradient, [0.0, 0.0])
    assert stats["num_examples"] == Sum(0)
    assert stats["num_batches"] == Sum(0)


def test_non_finite_rows_that_count_are_seen():
    batch = BATCH | {"y": jnp.array([jnp.nan, 0.0, 0.0])}
    (loss, _), _ = loss_and_gradient(regression(), batch, jnp.array([True] * 3))
    assert np.isnan(loss)


def test_metrics_of_the_user():
    def mean_error(predictions, batch, mask):
        return Mean.of(predictions - batch["y"], mask)

    def num_positive(predictions, batch, mask):
        return Sum(jnp.sum((predictions > 0) & mask))

    model = regression(metrics={"error": mean_error, "positive": num_positive})
    mask = jnp.array([True, True, False])
    _, (stats, _) = model.loss(None, WEIGHTS, BATCH, mask, False)
    assert float(stats["error"].result()) == 0.0
    assert int(stats["positive"].result()) == 1


def test_accuracy_is_the_default_of_classifiers():
    spec = {"x": SPEC["x"], "label": jax.ShapeDtypeStruct((), jnp.int32)}

    def cross_entropy(logits, batch):
        return -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch["label"]]

    model = from_functions(
        lambda key: jnp.eye(2), predict, loss=cross_entropy, input_spec=spec, num_classes=2
    )
    batch = {"x": BATCH["x"], "label": jnp.array([1, 1, 0])}
    _, (stats, _) = model.loss(None, jnp.eye(2), batch, jnp.array([True] * 3), False)
    assert float(stats["accuracy"].result()) == pytest.approx(2 / 3)


def test_key_and_mode_reach_the_function():
    def noisy(variables, batch, key, train):
        noise = jax.random.normal(key, (len(batch["x"]),)) if train else 0.0
        return batch["x"] @ variables + noise

    model = from_functions(init, noisy, loss=squared, input_spec=SPEC)
    mask = jnp.array([True] * 3)
    losses = [
        float(model.loss(jax.random.key(seed), WEIGHTS, BATCH, mask, True)[0]) for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    still = float(model.loss(None, WEIGHTS, BATCH, mask, False)[0])
    assert still == pytest.approx(np.mean([6.25, 6.25, 2.25**2]))


def test_predict_needs_the_inputs_alone():
    np.testing.assert_allclose(
        regression().predict(WEIGHTS, {"x": BATCH["x"]}), [-1.5, 2.5, -0.25], rtol=1e-6
    )


def test_features_come_as_they_are_stored():
    spec = {"x": jax.ShapeDtypeStruct((), jnp.uint8)}
    seen = []

    def apply(variables, batch, key, train):
        seen.append(batch["x"].dtype)
        return batch["x"] * variables

    model = from_functions(
        lambda key: jnp.ones(()), apply, loss=lambda p, batch: p, input_spec=spec
    )
    loss, _ = model.loss(
        None, jnp.ones(()), {"x": jnp.array([2, 4], jnp.uint8)}, jnp.array([True] * 2), True
    )
    assert seen == [jnp.uint8]
    assert float(loss) == 3.0
    with pytest.raises(FederatedTypeError, match="'x' must be the kind of uint8"):
        model.predict(jnp.ones(()), {"x": jnp.array([2.0])})


def test_loss_composes_with_transformations():
    model, mask = regression(), jnp.array([True, True, False])

    @jax.jit
    def descend(variables):
        def step(variables, _):
            gradient, _ = jax.grad(model.loss, argnums=1, has_aux=True)(
                None, variables, BATCH, mask, True
            )
            return variables - 0.1 * gradient, None

        return jax.lax.scan(step, variables, length=200)[0]

    solutions = jax.vmap(descend)(jnp.stack([WEIGHTS, jnp.zeros(2)]))
    rows, targets = BATCH["x"][mask], BATCH["y"][mask]
    solved = np.linalg.solve(rows, targets)
    np.testing.assert_allclose(solutions, np.stack([solved] * 2), rtol=1e-3)


@pytest.mark.parametrize("name", ["loss", "num_examples", "num_batches"])
def test_names_of_metrics_that_are_taken(name):
    with pytest.raises(ArgumentError, match=f"every model has loss.*got '{name}'"):
        regression(metrics={name: lambda *_: Sum(0)})


def test_metric_that_is_no_function():
    with pytest.raises(ArgumentError, match="'accuracy': 'accuracy'"):
        regression(metrics={"accuracy": "accuracy"})


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "2"])
def test_number_of_classes_out_of_range(num_classes):
    with pytest.raises(ArgumentError, match=f"num_classes.*got {num_classes!r}"):
        regression(num_classes=num_classes)


def test_classes_without_labels():
    with pytest.raises(DataError, match=r"\['label'\] are missing"):
        regression(num_classes=2)


def test_labels_under_another_name():
    spec = {"x": SPEC["x"], "target": jax.ShapeDtypeStruct((), jnp.int32)}
    model = from_functions(
        init, predict, loss=squared, input_spec=spec, num_classes=2, label_key="target"
    )
    assert model.label_key == "target"


@pytest.mark.parametrize("reduce", [jnp.mean, lambda losses: losses[:, None]])
def test_losses_must_be_one_of_each_example(reduce):
    model = from_functions(
        init, predict, loss=lambda p, batch: reduce(squared(p, batch)), input_spec=SPEC
    )
    with pytest.raises(FederatedTypeError, match=r"one loss of each example, of shape \[3\]"):
        model.loss(None, WEIGHTS, BATCH, jnp.array([True] * 3), True)


def test_batches_that_do_not_fit():
    model, mask = regression(), jnp.array([True] * 3)
    with pytest.raises(DataError, match=r"loss: .*\['y'\] are missing"):
        model.loss(None, WEIGHTS, {"x": BATCH["x"]}, mask, True)
    with pytest.raises(FederatedTypeError, match=r"loss: feature 'x' must have the shape"):
        model.loss(None, WEIGHTS, BATCH | {"x": jnp.zeros((3, 4))}, mask, True)
    with pytest.raises(DataError, match="'mask': 2"):
        model.loss(None, WEIGHTS, BATCH, mask[:2], True)


@pytest.mark.parametrize(
    ("small", "wide"),
    [
        (jnp.uint8(200), jnp.int32),
        (jnp.int16(30_000), jnp.int32),
        (True, jnp.int32),
        (jnp.float16(60_000), jnp.float32),
        (jnp.bfloat16(256), jnp.float32),
        (3, jnp.int32),
        (0.5, jnp.float32),
    ],
)
def test_small_numbers_of_a_metric_are_added_up_in_32_bits(small, wide):
    model = regression(metrics={"m": lambda predictions, batch, mask: Sum(small)})
    mask = jnp.array([True, True, True])
    (_, (stats, _)), _ = loss_and_gradient(model, BATCH, mask)
    assert stats["m"].total.dtype == wide
    assert float((stats["m"] + stats["m"]).result()) == 2 * float(small)


@pytest.mark.parametrize(
    "result",
    [
        jnp.float32(1),
        {"total": 1},
        Sum(jnp.ones(3)),
        Mean(jnp.ones(()), jnp.ones(1)),
        Sum(jnp.complex64(1)),
        None,
    ],
)
def test_a_metric_that_is_no_sum_of_scalars_is_named(result):
    model = regression(metrics={"mine": lambda predictions, batch, mask: result})
    with pytest.raises(FederatedTypeError, match="metric 'mine' must give a Mean or a Sum"):
        loss_and_gradient(model, BATCH, jnp.array([True, True, True]))


def test_metrics_have_names():
    with pytest.raises(ArgumentError, match="metrics must map names"):
        regression(metrics=[lambda predictions, batch, mask: Sum(1)])
