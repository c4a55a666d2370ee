import importlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fedjax_core import datasets
from fedjax_core.datasets import partition
from fedjax_core.errors import ArgumentError, DataError, StorageError


class WrittenNotes(tfds.core.GeneratorBasedBuilder):
    """Nine notes by three writers."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "writer": tfds.features.Text(),
            "vector": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(9), "test": self._generate_examples(3)}

    def _generate_examples(self, size):
        for i in range(size):
            yield i, {"writer": "xyz"[i % 3], "vector": [i, -i], "label": i % 3}


class RaggedNotes(WrittenNotes):
    """Notes of varying length."""

    def _info(self):
        features = {"codes": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, size):
        for i in range(size):
            yield i, {"codes": np.arange(i + 1, dtype=np.int32)}


class NeedsMissingPackage(WrittenNotes):
    """A builder whose own code imports what is not there."""

    def _split_generators(self, dl_manager):
        importlib.import_module("a_package_that_is_not_there")


def test_a_mocked_set_by_name(tmp_path):
    with tfds.testing.mock_data(num_examples=20):
        data = datasets.from_tfds(
            "mnist", "train", partition=partition.iid(4), data_dir=tmp_path, seed=3
        )
        source = tfds.data_source("mnist", split="train", data_dir=tmp_path)
        expected = sorted(int(source[i]["label"]) for i in range(20))
    assert data.name == "mnist/train"
    assert data.num_examples.tolist() == [5, 5, 5, 5]
    assert {n: (str(s.dtype), s.shape) for n, s in data.element_spec.items()} == {
        "image": ("uint8", (28, 28, 1)),
        "label": ("int32", ()),
    }
    assert sorted(data.examples["label"].tolist()) == expected


def test_text_is_seen_by_the_partitioner_and_left_out(tmp_path):
    with tfds.testing.mock_data(num_examples=12):
        data = datasets.from_tfds("cifar10", partition=partition.by_key("id"), data_dir=tmp_path)
    assert sorted(data.examples) == ["image", "label"]
    assert data.element_spec["image"].shape == (32, 32, 3)
    assert data.num_examples.sum() == 12


def test_a_builder_of_ones_own(tmp_path):
    builder = WrittenNotes(data_dir=tmp_path)
    data = datasets.from_tfds(builder, "train", partition=partition.by_key("writer"))
    assert data.client_ids == ("x", "y", "z")
    assert data.client("y")["vector"].tolist() == [[1, -1], [4, -4], [7, -7]]
    assert data.client("z")["label"].tolist() == [2, 2, 2]
    some = datasets.from_tfds(
        WrittenNotes(data_dir=tmp_path), "test", partition=partition.iid(3), features=["label"]
    )
    assert list(some.examples) == ["label"]
    part = datasets.from_tfds(builder, "train[:4]", partition=partition.iid(2))
    assert part.num_examples.tolist() == [2, 2]


def test_features_that_do_not_fit(tmp_path):
    builder = WrittenNotes(data_dir=tmp_path)
    with pytest.raises(DataError, match="encode text"):
        datasets.from_tfds(builder, partition=partition.iid(2), features=["writer"])
    with pytest.raises(DataError, match="features must name"):
        datasets.from_tfds(builder, partition=partition.iid(2), features=["image"])
    with pytest.raises(DataError, match="at most 9 clients"):
        datasets.from_tfds(builder, partition=partition.iid(10))
    with pytest.raises(DataError, match="'codes' varies in shape"):
        datasets.from_tfds(RaggedNotes(data_dir=tmp_path), partition=partition.iid(2))
    with pytest.raises(ArgumentError, match="seed"):
        datasets.from_tfds(builder, partition=partition.iid(2), seed=-1)


def test_unknown_splits_and_sets(tmp_path):
    with pytest.raises(StorageError, match=r"splits are \['train', 'test'\]"):
        datasets.from_tfds(
            WrittenNotes(data_dir=tmp_path), "validation", partition=partition.iid(2)
        )
    with pytest.raises(StorageError, match="check its name"):
        datasets.from_tfds("no_such_set", partition=partition.iid(2), data_dir=tmp_path)


def test_a_builder_that_needs_another_package_says_so(tmp_path):
    with pytest.raises(StorageError, match=r"a_package_that_is_not_there.*needs this package once"):
        datasets.from_tfds(NeedsMissingPackage(data_dir=tmp_path), partition=partition.iid(2))


def test_a_set_in_another_format_is_refused(tmp_path):
    builder = WrittenNotes(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    for path in tmp_path.rglob("*.array_record*"):
        path.unlink()
    with pytest.raises(StorageError, match="another data_dir"):
        datasets.from_tfds(WrittenNotes(data_dir=tmp_path), partition=partition.iid(2))


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to the cache folder"):
        datasets.from_tfds("mnist", partition=partition.iid(2), data_dir=tmp_path / "file")
