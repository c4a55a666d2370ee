"""Federated datasets: examples grouped by client, where they come from and who takes part.

A `FederatedDataset` is flat arrays grouped by client. It is made from arrays (`from_clients`,
`from_arrays` with a rule of `partition`), from sets of TensorFlow Datasets (`from_tfds`), from the
public federated files (`from_tff_sqlite`, `from_fedjax_sqlite`) or by name (`load`); `sampling`
says which clients take part in a round, and `FederatedDataset.cohort` packs their examples.
"""

from fedjax_core.datasets import partition as partition
from fedjax_core.datasets import sampling as sampling
from fedjax_core.datasets.building import from_arrays as from_arrays
from fedjax_core.datasets.building import from_clients as from_clients
from fedjax_core.datasets.cohort import Cohort as Cohort
from fedjax_core.datasets.federated import FederatedDataset as FederatedDataset
from fedjax_core.datasets.fedjax_sqlite import from_fedjax_sqlite as from_fedjax_sqlite
from fedjax_core.datasets.registry import available as available
from fedjax_core.datasets.registry import load as load
from fedjax_core.datasets.resident import DeviceDataset as DeviceDataset
from fedjax_core.datasets.splits import Splits as Splits
from fedjax_core.datasets.splits import holdout as holdout
from fedjax_core.datasets.spreading import spread as spread
from fedjax_core.datasets.tfds_source import from_tfds as from_tfds
from fedjax_core.datasets.tff_sqlite import from_tff_sqlite as from_tff_sqlite
