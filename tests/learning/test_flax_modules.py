"""Flax modules as models: linen and nnx, dropout, and what becomes of buffers."""

import functools
import subprocess
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedjax_core.errors import ArgumentError, DataError
from fedjax_core.models import from_flax

SPEC = {
    "image": jax.ShapeDtypeStruct((4,), jnp.float32),
    "label": jax.ShapeDtypeStruct((), jnp.int32),
}
ALL = jnp.ones(6, bool)
KEY = jax.random.key(3)


def batch_of(dtype: type = np.float32):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (6, 4)).astype(np.uint8)
    image = image if dtype == np.uint8 else (image / 255.0).astype(dtype)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, 3, 6))}


class LinenDropout(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


class NnxDropout(nnx.Module):
    def __init__(self, *, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.dropout(x))


class LinenNorm(linen.Module):
    """Batch normalisation and dropout, with one flag for both."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


class LinenNormTwoFlags(linen.Module):
    """Batch normalisation and dropout, with a flag for each."""

    @linen.compact
    def __call__(self, x, deterministic, use_running_average):
        x = linen.BatchNorm(use_running_average=use_running_average)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=deterministic)(x))


class NnxNorm(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(x))


class NnxLayers(nnx.Module):
    def __init__(self, classes, *, rngs):
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, classes, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def statistics(variables, path):
    for name in path:
        variables = variables[name]
    return variables["mean"], variables["var"]


NORMS = [
    pytest.param(LinenNorm(), ("batch_stats", "BatchNorm_0"), id="linen"),
    pytest.param(NnxNorm, ("buffers", "norm"), id="nnx"),
]
DROPOUTS = [
    pytest.param(LinenDropout(), id="linen"),
    pytest.param(NnxDropout, id="nnx"),
    pytest.param(NnxDropout(rngs=nnx.Rngs(0)), id="nnx-built"),
]


def test_linen_initialises_as_flax_does():
    module = linen.Dense(3)
    model = from_flax(module, input_spec=SPEC)
    expected = module.init(KEY, jnp.zeros((1, 4)))["params"]
    jax.tree.map(np.testing.assert_array_equal, model.init(KEY), expected)


def test_one_function_in_linen_and_nnx_is_one_model():
    batch = batch_of()
    linen_model = from_flax(linen.Dense(3), input_spec=SPEC)
    nnx_model = from_flax(functools.partial(nnx.Linear, 4, 3), input_spec=SPEC)
    variables = linen_model.init(KEY)
    assert jax.tree.map(jnp.shape, nnx_model.init(KEY)) == jax.tree.map(jnp.shape, variables)
    results = [
        jax.value_and_grad(model.loss, argnums=1, has_aux=True)(KEY, variables, batch, ALL, True)
        for model in (linen_model, nnx_model)
    ]
    for left, right in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_softmax_regression_by_hand():
    batch, model = batch_of(), from_flax(linen.Dense(3), input_spec=SPEC)
    variables = model.init(KEY)
    loss, (stats, after) = model.loss(KEY, variables, batch, ALL, True)
    logits = np.asarray(batch["image"], np.float64) @ np.asarray(variables["kernel"], np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    labels = np.asarray(batch["label"])
    assert float(loss) == pytest.approx(-log_softmax[np.arange(6), labels].mean(), rel=1e-6)
    is_right = logits.argmax(axis=-1) == labels
    assert float(stats["accuracy"].result()) == pytest.approx(is_right.mean())
    assert after is variables
    assert model.num_classes == 3


def test_nnx_draws_from_the_key_or_brings_its_parameters():
    model = from_flax(functools.partial(NnxLayers, 3), input_spec=SPEC)
    first, second = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    kernels = [v["layers"]["0"]["kernel"] for v in (first, second)]
    assert not np.array_equal(*kernels)
    module = NnxLayers(3, rngs=nnx.Rngs(5))
    built = from_flax(module, input_spec=SPEC).init(KEY)
    np.testing.assert_array_equal(built["layers"]["1"]["kernel"], module.layers[1].kernel[...])


def test_nnx_module_may_change_and_initial_variables_may_be_donated():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = from_flax(module, input_spec=SPEC)
    before = jax.device_get(model.init(KEY))
    module.kernel[...] = jnp.zeros((4, 3))
    for leaf in jax.tree.leaves(model.init(KEY)):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.init(KEY)), before)


def test_lists_of_more_than_ten_layers_keep_their_order():
    class Scale(nnx.Module):
        def __init__(self, *, rngs):
            self.scales = nnx.List([nnx.Param(jnp.full((3,), i, jnp.float32)) for i in range(12)])

        def __call__(self, x):
            powers = [0.5**i * scale[...] for i, scale in enumerate(self.scales)]
            return jnp.broadcast_to(sum(powers), (len(x), 3))

    model = from_flax(Scale, input_spec=SPEC)
    predictions = model.predict(model.init(KEY), batch_of())
    np.testing.assert_allclose(predictions[0, 0], sum(i * 0.5**i for i in range(12)), rtol=1e-6)


@pytest.mark.parametrize("module", DROPOUTS)
def test_dropout_is_a_function_of_the_key(module):
    model, batch = from_flax(module, input_spec=SPEC), batch_of()
    variables = model.init(KEY)

    def loss(seed, train):
        return float(model.loss(jax.random.key(seed), variables, batch, ALL, train)[0])

    assert loss(0, True) == loss(0, True) != loss(1, True)
    assert loss(0, False) == loss(1, False)
    still = float(model.loss(None, variables, batch, ALL, False)[0])
    assert still == loss(0, False) != loss(0, True)


@pytest.mark.parametrize("module", DROPOUTS)
def test_dropout_keeps_half_and_doubles_it(module):
    # 4,000 coins: the share of kept inputs is within 0.05 of 1/2 but for a probability of 1e-9.
    spec = {"image": jax.ShapeDtypeStruct((4,), jnp.float32)}
    model = from_flax(module, input_spec=spec, loss=lambda p, batch: p[:, 0])
    variables = jax.tree.map(jnp.zeros_like, model.init(KEY))
    kernel = next(leaf for leaf in jax.tree.leaves(variables) if leaf.ndim == 2)
    variables = jax.tree.map(lambda x: x + 1 if x.shape == kernel.shape else x, variables)
    batch, mask = {"image": jnp.ones((1000, 4))}, jnp.ones(1000, bool)
    mean, _ = model.loss(jax.random.key(0), variables, batch, mask, True)
    share = float(mean) / (4 * 2)
    assert abs(share - 0.5) < 0.05


@pytest.mark.parametrize(("module", "path"), NORMS)
def test_buffers_are_refused_unless_their_fate_is_told(module, path):
    with pytest.raises(ArgumentError, match=rf"{'/'.join(path)}/mean.*mutable=\"average\""):
        from_flax(module, input_spec=SPEC)


@pytest.mark.parametrize(("module", "path"), NORMS)
def test_averaged_buffers_follow_the_batch(module, path):
    model, batch = from_flax(module, input_spec=SPEC, mutable="average"), batch_of()
    variables = model.init(KEY)
    assert set(variables) == {"params", path[0]}
    (_, (_, after)), gradient = jax.value_and_grad(model.loss, argnums=1, has_aux=True)(
        KEY, variables, batch, ALL, True
    )
    mean, variance = statistics(after, path)
    rows = np.asarray(batch["image"], np.float64)
    np.testing.assert_allclose(mean, 0.1 * rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * rows.var(axis=0), rtol=1e-5)
    for statistic in statistics(gradient, path):
        np.testing.assert_array_equal(statistic, np.zeros(4))
    jax.tree.map(np.testing.assert_array_equal, after["params"], variables["params"])


@pytest.mark.parametrize(("module", "path"), NORMS)
def test_averaged_buffers_do_not_see_padding(module, path):
    model, batch = from_flax(module, input_spec=SPEC, mutable="average"), batch_of()
    mask = jnp.array([True, True, True, False, False, False])
    batch["image"] = jnp.where(mask[:, None], batch["image"], jnp.nan)
    _, (_, after) = model.loss(KEY, model.init(KEY), batch, mask, True)
    mean, variance = statistics(after, path)
    rows = np.asarray(batch["image"][:3], np.float64)
    np.testing.assert_allclose(mean, 0.1 * rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * rows.var(axis=0), rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("module", "path"), NORMS)
def test_averaged_buffers_rest_without_examples_and_in_evaluation(module, path, train):
    model, batch = from_flax(module, input_spec=SPEC, mutable="average"), batch_of()
    variables, mask = model.init(KEY), ALL & (not train)
    _, (_, after) = model.loss(KEY, variables, batch, mask, train)
    jax.tree.map(np.testing.assert_array_equal, after, variables)


@pytest.mark.parametrize(("module", "path"), NORMS)
def test_frozen_buffers_stay_and_are_used_in_training(module, path):
    model, batch = from_flax(module, input_spec=SPEC, mutable="frozen"), batch_of()
    variables = model.init(KEY)
    assert not any(
        "mean" in jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(variables)
    )
    trained, (_, after) = model.loss(KEY, variables, batch, ALL, True)
    evaluated, _ = model.loss(None, variables, batch, ALL, False)
    assert after is variables
    assert float(trained) == float(evaluated)


@pytest.mark.parametrize(("module", "path"), NORMS)
def test_models_with_buffers_train_in_scans_over_vmapped_clients(module, path):
    model, batch = from_flax(module, input_spec=SPEC, mutable="average"), batch_of()
    variables = model.init(KEY)

    def step(variables, key):
        gradient, (_, after) = jax.grad(model.loss, argnums=1, has_aux=True)(
            key, variables, batch, ALL, True
        )
        return jax.tree.map(lambda v, g: v - 0.1 * g, after, gradient), None

    keys = jax.random.split(KEY, (2, 3))
    train = jax.jit(jax.vmap(lambda keys: jax.lax.scan(step, variables, keys)[0]))
    trained = train(keys)
    for client in (0, 1):
        alone = variables
        for key in keys[client]:
            alone, _ = step(alone, key)
        for left, right in zip(jax.tree.leaves(trained), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(left[client], right, rtol=1e-4, atol=1e-6)
    # Three steps of momentum 0.9 on one batch: 1 - 0.9**3 of the way to its mean.
    expected = 0.271 * np.asarray(batch["image"], np.float64).mean(axis=0)
    np.testing.assert_allclose(statistics(trained, path)[0][1], expected, rtol=1e-5)


def test_frozen_buffers_with_flags_of_their_own_leave_dropout_on():
    model = from_flax(LinenNormTwoFlags(), input_spec=SPEC, mutable="frozen")
    variables, batch = model.init(KEY), batch_of()
    losses = {float(model.loss(jax.random.key(s), variables, batch, ALL, True)[0]) for s in (0, 1)}
    assert len(losses) == 2
    # Statistics of mean 0 and variance 1: a constant batch is not normalised to 0.
    constant = batch | {"image": jnp.ones((6, 4))}
    logits = model.predict(variables, constant)
    kernel = variables["Dense_0"]["kernel"]
    np.testing.assert_allclose(logits[0], kernel.sum(axis=0) / np.sqrt(1 + 1e-5), rtol=1e-4)


def test_frozen_buffers_of_a_built_nnx_module_are_its_own():
    module = NnxNorm(rngs=nnx.Rngs(0))
    module.norm.mean[...] = jnp.full((4,), 0.25)
    model = from_flax(module, input_spec=SPEC, mutable="frozen")
    logits = model.predict(model.init(KEY), {"image": jnp.full((1, 4), 0.25)})
    np.testing.assert_allclose(logits, np.zeros((1, 3)), atol=1e-6)


def test_integer_buffers_cannot_be_averaged():
    class Counter(linen.Module):
        @linen.compact
        def __call__(self, x):
            self.variable("counters", "calls", lambda: jnp.int32(0))
            return linen.Dense(3)(x)

    with pytest.raises(ArgumentError, match=r"Only floating buffers.*counters/calls"):
        from_flax(Counter(), input_spec=SPEC, mutable="average")
    assert from_flax(Counter(), input_spec=SPEC, mutable="frozen").num_classes == 3


def test_uint8_inputs_are_the_floats_they_stand_for():
    model = from_flax(linen.Dense(3), input_spec=SPEC)
    variables = model.init(KEY)
    losses = [
        float(model.loss(None, variables, batch_of(dtype), ALL, False)[0])
        for dtype in (np.uint8, np.float32)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_tokens_reach_the_module_unscaled():
    class Embed(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            assert jnp.issubdtype(tokens.dtype, jnp.integer)
            return linen.Embed(10, 3)(tokens).mean(axis=1)

    spec = {"tokens": jax.ShapeDtypeStruct((5,), jnp.int32), "label": SPEC["label"]}
    model = from_flax(Embed(), input_spec=spec, input_key="tokens")
    variables = model.init(KEY)
    tokens = np.arange(5)[None]
    logits = model.predict(variables, {"tokens": tokens})
    embedding = jax.tree.leaves(variables)[0]
    np.testing.assert_allclose(logits[0], np.asarray(embedding)[:5].mean(axis=0), rtol=1e-5)


def test_loss_of_the_user():
    spec = {"image": SPEC["image"], "target": jax.ShapeDtypeStruct((), jnp.float32)}
    model = from_flax(
        linen.Dense(1), input_spec=spec, loss=lambda p, b: jnp.abs(p[:, 0] - b["target"])
    )
    batch = {"image": jnp.zeros((2, 4)), "target": jnp.array([1.0, -3.0])}
    loss, (stats, _) = model.loss(None, model.init(KEY), batch, ALL[:2], False)
    assert float(loss) == 2.0
    assert "accuracy" not in stats
    assert model.num_classes is None


def test_number_of_classes_must_be_that_of_the_logits():
    with pytest.raises(ArgumentError, match="num_classes=4, but the module gives 3 logits"):
        from_flax(linen.Dense(3), input_spec=SPEC, num_classes=4)


def test_predictions_that_are_no_logits():
    with pytest.raises(ArgumentError, match="Without loss="):
        from_flax(lambda rngs: NnxLayersPair(rngs=rngs), input_spec=SPEC)


class NnxLayersPair(NnxNorm):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)[:, None, :]


@pytest.mark.parametrize("module", [3, "cnn", None, lambda rngs: 7])
def test_what_is_no_module(module):
    with pytest.raises(ArgumentError, match="module must be a flax"):
        from_flax(module, input_spec=SPEC)


def test_what_is_no_fate_of_buffers():
    with pytest.raises(ArgumentError, match='"average", "frozen" or None; got \'keep\''):
        from_flax(linen.Dense(3), input_spec=SPEC, mutable=cast(Any, "keep"))


def test_input_that_is_not_specified():
    with pytest.raises(DataError, match=r"\['pixels'\] are missing"):
        from_flax(linen.Dense(3), input_spec=SPEC, input_key="pixels")


def test_nothing_heavy_is_imported_before_it_is_used():
    script = (
        "import sys, fedjax_core.models as models\n"
        "assert not [m for m in ('flax.linen', 'flax.nnx', 'rich') if m in sys.modules]\n"
        "models.linear()\n"
        "assert 'flax.linen' in sys.modules and 'flax.nnx' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
