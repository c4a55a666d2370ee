"""Settings of all tests: four CPU devices, no silent rank promotion, no compilation cache."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A cached program would hide a recompilation from the tests that count them.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data files that FEDJAX_CORE_DATA names."""
    folder = os.environ.get("FEDJAX_CORE_DATA")
    if folder is None:
        pytest.skip("FEDJAX_CORE_DATA is not set: it names the folder that holds mnist/")
    return pathlib.Path(folder)
