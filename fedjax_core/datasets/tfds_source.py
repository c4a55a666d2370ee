"""Sets of TensorFlow Datasets, read without TensorFlow and federated by a partitioner."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from fedjax_core.datasets import cache
from fedjax_core.datasets.building import from_arrays
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.partition import Partition
from fedjax_core.errors import DataError, FedjaxError, StorageError


def from_tfds(
    name_or_builder: Any,
    split: str = "train",
    *,
    partition: Partition,
    features: Iterable[str] | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> FederatedDataset:
    """Federates a set of TensorFlow Datasets.

    The set is prepared as ArrayRecord if it is not yet. Reading needs no TensorFlow; preparing some
    sets for the first time does, because their own code uses it.

    Args:
      name_or_builder: a name like "mnist" or "emnist/digits", or a `tfds.core.DatasetBuilder`.
      split: a split in TFDS's notation, for example "train" or "train[:10%]".
      partition: gives the examples to clients; it sees all features, text included.
      features: the features to keep, under TFDS's names; by default all but text.
      seed: of the partitioner.
      data_dir: the cache folder; by default $FEDJAX_CORE_CACHE or ~/.cache/fedjax_core. Of no
        effect with a builder, which has its own.

    Returns:
      A `FederatedDataset` in memory.

    Raises:
      StorageError: the set is unknown, or cannot be downloaded, prepared or read.
      DataError: features that are nested or of varying shape, or a partition that does not fit.
    """
    builder = _prepared_builder(name_or_builder, data_dir)
    columns = read_columns(builder, split)
    if features is None:
        features = [name for name, column in columns.items() if column.dtype.kind not in "OSU"]
    name = f"{builder.name}/{split}"
    return from_arrays(columns, partition=partition, seed=seed, features=features, name=name)


def read_columns(builder: Any, split: str) -> dict[str, np.ndarray]:
    """All examples of a split of a prepared builder: feature name -> array ``[num_examples, ...]``.

    Raises:
      StorageError: the files cannot be read with random access, or there is no such split.
      DataError: features that are nested or of varying shape, or no examples.
    """
    try:
        source = builder.as_data_source(split)
        rows = [source[i] for i in range(len(source))]
    except Exception as error:
        # The builder's own code runs here: any class may come out of it.
        raise StorageError(
            f"cannot read the split {split!r} of {builder.name!r} from {builder.data_dir}: "
            f"{error}; its splits are {list(builder.info.splits)}; if it is there in another "
            "format than ArrayRecord, use another data_dir"
        ) from error
    if not rows:
        raise DataError(f"the split {split!r} of {builder.name!r} has no examples; choose another")
    return {name: _column(name, [row[name] for row in rows]) for name in rows[0]}


def _prepared_builder(name_or_builder: Any, data_dir: str | os.PathLike[str] | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = name_or_builder
        if isinstance(name_or_builder, str):
            builder = tfds.builder(name_or_builder, data_dir=_tfds_folder(data_dir))
        builder.download_and_prepare(file_format="array_record")
    except FedjaxError:
        raise
    except Exception as error:
        # Likewise: hundreds of builders, each with errors of its own.
        raise StorageError(_cannot_prepare(name_or_builder, error)) from error
    return builder


def _tfds_folder(data_dir: str | os.PathLike[str] | None) -> str:
    return os.fspath(cache.make_writable(cache.cache_folder(data_dir) / "tfds"))


def _cannot_prepare(name_or_builder: Any, error: Exception) -> str:
    name = name_or_builder if isinstance(name_or_builder, str) else type(name_or_builder).__name__
    remedy = "check its name, the network and the space in the cache folder (data_dir=)"
    if isinstance(error, ImportError):
        remedy = (
            "its own code needs this package once, to prepare it: install the package, or prepare "
            "it elsewhere with download_and_prepare(file_format='array_record') and copy the "
            "folder; reading it needs none"
        )
    return f"cannot prepare the TFDS set {name!r}: {error}; {remedy}"


def _column(name: str, values: list[Any]) -> np.ndarray:
    if isinstance(values[0], str | bytes):
        return np.asarray(values)
    if isinstance(values[0], dict):
        raise DataError(f"feature {name!r} is nested; flatten it and use from_arrays")
    try:
        return np.stack([np.asarray(value) for value in values])
    except ValueError as error:
        raise DataError(
            f"feature {name!r} varies in shape ({error}); bring the examples to one shape and use "
            "from_arrays"
        ) from error
