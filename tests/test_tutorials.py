"""The tutorials' code runs, block by block, and prints what is shown under it.

`PYTHONPATH=. python tests/test_tutorials.py` runs them and writes what they print into them anew.
"""

import contextlib
import functools
import io
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
FILES = {path.stem: path for path in [*DOCS.glob("tutorials/*.md"), DOCS / "compression.md"]}
NAMES = sorted(FILES)
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<shown>.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"(-?\d+\.\d+)")


# The tests of one in one process, which executes it once; long ones train for a minute or so.
LONG = ("compression", "simulation")


def marks(name: str) -> list:
    """Those of the tests of one tutorial."""
    group = pytest.mark.xdist_group(name)
    return [group, pytest.mark.slow] if name in LONG else [group]


GROUPED = [pytest.param(name, marks=marks(name)) for name in NAMES]


class Block(NamedTuple):
    """Code of a tutorial, what is shown under it (None for nothing), and what it prints."""

    match: re.Match[str]
    shown: str | None
    printed: str


def run(text: str, namespace: dict[str, Any]) -> Iterator[Block]:
    """Executes the blocks of a tutorial in one namespace."""
    for match in BLOCK.finditer(text):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(match["code"], "tutorial.py", "exec"), namespace)
        printed = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
        yield Block(match, match["shown"], printed)


def is_same(shown: str, printed: str) -> bool:
    """Whether two texts are equal, decimal numbers up to the last digit or to rounding."""
    ours, theirs = NUMBER.split(shown), NUMBER.split(printed)
    if ours[::2] != theirs[::2]:
        return False
    pairs = zip(ours[1::2], theirs[1::2], strict=True)
    return all(
        abs(float(a) - float(b)) <= max(1.01 * 10.0 ** -len(a.split(".")[1]), 4e-7 * abs(float(a)))
        for a, b in pairs
    )


def rewritten(text: str) -> str:
    """The tutorial with what its blocks print now, where that is not what it shows."""
    pieces, end = [], 0
    for match, shown, printed in run(text, {}):
        if shown is not None and not is_same(shown, printed):
            pieces += [text[end : match.start("shown")], printed]
            end = match.end("shown")
    return "".join([*pieces, text[end:]])


class Tutorial(NamedTuple):
    """A tutorial that has been executed."""

    blocks: list[Block]
    namespace: dict[str, Any]


@functools.cache
def executed(name: str) -> Tutorial:
    """A tutorial, executed once."""
    # A reader's JAX promotes ranks; the tests' does not.
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_rank_promotion("allow"),
        tempfile.TemporaryDirectory() as cache,
    ):
        patch.setenv("FEDJAX_CORE_CACHE", cache)
        namespace: dict[str, Any] = {}
        return Tutorial(list(run(FILES[name].read_text(), namespace)), namespace)


@pytest.mark.parametrize("name", GROUPED)
def test_a_tutorial_prints_what_it_shows(name):
    for block in executed(name).blocks:
        shown = block.shown or ""
        assert is_same(shown, block.printed), f"{block.match['code']}\n{block.printed}!=\n{shown}"


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_tutorial_lead_somewhere(name):
    prose = BLOCK.sub("", FILES[name].read_text())
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        assert (FILES[name].parent / target).exists(), target


# What the expressions of TFF's tutorial evaluate to, in its order.
TFF_SHOWS = (
    "Hello, World!",
    "float32",
    "CLIENTS",
    "{float32}@CLIENTS",
    "False",
    "float32@CLIENTS",
    "<a=float32,b=float32>",
    "<a=float32,b=float32>@CLIENTS",
    "({float32}@CLIENTS -> float32@SERVER)",
    "69.53333",
    "(float32 -> float32)",
    "({float32}@CLIENTS -> {float32}@CLIENTS)",
    "[np.float32(1.5), np.float32(3.5), np.float32(2.5)]",
    "15.0",
    "float32*",
    "(float32* -> float32)",
    "6",
    "(<A=int32,B=int32>* -> int32)",
    "26",
    "({float32*}@CLIENTS -> float32@SERVER)",
    "70.0",
)


@pytest.mark.parametrize("expected", TFF_SHOWS)
def test_every_result_of_tff_is_shown(expected):
    text = FILES["federated_core"].read_text()
    outputs = [match["shown"] or "" for match in BLOCK.finditer(text)]
    assert expected in [line for output in outputs for line in output.split("\n")]


@pytest.mark.xdist_group("federated_core")
def test_the_temperatures_are_right():
    names = executed("federated_core").namespace
    readings = [[68.0, 70.0], [71.0], [68.0, 72.0, 70.0]]
    means = [float(np.mean(x)) for x in readings]
    assert names["get_global_temperature_average"](readings) == pytest.approx(np.mean(means))
    average = names["get_average_of_all_readings"]([*readings, []])
    assert average == pytest.approx(np.mean(np.concatenate(readings)))
    assert names["get_average_temperature"]([68.5, 70.3, 69.8]) == pytest.approx(208.6 / 3)
    assert names["get_fraction_over"]([68.5, 70.3, 69.8, 71.2], 70.0) == 2 / 4


@pytest.mark.xdist_group("running")
def test_training_runs_as_in_closed_form():
    """Steps of the gradient -2 (sum of x y - slope * sum of x x) / 3 towards the slope 9 / 6."""
    names = executed("running").namespace
    expected = 1.5 * (1 - (1 - 0.1 * 2 * 6 / 3) ** np.arange(1, 11))
    np.testing.assert_allclose(names["slopes"], expected, rtol=1e-5)
    np.testing.assert_allclose(names["swept"].slope.value, [0.0, 0.6, 1.2], rtol=1e-6)
    np.testing.assert_allclose(names["gradient"].value, -2 * 9 / 3, rtol=1e-6)


@pytest.mark.xdist_group("running")
def test_the_loop_of_the_tutorial_is_that_of_the_library():
    """Another cohort, of an even number, and its lower median."""
    names = executed("running").namespace
    readings = np.array([3.0, 9.0, 4.0, 5.0, 1.0, 7.0], np.float32)
    clients = [{"reading": x} for x in readings]
    server, collects = {"tolerance": np.float32(2.0)}, {"readings": "reading"}
    results, kept, ledger = names["drive"](names["form"], server, clients, collects)
    middle = np.sort(readings)[2]
    is_odd = np.abs(readings - middle) > 2
    assert {name: x.item() for name, x in results.items()} == {"median": 4.0, "number": 3}
    assert np.array_equal(kept["is_odd"], is_odd)
    assert [int(bits) for bits in ledger] == [6 * 32] * 4
    whole = names["form"].run(readings, 2.0)
    assert (whole["middle"], whole["number"]) == (middle, is_odd.sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def train_with_numpy(model: dict[str, np.ndarray], rate: float, data: Any) -> dict[str, np.ndarray]:
    """SGD over the batches of one client, in float64."""
    weights, bias = (np.asarray(model[name], np.float64) for name in ("weights", "bias"))
    for start in range(0, len(data["y"]), 20):
        x, y = (data[name][start : start + 20] for name in "xy")
        error = (np.exp(log_softmax(x @ weights + bias)) - np.eye(10)[y]) / len(y)
        weights, bias = weights - rate * x.T @ error, bias - rate * error.sum(axis=0)
    return {"weights": weights, "bias": bias}


@pytest.mark.xdist_group("fed_avg_by_hand")
def test_a_round_by_hand_is_that_of_numpy():
    names = executed("fed_avg_by_hand").namespace
    model, data = names["initial_model"], names["federated_train_data"]
    trained = names["federated_train"](model, 0.01, data)
    by_client = [train_with_numpy(model, 0.01, client) for client in data]
    for name in model:
        expected = np.mean([client[name] for client in by_client], axis=0)
        np.testing.assert_allclose(trained[name], expected, atol=1e-6)


@pytest.mark.xdist_group("fed_avg_by_hand")
def test_training_by_hand_learns():
    names = executed("fed_avg_by_hand").namespace
    losses = np.array(names["train_losses"])
    assert np.all(np.diff(losses) < 0)
    # All ten digits, of which each client has seen one: a guess is right one time in ten.
    assert names["accuracy"] > 0.8


def test_rewriting_replaces_what_differs_alone():
    text = "```python\nprint(1.25, 'a')\n```\n\n```text\n{}```\nEnd.\n"
    same, new = text.format("1.26 a\n"), text.format("1.25 a\n")
    assert rewritten(same) == same
    assert rewritten(text.format("1.25 b\n")) == new == rewritten(text.format(""))


def test_numbers_may_differ_in_the_last_digit_only():
    assert is_same("loss 1.25 of {float32}", "loss 1.26 of {float32}")
    assert not is_same("loss 1.25", "loss 1.27")
    assert not is_same("float32[2]", "float32[3]")


if __name__ == "__main__":
    for name in NAMES:
        FILES[name].write_text(rewritten(FILES[name].read_text()))
