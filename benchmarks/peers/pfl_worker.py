"""pfl-research in the benchmark of rounds: its own `FederatedAveraging` on data in memory.

Its datasets keep their batches and do not shuffle, which saves it a little.
"""

# pyright: reportMissingImports=false
# The peer is installed in an environment of its own.

import collections
import os

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional

from benchmarks import workloads
from benchmarks.peers import protocol, torch_models
from benchmarks.workloads import Data, Params, Workload

# pfl evaluates in the rounds whose number this divides: in the first one only.
_NEVER = 10**9


class _Model(nn.Module):
    """The network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.network(images), labels)

    @torch.no_grad()
    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted(float(self.loss(images, labels)) * len(labels), len(labels))}


class PflSession:
    """The clients' datasets, the algorithm and the model."""

    def __init__(self, workload: Workload, data: Data, params: Params) -> None:
        self._workload = workload
        self._names = list(params)
        self._queue: collections.deque[int] = collections.deque()
        clients = [
            Dataset(tensors, user_id=str(i))
            for i, tensors in enumerate(torch_models.client_tensors(data))
        ]
        federated = FederatedDataset(clients.__getitem__, self._queue.popleft)
        self._backend = SimulatedBackend(federated, federated, [WeightByDatapoints()])
        self._network = torch_models.make_model(workload)
        torch_models.load_params(self._network, params)
        model = _Model(self._network)
        self._model = PyTorchModel(
            model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0)
        )
        self._algorithm = FederatedAveraging()
        self._num_rounds = 0

    def run(self, cohorts: list[np.ndarray]) -> None:
        """See `protocol.Session`."""
        workload = self._workload
        self._queue.extend(int(i) for positions in cohorts for i in positions)
        self._num_rounds += len(cohorts)
        # The algorithm goes on with the round at which it stopped.
        self._algorithm.run(
            NNAlgorithmParams(
                central_num_iterations=self._num_rounds,
                evaluation_frequency=_NEVER,
                train_cohort_size=workload.clients_per_round,
                val_cohort_size=None,
            ),
            self._backend,
            self._model,
            NNTrainHyperParams(
                local_batch_size=workload.batch_size,
                local_num_epochs=workload.num_epochs,
                local_learning_rate=workload.learning_rate,
            ),
            NNEvalHyperParams(local_batch_size=None),
            send_metrics_to_platform=False,
        )

    def params(self) -> Params:
        """See `protocol.Session`."""
        return torch_models.save_params(self._network, self._names)

    def executed(self, sizes: np.ndarray) -> tuple[int, int]:
        """See `protocol.Session`."""
        steps = int(workloads.steps(self._workload, sizes).sum())
        return steps, int(self._workload.num_epochs * sizes.sum())


if __name__ == "__main__":
    raise SystemExit(protocol.serve(PflSession, ("pfl", "torch", "numpy"), torch.set_num_threads))
