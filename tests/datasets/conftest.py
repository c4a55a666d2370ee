"""Small files in the formats of the public datasets, and a web server on this machine."""

import functools
import http.server
import lzma
import sqlite3
import threading
import zlib

import msgpack
import numpy as np
import pytest


def serialized_example(**features):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif np.asarray(value).dtype.kind == "f":
            feature.float_list.value.extend(np.ravel(value).tolist())
        else:
            feature.int64_list.value.extend(np.ravel(value).tolist())
    return example.SerializeToString()


def write_tff_file(path, splits, *, tables=("examples", "client_metadata"), stated=None):
    """`splits`: split -> list of (client id, serialized example), in the order of the rows."""
    database = path.with_name("writing.sqlite")
    connection = sqlite3.connect(database)
    if "examples" in tables:
        connection.execute(
            "CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL, "
            "serialized_example_proto BLOB NOT NULL)"
        )
    if "client_metadata" in tables:
        connection.execute(
            "CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT NOT NULL, "
            "num_examples INTEGER NOT NULL)"
        )
    for split, rows in splits.items():
        counts = {i: sum(c == i for c, _ in rows) for i, _ in rows} | (stated or {}).get(split, {})
        if "examples" in tables:
            connection.executemany(
                "INSERT INTO examples VALUES (?, ?, ?)", [(split, i, blob) for i, blob in rows]
            )
        if "client_metadata" in tables:
            connection.executemany(
                "INSERT INTO client_metadata VALUES (?, ?, ?)",
                [(client_id, split, count) for client_id, count in counts.items()],
            )
    connection.commit()
    connection.close()
    content = database.read_bytes()
    database.unlink()
    if path.suffix == ".lzma":
        content = lzma.compress(content, format=lzma.FORMAT_ALONE)
    if path.suffix == ".xz":
        content = lzma.compress(content)
    path.write_bytes(content)
    return path


def emnist_rows(sizes, num_classes, seed):
    """Rows of a split of EMNIST, the clients' rows interleaved as a file may have them."""
    rng = np.random.default_rng(seed)
    owners = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return [
        (
            f"f{owner:04d}_{owner % 7:02d}",
            serialized_example(
                pixels=rng.random((28, 28), np.float32), label=int(rng.integers(num_classes))
            ),
        )
        for owner in owners
    ]


def _emnist_splits():
    return {
        "digits_only_train": emnist_rows([5, 0, 3, 9], 10, 0),
        "digits_only_test": emnist_rows([1, 0, 2, 1], 10, 1),
        "all_train": emnist_rows([6, 2, 4], 62, 2),
        "all_test": emnist_rows([2, 1, 1], 62, 3),
    }


@pytest.fixture(scope="session")
def emnist_file(tmp_path_factory):
    return write_tff_file(
        tmp_path_factory.mktemp("emnist") / "emnist_all.sqlite.lzma", _emnist_splits()
    )


def write_fedjax_file(path, clients, *, table="federated_data", stated=None):
    """`clients`: client id (bytes) -> dict of arrays, or the bytes to store as they are."""
    connection = sqlite3.connect(path)
    connection.execute(
        f"CREATE TABLE {table} (client_id BLOB NOT NULL PRIMARY KEY, data BLOB NOT NULL, "
        "num_examples INTEGER NOT NULL)"
    )
    for client_id, examples in clients.items():
        is_raw = isinstance(examples, bytes)
        data = examples if is_raw else zlib.compress(msgpack.packb(examples, default=packed_array))
        count = 1 if is_raw else len(next(iter(examples.values()), ()))
        connection.execute(
            f"INSERT INTO {table} VALUES (?, ?, ?)",
            (client_id, data, (stated or {}).get(client_id, count)),
        )
    connection.commit()
    connection.close()
    return path


def packed_array(array):
    if array.dtype == object:
        return msgpack.ExtType(4, msgpack.packb((array.shape, array.ravel().tolist())))
    content = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer(send=False)

    def do_GET(self):
        self.server.requests += 1
        self._answer(send=True)

    def _answer(self, *, send):
        if self.path not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send and self.server.breaks > 0:
            self.server.breaks -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif send:
            self.wfile.write(content)

    def log_message(self, *args):
        del args


@pytest.fixture
def web():
    """A web server: `files` path -> bytes; the next `breaks` transfers end half-way."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files, server.breaks, server.requests = {}, 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def writers():
    """The functions that write files in the public formats."""
    import types

    return types.SimpleNamespace(
        tff=write_tff_file, example=serialized_example, fedjax=write_fedjax_file
    )
