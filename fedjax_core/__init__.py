"""fedjax-core: functional federated learning in JAX.

A federated computation is a typed program over placed pytrees; client work is vectorised over
simulated clients; aggregators and codecs plug into algorithms that are pairs of pure functions.
"""

__version__ = "0.1.0"

from fedjax_core import aggregators as aggregators
from fedjax_core import algorithms as algorithms
from fedjax_core import compression as compression
from fedjax_core import datasets as datasets
from fedjax_core import errors as errors
from fedjax_core import models as models
from fedjax_core.bits import BitCount as BitCount
from fedjax_core.bits import format_bits as format_bits
from fedjax_core.execution.computation import Computation as Computation
from fedjax_core.execution.computation import federated_computation as federated_computation
from fedjax_core.execution.config import Execution as Execution
from fedjax_core.execution.export import export as export
from fedjax_core.execution.mapreduce import map_reduce_form as map_reduce_form
from fedjax_core.execution.transforms import grad as grad
from fedjax_core.execution.transforms import value_and_grad as value_and_grad
from fedjax_core.execution.transforms import vmap as vmap
from fedjax_core.language.analysis import communication as communication
from fedjax_core.language.inference import infer_type as infer_type
from fedjax_core.language.jax_computations import jax_computation as jax_computation
from fedjax_core.language.notation import parse_type as parse_type
from fedjax_core.language.operators import federated_aggregate as federated_aggregate
from fedjax_core.language.operators import federated_broadcast as federated_broadcast
from fedjax_core.language.operators import federated_collect as federated_collect
from fedjax_core.language.operators import federated_count as federated_count
from fedjax_core.language.operators import federated_eval as federated_eval
from fedjax_core.language.operators import federated_map as federated_map
from fedjax_core.language.operators import federated_max as federated_max
from fedjax_core.language.operators import federated_mean as federated_mean
from fedjax_core.language.operators import federated_min as federated_min
from fedjax_core.language.operators import federated_select as federated_select
from fedjax_core.language.operators import federated_sum as federated_sum
from fedjax_core.language.operators import federated_value as federated_value
from fedjax_core.language.operators import federated_zip as federated_zip
from fedjax_core.language.placements import CLIENTS as CLIENTS
from fedjax_core.language.placements import SERVER as SERVER
from fedjax_core.language.privacy import check_aggregated_only as check_aggregated_only
from fedjax_core.language.secure import SecureTotal as SecureTotal
from fedjax_core.language.secure import (
    federated_secure_modular_sum as federated_secure_modular_sum,
)
from fedjax_core.language.secure import federated_secure_sum as federated_secure_sum
from fedjax_core.language.secure import (
    federated_secure_sum_bitwidth as federated_secure_sum_bitwidth,
)
from fedjax_core.language.sequence_operators import sequence_map as sequence_map
from fedjax_core.language.sequence_operators import sequence_reduce as sequence_reduce
from fedjax_core.language.sequence_operators import sequence_sum as sequence_sum
from fedjax_core.language.sequences import Batch as Batch
from fedjax_core.language.types import AbstractType as AbstractType
from fedjax_core.language.types import FederatedType as FederatedType
from fedjax_core.language.types import FunctionType as FunctionType
from fedjax_core.language.types import PlacementType as PlacementType
from fedjax_core.language.types import SequenceType as SequenceType
from fedjax_core.language.types import StructType as StructType
from fedjax_core.language.types import TensorType as TensorType
from fedjax_core.language.types import Type as Type
from fedjax_core.language.types import to_type as to_type
from fedjax_core.language.values import Federated as Federated
from fedjax_core.language.values import Sequence as Sequence
from fedjax_core.learning.checkpoints import load as load
from fedjax_core.learning.checkpoints import save as save
from fedjax_core.learning.evaluation import evaluate as evaluate
from fedjax_core.learning.loop import train as train
from fedjax_core.learning.tuning import explain as explain
from fedjax_core.learning.tuning import tune as tune
