"""One seed for all senders: what each draws, all draw.

Where the receiver cannot know whose message it decodes, it cannot know the sender's key either.
With a common seed it need not. The price is that errors are alike too: they do not average out over
senders. The mean of ten messages of `eden(1)` about one vector has a tenth of the error of one
message, and all of it with a common seed.
"""

from typing import Any

from fedjax_core.compression.base import Codec, Keys, Message, check_codec


def common_seed(codec: Codec) -> Codec:
    """The same codec, which draws from the shared key where it drew from the sender's own.

    Made for the way down, and for a single sender. Means refuse it: see the module.

    Args:
      codec: any.

    Returns:
      A codec with the traits of `codec`, but that it needs no sender's key, and that its errors are
      not independent of each other.

    Example:
      >>> from fedjax_core.compression import eden
      >>> codec = common_seed(eden(1))
      >>> codec.name, codec.traits.needs_seed, codec.traits.independent
      ('common_seed(eden(bits=1))', False, False)
    """
    check_codec(codec, "to share a seed")

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        return codec.encode(Keys(keys.shared, keys.shared), memory, hints, value)

    def decode(keys: Keys, hints: Any, message: Message) -> Any:
        return codec.decode(Keys(keys.shared, keys.shared), hints, message)

    return codec._replace(
        name=f"common_seed({codec.name})",
        traits=codec.traits._replace(needs_seed=False, independent=False),
        encode=encode,
        decode=decode,
    )
