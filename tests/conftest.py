"""Settings of all tests: four CPU devices, no silent rank promotion, no compilation cache.

Most of the time of these tests goes into compiling, several times as much as into running what was
compiled, so programs are compiled without optimisation. With FEDJAX_CORE_TEST_OPTIMIZE=1 they are
compiled as users compile them.
"""

import gc
import importlib.metadata
import os
import pathlib
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Processes that tests start take it over.
if os.environ.get("FEDJAX_CORE_TEST_OPTIMIZE") != "1":
    _flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib") < "0.11":  # it ends a process that does not know it
        _flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*_flags, os.environ.get("XLA_FLAGS", "")])

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A cached program would hide a recompilation from the tests that count them.
jax.config.update("jax_enable_compilation_cache", False)

# A shell lets what it starts in the background ignore control-C, and so would the processes that
# tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A worker holds gigabytes of programs, and would look through all of them again and again.
gc.set_threshold(100_000, 50, 100)

# What takes minutes begins first, so that no worker is left with it at the end.
_LONG = ("test_modes_agree", "test_tutorials", "test_readme", "test_processes", "test_tuning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of long files before all others."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data files that FEDJAX_CORE_DATA names."""
    folder = os.environ.get("FEDJAX_CORE_DATA")
    if folder is None:
        pytest.skip("FEDJAX_CORE_DATA is not set: it names the folder that holds mnist/")
    return pathlib.Path(folder)
