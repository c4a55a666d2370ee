import lzma

import numpy as np
import pytest

from fedjax_core import datasets
from fedjax_core.errors import DataError, StorageError


def _parsed(blob):
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(blob).features.feature
    return features["pixels"].float_list.value, features["label"].int64_list.value[0]


@pytest.mark.parametrize("suffix", [".sqlite", ".sqlite.lzma", ".sqlite.xz"])
def test_emnist_rows_become_images_of_their_writer(tmp_path, writers, suffix):
    rng = np.random.default_rng(0)
    rows = [
        (owner, writers.example(pixels=rng.random(784, np.float32), label=i % 10))
        for i, owner in enumerate(["b", "a", "b", "c", "a", "b"])
    ]
    path = writers.tff(tmp_path / f"some{suffix}", {"train": rows, "test": rows[:1]})
    data = datasets.from_tff_sqlite(path, split="train")
    assert data.client_ids == ("a", "b", "c")
    assert data.num_examples.tolist() == [2, 3, 1]
    assert data.name == "some/train"
    assert {n: (str(s.dtype), s.shape) for n, s in data.element_spec.items()} == {
        "image": ("float32", (28, 28, 1)),
        "label": ("int32", ()),
    }
    for client_id in "abc":
        mine = [_parsed(blob) for owner, blob in rows if owner == client_id]
        examples = data.client(client_id)
        assert examples["label"].tolist() == [label for _, label in mine]
        np.testing.assert_array_equal(
            examples["image"], np.float32([pixels for pixels, _ in mine]).reshape(-1, 28, 28, 1)
        )
    assert datasets.from_tff_sqlite(path, split="test").num_examples.tolist() == [1]


def test_many_rows_are_read_in_chunks(tmp_path, writers):
    owners = np.random.default_rng(1).integers(0, 50, 3_000)
    rows = [(f"{c:02d}", writers.example(x=i)) for i, c in enumerate(owners)]
    data = datasets.from_tff_sqlite(writers.tff(tmp_path / "x.sqlite", {"s": rows}), split="s")
    for client in range(50):
        expected = np.flatnonzero(owners == client)
        np.testing.assert_array_equal(data.client(f"{client:02d}")["x"], expected)


def test_clients_without_examples_are_kept(tmp_path, writers):
    path = writers.tff(
        tmp_path / "x.sqlite", {"s": [("b", writers.example(x=1))]}, stated={"s": {"a": 0}}
    )
    data = datasets.from_tff_sqlite(path, split="s")
    assert data.client_ids == ("a", "b")
    assert data.num_examples.tolist() == [0, 1]


def test_other_public_images_are_shaped(tmp_path, writers):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    row = ("a", writers.example(image=pixels, label=3, coarse_label=1))
    data = datasets.from_tff_sqlite(
        writers.tff(tmp_path / "cifar100.sqlite", {"train": [row]}), split="train"
    )
    assert data.examples["image"].dtype == np.uint8
    np.testing.assert_array_equal(data.examples["image"][0], pixels)
    assert list(data.examples) == ["coarse_label", "image", "label"]


def test_text_needs_a_decoder(tmp_path, writers):
    path = writers.tff(
        tmp_path / "shakespeare.sqlite",
        {
            "train": [
                ("hamlet", writers.example(snippets=b"to be")),
                ("iago", writers.example(snippets=b"I am")),
            ]
        },
    )
    with pytest.raises(DataError, match=r"\['snippets'\] hold text.*decode="):
        datasets.from_tff_sqlite(path, split="train")

    def decode(example):
        codes = np.frombuffer(example["snippets"][0].ljust(8, b"\0"), np.uint8)
        return {"codes": codes, "length": len(example["snippets"][0])}

    data = datasets.from_tff_sqlite(path, split="train", decode=decode)
    assert bytes(data.client("iago")["codes"][0]) == b"I am\0\0\0\0"
    assert data.client("hamlet")["length"].tolist() == [5]
    with pytest.raises(DataError, match="must return a dict"):
        datasets.from_tff_sqlite(path, split="train", decode=lambda example: 3)


def _tff_error(path, error=StorageError, split="s"):
    with pytest.raises(error) as caught:
        datasets.from_tff_sqlite(path, split=split)
    return str(caught.value)


def test_an_unknown_split_lists_those_there(tmp_path, writers):
    path = writers.tff(tmp_path / "x.sqlite", {"one": [("a", writers.example(x=1))]})
    assert "['one']" in _tff_error(path, DataError, split="two")


@pytest.mark.parametrize("missing", ["examples", "client_metadata"])
def test_a_missing_table_is_named(tmp_path, writers, missing):
    tables = {"examples", "client_metadata"} - {missing}
    path = writers.tff(tmp_path / "x.sqlite", {"s": [("a", writers.example(x=1))]}, tables=tables)
    message = _tff_error(path)
    assert f"no table {missing!r}" in message
    assert next(iter(tables)) in message
    assert "expected source" in message


def test_a_missing_column_is_named(tmp_path, writers):
    path = writers.fedjax(tmp_path / "x.sqlite", {b"a": {"x": np.arange(2)}}, table="examples")
    assert "'serialized_example_proto'" in _tff_error(path)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_lzma_file_is_refused(tmp_path, emnist_file, keep):
    content = emnist_file.read_bytes()
    path = tmp_path / "cut.sqlite.lzma"
    path.write_bytes(content[: int(len(content) * keep)])
    assert "cut off or damaged" in _tff_error(path)


def test_a_truncated_sqlite_file_is_refused(tmp_path, emnist_file):
    content = lzma.decompress(emnist_file.read_bytes())
    path = tmp_path / "cut.sqlite"
    path.write_bytes(content[: len(content) // 2])
    assert "get it again" in _tff_error(path, split="digits_only_train")


@pytest.mark.parametrize("content", [b"", b"hello", b"]\0\0\x80\0 garbage that is no lzma"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.sqlite"
    path.write_bytes(content)
    message = _tff_error(path)
    assert str(path) in message
    assert "damaged" in message or "no SQLite file" in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "check the path" in _tff_error(tmp_path / "nothing.sqlite")
    assert "check the path" in _tff_error(tmp_path)


def test_odd_characters_in_the_path(tmp_path, writers):
    folder = tmp_path / "a?b#c %20 é"
    folder.mkdir()
    path = writers.tff(folder / "x.sqlite", {"s": [("a", writers.example(x=1))]})
    assert datasets.from_tff_sqlite(str(path), split="s").num_clients == 1


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"a": 3}, "1 examples less than client_metadata"),
        ({"a": 1}, "more examples than client_metadata"),
        ({"a": -1}, "at least 0"),
        ({"a": "many"}, "at least 0"),
    ],
)
def test_counts_that_disagree_are_refused(tmp_path, writers, stated, words):
    rows = [("a", writers.example(x=1)), ("a", writers.example(x=2))]
    path = writers.tff(tmp_path / "x.sqlite", {"s": rows}, stated={"s": stated})
    assert words in _tff_error(path)


def test_a_split_without_examples_is_refused(tmp_path, writers):
    path = writers.tff(tmp_path / "x.sqlite", {"s": []}, stated={"s": {"a": 0}})
    assert "no examples" in _tff_error(path)


@pytest.mark.parametrize("blob", [b"\xff\xff\xff", "text", 3])
def test_rows_that_are_no_examples_are_refused(tmp_path, writers, blob):
    path = writers.tff(tmp_path / "x.sqlite", {"s": [("ann", blob)]})
    message = _tff_error(path)
    assert "client 'ann'" in message
    assert "tf.train.Example" in message


def test_rows_with_other_features_are_refused(tmp_path, writers):
    rows = [("a", writers.example(x=1)), ("b", writers.example(y=1))]
    path = writers.tff(tmp_path / "x.sqlite", {"s": rows})
    assert "client 'b' has the features ['y']" in _tff_error(path)


@pytest.mark.parametrize("gap", [0, 1500])
def test_rows_of_other_shape_are_refused(tmp_path, writers, gap):
    same = [("a", writers.example(x=[1, 2]))] * (1 + gap)
    path = writers.tff(tmp_path / "x.sqlite", {"s": [*same, ("b", writers.example(x=[1, 2, 3]))]})
    assert "decode=" in _tff_error(path, DataError)


def test_values_out_of_range_are_refused(tmp_path, writers):
    path = writers.tff(tmp_path / "x.sqlite", {"s": [("a", writers.example(x=2**40))]})
    assert "do not fit into int32" in _tff_error(path, DataError)
    image = np.full(3072, 256)
    path = writers.tff(tmp_path / "y.sqlite", {"s": [("a", writers.example(image=image))]})
    assert "do not fit into uint8" in _tff_error(path, DataError)


@pytest.mark.parametrize("stated", [{"a": 10**15}, {"a": 2**62, "b": 2**62}])
def test_absurd_numbers_of_examples_are_not_allocated(tmp_path, writers, stated):
    rows = [("a", writers.example(x=1))]
    path = writers.tff(tmp_path / "x.sqlite", {"s": rows}, stated={"s": stated})
    with pytest.raises(StorageError, match="less than client_metadata states"):
        datasets.from_tff_sqlite(path, split="s")


def test_a_decode_that_gives_ragged_values_is_named(tmp_path, writers):
    path = writers.tff(tmp_path / "x.sqlite", {"s": [("a", writers.example(x=1))]})
    with pytest.raises(DataError, match=r"client 'a', feature 'y': .*ragged"):
        datasets.from_tff_sqlite(path, split="s", decode=lambda features: {"y": [[1], [1, 2]]})
