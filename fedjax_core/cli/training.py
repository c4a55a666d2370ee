"""``fedjax-core train``, and what it shares with the demo."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import optax

from fedjax_core import compression, datasets, models
from fedjax_core.aggregators import mean
from fedjax_core.algorithms import fed_avg
from fedjax_core.cli import options
from fedjax_core.errors import StorageError
from fedjax_core.execution.config import Execution
from fedjax_core.files import check_writable, write_atomically
from fedjax_core.learning import checkpoints, writers
from fedjax_core.learning.algorithm import Algorithm
from fedjax_core.learning.evaluation import evaluate
from fedjax_core.learning.history import History
from fedjax_core.learning.loop import train
from fedjax_core.learning.tuning import tune


def run(settings: options.Train) -> bool:
    """Trains one model; returns whether Ctrl-C ended it."""
    # All that can be wrong shows before the first file is made, and before the work.
    options.check(settings)
    writers.check_log_folder(settings.log_dir, overwrite=settings.overwrite)
    if settings.save is not None:
        check_writable(settings.save, overwrite=settings.overwrite)
    codec = make_codec(settings)
    model = make_model(settings.model)
    splits = load_splits(settings.dataset, settings, num_clients=settings.num_clients)
    print(describe(splits), flush=True)
    down = make_downlink(settings)
    experiment = make_experiment(model, splits, codec, settings, broadcast_codec=down)
    folder = writers.log_folder(settings.log_dir, overwrite=settings.overwrite)
    state, history = train_once(experiment, settings, folder=folder)
    if settings.save is not None:
        save(settings.save, state, history)
    print(f"{'interrupted; ' if history.interrupted else ''}logs are in {folder}")
    return history.interrupted


def make_codec(settings: options.Train) -> compression.Codec | None:
    """The codec that `settings.uplink` names, None for raw updates."""
    if settings.uplink in compression.PRESETS:
        return compression.preset(settings.uplink)
    quantize = compression.uniform_quantize(settings.bits, min_size=settings.min_size)
    top_k = compression.top_k(settings.fraction, min_size=settings.min_size)
    codecs = {
        "quantize": quantize,
        "top_k": top_k,
        "top_k_quantize": compression.chain(top_k, quantize),
    }
    return codecs.get(settings.uplink)


def make_downlink(settings: options.Train) -> compression.Codec | compression.Downlink | None:
    """What `settings.downlink` names, None for the raw model."""
    if settings.downlink == "none":
        return None
    if settings.downlink in compression.DOWNLINK_PRESETS:
        return compression.downlink_preset(settings.downlink)
    return compression.preset(settings.downlink)


def make_model(name: str) -> models.Model:
    """The model for images of ten classes that `name` names."""
    factories = {"cnn": models.emnist_cnn, "linear": models.linear, "two_nn": models.two_nn}
    return factories[name]()


def load_splits(name: str, settings: options.Training, *, num_clients: int) -> datasets.Splits:
    """The dataset `name`, prepared on first use."""
    if name == "emnist":
        return datasets.load("emnist", only_digits=True, data_dir=settings.data_dir)
    return datasets.load(
        "digits", num_clients=num_clients, seed=settings.seed, data_dir=settings.data_dir
    )


def describe(splits: datasets.Splits) -> str:
    """One line on a dataset's size."""
    return (
        f"{splits.train.name}: {splits.train.num_clients} clients, "
        f"{splits.train.num_examples.sum():,} examples to train, "
        f"{splits.test.num_examples.sum():,} held out"
    )


class Experiment(NamedTuple):
    """What a run trains; to make one checks all its settings."""

    model: models.Model
    splits: datasets.Splits
    algorithm: Algorithm
    sampler: datasets.sampling.Sampler


def make_experiment(
    model: models.Model,
    splits: datasets.Splits,
    codec: compression.Codec | None,
    settings: options.Training,
    broadcast_codec: compression.Codec | compression.Downlink | None = None,
) -> Experiment:
    """Federated averaging of `model`."""
    execution = Execution() if settings.execution is None else read_execution(settings.execution)
    is_secure = isinstance(settings, options.Train) and settings.uplink == "secure"
    algorithm = fed_avg(
        model,
        client_optimizer=optax.sgd(settings.client_learning_rate),
        server_optimizer=optax.sgd(settings.server_learning_rate),
        aggregator=mean(codec=codec, secure=is_secure),
        broadcast_codec=broadcast_codec,
        batch_size=settings.batch_size,
        num_epochs=settings.epochs,
        execution=execution,
    )
    sampler = datasets.sampling.uniform(
        splits.train, settings.clients_per_round, seed=settings.seed
    )
    return Experiment(model, splits, algorithm, sampler)


def train_once(
    experiment: Experiment, settings: options.Training, *, folder: pathlib.Path, title: str = ""
) -> tuple[Any, History]:
    """Runs the rounds, logged to the screen and to `folder`; the last state and the history."""
    model, splits, algorithm, sampler = experiment
    algorithm = _decided(algorithm, splits.train.cohort(sampler(0)), settings)
    write_execution(folder / writers.EXECUTION_NAME, algorithm.execution)
    return train(
        algorithm,
        splits.train,
        sampler,
        num_rounds=settings.rounds,
        key=jax.random.key(settings.seed),
        evaluation=lambda params: evaluate(model, params, splits.test),
        evaluate_every=settings.evaluate_every,
        writers=[
            writers.progress(settings.rounds, title=title),
            writers.tensorboard(folder),
            writers.json_lines(folder / writers.JSON_LINES_NAME),
        ],
    )


def _decided(
    algorithm: Algorithm, cohort: datasets.Cohort, settings: options.Training
) -> Algorithm:
    """The algorithm with nothing left to be decided about how it runs, measured if asked for."""
    execution = algorithm.execution
    if settings.tune:
        execution = tune(algorithm, algorithm.init(jax.random.key(settings.seed)), cohort)
        print(execution.tuning, flush=True)
    return algorithm.with_execution(execution.resolved(cohort.num_clients))


def write_execution(path: pathlib.Path, execution: Execution) -> None:
    """Writes how a run is run, as JSON for people and for `read_execution`."""
    write_atomically(path, (json.dumps(execution.to_dict(), indent=2) + "\n").encode())


def read_execution(path: pathlib.Path) -> Execution:
    """What `write_execution` wrote.

    Raises:
      StorageError: there is no such file, or it holds no JSON.
      ArgumentError: it holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"expected the execution.json of an earlier run, got {path} ({error}); check the path."
        ) from error
    return Execution.from_dict(record)


def save(path: pathlib.Path, state: Any, history: History) -> None:
    """Writes the last state, unless Ctrl-C came before there was anything to save."""
    if history.interrupted and not history:
        print(f"nothing was trained; {path} is as it was")
        return
    checkpoints.save(path, state)
    print(f"the state after {len(history)} rounds is in {path}")
