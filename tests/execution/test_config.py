"""Execution: what it refuses."""

import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import ArgumentError


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
