"""A bare PyTorch loop in the benchmark of rounds: one model, overwritten in place."""

# pyright: reportMissingImports=false
# The peer is installed in an environment of its own.

import numpy as np
import torch
from torch.nn import functional

from benchmarks import workloads
from benchmarks.peers import protocol, torch_models
from benchmarks.workloads import Data, Params, Workload


class PyTorchSession:
    """The clients' tensors and the one model."""

    def __init__(self, workload: Workload, data: Data, params: Params) -> None:
        torch.manual_seed(workload.seed)
        self._workload = workload
        self._names = list(params)
        device = torch_models.device()
        self._clients = [(x.to(device), y.to(device)) for x, y in torch_models.client_tensors(data)]
        self._model = torch_models.make_model(workload).to(device)
        torch_models.load_params(self._model, params)
        self._own = list(self._model.parameters())
        self._server = [p.detach().clone() for p in self._own]

    def run(self, cohorts: list[np.ndarray]) -> None:
        """See `protocol.Session`."""
        for positions in cohorts:
            self._round([self._clients[i] for i in positions])
        if torch_models.device() == "cuda":
            torch.cuda.synchronize()

    def _round(self, clients: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Trains each client and averages: x = sum_k n_k x_k / sum_k n_k."""
        total = sum(len(labels) for _, labels in clients)
        average = [torch.zeros_like(p) for p in self._server]
        for images, labels in clients:
            self._train(images, labels)
            with torch.no_grad():
                for mean, own, server in zip(average, self._own, self._server, strict=True):
                    mean.add_(own, alpha=len(labels) / total)
                    own.copy_(server)
        self._server = average
        with torch.no_grad():
            for own, server in zip(self._own, self._server, strict=True):
                own.copy_(server)

    def _train(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """SGD on the shuffled batches of one client."""
        size, rate = self._workload.batch_size, self._workload.learning_rate
        for _ in range(self._workload.num_epochs):
            order = torch.randperm(len(labels), device=labels.device)
            batches = zip(images[order].split(size), labels[order].split(size), strict=True)
            for x, y in batches:
                loss = functional.cross_entropy(self._model(x), y)
                gradients = torch.autograd.grad(loss, self._own)
                with torch.no_grad():
                    for own, gradient in zip(self._own, gradients, strict=True):
                        own.add_(gradient, alpha=-rate)

    def params(self) -> Params:
        """See `protocol.Session`."""
        return torch_models.save_params(self._model, self._names)

    def executed(self, sizes: np.ndarray) -> tuple[int, int]:
        """See `protocol.Session`."""
        steps = int(workloads.steps(self._workload, sizes).sum())
        return steps, int(self._workload.num_epochs * sizes.sum())


if __name__ == "__main__":
    raise SystemExit(protocol.serve(PyTorchSession, ("torch", "numpy"), torch.set_num_threads))
