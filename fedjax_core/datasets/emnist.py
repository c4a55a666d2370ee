"""Federated EMNIST: handwritten digits and letters, each client a writer.

TensorFlow Federated's public file, with the writers as NIST recorded them. The background is 1.0
and ink goes towards 0.0: the other way round than MNIST.

References:
  Cohen et al. EMNIST: extending MNIST to handwritten letters. 2017. arXiv:1702.05373.
  Caldas et al. LEAF: a benchmark for federated settings. 2018. arXiv:1812.01097.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_core.datasets import cache, download, sqlite_files, store, tff_sqlite
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.splits import Splits
from fedjax_core.errors import FederatedTypeError, StorageError

URL = "https://storage.googleapis.com/tff-datasets-public/emnist_all.sqlite.lzma"
_FILE_NAMES = ("emnist_all.sqlite", "emnist_all.sqlite.lzma")
# Raised whenever the same file would be prepared differently.
_FORMAT = 1


def load_emnist(
    *,
    only_digits: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Splits:
    """Federated EMNIST, memory-mapped from the cache folder after the first use.

    The file is taken from `path`, or from `data_dir` (or its folder `downloads`) if it was put
    there, or downloaded (about 170 MB, once). Preparing it takes a few minutes and, for a
    moment, 3 GB of disk; only a thousand examples at a time are in memory.

    Args:
      only_digits: 10 classes and 3,383 writers with 341,873 training and 40,832 test examples, or
        62 classes and 3,400 writers with 671,585 and 77,483.
      data_dir: the cache folder; by default $FEDJAX_CORE_CACHE or ~/.cache/fedjax_core.
      path: a copy of emnist_all.sqlite.lzma, or of the file in it.

    Returns:
      `Splits` of the same writers: `image` float32 ``[28, 28, 1]`` in 0..1, `label` int32.

    Raises:
      StorageError: no network, a damaged file, or a cache folder that cannot be written.
    """
    if not isinstance(only_digits, bool):
        raise FederatedTypeError(f"only_digits: expected True or False, got {only_digits!r}")
    folder = cache.cache_folder(data_dir)
    local = _local_copy(folder) if path is None else _existing(Path(path).expanduser().absolute())
    settings = {"format": _FORMAT, "only_digits": only_digits, "source": _identity(path, local)}
    prefix = "digits_only" if only_digits else "all"

    def build(target: Path) -> None:
        if path is None and local is not None:
            download.verify(local, URL)
        _prepare(local or download.fetch(URL, folder / "downloads"), prefix, target)

    prepared = cache.prepared(folder, "emnist", settings, build)
    return Splits(
        train=store.load(prepared / "train", "emnist/train"),
        test=store.load(prepared / "test", "emnist/test"),
    )


def _local_copy(folder: Path) -> Path | None:
    places = [place / name for place in (folder, folder / "downloads") for name in _FILE_NAMES]
    with cache.writing_to(folder):
        return next((place for place in places if place.is_file()), None)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise StorageError(
            f"there is no file {path}; pass path= the place of emnist_all.sqlite.lzma, or leave it "
            "out to download the file"
        )
    return path


def _identity(path: object, local: Path | None) -> dict[str, Any]:
    """What tells the source apart from others: the address, or file, size and time of change."""
    if path is None or local is None:
        return {"url": URL}
    status = local.stat()
    return {"path": str(local), "size": status.st_size, "changed": status.st_mtime_ns}


def _prepare(source: Path, prefix: str, target: Path) -> None:
    with sqlite_files.open_database(source, tff_sqlite.TABLES, target) as connection:
        for part in ("train", "test"):
            allocate = store.allocate_in(target / part)
            split = f"{prefix}_{part}"
            dataset = tff_sqlite.read_split(connection, split, allocate, None, split)
            _check_features(dataset, 10 if prefix == "digits_only" else 62, source)
            store.save(dataset, target / part)


def _check_features(dataset: FederatedDataset, num_classes: int, source: Path) -> None:
    found = {name: (spec.dtype, spec.shape) for name, spec in dataset.element_spec.items()}
    expected = {"image": (np.float32, (28, 28, 1)), "label": (np.int32, ())}
    if found != expected:
        raise StorageError(
            f"{source} is not federated EMNIST: expected pixels of 28 x 28 and a label, got "
            f"{dataset}; check which file this is"
        )
    labels = dataset.examples["label"]
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise StorageError(
            f"{source}: expected labels 0..{num_classes - 1} in {dataset.name}, got "
            f"{labels.min()}..{labels.max()}; check which file this is"
        )
