"""Codecs by name, each for one purpose.

| name | bits a parameter of the FedAvg CNN | take it |
|---|---|---|
| `tff_8bit` | 9.23 | to reproduce the results of TFF's tutorial, waste included |
| `dense_8bit` | 8.09 | when nothing may go wrong: the values of `tff_8bit` without its waste |
| `one_bit` | 1.01 | for one bit whatever the updates look like, and many clients |
| `rotated` | 4.1 | for a small unbiased error that is guaranteed for every update |
| `sparse` | by value | when a few elements carry the update |
| `entropy` | by value | for the fewest bits without bias: most small elements become zeros |
| `flagship` | by value | for updates of dense layers: low rank, contexts, one step for all |
| `secure` | 8, and room for the sum | under secure sums: the server learns the sum alone |
"""

from collections.abc import Callable

from fedjax_core.compression.base import Codec
from fedjax_core.compression.bounded import bounded_support
from fedjax_core.compression.chain import chain
from fedjax_core.compression.coding import ans
from fedjax_core.compression.eden import eden
from fedjax_core.compression.fixed_point import fixed_point
from fedjax_core.compression.flagship import flagship
from fedjax_core.compression.hadamard import hadamard_rotation
from fedjax_core.compression.sparse import top_k
from fedjax_core.compression.stepped import step_quantize
from fedjax_core.compression.uniform import tff_8bit, uniform_quantize
from fedjax_core.errors import CodecError

_PRESETS: dict[str, Callable[[], Codec]] = {
    "tff_8bit": tff_8bit,
    "dense_8bit": lambda: uniform_quantize(8),
    "one_bit": lambda: eden(1, min_size=0),
    "rotated": lambda: bounded_support(4, min_size=0),
    "sparse": lambda: chain(top_k(0.05, min_size=0), uniform_quantize(8, min_size=0)),
    "entropy": lambda: chain(step_quantize(4.0, rounding="stochastic", min_size=64), ans()),
    "flagship": flagship,
    "secure": lambda: chain(hadamard_rotation(min_size=0), fixed_point(8)),
}

PRESETS = tuple(_PRESETS)


def preset(name: str) -> Codec:
    """A codec by the name of its purpose; see the module.

    Args:
      name: one of `PRESETS`.

    Returns:
      The codec. That of `"secure"` is for ``mean(codec=..., secure=True)``.

    Raises:
      CodecError: there is no preset of this name.

    Example:
      >>> preset("dense_8bit").name
      'uniform_quantize(bits=8)'
    """
    make = _PRESETS.get(name) if isinstance(name, str) else None
    if make is None:
        raise CodecError(f"expected one of {', '.join(PRESETS)}, got {name!r}.")
    return make()
