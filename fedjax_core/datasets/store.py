"""Federated datasets on disk: one .npy file a feature, read back memory-mapped."""

import json
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.errors import StorageError

Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]

_OFFSETS = "offsets.npy"
_CLIENT_IDS = "client_ids.json"
_FEATURES = "features.json"


def allocate_in_memory(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array for one feature, in memory."""
    del name
    return np.zeros(shape, dtype)


def allocate_in(folder: Path) -> Allocate:
    """A function that makes the array of a feature as a .npy file in `folder`, memory-mapped."""
    folder.mkdir(parents=True, exist_ok=True)

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        path = folder / _file_name(name)
        if 0 in shape:
            # A file of no bytes cannot be mapped.
            np.save(path, np.zeros(shape, dtype))
            return np.zeros(shape, dtype)
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    return allocate


def save(dataset: FederatedDataset, folder: Path) -> None:
    """Writes a dataset to `folder`; features that `allocate_in` put there are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in dataset.examples.items():
        if not (folder / _file_name(name)).exists():
            np.save(folder / _file_name(name), array)
        elif isinstance(array, np.memmap):
            array.flush()
    np.save(folder / _OFFSETS, dataset.offsets)
    (folder / _CLIENT_IDS).write_text(json.dumps(dataset.client_ids), encoding="utf-8")
    (folder / _FEATURES).write_text(json.dumps(list(dataset.examples)), encoding="utf-8")


def load(folder: Path, name: str) -> FederatedDataset:
    """The dataset that `save` wrote to `folder`, memory-mapped.

    Raises:
      StorageError: the files are missing or damaged.
    """
    try:
        features = json.loads((folder / _FEATURES).read_text(encoding="utf-8"))
        client_ids = json.loads((folder / _CLIENT_IDS).read_text(encoding="utf-8"))
        examples = {feature: _map(folder / _file_name(feature)) for feature in features}
        return FederatedDataset(examples, np.load(folder / _OFFSETS), tuple(client_ids), name)
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise StorageError(
            f"cannot read the prepared dataset in {folder}: {error}; delete this folder, it will "
            "be made again"
        ) from error


def _file_name(feature: str) -> str:
    # Names come from files that others wrote: none may lead out of the folder.
    return f"feature-{urllib.parse.quote(feature, safe='')}.npy"


def _map(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array if array.size else np.asarray(array)


def placed_rows(
    positions: np.ndarray, chunk: Mapping[str, np.ndarray], examples: Mapping[str, np.ndarray]
) -> None:
    """Writes the rows of a chunk to `positions` of the dataset's arrays."""
    for name, rows in chunk.items():
        examples[name][positions] = rows
