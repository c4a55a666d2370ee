"""Where in the user's code an operation or an error comes from."""

import functools
import inspect
import os

import jax
import numpy as np

from fedjax_core.errors import FedjaxError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def location() -> str:
    """`file:line` of the user's code that called into the library."""
    frame = inspect.currentframe()
    while frame is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@functools.lru_cache(maxsize=4096)
def _is_inside(filename: str) -> bool:
    return os.path.realpath(filename).startswith(_ROOTS) or filename.startswith("<frozen")


# The package's own folder, those that its subpackages are linked to, and of those that call back.
_ROOTS = tuple(
    os.path.realpath(folder) + os.sep
    for folder in (
        *(os.path.join(_PACKAGE, name) for name in ("", "algorithms", "compression")),
        os.path.dirname(jax.__file__),
        os.path.dirname(np.__file__),
    )
)


def located(kind: type[FedjaxError], message: str, where: str = "") -> FedjaxError:
    """An error that names the line of the user's code."""
    where = where or location()
    error = kind(f"{message} ({where})" if where else message)
    error.__dict__["_is_located"] = True
    return error


def locate(error: Exception, name: str) -> None:
    """Says once where the innermost operator that failed was called."""
    if getattr(error, "_is_located", False):
        return
    where = location()
    if isinstance(error, FedjaxError) and where:
        is_named = not name.startswith("federated_") or name in str(error.args[0])
        source = where if is_named else f"{name}, {where}"
        error.args = (f"{error.args[0]} ({source})", *error.args[1:])
    else:
        error.add_note(f"In {name.lstrip('_')}, called at {where or 'an unknown place'}.")
    error.__dict__["_is_located"] = True


def raised_at(error: Exception) -> str:
    """`file:line` of the user's code that raised the error, or called what raised it."""
    where, trace = "", error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if not _is_inside(filename):
            where = f"{os.path.basename(filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where
