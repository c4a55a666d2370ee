import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from fedjax_core import datasets, models
from fedjax_core.algorithms import fed_avg
from fedjax_core.cli import options, training
from fedjax_core.cli.demo import comparison_table
from fedjax_core.cli.main import main
from fedjax_core.compression import PRESETS
from fedjax_core.learning import checkpoints
from fedjax_core.learning.evaluation import evaluate
from fedjax_core.learning.history import History, RoundRecord

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = ["--rounds", "2", "--clients-per-round", "3", "--num-clients", "5"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One folder of prepared digits for this module, away from the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDJAX_CORE_CACHE", str(folder))
        yield folder


def train(log_dir, *more):
    return main(["train", "--log-dir", str(log_dir), "--model", "linear", *QUICK, *more])


def rows(log_dir):
    return [json.loads(line) for line in (log_dir / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([], ["demo", "train", "datasets"]),
        (["demo"], ["default: 60", "logs", "1 to 16", "--overwrite"]),
        (["train"], ["default: 0.1", "Examples in a step", "{cnn,linear,two_nn}", "(0, 1]"]),
    ],
)
def test_help_names_defaults_and_units(capsys, command, expected):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in expected if word not in text] == []


def test_an_unknown_option_ends_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--log-dir", "x", "--clients", "3"])
    assert caught.value.code == 2


def test_datasets_are_listed(capsys):
    assert main(["datasets"]) == 0
    text = capsys.readouterr().out
    assert "digits: 1,797 handwritten digits" in text
    assert "emnist: " in text


def test_train_logs_each_round_and_saves_a_state_that_can_be_used_again(tmp_path, capsys):
    assert train(tmp_path / "run", "--save", str(tmp_path / "state")) == 0
    text = capsys.readouterr().out
    # 5 clients, 20 % held out of 1,797; 3 of them send 7,850 parameters of 32 bits.
    assert "5 clients, 1,437 examples to train, 360 held out" in text
    assert "\nround  0, train_metrics=(accuracy=" in text
    assert text.splitlines()[-1] == f"logs are in {tmp_path / 'run'}"
    first, last = rows(tmp_path / "run")
    assert first["communication/aggregate/update"] == 3 * 32 * 7850
    assert last["communication/aggregate/update"] == 3 * 32 * 7850

    model = models.linear()
    algorithm = fed_avg(model, client_optimizer=optax.sgd(0.1), batch_size=20)
    like = jax.eval_shape(algorithm.init, jax.random.key(0))
    state = checkpoints.load(tmp_path / "state", like)
    assert int(state.round) == 2
    test = datasets.load("digits", num_clients=5).test
    assert evaluate(model, state.params, test)["accuracy"] == pytest.approx(last["test_accuracy"])


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name in "ab":
        assert train(tmp_path / name, "--uplink", "quantize") == 0
    first, second = ([row | {"seconds": 0} for row in rows(tmp_path / name)] for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    "uplink",
    [
        "none",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("quantize", "top_k", "top_k_quantize", *PRESETS)
        ),
    ],
)
def test_every_uplink_trains(tmp_path, uplink):
    # The 2NN has two tensors above 20,000 elements, so that each codec has work to do.
    assert train(tmp_path, "--uplink", uplink, "--model", "two_nn") == 0
    sent, raw = rows(tmp_path)[0]["communication/aggregate/update"], 3 * 32 * 199_210
    assert sent == raw if uplink == "none" else sent < raw / 2


@pytest.mark.parametrize(
    "downlink",
    [
        "replica",
        pytest.param("anchored", marks=pytest.mark.slow),
        pytest.param("dense_8bit", marks=pytest.mark.slow),
    ],
)
def test_every_downlink_trains(tmp_path, downlink):
    assert train(tmp_path, "--downlink", downlink, "--model", "linear") == 0
    row = rows(tmp_path)[-1]
    raw = 3 * 32 * 7_850
    # The tensors are too small for the codec of 8 bits.
    assert row["communication/broadcast/params"] <= raw / (1 if downlink == "dense_8bit" else 2)
    assert ("communication/broadcast/catch_up" in row) == (downlink == "replica")
    assert ("communication/broadcast/anchor" in row) == (downlink == "anchored")


def test_a_used_folder_is_refused_in_one_line(tmp_path, capsys):
    assert train(tmp_path) == 0
    capsys.readouterr()
    assert train(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedjax-core: error: ")
    assert "--overwrite" in line
    assert train(tmp_path, "--overwrite") == 0


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--bits", "17", "bits"),
        ("--clients-per-round", "6", "clients"),
        ("--rounds", "-1", "--rounds"),
        ("--seed", "-1", "--seed"),
        ("--seed", str(2**63), "--seed"),
        ("--evaluate-every", "-1", "--evaluate-every"),
        ("--client-learning-rate", "nan", "--client-learning-rate"),
        ("--server-learning-rate", "-1", "--server-learning-rate"),
        ("--num-clients", "0", "num_clients"),
        ("--data-dir", "x" * 300, "data_dir"),
        ("--batch-size", "0", "batch_size"),
        ("--save", "/dev/null/state", "/dev/null/state"),
    ],
)
def test_bad_values_end_with_2_and_a_word_on_what_is_wrong(tmp_path, capsys, option, value, word):
    assert train(tmp_path, "--uplink", "quantize", option, value) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line
    # The corrected command finds nothing in its way.
    assert list(tmp_path.rglob("*")) == []


def test_a_saved_state_is_never_lost(tmp_path, capsys):
    saved = tmp_path / "state"
    saved.write_bytes(b"of long ago")
    assert train(tmp_path / "a", "--save", str(saved)) == 2
    assert "--overwrite" in capsys.readouterr().err
    # Fails once the data is there, because 6 of 5 clients are asked for.
    assert train(tmp_path / "b", "--save", str(saved), "--overwrite", "--clients-per-round", "6")
    assert saved.read_bytes() == b"of long ago"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert train(tmp_path / "c", "--save", str(saved), "--overwrite") == 0
    assert saved.read_bytes() != b"of long ago"


def test_an_interruption_before_the_first_round_saves_nothing(tmp_path, capsys):
    saved = tmp_path / "state"
    saved.write_bytes(b"of long ago")
    training.save(saved, {}, History((), interrupted=True))
    assert saved.read_bytes() == b"of long ago"
    assert "nothing was trained" in capsys.readouterr().out


def test_a_demo_of_no_rounds_is_an_error(tmp_path, capsys):
    assert main(["demo", "--log-dir", str(tmp_path / "logs"), "--rounds", "0"]) == 2
    assert "--rounds: expected an integer of at least 1" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["datasets"]) == 2
    assert "pip install 'fedjax-core[cli]'" in capsys.readouterr().err


def test_the_demo_compares_two_runs(tmp_path, capsys, monkeypatch):
    # The model is the one thing made smaller: the CNN takes minutes to train.
    monkeypatch.setattr(training, "make_model", lambda name: models.two_nn())
    assert main(["demo", "--log-dir", str(tmp_path), *QUICK]) == 0
    text = capsys.readouterr().out
    table = [line.split() for line in text.splitlines()]
    assert ["original", "compression"] in table
    assert ["rounds", "2", "2"] in table
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("original", "compression"):
        assert str(tmp_path / name) in text.splitlines()[-1]
        assert len(rows(tmp_path / name)) == 2

    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert set(runs.Runs()) == {"original", "compression"}
    for name in ("loss", "accuracy", "broadcasted_bits", "aggregated_bits"):
        assert [event.step for event in runs.Scalars("compression", name)] == [0, 1]
    ups = [runs.Scalars(name, "aggregated_bits")[-1].value for name in runs.Runs()]
    assert max(ups) > 2 * min(ups)


def test_control_c_leaves_valid_files_and_says_where_they_are(tmp_path):
    arguments = ["train", "--log-dir", str(tmp_path), "--model", "linear", "--num-clients", "5"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from fedjax_core.cli.main import main; sys.exit(main(sys.argv[1:]))",
            *arguments,
            *("--clients-per-round", "3", "--rounds", "100000"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("round  1"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert seen[-1] == f"interrupted; logs are in {tmp_path}\n"
    assert len(rows(tmp_path)) == sum(line.startswith("round ") for line in seen)


def test_a_state_that_control_c_left_goes_on_with_the_same_bits(tmp_path):
    """The state and the rounds of an interrupted run, against a run that had time for more."""
    program = "import sys; from fedjax_core.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", "--model", "linear", "--num-clients", "5", "--clients-per-round", "3"]
    files = ["--log-dir", str(tmp_path / "part"), "--save", str(tmp_path / "state")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words, *files, "--rounds", "100000"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round  1"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    done = len(rows(tmp_path / "part"))
    settings = options.Train(log_dir=tmp_path, model="linear", num_clients=5, clients_per_round=3)
    splits = training.load_splits("digits", settings, num_clients=5)
    experiment = training.make_experiment(models.linear(), splits, None, settings)
    algorithm, sampler = experiment.algorithm, experiment.sampler
    first = algorithm.init(jax.random.key(0))
    state = checkpoints.load(tmp_path / "state", first)
    assert int(state.round) == done
    state, _ = algorithm.run(state, splits.train, sampler, num_rounds=2)
    whole, metrics = algorithm.run(first, splits.train, sampler, num_rounds=done + 2)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)
    logged = [row["loss"] for row in rows(tmp_path / "part")]
    np.testing.assert_array_equal(logged, metrics.train["loss"][:done])


@pytest.mark.slow
def test_a_run_that_was_tuned_is_repeated_with_the_same_bits(tmp_path, capsys):
    """What was measured and chosen lies beside the logs, and another run is given it."""
    assert train(tmp_path / "a", "--tune") == 0
    assert "ms a round" in capsys.readouterr().out
    path = tmp_path / "a" / "execution.json"
    record = json.loads(path.read_text())
    assert record["lanes"] in (1, 3)
    assert record["tuning"]["num_clients"] == 3
    assert train(tmp_path / "b", "--execution", str(path)) == 0
    assert json.loads((tmp_path / "b" / "execution.json").read_text()) == record
    first, second = ([row | {"seconds": 0} for row in rows(tmp_path / name)] for name in "ab")
    assert first == second


@pytest.mark.slow
def test_without_a_choice_what_is_automatic_is_written(tmp_path):
    assert train(tmp_path) == 0
    record = json.loads((tmp_path / "execution.json").read_text())
    assert (record["mode"], record["lanes"]) == ("streamed", 1)
    assert train(tmp_path, "--overwrite") == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "check the path"), ("{", "check the path"), ("{}", "Execution.to_dict")],
)
def test_a_file_that_holds_no_execution(tmp_path, capsys, content, words):
    path = tmp_path / "execution.json"
    if content is not None:
        path.write_text(content)
    assert train(tmp_path / "logs", "--execution", str(path)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    assert train(tmp_path / "logs", "--execution", str(path), "--tune") == 2
    assert "got both" in capsys.readouterr().err


def test_the_table_shows_the_last_numbers():
    def history(up):
        record = RoundRecord(0, {"loss": 0.5}, 1 << 20, 1 << up, test={"accuracy": 0.875})
        return History((record._replace(train={"loss": 2.0}, test={}), record))

    assert comparison_table({"original": history(20), "compression": history(18)}) == "\n".join(
        [
            "                  original  compression",
            "rounds                   2            2",
            "train loss          0.5000       0.5000",
            "test loss                -            -",
            "test accuracy       0.8750       0.8750",
            "sent down        1.00Mibit    1.00Mibit",
            "sent up          1.00Mibit  256.00Kibit",
            "seconds a round       0.00         0.00",
        ]
    )


@pytest.mark.slow
def test_small_models_are_compressed_if_asked(tmp_path):
    """Tensors of 7,840 and 10 entries: raw by default, 2 bits each with --min-size 0."""

    def update_bits(*words: str) -> int:
        folder = tmp_path / f"logs{len(words)}"
        arguments = ["--log-dir", str(folder), "--rounds", "1", "--num-clients", "5"]
        arguments += ["--clients-per-round", "2", "--model", "linear", "--uplink", "quantize"]
        assert main(["train", *arguments, "--bits", "2", *words]) == 0
        record = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
        return record["communication/aggregate/update"]

    assert update_bits() == 2 * 32 * 7_850
    assert update_bits("--min-size", "0") == 2 * (2 * 7_840 + 64 + 24 + 64)
