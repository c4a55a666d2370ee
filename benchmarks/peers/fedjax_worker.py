"""FedJAX in the benchmark of rounds: its own `fed_avg`, with the `jit` backend.

FedJAX fills the last batch of a client with examples that it has had before, where ours masks it:
the same number of steps of the same size, though not the same update for clients of other sizes.
"""

# pyright: reportMissingImports=false
# The peer is installed in an environment of its own.

from typing import Any

import jax

if not hasattr(jax, "tree_map"):  # FedJAX needs it, and JAX has dropped it
    jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue]

import fedjax
import haiku as hk
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg

from benchmarks import workloads
from benchmarks.peers import jax_lstm, protocol
from benchmarks.workloads import Data, Params, Workload

_HAIKU_LAYERS = {"Conv": "conv2_d", "Dense": "linear"}
_HAIKU_NAMES = {"kernel": "w", "bias": "b"}


class FedJaxSession:
    """The clients' data in memory, an algorithm and its state."""

    def __init__(self, workload: Workload, data: Data, params: Params) -> None:
        fedjax.set_for_each_client_backend("jit")
        self._workload = workload
        self._names = list(params)
        self._ids = [b"%06d" % i for i in range(len(data.sizes))]
        clients = {client_id: _features(data, i) for i, client_id in enumerate(self._ids)}
        self._data = fedjax.InMemoryFederatedData(clients)
        model = _lstm_model() if workload.model == "lstm" else _image_model(workload)
        self._algorithm = fed_avg.federated_averaging(
            grad_fn=fedjax.model_grad(model),
            client_optimizer=fedjax.optimizers.sgd(workload.learning_rate),
            server_optimizer=fedjax.optimizers.sgd(1.0),
            client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
                batch_size=workload.batch_size, num_epochs=workload.num_epochs
            ),
        )
        self._is_lstm = workload.model == "lstm"
        tree: dict[str, dict[str, jax.Array]] = {}
        for name, x in params.items():
            layer, leaf = self._place(name)
            tree.setdefault(layer, {})[leaf] = jnp.asarray(x)
        self._state = self._algorithm.init(tree)
        self._key = jax.random.PRNGKey(workload.seed)

    def run(self, cohorts: list[np.ndarray]) -> None:
        """See `protocol.Session`."""
        for positions in cohorts:
            self._key, key = jax.random.split(self._key)
            # Rows of a NumPy array: slicing one of JAX would cost a dispatch for each client.
            keys = np.asarray(jax.random.split(key, len(positions)))
            ids = [self._ids[i] for i in positions]
            found = self._data.get_clients(ids)
            clients = [(i, dataset, key) for (i, dataset), key in zip(found, keys, strict=True)]
            self._state, _ = self._algorithm.apply(self._state, clients)
        jax.block_until_ready(self._state.params)

    def params(self) -> Params:
        """See `protocol.Session`."""
        places = {name: self._place(name) for name in self._names}
        tree = self._state.params
        return {name: np.asarray(tree[layer][leaf]) for name, (layer, leaf) in places.items()}

    def executed(self, sizes: np.ndarray) -> tuple[int, int]:
        """See `protocol.Session`."""
        steps = int((-(-self._workload.num_epochs * sizes // self._workload.batch_size)).sum())
        return steps, steps * self._workload.batch_size

    def _place(self, path: str) -> tuple[str, str]:
        """Layer and name of a parameter in FedJAX's tree."""
        layer, name = path.split("/")
        if self._is_lstm:
            return layer, name
        kind, index = layer.split("_")
        suffix = "" if index == "0" else f"_{index}"
        return f"{_HAIKU_LAYERS[kind]}{suffix}", _HAIKU_NAMES[name]


def _features(data: Data, position: int) -> dict[str, np.ndarray]:
    names = {"image": "x", "label": "y", "tokens": "tokens"}
    return {names[name]: x for name, x in data.client(position).items()}


def _image_model(workload: Workload) -> Any:
    hidden = {"cnn": [512], "two_nn": [200, 200], "linear": []}[workload.model]

    def forward(batch: dict[str, jax.Array]) -> jax.Array:
        # Scaled here: bytes are cheaper to gather and to hand over than floats.
        x = batch["x"].astype(jnp.float32) / 255
        if workload.model == "cnn":
            for channels in (32, 64):
                x = _max_pool_2x2(jax.nn.relu(hk.Conv2D(channels, 5)(x)))
        x = hk.Flatten()(x)
        for units in hidden:
            x = jax.nn.relu(hk.Linear(units)(x))
        return hk.Linear(workloads.NUM_CLASSES)(x)

    sample = {
        "x": np.zeros((1, *workloads.IMAGE_SHAPE), np.uint8),
        "y": np.zeros(1, np.int32),
    }
    return fedjax.create_model_from_haiku(
        transformed_forward_pass=hk.transform(forward),
        sample_batch=sample,
        train_loss=lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(
            batch["y"], logits
        ),
    )


def _max_pool_2x2(x: jax.Array) -> jax.Array:
    """Like `hk.max_pool`, whose gradient takes a fifth more of a step's time on CPUs."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _lstm_model() -> Any:
    return fedjax.Model(
        init=lambda rng: None,
        apply_for_train=lambda params, batch, rng=None: jax_lstm.losses(params, batch["tokens"]),
        apply_for_eval=lambda params, batch: jax_lstm.losses(params, batch["tokens"]),
        train_loss=lambda batch, losses: losses,
        eval_metrics={},
    )


if __name__ == "__main__":
    packages = ("fedjax", "jax", "jaxlib", "dm-haiku", "numpy")
    raise SystemExit(protocol.serve(FedJaxSession, packages, lambda threads: None))
