"""The parts of `simulation` about what compression costs."""

import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

import fedjax_core as fc
from benchmarks.measuring import (
    SEED,
    Figure,
    Found,
    Sizes,
    alternate,
    fed_avg,
    prototypes,
    ratio,
    warm_up,
)
from fedjax_core import compression

PRESET_CODECS = {name: compression.preset(name) for name in compression.PRESETS}


def codecs(sizes: Sizes) -> Found:
    """A round of the FedAvg CNN with each codec, over one without."""
    dataset = prototypes(sizes).on_device()
    cohort = dataset.cohort(dataset.client_ids)
    nearest = compression.uniform_quantize(8, stochastic=False)
    flagship = compression.flagship
    uplinks = {
        "dense_8bit, to the nearest": nearest,
        **PRESET_CODECS,
        "flagship, low rank alone": flagship(candidates="low_rank"),
        "flagship, by the ledger": flagship(candidates="ledger"),
        "flagship, stochastic": flagship(rounding="stochastic"),
        "flagship, stochastic, low rank alone": flagship(
            candidates="low_rank", rounding="stochastic"
        ),
    }
    limits = {
        "dense_8bit, to the nearest": 1.05,
        "dense_8bit": 1.2,
        "flagship": 1.35,
        "flagship, low rank alone": 1.2,
    }

    def way(codec: compression.Codec | None, secure: bool) -> Callable[[], None]:
        aggregator = fc.aggregators.mean(codec=codec, secure=secure)
        algorithm = fed_avg(fc.models.emnist_cnn(), aggregator=aggregator)
        state = algorithm.init(jax.random.key(SEED))

        def take() -> None:
            jax.block_until_ready(algorithm.update(state, cohort))

        return take

    ways = [way(None, False), *(way(codec, name == "secure") for name, codec in uplinks.items())]
    warm_up(*ways)
    raw, *others = alternate(2 * sizes.repeats, *ways)
    figures = [
        Figure(f"round with {name} / raw", ratio(seconds, raw), limits.get(name))
        for name, seconds in zip(uplinks, others, strict=True)
    ]
    return Found(figures, {"seconds": {"raw": raw, **dict(zip(uplinks, others, strict=True))}})


def coding(sizes: Sizes) -> Found:
    """The bytes of one client's update of the FedAvg CNN, there and back on the host."""
    dataset = prototypes(sizes)
    algorithm = fed_avg(fc.models.emnist_cnn())
    state = algorithm.init(jax.random.key(SEED))
    after, _ = algorithm.update(state, dataset.cohort(dataset.client_ids[:1]))
    update = jax.tree.map(jnp.subtract, state.params, after.params)
    keys = compression.Keys(jax.random.key(1), jax.random.key(2))
    figures, notes = [], {}
    for name, codec in PRESET_CODECS.items():
        server, memory_of_sender = codec.init(jax.eval_shape(lambda: update))
        hints = codec.hints(server)
        encode = jax.jit(functools.partial(codec.encode, keys, memory_of_sender, hints))
        message = jax.device_get(encode(update)[1])
        data = compression.to_bytes(codec, message)
        ways = (
            functools.partial(compression.to_bytes, codec, message),
            functools.partial(compression.from_bytes, codec, data, message),
        )
        seconds = alternate(4 * sizes.repeats, *ways)
        write, read = (1e3 * statistics.median(x) for x in seconds)
        figures.append(Figure(f"to write a message of {name}", write, 60, unit=" ms"))
        figures.append(Figure(f"to read it, {len(data):,} bytes", read, unit=" ms"))
        notes[name] = seconds
    return Found(figures, notes)
