"""What the language costs: calls, tracing, and the memory of the streamed lowering.

    python benchmarks/federated_core.py

Calls: a computation that is compiled already, called with `Federated` values, against the bare
`jax.jit` of the same function. Tracing: FedAvg's round with the FedAvg CNN, against the gradient of
its loss alone. Memory: what XLA allocates besides arguments and results for a round with a model of
1 MiB, at 16 and at 1,024 clients. Prints a table and writes it as JSON with the machine, the
versions and the commit.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import describe_machine

import fedjax_core as fc
from fedjax_core.aggregators import mean
from fedjax_core.learning.client_work import local_training
from fedjax_core.learning.rounds import Parts, trace_round

NUM_CALLS = 2_000
NUM_REPEATS = 15
NUM_TRACES = 15
MODEL_SIZE = 1 << 18  # float32: 1 MiB
COHORTS = (16, 1_024)
LANES = (1, 4, 16)


def seconds_per_call(function: Callable[..., Any], *args: Any) -> float:
    """The mean time of many calls in a row."""
    result = None
    begin = time.perf_counter()
    for _ in range(NUM_CALLS):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / NUM_CALLS


def measure_calls() -> dict[str, float]:
    """Microseconds a call, the two alternating."""
    at_clients = fc.FederatedType(np.float32, fc.CLIENTS)
    computation = fc.federated_computation(fc.federated_mean, at_clients, at_clients)
    x, weight = jnp.arange(8.0), jnp.ones(8)
    placed = fc.Federated(x, fc.CLIENTS), fc.Federated(weight, fc.CLIENTS)
    bare = jax.jit(lambda x, weight: jnp.sum(x * weight) / jnp.sum(weight))
    np.testing.assert_allclose(computation(*placed).value, bare(x, weight))
    pairs = [
        (seconds_per_call(computation, *placed), seconds_per_call(bare, x, weight))
        for _ in range(NUM_REPEATS)
    ]
    ours, theirs = (1e6 * statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return {"computation_us": ours, "jit_us": theirs, "ratio": ratio}


def measure_tracing() -> dict[str, float]:
    """Milliseconds to trace the round of FedAvg with the FedAvg CNN, and a gradient of it alone.

    Of a model that JAX has not met, each time a new one; and again of a model whose gradient it has
    traced before, as for another aggregator, optimiser or capacity.
    """
    algorithm = fc.algorithms.fed_avg(
        fc.models.emnist_cnn(), client_optimizer=optax.sgd(0.1), batch_size=20
    )
    parameters = algorithm.computation.parameters

    def parts_of(model: fc.models.Model) -> Parts:
        work = local_training(model, optax.sgd(0.1), batch_size=20)
        return Parts(model, work, mean(), optax.sgd(1.0), None)

    def trace(parts: Parts) -> float:
        begin = time.perf_counter()
        fc.federated_computation(
            lambda state, examples, uid: trace_round(parts, state, examples, uid), *parameters
        )
        return 1e3 * (time.perf_counter() - begin)

    known = parts_of(fc.models.emnist_cnn())
    for _ in range(2):
        trace(known)
        trace_gradient(known.model)
    triples = []
    for _ in range(NUM_TRACES):
        fresh = parts_of(fc.models.emnist_cnn())
        triples.append((trace(fresh), trace(known), trace_gradient(known.model)))
    first, again, gradients = zip(*triples, strict=True)
    return {
        "median_ms": statistics.median(first),
        "smallest_ms": min(first),
        "again_median_ms": statistics.median(again),
        "again_smallest_ms": min(again),
        "gradient_ms": statistics.median(gradients),
        "gradient_smallest_ms": min(gradients),
        "ratio": statistics.median(a / b for a, b in zip(first, gradients, strict=True)),
    }


def trace_gradient(model: fc.models.Model) -> float:
    """Milliseconds to trace the gradient of the loss alone, with nothing of it known to JAX."""
    variables = jax.eval_shape(model.init, jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((20, 28, 28, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct((20,), jnp.int32),
    }

    def loss(variables: Any, batch: Any) -> jax.Array:
        logits = model.predict(variables, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    begin = time.perf_counter()
    jax.make_jaxpr(jax.grad(loss))(variables, batch)
    return 1e3 * (time.perf_counter() - begin)


def model_round() -> Any:
    """A round of broadcast, local work and mean, with a model of 1 MiB."""

    def body(model: Any, example: Any) -> Any:
        def work(model: jax.Array, example: jax.Array) -> jax.Array:
            return model * jnp.mean(example) + jnp.sin(model)

        update = fc.federated_map(work, fc.federated_broadcast(model), example)
        return fc.federated_mean(update)

    return fc.federated_computation(
        body,
        fc.FederatedType((np.float32, [MODEL_SIZE]), fc.SERVER),
        fc.FederatedType((np.float32, [8]), fc.CLIENTS),
    )


def temporary_bytes(computation: Any, num_clients: int, lanes: int) -> int:
    """What XLA allocates besides arguments and results."""
    run = computation.lower(fc.Execution(mode="streamed", lanes=lanes))
    model = jax.ShapeDtypeStruct((MODEL_SIZE,), jnp.float32)
    examples = jax.ShapeDtypeStruct((num_clients, 8), jnp.float32)
    args = fc.Federated(model, fc.SERVER), fc.Federated(examples, fc.CLIENTS)
    analysis = jax.jit(run).lower(*args).compile().memory_analysis()
    assert analysis is not None, "this backend does not say what it allocates"
    return analysis.temp_size_in_bytes


def measure_memory() -> dict[str, dict[str, float]]:
    """MiB by lanes and clients, and how much more the larger cohort takes."""
    computation = model_round()
    rows = {}
    for lanes in LANES:
        small, large = (temporary_bytes(computation, n, lanes) for n in COHORTS)
        rows[str(lanes)] = {
            f"clients_{COHORTS[0]}_mib": small / 2**20,
            f"clients_{COHORTS[1]}_mib": large / 2**20,
            "ratio": large / small,
        }
    return rows


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = pathlib.Path(__file__).parent / "results" / "federated_core.json"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    output = parser.parse_args().output
    results = {
        "machine": describe_machine(),
        "calls": measure_calls(),
        "tracing": measure_tracing(),
        "memory": measure_memory(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


def table(results: dict[str, Any]) -> str:
    """The results for a person."""
    calls, tracing = results["calls"], results["tracing"]
    lines = [
        f"call    {calls['computation_us']:.1f} us, bare jit {calls['jit_us']:.1f} us, "
        f"ratio {calls['ratio']:.2f}",
        f"tracing FedAvg's round, new model: {tracing['median_ms']:.1f} ms (median), "
        f"{tracing['smallest_ms']:.1f} ms (smallest), {tracing['ratio']:.2f} times the "
        f"{tracing['gradient_ms']:.1f} ms of the gradient alone",
        f"tracing FedAvg's round, known model: {tracing['again_median_ms']:.1f} ms (median), "
        f"{tracing['again_smallest_ms']:.1f} ms (smallest)",
    ]
    for lanes, row in results["memory"].items():
        sizes = ", ".join(f"{row[f'clients_{n}_mib']:.2f} MiB at {n} clients" for n in COHORTS)
        lines.append(f"lanes {lanes:>2}: {sizes}, ratio {row['ratio']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
