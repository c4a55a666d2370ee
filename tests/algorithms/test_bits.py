"""The bits of a round of the FedAvg CNN: by arithmetic, from the program, and in a run."""

import jax
import numpy as np
import optax
import pytest

import fedjax_core as fc

NUM_CLIENTS = 10
# 32 (25 + 1) + 64 (25 * 32 + 1) + 512 (7 * 7 * 64 + 1) + 10 (512 + 1)
NUM_PARAMS = 1_663_370
RAW = 32 * NUM_PARAMS
# Two tensors above 20,000 elements at 8 bits, with a range of two float32 each; 6,538 others raw.
QUANTISED = 8 * (5 * 5 * 32 * 64 + 3136 * 512) + 2 * 64 + 32 * 6_538


def algorithm(codec=None) -> fc.algorithms.Algorithm:
    return fc.algorithms.fed_avg(
        fc.models.emnist_cnn(),
        client_optimizer=optax.sgd(0.1),
        aggregator=fc.aggregators.mean(codec=codec),
        batch_size=20,
    )


def rows(report, direction: str) -> dict[str, int]:
    totals: dict[str, int] = {}
    for edge in report:
        if edge.direction == direction:
            totals[edge.name] = totals.get(edge.name, 0) + edge.bits
    return totals


@pytest.mark.parametrize(
    ("codec", "update", "printed"),
    [
        pytest.param(None, RAW, "507.62Mibit", marks=pytest.mark.slow),
        (fc.compression.uniform_quantize(8), QUANTISED, "128.40Mibit"),
    ],
    ids=["raw", "8 bit"],
)
def test_round_sends_exactly_what_the_program_says(codec, update, printed):
    """532,278,400 bits each way raw, 134,640,000 up with 8 bits; the ledger agrees exactly."""
    assert RAW * NUM_CLIENTS == 532_278_400
    assert QUANTISED * NUM_CLIENTS == 134_640_000
    fed_avg = algorithm(codec)
    report = fc.communication(fed_avg.computation, num_clients=NUM_CLIENTS)
    assert rows(report, "down")["params"] == RAW * NUM_CLIENTS
    assert rows(report, "up")["update"] == update * NUM_CLIENTS
    assert fc.format_bits(report.aggregate_bits) == printed
    assert fc.format_bits(report.broadcast_bits) == "507.62Mibit"

    images = {"image": np.ones((1, 28, 28, 1), np.uint8), "label": np.zeros(1, np.int32)}
    data = fc.datasets.from_clients({f"c{i}": images for i in range(NUM_CLIENTS)})
    _, metrics = fed_avg.update(fed_avg.init(jax.random.key(0)), data.cohort(data.client_ids))
    sent = metrics.communication
    assert {k: int(v) for k, v in sent.broadcast.items()} == rows(report, "down")
    assert {k: int(v) for k, v in sent.aggregate.items()} == rows(report, "up")
    assert int(sent.aggregate_bits) == report.aggregate_bits
    assert int(sent.broadcast_bits) == report.broadcast_bits


def test_weight_and_metrics_have_rows_of_their_own():
    """Beside the update: a float32 weight, two means and two counts, and a byte of status."""
    report = fc.communication(algorithm().computation, num_clients=1)
    up = rows(report, "up")
    assert up == {"update": RAW, "weight": 32, "metrics": 2 * 64 + 2 * 32 + 8}
    assert rows(report, "down") == {"params": RAW, "seed": 64}
