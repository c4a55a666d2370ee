"""Scikit-learn's handwritten digits, federated: real images that need no download.

1,797 images of 8 x 8 pixels with values 0..16, by 43 writers whose names were not kept; so they are
federated by a partitioner. They go through a builder of TensorFlow Datasets, as every other set
does: written as ArrayRecord to the cache folder once, read back with random access.

References:
  Alpaydin, Kaynak. Optical recognition of handwritten digits. UCI Machine Learning Repository.
"""

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_core.datasets import cache, partition, tfds_source
from fedjax_core.datasets.building import from_arrays
from fedjax_core.datasets.partition import Partition
from fedjax_core.datasets.splits import Splits, holdout
from fedjax_core.errors import ArgumentError

_VERSION = "1.0.0"
_SIZE = 28
_MAX_VALUE = 16
_NUM_CLIENTS = 50
_TEST_FRACTION = 0.2


def load_digits(
    *,
    num_clients: int | None = None,
    partition: Partition | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> Splits:
    """Scikit-learn's handwritten digits, split among clients, a fifth of each client held out.

    Args:
      num_clients: how many clients, by default 50 of about 36 images each, with class mixes drawn
        from Dirichlet(1.0).
      partition: a partitioner in place of that; it says itself how many clients there are.
      seed: of the partition and of the choice of test images.
      data_dir: the cache folder; by default $FEDJAX_CORE_CACHE or ~/.cache/fedjax_core.

    Returns:
      `Splits` of the same clients: `image` uint8 ``[28, 28, 1]``, the 8 x 8 pixels x 255/16 resized
      bilinearly; `label` int32.

    Raises:
      ArgumentError: both `num_clients` and `partition`.
      DataError: more clients than the 1,797 images.
      StorageError: the cache folder cannot be written.
    """
    split = _partition(num_clients, partition)
    examples = _read(_prepared(cache.cache_folder(data_dir)))
    dataset = from_arrays(examples, partition=split, seed=seed, name="digits")
    return holdout(dataset, _TEST_FRACTION, seed)


def resize_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarges square images bilinearly, pixel centres at half-integers, edges repeated.

    Args:
      images: float ``[num_images, n, n]``.
      size: the new height and width, at least `n`.

    Returns:
      float64 ``[num_images, size, size]``.
    """
    weights = _interpolation(images.shape[1], size)
    return np.einsum("ij,njk,lk->nil", weights, images, weights, optimize=True)


def _interpolation(old: int, new: int) -> np.ndarray:
    """The weights of `old` samples in each of `new` samples: ``[new, old]``, rows sum to 1."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(1 - np.abs(places[:, None] - np.arange(old)), 0)


def _partition(num_clients: int | None, chosen: Partition | None) -> Partition:
    if chosen is None:
        return partition.dirichlet(_NUM_CLIENTS if num_clients is None else num_clients, alpha=1.0)
    if num_clients is not None:
        raise ArgumentError(
            f"got both {num_clients=} and a partition; give the number of clients to the "
            "partitioner, for example partition.iid(num_clients)"
        )
    return chosen


def _prepared(folder: Path) -> Path:
    settings = {"version": _VERSION, "size": _SIZE, "file_format": "array_record"}

    def build(target: Path) -> None:
        with _quiet():
            builder = _builder_class()(data_dir=target)
            builder.download_and_prepare(file_format="array_record")
        shutil.rmtree(target / "downloads", ignore_errors=True)

    return cache.prepared(folder, "digits", settings, build)


def _read(folder: Path) -> dict[str, np.ndarray]:
    builder = _builder_class()(data_dir=folder, file_format="array_record")
    return tfds_source.read_columns(builder, "train")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # A set this small is ready before its progress bars are drawn; they would only be in the way.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@functools.cache
def _builder_class() -> Any:
    # Once only: TensorFlow Datasets registers the classes by name.
    import tensorflow_datasets as tfds

    class FedjaxCoreDigits(tfds.core.GeneratorBasedBuilder):
        """Scikit-learn's digits at 28 x 28."""

        VERSION = tfds.core.Version(_VERSION)

        def _info(self) -> Any:
            features = {
                # Not an `Image`: its encoder needs TensorFlow.
                "image": tfds.features.Tensor(shape=(_SIZE, _SIZE, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                # The order of scikit-learn, whatever the version of TensorFlow Datasets.
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # Nothing is downloaded.
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            from sklearn.datasets import load_digits as load_bundled

            bundled: Any = load_bundled()
            enlarged = resize_bilinear(bundled.images * (255 / _MAX_VALUE), _SIZE)
            images = np.rint(enlarged).astype(np.uint8)[..., None]
            for i, (image, label) in enumerate(zip(images, bundled.target, strict=True)):
                yield i, {"image": image, "label": int(label)}

    return FedjaxCoreDigits
