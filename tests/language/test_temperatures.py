"""The temperature examples of the federated core tutorial, through the public names."""

import numpy as np
import pytest

import fedjax_core as fc

READING = fc.FederatedType(np.float32, fc.CLIENTS)
READINGS = fc.FederatedType(fc.SequenceType(np.float32), fc.CLIENTS)


@fc.federated_computation(READING)
def get_average_temperature(sensor_readings):
    return fc.federated_mean(sensor_readings)


@fc.federated_computation(READINGS)
def get_global_temperature_average(sensor_readings):
    def average(readings):
        total, count = readings.reduce((0.0, 0), lambda s, x: (s[0] + x, s[1] + 1))
        return total / count

    return fc.federated_mean(fc.federated_map(average, sensor_readings))


add_half = fc.jax_computation(lambda x: x + 0.5, np.float32)


@fc.federated_computation(READING)
def add_half_on_clients(x):
    return fc.federated_map(add_half, x)


def test_get_average_temperature():
    """Three sensors of one reading each."""
    assert str(get_average_temperature.type_signature) == "({float32}@CLIENTS -> float32@SERVER)"
    assert get_average_temperature([68.5, 70.3, 69.8]) == pytest.approx(69.53333, rel=1e-6)


def test_get_global_temperature_average():
    """Sensors with sequences of readings: the mean of the sensors' means."""
    expected = "({float32*}@CLIENTS -> float32@SERVER)"
    assert str(get_global_temperature_average.type_signature) == expected
    result = get_global_temperature_average([[68.0, 70.0], [71.0], [68.0, 72.0, 70.0]])
    assert result == pytest.approx(70.0, rel=1e-6)


def test_add_half_on_clients():
    """A map at the clients gives a list with one entry a client."""
    expected = "({float32}@CLIENTS -> {float32}@CLIENTS)"
    assert str(add_half_on_clients.type_signature) == expected
    assert add_half_on_clients([1.0, 3.0, 2.0]) == [1.5, 3.5, 2.5]
    assert str(add_half.type_signature) == "(float32 -> float32)"
