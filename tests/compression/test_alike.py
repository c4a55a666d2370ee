"""What is alike is computed at once, and what comes back is in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression.alike import map_alike


def test_results_are_those_of_each_item_in_its_place():
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (4,), (2, 3), (3, 2), (4,), (2, 3), ()]
    items = [np.float32(rng.normal(size=shape)) for shape in shapes]
    offsets = list(range(len(shapes)))
    found = map_alike(lambda x, offset: {"sum": jnp.sum(x) + offset, "x": x}, items, offsets)
    for item, offset, result in zip(items, offsets, found, strict=True):
        assert float(result["sum"]) == pytest.approx(item.sum() + offset, rel=1e-6)
        np.testing.assert_array_equal(result["x"], item)


def test_structures_and_dtypes_are_told_apart():
    calls = []

    def function(item):
        calls.append(item)
        return jax.tree.map(lambda x: x + x, item)

    items = [(jnp.ones(2),), (jnp.ones(2, jnp.int32), ()), {"a": jnp.ones(2)}, (jnp.ones(2),)]
    found = map_alike(function, items)
    assert [jax.tree.structure(x) for x in found] == [jax.tree.structure(x) for x in items]
    assert found[1][0].dtype == jnp.int32
    assert len(calls) == 3


def test_keys_and_nothing_are_items():
    keys = [jax.random.key(seed) for seed in range(3)]
    found = map_alike(jax.random.bits, keys)
    assert [int(x) for x in found] == [int(jax.random.bits(key)) for key in keys]
    assert map_alike(jnp.sum, []) == []
    with pytest.raises(ValueError, match="shorter"):
        map_alike(jnp.add, [1, 2], [1])
