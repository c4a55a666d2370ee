"""The README's code runs, and what it says was printed is printed."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re

import numpy as np

import fedjax_core as fc

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def output_block(name: str, text: str = README) -> str:
    found = re.search(rf"<!-- output: {name} -->\n(.*?)(?:\n\n|\Z)", text, flags=re.DOTALL)
    assert found, f"no output block {name}"
    return found[1].removeprefix("```\n").removesuffix("\n```").strip()


def test_readme_code_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_CORE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    printed, namespace = [], {}
    for block in code_blocks():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, "README.md", "exec"), namespace)
        printed.append(out.getvalue())
    train, fast, edges, temperature, language, attacked, signs = printed
    assert len(train.splitlines()) == 4
    assert fast.splitlines()[0] == "(3,) 3"
    assert "lanes         2: as given" in fast
    shown = [line.split("  <")[0].rstrip() for line in edges.strip().splitlines()]
    assert shown == [
        line.split("  <")[0].rstrip() for line in output_block("communication").splitlines()
    ]
    assert temperature.splitlines()[0] == "({float32}@CLIENTS -> float32@SERVER)"
    assert temperature.splitlines()[1].startswith("69.5333")
    # 4, 9 + 4 and 0 over three clients; the derivatives are -4, -6 - 8 and 0.
    value, gradient, allowed, loaded, looped = language.splitlines()
    np.testing.assert_allclose([float(x) for x in (value, loaded, looped)], 17 / 3, rtol=1e-6)
    np.testing.assert_allclose(float(gradient), -6, rtol=1e-6)
    assert allowed == "('mean', 'secure_sum', 'sum')"
    assert attacked.strip() == "[-0.6 -0.8]"
    # One bit for each parameter, tensors aligned to bytes, 8 scales, and weight and metrics.
    bits = sum(8 * -(-n // 8) for n in (800, 32, 51_200, 64, 1_605_632, 512, 5_120, 10))
    assert signs.strip() == fc.format_bits(10 * (bits + 8 * 32 + 32 + 200)) == "15.87Mibit"


def module_of(name: str, monkeypatch):
    """A benchmark as a module, whose neighbours it finds as it does as a script."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results_of(name: str):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_tables_of_the_readme_are_those_of_the_benchmarks(monkeypatch):
    """The figures in the README are those of the committed runs."""
    accuracy = module_of("mnist_fedavg", monkeypatch)
    assert output_block("mnist_fedavg") == accuracy.table(results_of("mnist_fedavg")["results"])
    rates = module_of("rate_distortion", monkeypatch)
    assert output_block("rate_distortion") == rates.short_table(
        results_of("rate_distortion")["results"]
    )
    report = module_of("peers/report", monkeypatch)
    for name in ("rounds_jax010", "rounds_jax012"):
        assert output_block(name) == report.short_table(results_of(name))
    against_bits = module_of("accuracy_vs_bits", monkeypatch)
    compression = (ROOT / "docs" / "compression.md").read_text()
    for name in ("accuracy_vs_bits", "accuracy_vs_bits_speakers"):
        table = against_bits.table(results_of(name)["results"])
        assert output_block(name, compression) == table
    updates = module_of("real_updates", monkeypatch)
    shown = output_block("real_updates", (ROOT / "docs" / "compression.md").read_text())
    assert shown == updates.table(results_of("real_updates")["results"])
    simulation = module_of("simulation", monkeypatch)
    assert output_block("simulation") == simulation.table(results_of("simulation"))


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
