"""Our library in the benchmark of rounds, through its public interface.

Started with a number, that many clients run side by side.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_core as fc
from benchmarks import workloads
from benchmarks.peers import jax_lstm, protocol
from benchmarks.workloads import Data, Params, Workload

EXECUTION = fc.Execution(donate=True)


class OursSession:
    """A dataset, an algorithm and its state."""

    def __init__(
        self,
        workload: Workload,
        data: Data,
        params: Params,
        execution: fc.Execution = EXECUTION,
    ) -> None:
        self._workload = workload
        self._execution = execution
        ids = tuple(f"{i:06}" for i in range(len(data.sizes)))
        dataset = fc.datasets.FederatedDataset(data.features, data.offsets, ids)
        self._dataset = dataset.on_device()
        self._algorithm = fc.algorithms.fed_avg(
            _model(workload, data),
            client_optimizer=optax.sgd(workload.learning_rate),
            batch_size=workload.batch_size,
            num_epochs=workload.num_epochs,
            execution=execution,
        )
        state = self._algorithm.init(jax.random.key(workload.seed))
        self._state = state._replace(params=_nested(params))

    def run(self, cohorts: list[np.ndarray]) -> None:
        """How a user drives the rounds: the one place to change with the interface."""
        ids = self._dataset.client_ids
        for positions in cohorts:
            cohort = self._dataset.cohort([ids[i] for i in positions])
            self._state, _ = self._algorithm.update(self._state, cohort)
        jax.block_until_ready(self._state.params)

    def params(self) -> Params:
        """See `protocol.Session`."""
        leaves = jax.tree.leaves_with_path(self._state.params)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
            for path, x in leaves
        }

    def executed(self, sizes: np.ndarray) -> tuple[int | None, int | None]:
        """See `protocol.Session`."""
        if self._execution.num_lanes(len(sizes)) > 1:
            return None, None
        steps = int(workloads.steps(self._workload, sizes).sum())
        return steps, steps * self._workload.batch_size


def _model(workload: Workload, data: Data) -> fc.models.Model:
    match workload.model:
        case "cnn":
            return fc.models.emnist_cnn()
        case "linear":
            return fc.models.linear()
        case "two_nn":
            return fc.models.two_nn()
        case "lstm":
            params = workloads.initial_params(workload, data)
            return fc.models.from_functions(
                lambda key: _nested(params),
                lambda params, batch, key, train: jax_lstm.losses(params, batch["tokens"]),
                loss=lambda losses, batch: losses,
                input_spec={
                    "tokens": jax.ShapeDtypeStruct((workloads.SEQUENCE_LENGTH + 1,), jnp.int32)
                },
            )


def _nested(params: Params) -> dict[str, dict[str, jax.Array]]:
    tree: dict[str, dict[str, jax.Array]] = {}
    for path, x in params.items():
        layer, name = path.split("/")
        tree.setdefault(layer, {})[name] = jnp.asarray(x)
    return tree


if __name__ == "__main__":
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    lanes = int(sys.argv[1]) if sys.argv[1:] else "auto"
    build = functools.partial(OursSession, execution=dataclasses.replace(EXECUTION, lanes=lanes))
    raise SystemExit(protocol.serve(build, packages, lambda threads: None))
