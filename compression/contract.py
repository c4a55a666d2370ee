"""The contract of a codec, held to wherever it is used on an edge.

init:   (template) -> (server, memory)
encode: (keys, memory, hints, value) -> (memory, message)
finish: (shared_key, server, total, report) -> (server, value)
bits:   (message) -> BitCount
"""

from typing import Any

import jax

from fedjax_core.bits import BitCount
from fedjax_core.compression.base import Codec, Keys, Message, Report, check_message
from fedjax_core.errors import CodecError, noted
from fedjax_core.language import inference
from fedjax_core.language.checks import check_takes

_NUM_ARGUMENTS = {"init": 1, "hints": 1, "encode": 4, "decode": 3, "finish": 4, "bits": 1}


def checked(codec: Codec) -> Codec:
    """The same codec, whose functions raise where they break their contract.

    Args:
      codec: to be used.

    Raises:
      CodecError: if it is none, or from its functions if they return something else.
      FederatedTypeError: if a function takes another number of arguments.

    Examples:
      >>> from fedjax_core.compression.base import identity
      >>> checked(identity()).name
      'identity()'
    """
    if not isinstance(codec, Codec):
        raise CodecError(f"Expected a codec, got {codec!r}; pass one of fc.compression.")
    for part, num_args in _NUM_ARGUMENTS.items():
        check_takes(getattr(codec, part), num_args, f"`{part}` of codec {codec.name}")

    def init(template: Any) -> tuple[Any, Any]:
        server, memory = _pair(codec, "init", codec.init(template), "(server, memory)")
        return server, memory

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        with noted(f"In `encode` of codec {codec.name}."):
            results = codec.encode(keys, memory, hints, value)
        new, message = _pair(codec, "encode", results, "(memory, message)")
        check_message(message)
        _check_kept(codec, "encode", "memory", memory, new)
        return new, message

    def finish(key: jax.Array, server: Any, total: Any, report: Report) -> tuple[Any, Any]:
        results = codec.finish(key, server, total, report)
        new, value = _pair(codec, "finish", results, "(server, value)")
        _check_kept(codec, "finish", "server", server, new)
        return new, value

    def bits(message: Message) -> BitCount:
        count = codec.bits(message)
        if not isinstance(count, BitCount):
            raise CodecError(
                f"Expected `bits` of codec {codec.name} to return a BitCount, got {count!r}; wrap "
                "an int with BitCount.of."
            )
        return count

    return codec._replace(init=init, encode=encode, finish=finish, bits=bits)


def _pair(codec: Codec, part: str, results: Any, expected: str) -> tuple[Any, Any]:
    if isinstance(results, tuple) and len(results) == 2:
        return results
    raise CodecError(
        f"Expected `{part}` of codec {codec.name} to return {expected}, got {results!r}; return "
        "both, () for one that there is not."
    )


def _check_kept(codec: Codec, part: str, name: str, old: Any, new: Any) -> None:
    """Raises unless the next round can be given what this one returned."""
    found = inference.difference(old, new)
    if found:
        raise CodecError(
            f"Expected `{part}` of codec {codec.name} to return {name} as it was given: {found}; "
            "keep what `init` returns in structure, dtype and shape."
        )
