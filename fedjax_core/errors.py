"""The errors of the library: one tree, and each is also the built-in error a Python user expects.

    FedjaxError
    ├── FederatedTypeError    (TypeError)   a value, type or placement does not fit
    │   ├── PlacementError                  it lives at the wrong placement
    │   ├── FieldError        (AttributeError, IndexError) a field that a struct does not have
    │   ├── MisplacedTypeError (ValueError)  a type where it may not stand
    │   └── CallError         (SyntaxError) a call of a value that is no function
    ├── ArgumentError         (ValueError)  an argument is out of range or inconsistent
    │   ├── CodecError                      a codec, or the bytes of a message
    │   ├── NotExportableError              a computation of which JAX makes no artifact
    │   ├── PrivacyError                    a client's value that leaves past the aggregations
    │   └── DataError                       examples, labels, partitions
    │       └── UnknownClientError (KeyError)
    ├── StorageError          (OSError)     files, caches and downloads
    └── ContextError          (RuntimeError) an operator used outside a federated computation

Messages say what was expected, what was got, and what to do.
"""

import contextlib
from collections.abc import Iterator


class FedjaxError(Exception):
    """Base class of every error that the library raises on purpose."""


class FederatedTypeError(FedjaxError, TypeError):
    """A value, type or placement does not fit."""


class PlacementError(FederatedTypeError):
    """A value lives at the wrong placement, or at none."""


class ArgumentError(FedjaxError, ValueError):
    """An argument is out of range, or disagrees with another one."""


class CodecError(ArgumentError):
    """A codec got a value it cannot encode, or bytes it cannot decode."""


class PrivacyError(ArgumentError):
    """A computation of which it is not proven that clients' values leave as aggregates only."""


class DataError(ArgumentError):
    """Examples, labels or partitions that cannot be used as given."""


class UnknownClientError(DataError, KeyError):
    """A client id that the dataset does not hold."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class DeviceMemoryError(FedjaxError, MemoryError):
    """Arrays that do not fit into the memory there is; raised before any of it is taken."""


class StorageError(FedjaxError, OSError):
    """A file, a cache folder or a download that cannot be used."""


class ContextError(FedjaxError, RuntimeError):
    """An operator was used outside the body of a federated computation."""


class FieldError(FederatedTypeError, AttributeError, IndexError):
    """A field that a struct does not have, by name or by index."""


class CallError(FederatedTypeError, SyntaxError):
    """A call of a value that is no function."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.msg = message  # what a SyntaxError prints


class MisplacedTypeError(FederatedTypeError, ValueError):
    """A type where it may not stand; a `ValueError` too, as in TFF."""


class NotExportableError(ArgumentError):
    """A computation of which JAX makes no artifact."""


@contextlib.contextmanager
def noted(note: str) -> Iterator[None]:
    """Adds a note on where it happened to an error, the user's own one too, which stays as it is.

    Args:
      note: a sentence.
    """
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise
