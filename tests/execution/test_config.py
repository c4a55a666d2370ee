"""Execution: what it refuses, and what is written of it."""

import json

import jax
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import ArgumentError
from fedjax_core.execution.config import Tuning, TuningRow


@pytest.mark.parametrize("lanes", [0, 1.5, None, True, "two", np.array([1, 2]), np.array("auto")])
def test_lanes_are_auto_or_a_positive_int(lanes):
    with pytest.raises(ArgumentError, match="Expected lanes to be 'auto' or a positive int"):
        fc.Execution(lanes=lanes)


@pytest.mark.parametrize("donate", [None, 1, "yes", np.array([True, False])])
def test_donate_is_a_bool(donate):
    with pytest.raises(ArgumentError, match="Expected donate to be True or False"):
        fc.Execution(donate=donate)


@pytest.mark.parametrize("mode", [None, "fast", 3, np.array(["auto", "auto"])])
def test_a_mode_is_one_of_four(mode):
    with pytest.raises(ArgumentError, match="Expected a mode out of"):
        fc.Execution(mode=mode)


@pytest.mark.parametrize("tuning", [5, {"rows": []}, "fast"])
def test_tuning_is_what_tune_measured(tuning):
    with pytest.raises(ArgumentError, match="Expected tuning to be the measurements"):
        fc.Execution(tuning=tuning)


ROWS = (TuningRow("streamed", 4, 1.5, 0.25), TuningRow("unrolled", 1, None, None, "too large"))
TUNING = Tuning("cpu", "cpu", "0.10.2", 8, ROWS)


@pytest.mark.parametrize(
    "execution",
    [
        fc.Execution(),
        fc.Execution(mode="stacked", donate=True, axis=("hosts", "clients")),
        fc.Execution(lanes=4, tuning=TUNING),
    ],
)
def test_an_execution_is_written_and_read(execution):
    record = json.loads(json.dumps(execution.to_dict()))
    assert fc.Execution.from_dict(record) == execution
    assert "tuning" not in execution.to_dict(tuning=False)


def test_an_execution_on_a_mesh_needs_one_of_its_shape():
    mesh = jax.make_mesh((4,), ("clients",))
    execution = fc.Execution(mesh=mesh, lanes=2)
    record = json.loads(json.dumps(execution.to_dict()))
    assert record["mesh"] == {"clients": 4}
    assert fc.Execution.from_dict(record, mesh) == execution
    smaller = jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])
    for given in (None, smaller):
        with pytest.raises(ArgumentError, match=r"mesh of the shape.*'clients': 4.*pass mesh="):
            fc.Execution.from_dict(record, given)
    with pytest.raises(ArgumentError, match="that the record names, None"):
        fc.Execution.from_dict(fc.Execution().to_dict(), mesh)


def test_what_auto_comes_to_is_made_explicit():
    assert fc.Execution().resolved(10) == fc.Execution(mode="streamed", lanes=1)  # on a CPU
    assert fc.Execution(lanes=16).resolved(10) == fc.Execution(mode="streamed", lanes=10)
    assert fc.Execution(mode="stacked").resolved(10) == fc.Execution(mode="stacked", lanes=10)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "Expected what Execution.to_dict wrote"),
        ({}, "with mode and lanes"),
        ({"mode": "auto", "lanes": 1, "speed": 9}, "nothing but"),
        ({"mode": "fast", "lanes": 1}, "Expected a mode out of"),
        ({"mode": "auto", "lanes": 0}, "Expected lanes"),
        ({"mode": "auto", "lanes": 1, "tuning": {"rows": 3}}, "the measurements that tune made"),
        ({"mode": "auto", "lanes": 1, "tuning": [1]}, "the measurements that tune made"),
    ],
)
def test_records_that_are_none(record, words):
    with pytest.raises(ArgumentError, match=words):
        fc.Execution.from_dict(record)
