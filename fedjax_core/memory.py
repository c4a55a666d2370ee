"""How much memory there is, asked before it is taken."""

import os
from typing import Any

import jax

from fedjax_core.errors import DeviceMemoryError

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def available_bytes(device: Any = None) -> int | None:
    """The memory that a device has left, None where it does not say.

    Args:
      device: a `jax.Device`, the first one if not given. For a CPU it is the memory of the host.
    """
    device = jax.local_devices()[0] if device is None else device
    if device.platform == "cpu":
        return available_on_host()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def available_on_host() -> int | None:
    """The memory that the host has left, None where it does not say."""
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def check_fits(
    num_bytes: int, what: str, remedy: str, device: Any = None, *, on_host: bool = False
) -> None:
    """Raises before memory is taken that there is not.

    Args:
      num_bytes: how much is wanted.
      what: for the message, such as "the examples of 1,000 clients".
      remedy: what to do instead.
      device: where; the first one if not given.
      on_host: whether it is the memory of the host instead.

    Raises:
      DeviceMemoryError: with both numbers.
    """
    available = available_on_host() if on_host else available_bytes(device)
    if available is not None and num_bytes > available:
        raise DeviceMemoryError(
            f"{what} take {num_bytes:,} bytes ({format_bytes(num_bytes)}), and "
            f"{format_bytes(available)} are free; {remedy}."
        )


def format_bytes(count: int) -> str:
    """A number of bytes in binary units.

    Examples:
      >>> format_bytes(1536), format_bytes(12)
      ('1.50 KiB', '12 bytes')
    """
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count} bytes" if power == 0 else f"{count / 1024**power:.2f} {_UNITS[power]}"
