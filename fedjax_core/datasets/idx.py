"""The IDX format, in which MNIST and its siblings are published."""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

from fedjax_core.errors import StorageError

_DTYPES = {
    0x08: ">u1",
    0x09: ">i1",
    0x0B: ">i2",
    0x0C: ">i4",
    0x0D: ">f4",
    0x0E: ">f8",
}
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an IDX file, compressed by gzip or not.

    The format: two zero bytes, a byte for the dtype, a byte for the number of axes, the lengths of
    the axes as big-endian uint32, then the values, big-endian, last axis fastest.

    Args:
      path: the file.

    Returns:
      An array in the machine's byte order, of the shape and dtype that the file states.

    Raises:
      StorageError: the file is missing, is no IDX file, or its length is not what it states.

    References:
      LeCun, Cortes, Burges. The MNIST database of handwritten digits.
    """
    content = _content(Path(path))
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise StorageError(
            f"{path} is no IDX file: expected it to begin with two zero bytes and a code of a "
            f"dtype, got {content[:4].hex(' ') or 'nothing'}; check which file this is"
        )
    dtype, num_axes = np.dtype(_DTYPES[content[2]]), content[3]
    start = 4 + 4 * num_axes
    shape = tuple(map(int, np.frombuffer(content[4:start], ">u4"))) if start <= len(content) else ()
    # Python's integers: four lengths of 2**32 - 1 must not wrap around to something plausible.
    expected = start + math.prod(shape) * dtype.itemsize
    if len(shape) != num_axes or len(content) != expected:
        raise StorageError(
            f"{path} states {num_axes} axes {list(shape)} of {dtype}: expected {expected} bytes, "
            f"got {len(content)}; the file is cut off or damaged, get it again"
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == _GZIP_MAGIC else content
    except (OSError, EOFError, zlib.error) as error:
        raise StorageError(
            f"cannot read the IDX file {path}: {error}; check the path, or get the file again"
        ) from error
