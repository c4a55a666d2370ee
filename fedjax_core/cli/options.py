"""What can be set on the command line: one record a subcommand, defaults and units in the help."""

import dataclasses
import math
import pathlib
from typing import Literal

from fedjax_core.datasets.checks import checked_count, checked_fraction
from fedjax_core.errors import ArgumentError

Uplink = Literal[
    "none",
    "quantize",
    "top_k",
    "top_k_quantize",
    "tff_8bit",
    "dense_8bit",
    "one_bit",
    "rotated",
    "sparse",
    "entropy",
    "flagship",
    "secure",
]

Downlink = Literal["none", "anchored", "replica", "dense_8bit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Options of every command that trains."""

    rounds: int = 60
    """Rounds of training."""
    clients_per_round: int = 10
    """Clients that train in a round, drawn uniformly without replacement."""
    batch_size: int = 20
    """Examples in a step of a client; its last batch may hold fewer."""
    epochs: int = 1
    """Passes of a client over its examples in a round."""
    client_learning_rate: float = 0.1
    """Step size of the clients' SGD."""
    server_learning_rate: float = 1.0
    """Step size of the server's SGD; 1 is plain averaging."""
    evaluate_every: int = 5
    """Rounds between two evaluations on the test set; 0: only after the last round."""
    seed: int = 0
    """Seed of the partition, the initial parameters and the sampling of clients, below 2**32."""
    data_dir: pathlib.Path | None = None
    """Folder for prepared data; by default $FEDJAX_CORE_CACHE or ~/.cache/fedjax_core."""
    tune: bool = False
    """Measure ways to run a round on the first cohort, and train with the fastest."""
    execution: pathlib.Path | None = None
    """File execution.json of an earlier run, to run rounds as there: the same bits again."""
    overwrite: bool = False
    """Replace the logs (and the saved state) of an earlier run; other files in the folder stay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Training):
    """Train the FedAvg CNN twice on handwritten digits, with raw and with quantised updates."""

    log_dir: pathlib.Path = pathlib.Path("logs")
    """Folder for the logs of both runs, in `original` and `compression`, and the picture."""
    num_clients: int = 30
    """Clients over which the 1,797 digits are spread, by Dirichlet(1) over the labels."""
    bits: int = 8
    """Bits that an entry of a large tensor takes in the compressed run, 1 to 16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Training):
    """Train one model with federated averaging."""

    log_dir: pathlib.Path
    """Folder for the logs: TensorBoard events and rounds.jsonl."""
    dataset: Literal["digits", "emnist"] = "digits"
    """Federated dataset; `fedjax-core datasets` describes them."""
    num_clients: int = 30
    """Clients over which the digits are spread; EMNIST has its own clients."""
    model: Literal["cnn", "linear", "two_nn"] = "cnn"
    """Model: the FedAvg CNN, a linear one, or two hidden layers of 200 units."""
    uplink: Uplink = "none"
    """Compression of what clients send up: by one of the presets of docs/compression.md, or
    quantisation and top-k with the three options below."""
    downlink: Downlink = "none"
    """Compression of the model on its way down: as its difference to the first model (anchored) or
    to what clients hold (replica), or by the codec dense_8bit."""
    bits: int = 8
    """Bits that an entry takes with quantize, 1 to 16."""
    fraction: float = 0.1
    """Part of a tensor, in (0, 1], that top-k keeps."""
    min_size: int = 20_000
    """Tensors of more entries than this are compressed, others travel raw; 0 for small models."""
    save: pathlib.Path | None = None
    """New file for the final state; `fedjax_core.load` reads it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Datasets:
    """List the datasets that `train --dataset` knows, and where their data comes from."""


Command = Demo | Train | Datasets

# What makes a stream of random numbers of its own in JAX.
_MAX_SEED = 2**32 - 1


def check(settings: Training) -> None:
    """Checks what nothing else checks before files are made.

    Raises:
      ArgumentError: a number is out of range.
    """
    # The demo has nothing to compare without a round.
    checked_count("--rounds", settings.rounds, least=1 if isinstance(settings, Demo) else 0)
    checked_count("--evaluate-every", settings.evaluate_every, least=0)
    checked_count("--seed", settings.seed, least=0)
    if settings.seed > _MAX_SEED:
        raise ArgumentError(f"--seed: expected at most {_MAX_SEED}, got {settings.seed}")
    for side in ("client", "server"):
        rate = getattr(settings, f"{side}_learning_rate")
        checked_fraction(f"--{side}-learning-rate", rate, high=math.inf)
    if settings.tune and settings.execution is not None:
        raise ArgumentError(
            "expected --tune or --execution, got both; leave out --tune to run as the file says"
        )
