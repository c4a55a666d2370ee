"""Federated algorithms, one file each: client work x aggregator x server optimiser."""

from fedjax_core.algorithms.fed_avg import fed_avg as fed_avg
from fedjax_core.learning.algorithm import Algorithm as Algorithm
from fedjax_core.learning.algorithm import Metrics as Metrics
from fedjax_core.learning.algorithm import State as State
from fedjax_core.learning.algorithm import federated_learning as federated_learning
