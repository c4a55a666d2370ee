"""What `rounds.py` measures: data, cohorts, initial parameters and the loss, all in NumPy.

Every worker makes the same bytes from the same seed: random numbers are taken from the raw bits of
a generator, which NumPy keeps the same over versions. Parameters are in the layout of JAX (images
``[height, width, channels]``, kernels ``[..., in, out]``) and named as flax.linen names them.

| workload      | model (parameters)  | clients a round x examples                   |
|---------------|---------------------|----------------------------------------------|
| cnn           | FedAvg CNN (1.66 M) | 10 x 100                                     |
| cnn_uneven    | FedAvg CNN          | 10 x 50 .. 150                               |
| linear_100    | linear (7,850)      | 100 x 100                                    |
| linear_1000   | linear              | 1,000 x 100                                  |
| overhead      | linear              | 10 x 1                                       |
| shakespeare   | LSTM (0.82 M)       | 10 speakers, sequences of 80 characters      |
| emnist_scale  | 2NN (199,210)       | 100 of 3,400 with 671,585 examples altogether|
"""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Params = dict[str, np.ndarray]
ModelName = Literal["cnn", "linear", "two_nn", "lstm"]

NUM_CLASSES = 10
IMAGE_SHAPE = (28, 28, 1)
SEQUENCE_LENGTH = 80
EMBEDDING, HIDDEN, NUM_LAYERS = 8, 256, 2
LOG_NORMAL_SIGMA = 0.4  # of the clients' sizes, about as uneven as EMNIST's writers
NUM_EXAMPLES_OF_LOSS = 100

# What a stream of random numbers is for.
_IMAGES, _LABELS, _PROTOTYPES, _SIZES, _PARAMS, _COHORT = range(6)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rounds of federated averaging with SGD on one model and one dataset.

    Attributes:
      name: of the workload.
      model: of the workload.
      num_clients: in the dataset; of Shakespeare, the upper limit.
      clients_per_round: drawn without replacement, afresh each round.
      examples: smallest and largest number of a client; sizes are uniform between them.
      batch_size: examples a step.
      num_rounds: rounds in one measurement.
      num_warmup: rounds before the first measurement, so that each shape has been met.
      total: examples of all clients, if sizes are log-normal instead.
      num_epochs: passes of a client over its examples.
      learning_rate: of the clients; the server averages.
      peers: whom it is measured against.
      same_examples: every client holds copies of its first example, so that order does not matter.
      seed: of data, parameters and cohorts.
    """

    name: str
    model: ModelName
    num_clients: int
    clients_per_round: int
    examples: tuple[int, int]
    batch_size: int
    num_rounds: int
    num_warmup: int = 2
    total: int | None = None
    num_epochs: int = 1
    learning_rate: float = 0.1
    peers: tuple[str, ...] = ("fedjax", "pytorch", "pfl")
    same_examples: bool = False
    seed: int = 0


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cnn", "cnn", 100, 10, (100, 100), batch_size=20, num_rounds=3),
        Workload(
            "cnn_uneven", "cnn", 100, 10, (50, 150), batch_size=20, num_rounds=3, num_warmup=6
        ),
        Workload("linear_100", "linear", 1_000, 100, (100, 100), batch_size=20, num_rounds=10),
        Workload("linear_1000", "linear", 1_000, 1_000, (100, 100), batch_size=20, num_rounds=2),
        Workload("overhead", "linear", 100, 10, (1, 1), batch_size=1, num_rounds=100),
        Workload(
            "shakespeare",
            "lstm",
            10_000,
            10,
            (1, 10_000),
            batch_size=4,
            num_rounds=1,
            num_warmup=3,
            learning_rate=0.5,
            peers=("fedjax",),
        ),
        Workload(
            "emnist_scale",
            "two_nn",
            3_400,
            100,
            (1, 10_000),
            batch_size=20,
            num_rounds=3,
            num_warmup=4,
            total=671_585,
            peers=(),
        ),
    )
}


class Data(NamedTuple):
    """Examples grouped by client.

    Attributes:
      features: name -> array ``[num_examples, ...]``.
      offsets: int64 ``[num_clients + 1]``; client `i` has the rows ``offsets[i]:offsets[i + 1]``.
      num_classes: of the labels.
    """

    features: dict[str, np.ndarray]
    offsets: np.ndarray
    num_classes: int

    @property
    def sizes(self) -> np.ndarray:
        """int64 ``[num_clients]``: each client's number of examples."""
        return np.diff(self.offsets)

    def client(self, position: int) -> dict[str, np.ndarray]:
        """The examples of one client, as views."""
        rows = slice(self.offsets[position], self.offsets[position + 1])
        return {name: x[rows] for name, x in self.features.items()}


def from_json(fields: Mapping[str, Any]) -> Workload:
    """The workload whose ``dataclasses.asdict`` came through JSON."""
    lists = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}
    return Workload(**{**fields, **lists})


def quick(workload: Workload) -> Workload:
    """The workload with few small clients and one round, for a smoke run."""
    return dataclasses.replace(
        workload,
        num_clients=min(workload.num_clients, 12),
        clients_per_round=min(workload.clients_per_round, 3),
        examples=(min(workload.examples[0], 4), min(workload.examples[1], 6)),
        batch_size=min(workload.batch_size, 2),
        total=None if workload.total is None else 60,
        num_rounds=1,
        num_warmup=1,
    )


def order_free(workload: Workload) -> dict[str, Workload]:
    """The workload changed so that the parameters after a round do not depend on any shuffling.

    "copies": the examples of a client are all the same, so only the number of steps and the weights
    of the clients count. "full_batch": every step takes all examples, three times; left out where
    sizes differ, since FedJAX then fills a batch with examples that it has had before.
    """
    changed = {"copies": dataclasses.replace(workload, same_examples=True)}
    smallest, largest = workload.examples
    if smallest == largest:
        changed["full_batch"] = dataclasses.replace(workload, batch_size=largest, num_epochs=3)
    return changed


def missing(workload: Workload) -> str | None:
    """Why the data of the workload cannot be made here, None if it can."""
    if workload.name != "shakespeare":
        return None
    path = _shakespeare_path()
    if path is None:
        return "set FEDJAX_CORE_DATA to a folder with shakespeare/input.txt"
    return None if path.exists() else f"{path} does not exist"


def make(workload: Workload) -> Data:
    """The clients' examples: uint8 images of ten blurred prototypes, or speakers' characters."""
    data = _shakespeare(workload) if workload.name == "shakespeare" else _images(workload)
    if workload.same_examples:
        first = np.repeat(data.offsets[:-1], data.sizes)
        data = data._replace(features={name: x[first] for name, x in data.features.items()})
    return data


def cohort(workload: Workload, data: Data, round_number: int) -> np.ndarray:
    """The positions of the clients of a round, int64 ``[clients_per_round]``."""
    draws = _raw(workload.seed, _COHORT, round_number, size=len(data.sizes))
    return np.argsort(draws, kind="stable")[: workload.clients_per_round]


def steps(workload: Workload, sizes: np.ndarray) -> np.ndarray:
    """How many steps clients with so many examples take in a round."""
    return workload.num_epochs * -(-sizes // workload.batch_size)


def shapes(model: ModelName, num_classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter."""
    match model:
        case "cnn":
            convolutions = {"Conv_0": (5, 5, 1, 32), "Conv_1": (5, 5, 32, 64)}
            layers = {**convolutions, **_dense(7 * 7 * 64, 512, num_classes)}
        case "linear":
            layers = _dense(784, num_classes)
        case "two_nn":
            layers = _dense(784, 200, 200, num_classes)
        case "lstm":
            return _lstm_shapes(num_classes)
    kernels = {f"{layer}/kernel": shape for layer, shape in layers.items()}
    return kernels | {f"{layer}/bias": shape[-1:] for layer, shape in layers.items()}


def initial_params(workload: Workload, data: Data) -> Params:
    """Parameters to begin with: Glorot-uniform kernels, biases of zero; float32."""
    params = {}
    for index, (name, shape) in enumerate(shapes(workload.model, data.num_classes).items()):
        bits = _raw(workload.seed, _PARAMS, index, size=int(np.prod(shape)))
        uniform = (bits >> 11).astype(np.float64) / 2**52 - 1  # in [-1, 1)
        receptive = int(np.prod(shape[:-2]))
        limit = np.sqrt(6 / (receptive * sum(shape[-2:]))) if len(shape) > 1 else 0.0
        params[name] = (limit * uniform).reshape(shape).astype(np.float32)
    return params


def flops_per_example(workload: Workload, num_classes: int) -> float:
    """Floating-point operations of the matrix products that training on one example takes.

    Twice the multiplications forward, as many for the gradient of the kernels, and as many for that
    of the inputs, which the first layer of an image model does not need.
    """
    sizes = {name: np.prod(s) for name, s in shapes(workload.model, num_classes).items()}
    if workload.model == "lstm":
        inner = sum(n for name, n in sizes.items() if not name.endswith(("bias", "embedding")))
        return float(6 * SEQUENCE_LENGTH * inner)
    positions = {"Conv_0/kernel": 28 * 28, "Conv_1/kernel": 14 * 14}
    products = [n * positions.get(name, 1) for name, n in sizes.items() if "kernel" in name]
    return float(6 * sum(products) - 2 * products[0])


def loss(workload: Workload, params: Params, data: Data) -> float:
    """The mean cross entropy of some examples, evenly spread over the clients."""
    num_examples = data.offsets[-1]
    rows = np.unique(np.linspace(0, num_examples - 1, NUM_EXAMPLES_OF_LOSS).astype(np.int64))
    batch = {name: x[rows] for name, x in data.features.items()}
    if workload.model == "lstm":
        logits, labels = _lstm(params, batch["tokens"][:, :-1]), batch["tokens"][:, 1:]
    else:
        logits, labels = _classify(params, batch["image"]), batch["label"]
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, labels[..., None].astype(np.int64), -1)[..., 0]
    return float(np.mean(np.log(np.exp(shifted).sum(-1)) - chosen))


def _raw(*entropy: int, size: int) -> np.ndarray:
    """Random uint64 ``[size]`` of the stream that these integers name."""
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(size)


def _images(workload: Workload) -> Data:
    """Images whose bits are those of their label's prototype, each kept with a chance of a half."""
    sizes = _sizes(workload)
    total, num_pixels = int(sizes.sum()), int(np.prod(IMAGE_SHAPE))
    labels = (_raw(workload.seed, _LABELS, size=total) % NUM_CLASSES).astype(np.int32)
    prototypes = _bytes(workload.seed, _PROTOTYPES, shape=(NUM_CLASSES, num_pixels))
    images = _bytes(workload.seed, _IMAGES, shape=(total, num_pixels))
    for begin in range(0, total, 10_000):  # in pieces, for the sake of the peak of memory
        images[begin : begin + 10_000] &= prototypes[labels[begin : begin + 10_000]]
    features = {"image": images.reshape(total, *IMAGE_SHAPE), "label": labels}
    return Data(features, _offsets(sizes), NUM_CLASSES)


def _bytes(*entropy: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    return _raw(*entropy, size=-(-size // 8)).astype("<u8").view(np.uint8)[:size].reshape(shape)


def _sizes(workload: Workload) -> np.ndarray:
    smallest, largest = workload.examples
    bits = _raw(workload.seed, _SIZES, size=2 * workload.num_clients)
    if workload.total is None:
        span = np.uint64(largest - smallest + 1)
        return (smallest + bits[: workload.num_clients] % span).astype(np.int64)
    # Box and Muller's normal numbers.
    radius, angle = ((bits >> 11).astype(np.float64) + 1).reshape(2, -1) / 2**53
    normal = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    shares = np.exp(LOG_NORMAL_SIGMA * normal)
    ends = np.rint(np.cumsum(shares) / shares.sum() * workload.total).astype(np.int64)
    return np.diff(ends, prepend=0)


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _shakespeare_path() -> pathlib.Path | None:
    folder = os.environ.get("FEDJAX_CORE_DATA")
    return pathlib.Path(folder) / "shakespeare" / "input.txt" if folder else None


def _shakespeare(workload: Workload) -> Data:
    """The lines of each speaker one after the other, cut into sequences of 80 characters and one.

    The last character of a sequence is the first of the next; a rest is dropped, and so are
    speakers who say less than one sequence.
    """
    path = _shakespeare_path()
    assert path is not None, missing(workload)
    text = path.read_text(encoding="utf-8")
    speakers: dict[str, list[str]] = {}
    for speech in re.split(r"\n\n+", text):
        speaker, _, lines = speech.partition(":\n")
        if lines:
            speakers.setdefault(speaker, []).append(lines)
    characters = np.unique(np.array(list(text)))
    clients = []
    for speeches in speakers.values():
        said = np.searchsorted(characters, np.array(list("\n".join(speeches)))).astype(np.int32)
        num_sequences = min((len(said) - 1) // SEQUENCE_LENGTH, workload.examples[1])
        start = SEQUENCE_LENGTH * np.arange(num_sequences)[:, None]
        clients.append(said[start + np.arange(SEQUENCE_LENGTH + 1)])
    clients = [x for x in clients if len(x)][: workload.num_clients]
    offsets = _offsets(np.array([len(x) for x in clients]))
    return Data({"tokens": np.concatenate(clients)}, offsets, len(characters))


def _dense(*units: int) -> dict[str, tuple[int, ...]]:
    return {f"Dense_{index}": pair for index, pair in enumerate(itertools.pairwise(units))}


def _lstm_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"Embed_0/embedding": (num_classes, EMBEDDING)}
    for layer in range(NUM_LAYERS):
        found[f"LSTM_{layer}/input"] = (HIDDEN if layer else EMBEDDING, 4 * HIDDEN)
        found[f"LSTM_{layer}/hidden"] = (HIDDEN, 4 * HIDDEN)
        found[f"LSTM_{layer}/bias"] = (4 * HIDDEN,)
    return found | {"Dense_0/kernel": (HIDDEN, num_classes), "Dense_0/bias": (num_classes,)}


def _classify(params: Params, images: np.ndarray) -> np.ndarray:
    """Logits of uint8 images, ``[examples, classes]``."""
    hidden = images.astype(np.float32) / 255
    for layer in range(sum("Conv" in name for name in params) // 2):
        hidden = _pool(np.maximum(_convolve(hidden, params, f"Conv_{layer}"), 0))
    hidden = hidden.reshape(len(hidden), -1)
    last = sum("Dense" in name for name in params) // 2 - 1
    for layer in range(last + 1):
        hidden = hidden @ params[f"Dense_{layer}/kernel"] + params[f"Dense_{layer}/bias"]
        hidden = hidden if layer == last else np.maximum(hidden, 0)
    return hidden


def _convolve(images: np.ndarray, params: Params, layer: str) -> np.ndarray:
    kernel = params[f"{layer}/kernel"]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.tensordot(windows, kernel, ([4, 5, 3], [0, 1, 2])) + params[f"{layer}/bias"]


def _pool(images: np.ndarray) -> np.ndarray:
    batch, height, width, channels = images.shape
    return images.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _lstm(params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits of the next character, ``[sequences, length, characters]``."""
    hidden = params["Embed_0/embedding"][tokens]
    for layer in range(NUM_LAYERS):
        inputs = hidden @ params[f"LSTM_{layer}/input"] + params[f"LSTM_{layer}/bias"]
        output = cell = np.zeros((len(tokens), HIDDEN), np.float32)
        outputs = []
        for step in range(tokens.shape[1]):
            gates = inputs[:, step] + output @ params[f"LSTM_{layer}/hidden"]
            enter, keep, new, leave = np.split(gates, 4, axis=-1)
            cell = _sigmoid(keep) * cell + _sigmoid(enter) * np.tanh(new)
            output = _sigmoid(leave) * np.tanh(cell)
            outputs.append(output)
        hidden = np.stack(outputs, 1)
    return hidden @ params["Dense_0/kernel"] + params["Dense_0/bias"]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
