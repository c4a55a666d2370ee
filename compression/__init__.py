"""Codecs: what encodes the values on an edge, counts their exact bits and writes their bytes."""

if __name__ == "compression":
    # From Python 3.14 on the standard library has a package `compression`, which gzip (so jax)
    # imports. With the root of the repository on sys.path this folder would be found first: stand
    # in for it.
    import os
    import sysconfig

    __path__ = [os.path.join(sysconfig.get_path("stdlib"), "compression")]
else:
    from fedjax_core.compression.base import Codec as Codec
    from fedjax_core.compression.base import Keys as Keys
    from fedjax_core.compression.base import Message as Message
    from fedjax_core.compression.base import Report as Report
    from fedjax_core.compression.base import Rotated as Rotated
    from fedjax_core.compression.base import Survivors as Survivors
    from fedjax_core.compression.base import Traits as Traits
    from fedjax_core.compression.base import from_bytes as from_bytes
    from fedjax_core.compression.base import identity as identity
    from fedjax_core.compression.base import keep_total as keep_total
    from fedjax_core.compression.base import stateless as stateless
    from fedjax_core.compression.base import to_bytes as to_bytes
    from fedjax_core.compression.bounded import bounded_support as bounded_support
    from fedjax_core.compression.casts import bfloat16 as bfloat16
    from fedjax_core.compression.casts import float8 as float8
    from fedjax_core.compression.chain import chain as chain
    from fedjax_core.compression.coding import Coded as Coded
    from fedjax_core.compression.coding import ans as ans
    from fedjax_core.compression.coding import elias_delta as elias_delta
    from fedjax_core.compression.coding import elias_gamma as elias_gamma
    from fedjax_core.compression.coding import huffman as huffman
    from fedjax_core.compression.coding import rice as rice
    from fedjax_core.compression.coding import zero_runs as zero_runs
    from fedjax_core.compression.common_seed import common_seed as common_seed
    from fedjax_core.compression.control import scheduled as scheduled
    from fedjax_core.compression.control import target_error as target_error
    from fedjax_core.compression.control import target_rate as target_rate
    from fedjax_core.compression.downlinks import Downlink as Downlink
    from fedjax_core.compression.downlinks import anchored as anchored
    from fedjax_core.compression.downlinks import replica as replica
    from fedjax_core.compression.eden import drive as drive
    from fedjax_core.compression.eden import eden as eden
    from fedjax_core.compression.edges import PlacedKeys as PlacedKeys
    from fedjax_core.compression.edges import downlink as downlink
    from fedjax_core.compression.edges import uplink as uplink
    from fedjax_core.compression.fixed_point import fixed_point as fixed_point
    from fedjax_core.compression.flagship import flagship as flagship
    from fedjax_core.compression.framing import Frame as Frame
    from fedjax_core.compression.framing import frame as frame
    from fedjax_core.compression.framing import frame_bits as frame_bits
    from fedjax_core.compression.framing import unframe as unframe
    from fedjax_core.compression.hadamard import hadamard_rotation as hadamard_rotation
    from fedjax_core.compression.lossless import lossless as lossless
    from fedjax_core.compression.memory import ef21 as ef21
    from fedjax_core.compression.memory import error_feedback as error_feedback
    from fedjax_core.compression.positions import Positions as Positions
    from fedjax_core.compression.presets import DOWNLINK_PRESETS as DOWNLINK_PRESETS
    from fedjax_core.compression.presets import PRESETS as PRESETS
    from fedjax_core.compression.presets import downlink_preset as downlink_preset
    from fedjax_core.compression.presets import preset as preset
    from fedjax_core.compression.qsgd import qsgd as qsgd
    from fedjax_core.compression.sampled import rand_k as rand_k
    from fedjax_core.compression.signs import scaled_sign as scaled_sign
    from fedjax_core.compression.sparse import top_k as top_k
    from fedjax_core.compression.stepped import step_quantize as step_quantize
    from fedjax_core.compression.ternary import sparse_ternary as sparse_ternary
    from fedjax_core.compression.ternary import tern_grad as tern_grad
    from fedjax_core.compression.threshold import threshold as threshold
    from fedjax_core.compression.uniform import tff_8bit as tff_8bit
    from fedjax_core.compression.uniform import uniform_quantize as uniform_quantize
    from fedjax_core.compression.wire import Packed as Packed
    from fedjax_core.compression.wire import Symbols as Symbols
