"""Federated averaging, and its generalisation to any server optimiser.

McMahan et al., 2017, and Reddi et al., 2021:

    fed_avg = local training x mean x server optimiser

    server:    x_0;  in round t, with a cohort S of clients:
    client k:  x_k = x_t after E epochs of the client optimiser on its batches of size B
               u_k = x_t - x_k,  w_k = number of examples
    server:    u = sum_k w_k u_k / sum_k w_k
               x_{t+1} = server optimiser's step from x_t along the gradient u  (SGD(1) averages)
"""

from typing import TYPE_CHECKING

from fedjax_core import aggregators
from fedjax_core.aggregators import Aggregator
from fedjax_core.compression import Codec, Downlink
from fedjax_core.execution.config import Execution
from fedjax_core.learning.algorithm import Algorithm, federated_learning
from fedjax_core.learning.client_work import Weighting, local_training
from fedjax_core.learning.models import Model

if TYPE_CHECKING:
    import optax  # half of the time that importing the library would take


def fed_avg(
    model: Model,
    *,
    client_optimizer: "optax.GradientTransformation",
    server_optimizer: "optax.GradientTransformation | None" = None,
    aggregator: Aggregator | None = None,
    broadcast_codec: Codec | Downlink | None = None,
    batch_size: int,
    num_epochs: int = 1,
    weighting: Weighting = "num_examples",
    execution: Execution = Execution(),  # noqa: B008 - frozen
) -> Algorithm:
    """Federated averaging.

    Args:
      model: what is trained, such as `models.emnist_cnn()`.
      client_optimizer: any optax optimiser; starts afresh at each client in each round.
      server_optimizer: any optax optimiser; `optax.sgd(1.0)`, which is averaging, if not given.
      aggregator: how the clients' updates become one; `aggregators.mean()` if not given. One with a
        codec, such as `mean(codec=uniform_quantize(8))`, compresses the way up.
      broadcast_codec: compresses the model on its way down, such as `uniform_quantize(8)` or
        `anchored(flagship(1.0, candidates="direct"))`; None sends it raw.
      batch_size: examples a step of a client; the last batch of an epoch is padded and masked.
      num_epochs: passes of a client over its examples in a round.
      weighting: of the clients in a weighted mean: "num_examples", "uniform", or a function of a
        client's training stats.
      execution: how a round is run; see `Execution`.

    Returns:
      An `Algorithm`: `init(key) -> state` and `update(state, cohort) -> (state, metrics)`, with the
      round as a typed program in `computation`.

    Raises:
      ArgumentError: for numbers that are not positive, or parts that do not fit together.

    Examples:
      >>> import jax
      >>> import numpy as np
      >>> import optax
      >>> from fedjax_core import datasets, models
      >>> labels = np.arange(4, dtype=np.int32)
      >>> rows = {"image": np.zeros((4, 28, 28, 1), np.uint8), "label": labels}
      >>> data = datasets.from_clients({"a": rows, "b": rows})
      >>> algorithm = fed_avg(models.linear(), client_optimizer=optax.sgd(0.1), batch_size=2)
      >>> state = algorithm.init(jax.random.key(0))
      >>> state, metrics = algorithm.update(state, data.cohort(["a", "b"]))
      >>> int(metrics.train["num_examples"]), int(metrics.communication.aggregate["update"])
      (8, 502400)

    References:
      McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep
      Networks from Decentralized Data, AISTATS 2017, arXiv:1602.05629. Reddi et al.: Adaptive
      Federated Optimization, ICLR 2021, arXiv:2003.00295.
    """
    import optax

    work = local_training(
        model,
        client_optimizer,
        batch_size=batch_size,
        num_epochs=num_epochs,
        weighting=weighting,
    )
    return federated_learning(
        model,
        work,
        aggregators.mean() if aggregator is None else aggregator,
        optax.sgd(1.0) if server_optimizer is None else server_optimizer,
        broadcast_codec=broadcast_codec,
        execution=execution,
    )
