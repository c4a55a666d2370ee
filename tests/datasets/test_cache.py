import json
import threading

import numpy as np
import pytest

from fedjax_core import datasets
from fedjax_core.datasets import cache, store
from fedjax_core.errors import StorageError


def _write(text):
    return lambda folder: (folder / "data.txt").write_text(text)


def test_different_settings_never_share_a_folder(tmp_path):
    first = cache.prepared(tmp_path, "set", {"a": 1}, _write("one"))
    second = cache.prepared(tmp_path, "set", {"a": 2}, _write("two"))
    assert first != second
    assert (first / "data.txt").read_text() == "one"
    assert (second / "data.txt").read_text() == "two"
    # JSON text, not Python equality: 1 and True, 1 and 1.0 are different settings.
    assert cache.prepared(tmp_path, "set", {"a": True}, _write("three")) not in (first, second)


def test_a_prepared_folder_is_used_again(tmp_path):
    builds = []
    for _ in range(2):
        folder = cache.prepared(tmp_path, "set", {}, lambda f: builds.append(_write("x")(f)))
    assert len(builds) == 1
    assert (folder / "data.txt").read_text() == "x"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(tmp_path, failure):
    def build(folder):
        _write("half")(folder)
        raise failure

    with pytest.raises(failure):
        cache.prepared(tmp_path, "set", {}, build)
    assert list((tmp_path / "set").iterdir()) == []
    assert (cache.prepared(tmp_path, "set", {}, _write("whole")) / "data.txt").exists()


def test_two_builds_at_once_do_no_harm(tmp_path):
    barrier = threading.Barrier(4)
    folders, errors = [], []

    def build(folder):
        _write("same")(folder)
        barrier.wait()

    def run():
        try:
            folders.append(cache.prepared(tmp_path, "set", {}, build))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(folders)) == 1
    assert [p.name for p in (tmp_path / "set").iterdir()] == [folders[0].name]


def _truncate(folder):
    (folder / "data.txt").write_text("x")


def _remove(folder):
    (folder / "data.txt").unlink()


def _forget(folder):
    (folder / "settings.json").unlink()


def _other_settings(folder):
    content = json.loads((folder / "settings.json").read_text())
    content["settings"] = {"other": 1}
    (folder / "settings.json").write_text(json.dumps(content))


def _garbage(folder):
    (folder / "settings.json").write_text("[]")


@pytest.mark.parametrize("damage", [_truncate, _remove, _forget, _other_settings, _garbage])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder = cache.prepared(tmp_path, "set", {}, _write("long text"))
    damage(folder)
    with pytest.raises(StorageError, match="delete this folder") as caught:
        cache.prepared(tmp_path, "set", {}, _write("long text"))
    assert str(folder) in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="data_dir= or the environment variable") as caught:
        cache.prepared(tmp_path / "file", "set", {}, _write("x"))
    assert str(tmp_path / "file" / "set") in str(caught.value)


def test_errors_while_writing_are_storage_errors(tmp_path):
    def build(folder):
        del folder
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        cache.prepared(tmp_path, "set", {}, build)


def test_the_cache_folder_is_chosen_by_argument_environment_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDJAX_CORE_CACHE", raising=False)
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "fedjax_core"
    monkeypatch.setenv("FEDJAX_CORE_CACHE", str(tmp_path / "env"))
    assert cache.cache_folder() == tmp_path / "env"
    assert cache.cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache.cache_folder("~/x") == tmp_path / "home" / "x"
    assert not (tmp_path / "env").exists()


def test_a_stored_dataset_is_the_same_and_memory_mapped(tmp_path):
    data = datasets.from_clients(
        {
            "é": {"image": np.ones((2, 3), np.uint8), "a/../b": np.arange(2)},
            "empty": {"image": np.ones((0, 3), np.uint8), "a/../b": np.arange(0)},
        }
    )
    store.save(data, tmp_path / "deep" / "set")
    loaded = store.load(tmp_path / "deep" / "set", "again")
    assert loaded.client_ids == data.client_ids
    assert loaded.name == "again"
    assert loaded.offsets.tolist() == [0, 2, 2]
    assert list(loaded.examples) == ["image", "a/../b"]
    for name in data.examples:
        assert isinstance(loaded.examples[name], np.memmap)
        np.testing.assert_array_equal(loaded.examples[name], data.examples[name])
    assert all(p.parent == tmp_path / "deep" / "set" for p in tmp_path.rglob("*.npy"))


def test_a_stored_dataset_without_examples(tmp_path):
    data = datasets.from_clients({"a": {"x": np.zeros((0, 2), np.float32)}})
    store.save(data, tmp_path)
    assert store.load(tmp_path, "x").client("a")["x"].shape == (0, 2)
    array = store.allocate_in(tmp_path / "new")("y", (0, 2), np.dtype(np.int32))
    assert array.shape == (0, 2)


@pytest.mark.parametrize(
    "name", ["offsets.npy", "client_ids.json", "features.json", "feature-x.npy"]
)
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_damaged_store_is_refused(tmp_path, name, content):
    store.save(datasets.from_clients({"a": {"x": [1.0]}}), tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StorageError, match="delete this folder"):
        store.load(tmp_path, "x")


def test_pickles_in_a_store_are_refused(tmp_path):
    store.save(datasets.from_clients({"a": {"x": [1.0]}}), tmp_path)
    np.save(tmp_path / "feature-x.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(StorageError, match="delete this folder"):
        store.load(tmp_path, "x")
