"""What a benchmark says of the machine it ran on."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax


def describe_machine() -> dict[str, Any]:
    """The processor, the load, the versions and the commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "devices": [str(device) for device in jax.devices()],
        "commit": commit.stdout.strip(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
