import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as bundled_digits

from fedjax_core import datasets
from fedjax_core.datasets import digits, download, emnist, partition
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError, StorageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_digits_are_scikit_learns_enlarged(folder):
    everyone = partition.by_key(np.zeros(1797, int))
    train, test = datasets.load("digits", partition=everyone, data_dir=folder)
    assert (train.name, test.name) == ("digits/train", "digits/test")
    assert train.element_spec == {
        "image": jax.ShapeDtypeStruct((28, 28, 1), np.uint8),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }
    assert (train.num_examples[0], test.num_examples[0]) == (1438, 359)
    bundled = bundled_digits()
    scaled = np.float32(bundled["images"] * 255 / 16)
    expected = jax.image.resize(scaled, (1797, 28, 28), "bilinear", antialias=False)
    _assert_same_rows(train, test, np.asarray(expected), bundled["target"])


def _assert_same_rows(train, test, images, labels):
    """Every image is in one of the parts, with its label; rounding may differ by one half."""
    found = np.concatenate([train.examples["image"], test.examples["image"]])[..., 0]
    found_labels = np.concatenate([train.examples["label"], test.examples["label"]])
    # Both parts keep the order of the bundled set, so two pointers match all rows.
    i, j = 0, int(train.num_examples[0])
    for image, label in zip(images, labels, strict=True):
        first = i < train.num_examples[0] and abs(found[i] - image).max() <= 0.51
        row = i if first else j
        assert abs(found[row] - image).max() <= 0.51
        assert found_labels[row] == label
        i, j = (i + 1, j) if first else (i, j + 1)


def test_resizing_agrees_with_pillow():
    images = np.random.default_rng(0).random((3, 8, 8), np.float32)
    resized = digits.resize_bilinear(images, 28)
    for image, ours in zip(images, resized, strict=True):
        theirs = Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-6)
    np.testing.assert_array_equal(digits.resize_bilinear(images, 8), images)


def test_digits_settings(folder):
    train, test = datasets.load("digits", data_dir=folder)
    assert train.num_clients == test.num_clients == 50
    sizes = train.num_examples + test.num_examples
    assert set(sizes.tolist()) == {35, 36}
    assert sizes.sum() == 1797
    # A fifth of 35 or 36 is 7 each.
    assert set(test.num_examples.tolist()) == {7}
    again = datasets.load("digits", data_dir=folder)
    np.testing.assert_array_equal(train.examples["image"], again.train.examples["image"])
    other = datasets.load("digits", data_dir=folder, seed=1)
    assert not np.array_equal(train.examples["label"], other.train.examples["label"])
    assert datasets.load("digits", num_clients=7, data_dir=folder).train.num_clients == 7


def test_digits_are_array_records_prepared_once(folder):
    datasets.load("digits", data_dir=folder)
    files = {p.name: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert any(".array_record" in name for name in files)
    datasets.load("digits", data_dir=folder)
    assert files == {p.name: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_preparing_digits_prints_nothing(tmp_path, capfd):
    datasets.load("digits", data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_digits_bad_settings(folder, tmp_path):
    with pytest.raises(DataError, match="at most 1797 clients"):
        datasets.load("digits", num_clients=1798, data_dir=folder)
    with pytest.raises(ArgumentError, match="num_clients"):
        datasets.load("digits", num_clients=0, data_dir=folder)
    with pytest.raises(ArgumentError, match="both num_clients=3 and a partition"):
        datasets.load("digits", num_clients=3, partition=partition.iid(3), data_dir=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="data_dir=") as caught:
        datasets.load("digits", data_dir=tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_the_environment_names_the_cache(folder, monkeypatch):
    monkeypatch.setenv("FEDJAX_CORE_CACHE", str(folder))
    assert datasets.load("digits", num_clients=3).train.num_clients == 3


def test_unknown_names_and_settings():
    with pytest.raises(ArgumentError, match="did you mean 'digits'"):
        datasets.load("digit")
    with pytest.raises(ArgumentError, match="from_tfds"):
        datasets.load("imagenet")
    with pytest.raises(ArgumentError, match="no setting 'only_digits'"):
        datasets.load("digits", only_digits=True)
    with pytest.raises(FederatedTypeError, match="only_digits"):
        datasets.load("emnist", only_digits="yes")


def test_available_describes_every_dataset():
    descriptions = {d.name: d for d in datasets.available()}
    assert list(descriptions) == ["digits", "emnist"]
    assert descriptions["emnist"].settings == {
        "only_digits": True,
        "data_dir": None,
        "path": None,
    }
    assert all(d.summary and d.source and d.features for d in descriptions.values())


def _sizes(dataset):
    return dataset.num_examples.tolist()


def test_emnist_from_a_local_copy(emnist_file, tmp_path):
    train, test = datasets.load("emnist", path=emnist_file, data_dir=tmp_path)
    assert train.client_ids == ("f0000_00", "f0002_02", "f0003_03")
    assert (_sizes(train), _sizes(test)) == ([5, 3, 9], [1, 2, 1])
    assert isinstance(train.examples["image"], np.memmap)
    expected = datasets.from_tff_sqlite(emnist_file, split="digits_only_train")
    for name in ("image", "label"):
        np.testing.assert_array_equal(train.examples[name], expected.examples[name])
    letters = datasets.load("emnist", only_digits=False, path=emnist_file, data_dir=tmp_path)
    assert _sizes(letters.train) == [6, 2, 4]
    # The two are in folders of their own, and nothing else is left.
    assert len(list((tmp_path / "emnist").iterdir())) == 2
    again = datasets.load("emnist", path=emnist_file, data_dir=tmp_path)
    np.testing.assert_array_equal(again.train.examples["label"], train.examples["label"])


def test_emnist_from_another_copy_is_prepared_anew(emnist_file, tmp_path, writers):
    copy = tmp_path / "copy.sqlite.lzma"
    copy.write_bytes(emnist_file.read_bytes())
    datasets.load("emnist", path=copy, data_dir=tmp_path)
    row = ("new", writers.example(pixels=np.ones(784, np.float32), label=1))
    writers.tff(copy, {"digits_only_train": [row], "digits_only_test": [row]})
    assert datasets.load("emnist", path=copy, data_dir=tmp_path).train.client_ids == ("new",)


@pytest.mark.parametrize("place", [".", "downloads"])
def test_emnist_placed_in_the_cache_folder(emnist_file, tmp_path, place):
    target = tmp_path / place / "emnist_all.sqlite.lzma"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(emnist_file.read_bytes())
    assert datasets.load("emnist", data_dir=tmp_path).train.num_clients == 3
    assert json.loads(download.record_path(target).read_text())["size"] == target.stat().st_size
    target.write_bytes(emnist_file.read_bytes() + b"x")
    with pytest.raises(StorageError, match="not the file that was used first"):
        datasets.load("emnist", only_digits=False, data_dir=tmp_path)
    # What is prepared already needs the file no more.
    target.unlink()
    assert datasets.load("emnist", data_dir=tmp_path).train.num_clients == 3


def test_emnist_downloaded_after_an_interruption(emnist_file, tmp_path, web, monkeypatch):
    web.files["/emnist_all.sqlite.lzma"] = emnist_file.read_bytes()
    monkeypatch.setattr(emnist, "URL", f"{web.url}/emnist_all.sqlite.lzma")
    web.breaks = 3
    with pytest.raises(StorageError, match="put it at"):
        datasets.load("emnist", data_dir=tmp_path)
    assert list((tmp_path / "emnist").iterdir()) == []
    train, _ = datasets.load("emnist", data_dir=tmp_path)
    assert _sizes(train) == [5, 3, 9]
    assert (tmp_path / "downloads" / "emnist_all.sqlite.lzma").is_file()
    requests = web.requests
    datasets.load("emnist", data_dir=tmp_path)
    datasets.load("emnist", data_dir=tmp_path, only_digits=False)
    assert web.requests == requests


def test_emnist_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(emnist, "URL", "http://127.0.0.1:1/emnist_all.sqlite.lzma")
    with pytest.raises(StorageError, match="where there is a network") as caught:
        datasets.load("emnist", data_dir=tmp_path)
    assert str(tmp_path / "downloads" / "emnist_all.sqlite.lzma") in str(caught.value)


def test_emnist_missing_or_other_files(emnist_file, tmp_path, writers):
    with pytest.raises(StorageError, match="there is no file"):
        datasets.load("emnist", path=tmp_path / "nothing", data_dir=tmp_path)
    row = ("a", writers.example(x=1))
    other = writers.tff(
        tmp_path / "x.sqlite", {"digits_only_train": [row], "digits_only_test": [row]}
    )
    with pytest.raises(StorageError, match="is not federated EMNIST"):
        datasets.load("emnist", path=other, data_dir=tmp_path)
    row = ("a", writers.example(pixels=np.ones(784, np.float32), label=10))
    other = writers.tff(tmp_path / "y.sqlite", {"digits_only_train": [row]})
    with pytest.raises(StorageError, match=r"labels 0\.\.9"):
        datasets.load("emnist", path=other, data_dir=tmp_path)
    cut = tmp_path / "cut.sqlite.lzma"
    cut.write_bytes(emnist_file.read_bytes()[:-5000])
    with pytest.raises(StorageError, match="cut off or damaged"):
        datasets.load("emnist", path=cut, data_dir=tmp_path)
    assert list((tmp_path / "emnist").iterdir()) == []


def test_importing_the_package_imports_no_heavy_library():
    program = (
        "import sys, fedjax_core.datasets\n"
        "heavy = ('tensorflow_datasets', 'tensorflow', 'sklearn', 'PIL', 'tqdm', 'requests')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [["digits"], None, {}, 3])
def test_a_name_is_text(name):
    with pytest.raises(ArgumentError, match="no dataset"):
        datasets.load(name)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
@pytest.mark.parametrize("dataset", ["digits", "emnist"])
def test_a_folder_that_cannot_be_is_an_error_of_storage(tmp_path, dataset, name):
    with pytest.raises(StorageError, match="choose another folder with data_dir="):
        datasets.load(dataset, data_dir=tmp_path / name)
