"""Arguments by position and by name, as Python has them."""

from typing import Any

from fedjax_core.errors import FederatedTypeError


def bind_arguments(
    name: str, names: tuple[str, ...], count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call in the order of the parameters.

    Args:
      name: of what is called.
      names: of its parameters, as far as they have names.
      count: how many parameters there are.
      args: given by position.
      kwargs: given by name.

    Raises:
      FederatedTypeError: for one that is missing, unknown, or given twice.
    """
    unknown = sorted(set(kwargs) - set(names[:count]))
    if unknown:
        raise FederatedTypeError(
            f"`{name}` expected arguments out of {list(names[:count])}, got {unknown}; use these "
            "names."
        )
    twice = [given for given in names[: len(args)] if given in kwargs]
    if twice:
        raise FederatedTypeError(
            f"`{name}` expected each argument once, got {twice} by position and by name; give it "
            "once."
        )
    if not kwargs and len(args) == count:
        return args
    by_name = [kwargs[given] for given in names[len(args) : count] if given in kwargs]
    if len(args) + len(by_name) != count:
        missing = [given for given in names[len(args) : count] if given not in kwargs]
        raise FederatedTypeError(
            f"`{name}` expected {count} arguments, got {len(args) + len(kwargs)}"
            + (f"; missing {missing}." if missing else f"; pass {count}.")
        )
    return (*args, *by_name)
