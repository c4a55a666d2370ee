"""The wheel, the import and the files that packaging relies on."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = sorted((ROOT / "requirements").glob("constraints-*.txt"))
HEAVY = (
    "array_record",
    "matplotlib",
    "rich",
    "sklearn",
    "tensorboard",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tyro",
)


def _names(pattern: str) -> list[str]:
    """Names of the modules whose files match `pattern`, read from the real folders."""
    folders = {
        "fedjax_core": "fedjax_core",
        "algorithms": "fedjax_core.algorithms",
        "compression": "fedjax_core.compression",
    }
    names = set()
    for folder, prefix in folders.items():
        for path in (ROOT / folder).rglob(pattern):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.add(".".join((prefix, *parts)).removesuffix(".__init__"))
    return sorted(names)


def _modules() -> list[str]:
    return _names("*.py")


def _python(code: str, folder: pathlib.Path, *flags: str) -> str:
    """What `code` prints in a Python of its own, started in `folder`."""
    process = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    # A copy is built: in the tree itself a stale build/lib would end up in the wheel.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("fedjax_core", "algorithms", "compression"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-w", "dist", "."], cwd=source, check=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fedjax_core"}
    held = {name.removesuffix(".py").replace("/", ".") for name in names if name.endswith(".py")}
    assert {name.removesuffix(".__init__") for name in held} == set(_modules())
    assert "fedjax_core/py.typed" in names


def test_the_installed_wheel_imports_every_module(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    # Without `site` the hooks of the editable installation stay out; only the wheel can answer.
    code = (
        f"import sys; sys.path[:0] = [{str(site)!r}]; "
        f"sys.path.append({sysconfig.get_path('purelib')!r})\n"
        "import importlib, json\n"
        f"names = {_modules()!r}\n"
        "files = [importlib.import_module(name).__file__ for name in names]\n"
        "print(json.dumps(files))"
    )
    files = json.loads(_python(code, empty, "-I", "-S"))
    assert all(pathlib.Path(file).is_relative_to(site) for file in files)


def test_the_list_of_packages_is_complete():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == _names("__init__.py")


def test_importing_is_quick_and_loads_nothing_heavy(tmp_path):
    # Processor time, the least of five: other processes on the machine do not count, nor does the
    # first import, which compiles.
    code = (
        "import json, sys, time\n"
        "sys.dont_write_bytecode = False\n"
        f"sys.pycache_prefix = {str(tmp_path / 'bytecode')!r}\n"
        "begin = time.process_time()\n"
        "import jax\n"
        "middle = time.process_time()\n"
        "import fedjax_core\n"
        "times = middle - begin, time.process_time() - middle\n"
        "print(json.dumps([*times, sorted(sys.modules)]))"
    )
    _python(code, tmp_path)
    runs = [json.loads(_python(code, tmp_path)) for _ in range(5)]
    jax_seconds, seconds = (min(run[k] for run in runs) for k in (0, 1))
    # On a machine that imports JAX in 0.8 s or less; a slower one may take longer.
    assert seconds < 0.3 * max(1.0, jax_seconds / 0.8)
    loaded = {name.split(".")[0] for name in runs[0][2]}
    assert loaded.isdisjoint(HEAVY), loaded.intersection(HEAVY)


def test_importing_starts_no_backend_and_no_thread(tmp_path):
    # JAX refuses to change the number of devices once a backend runs.
    code = (
        "import os, threading\n"
        "os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        "import jax\n"
        "before = threading.active_count()\n"
        "import fedjax_core\n"
        "assert threading.active_count() == before, threading.enumerate()\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(jax.device_count())"
    )
    assert _python(code, tmp_path).strip() == "3"


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_pin_every_dependency_by_name_and_version(path):
    pins = path.read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in pins)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[\[<>=;]", line)[0] for line in wanted} - {"fedjax-core"}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in names} <= pinned


def test_there_are_constraints_for_the_supported_pythons():
    minors = [path.stem.removeprefix("constraints-") for path in CONSTRAINTS]
    assert minors == ["3.11", "3.12", "3.13"]
