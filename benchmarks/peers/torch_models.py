"""The image models in PyTorch, and their parameters in the layout of `workloads`."""

# pyright: reportMissingImports=false
# The peer is installed in an environment of its own.

import os

import numpy as np
import torch
from torch import nn

from benchmarks import workloads
from benchmarks.workloads import Data, Params, Workload


def device() -> str:
    """Where the workers run: on a GPU if JAX is told to, so that one setting holds for all."""
    return "cuda" if os.environ.get("JAX_PLATFORMS", "cpu").split(",")[0] == "cuda" else "cpu"


def make_model(workload: Workload) -> nn.Sequential:
    """The model of the workload, with layers named as in `workloads`."""
    model = nn.Sequential()
    if workload.model == "cnn":
        for index, (inputs, channels) in enumerate(((1, 32), (32, 64))):
            model.add_module(f"Conv_{index}", nn.Conv2d(inputs, channels, 5, padding="same"))
            model.add_module(f"relu_{index}", nn.ReLU())
            model.add_module(f"pool_{index}", nn.MaxPool2d(2))
    model.add_module("flatten", nn.Flatten())
    shapes = workloads.shapes(workload.model, workloads.NUM_CLASSES)
    kernels = [shape for name, shape in shapes.items() if name.startswith("Dense") and shape[1:]]
    for index, (inputs, units) in enumerate(kernels):
        model.add_module(f"Dense_{index}", nn.Linear(inputs, units))
        if index < len(kernels) - 1:
            model.add_module(f"dense_relu_{index}", nn.ReLU())
    # A tenth faster with convolutions on CPUs than PyTorch's own layout.
    return model.to(memory_format=torch.channels_last)


def load_params(model: nn.Module, params: Params) -> None:
    """Overwrites the parameters of a model."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for path, x in params.items():
            own[_name(path)].copy_(torch.from_numpy(_to_torch(path, x, "Conv_0/bias" in params)))


def save_params(model: nn.Module, names: list[str]) -> Params:
    """The parameters of a model in the layout of `workloads`."""
    own = dict(model.named_parameters())
    is_cnn = "Conv_0/bias" in names
    return {
        path: _from_torch(path, own[_name(path)].detach().cpu().numpy(), is_cnn) for path in names
    }


def client_tensors(data: Data) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images as floats, ``[examples, 1, 28, 28]``, and labels of each client, in memory."""
    images = torch.from_numpy(data.features["image"]).float().div_(255).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.features["label"]).long()
    sizes = data.sizes.tolist()
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def _name(path: str) -> str:
    return path.replace("/kernel", ".weight").replace("/bias", ".bias")


def _to_torch(path: str, x: np.ndarray, is_cnn: bool) -> np.ndarray:
    if path.startswith("Conv") and x.ndim == 4:
        return np.ascontiguousarray(x.transpose(3, 2, 0, 1))
    if is_cnn and path == "Dense_0/kernel":  # its inputs: height, width, channels -> channels first
        x = x.reshape(7, 7, 64, -1).transpose(2, 0, 1, 3).reshape(x.shape)
    return np.ascontiguousarray(x.T)


def _from_torch(path: str, x: np.ndarray, is_cnn: bool) -> np.ndarray:
    if path.startswith("Conv") and x.ndim == 4:
        return x.transpose(2, 3, 1, 0)
    if is_cnn and path == "Dense_0/kernel":
        return x.T.reshape(64, 7, 7, -1).transpose(1, 2, 0, 3).reshape(x.T.shape)
    return x.T
