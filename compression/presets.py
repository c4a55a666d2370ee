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

On the way down:

| name | bits a parameter of the FedAvg CNN | take it |
|---|---|---|
| `anchored` | by value, about 1 | for clients that appear once: a seed is all that they need |
| `replica` | by value | when clients come back often: they hold the model of an earlier round |
"""

from collections.abc import Callable
from typing import TypeVar

from fedjax_core.compression.base import Codec
from fedjax_core.compression.bounded import bounded_support
from fedjax_core.compression.chain import chain
from fedjax_core.compression.checks import told
from fedjax_core.compression.coding import ans
from fedjax_core.compression.downlinks import Downlink, anchored, replica
from fedjax_core.compression.eden import eden
from fedjax_core.compression.fixed_point import fixed_point
from fedjax_core.compression.flagship import flagship
from fedjax_core.compression.hadamard import hadamard_rotation
from fedjax_core.compression.sparse import top_k
from fedjax_core.compression.stepped import step_quantize
from fedjax_core.compression.uniform import tff_8bit, uniform_quantize
from fedjax_core.errors import CodecError

_T = TypeVar("_T")

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

_DOWNLINKS: dict[str, Callable[[], Downlink]] = {
    "anchored": lambda: anchored(flagship(1.0, candidates="direct")),
    "replica": lambda: replica(flagship(2.0, candidates="direct")),
}

PRESETS = tuple(_PRESETS)
DOWNLINK_PRESETS = tuple(_DOWNLINKS)


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
    return _made(_PRESETS, name, "`downlink_preset` has those of the way down")


def downlink_preset(name: str) -> Downlink:
    """A way to send the model down by the name of its purpose; see the module.

    Args:
      name: one of `DOWNLINK_PRESETS`.

    Returns:
      What `fed_avg` takes as its `broadcast_codec`.

    Raises:
      CodecError: there is no preset of this name.

    Example:
      >>> downlink_preset("anchored").name
      'anchored(flagship(1, candidates=direct))'
    """
    return _made(_DOWNLINKS, name, "on the way down a codec, `preset(...)`, will do too")


def _made(presets: dict[str, Callable[[], _T]], name: str, others: str) -> _T:
    make = presets.get(name) if isinstance(name, str) else None
    if make is None:
        raise CodecError(f"expected one of {', '.join(presets)}, got {told(name)}; {others}.")
    return make()
