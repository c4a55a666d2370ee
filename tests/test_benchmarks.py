"""The benchmarks of rounds and of simulation: data, sums, protocol. No peer is installed here."""

import dataclasses
import importlib
import json
import pathlib
import re
import stat
import sys
import textwrap

import jax
import numpy as np
import optax
import pytest

import fedjax_core as fc

ROOT = pathlib.Path(__file__).parents[1]
# As for the scripts, which find their neighbours in their own folder.
sys.path.insert(0, str(ROOT / "benchmarks"))
rounds = importlib.import_module("rounds")
workloads = importlib.import_module("workloads")
environments = importlib.import_module("peers.environments")
worker = importlib.import_module("peers.worker")
simulation = importlib.import_module("simulation")
engine_parts = importlib.import_module("benchmarks.engine_parts")
measuring = importlib.import_module("benchmarks.measuring")
rate_distortion = importlib.import_module("rate_distortion")
real_updates = importlib.import_module("real_updates")
sys.path.remove(str(ROOT / "benchmarks"))

TINY = workloads.quick(workloads.WORKLOADS["linear_100"])

# Answers like a worker, as fast as the workload's seed says.
FAKE = """
    import json, sys
    for line in sys.stdin:
        request = json.loads(line)
        if "workload" in request:
            answer = {"ready": True, "load_s": 0.0, "compile_s": 1.0, "versions": {}}
        else:
            n = request["run"]
            answer = {"seconds_per_round": SECONDS, "rounds": n, "client_steps": 8 * n,
                      "examples": 10 * n, "flops": 2e9 * n, "steps_executed": 8 * n,
                      "rows_executed": 16 * n, "loss": 0.5, "peak_rss_mb": 100.0, "rss_mb": 90.0}
        print(json.dumps(answer), flush=True)
"""


def fake(tmp_path, name, code, peer=None):
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(code))
    return rounds.Variant(name, peer or name, [sys.executable, str(path)])


def fake_program(tmp_path, status):
    """Stands in for Python: makes environments that hold itself, and a pip with this status."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\ncase "$2" in\n'
        'venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;\n'
        f'pip) echo "ERROR: no such thing" >&2; exit {status};;\nesac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def answer(seconds, **fields):
    known = {"rounds": 2, "client_steps": 10, "examples": 40, "flops": 4e9, "steps_executed": 15}
    known |= {"rows_executed": None, "loss": 1.0, "peak_rss_mb": 5.0, "rss_mb": 4.0}
    return {"seconds_per_round": seconds, **known, **fields}


@pytest.mark.parametrize("name", [n for n in workloads.WORKLOADS if n != "shakespeare"])
def test_data_have_the_stated_sizes_and_are_the_same_again(name):
    workload = workloads.quick(workloads.WORKLOADS[name])
    data, again = workloads.make(workload), workloads.make(workload)
    assert len(data.sizes) == workload.num_clients
    assert data.sizes.min() >= min(workload.examples) or workload.total is not None
    assert data.sizes.sum() == len(data.features["label"])
    if workload.total is not None:
        assert data.sizes.sum() == workload.total
    for feature, x in data.features.items():
        assert x.tobytes() == again.features[feature].tobytes()
    other = workloads.make(dataclasses.replace(workload, seed=1))
    assert other.features["image"].tobytes()[:50] != data.features["image"].tobytes()[:50]


def test_emnist_is_as_large_as_it_is():
    workload = workloads.WORKLOADS["emnist_scale"]
    sizes = workloads._sizes(workload)
    assert (len(sizes), sizes.sum()) == (3_400, 671_585)
    assert sizes.min() > 0
    # The standard deviation of a log-normal share: sqrt(exp(sigma^2) - 1) = 0.417.
    assert abs(sizes.std() / sizes.mean() - 0.417) < 0.03


def test_random_bytes_are_those_of_every_numpy():
    # Philox keyed by this seed: raw bits of NumPy are kept the same over versions.
    first = workloads._raw(0, 1, 2, size=1)[0]
    bits = np.random.Philox(np.random.SeedSequence([0, 1, 2])).random_raw(1)[0]
    assert first == bits
    assert (
        workloads._bytes(0, 1, 2, shape=(3,)).tolist() == list(int(bits).to_bytes(8, "little"))[:3]
    )


def test_cohorts_are_distinct_clients_and_differ_by_round():
    workload = workloads.WORKLOADS["linear_100"]
    data = workloads.Data({}, np.arange(workload.num_clients + 1), 10)
    first, second = (workloads.cohort(workload, data, number) for number in (0, 1))
    assert len(set(first.tolist())) == workload.clients_per_round
    assert first.tolist() != second.tolist()
    assert first.tolist() == workloads.cohort(workload, data, 0).tolist()


def test_steps_and_rounds_without_an_order():
    uneven = workloads.WORKLOADS["cnn_uneven"]
    assert workloads.steps(uneven, np.array([1, 20, 21, 150])).tolist() == [1, 1, 2, 8]
    assert list(workloads.order_free(uneven)) == ["copies"]
    full = workloads.order_free(workloads.WORKLOADS["cnn"])["full_batch"]
    assert workloads.steps(full, np.array([100])).tolist() == [3]
    data = workloads.make(workloads.order_free(TINY)["copies"])
    images = data.client(3)["image"]
    assert len(images) > 1
    assert (images == images[0]).all()


def test_a_workload_survives_json():
    workload = workloads.WORKLOADS["shakespeare"]
    sent = json.loads(json.dumps(dataclasses.asdict(workload)))
    assert workloads.from_json(sent) == workload


@pytest.mark.parametrize(
    ("name", "model"), [("cnn", fc.models.emnist_cnn), ("two_nn", fc.models.two_nn)]
)
def test_parameters_and_loss_are_those_of_our_models(name, model):
    workload = dataclasses.replace(TINY, model=name)
    data = workloads.make(workload)
    params = workloads.initial_params(workload, data)
    tree = {}
    for path, x in params.items():
        layer, leaf = path.split("/")
        tree.setdefault(layer, {})[leaf] = x
    ours = model()
    expected = jax.eval_shape(ours.init, jax.random.key(0))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda x: x.shape, expected)
    mask = np.ones(len(data.features["label"]), bool)
    loss, _ = ours.loss(jax.random.key(0), tree, data.features, mask, False)
    assert workloads.loss(workload, params, data) == pytest.approx(float(loss), rel=1e-5)


def test_operations_of_the_models():
    # Linear: 7,840 multiplications forward, 7,840 for the kernel, none for the images.
    assert workloads.flops_per_example(TINY, 10) == 4 * 7_840
    cnn = workloads.flops_per_example(workloads.WORKLOADS["cnn"], 10)
    first, second = 28 * 28 * 25 * 32, 14 * 14 * 25 * 32 * 64
    assert cnn == 4 * first + 6 * (second + 3_136 * 512 + 512 * 10)


def test_shakespeare_is_skipped_without_its_file(monkeypatch, tmp_path):
    workload = workloads.WORKLOADS["shakespeare"]
    monkeypatch.delenv("FEDJAX_CORE_DATA", raising=False)
    assert "FEDJAX_CORE_DATA" in workloads.missing(workload)
    found = rounds.run_workload(workload, [], {}, 1, with_check=False)
    assert "FEDJAX_CORE_DATA" in found["skipped"]
    monkeypatch.setenv("FEDJAX_CORE_DATA", str(tmp_path))
    assert "does not exist" in workloads.missing(workload)


def test_speakers_are_cut_into_sequences(monkeypatch, tmp_path):
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    speech = "ab" * 100 + "\n"
    text = f"Ann:\n{speech}\nBob:\nshort\n\nAnn:\n{speech}"
    (folder / "input.txt").write_text(text)
    monkeypatch.setenv("FEDJAX_CORE_DATA", str(tmp_path))
    workload = workloads.WORKLOADS["shakespeare"]
    data = workloads.make(workload)
    # 401 or 402 characters of Ann make 5 sequences; Bob has too few for one.
    assert data.sizes.tolist() == [5]
    tokens = data.features["tokens"]
    assert tokens.shape == (5, 81)
    np.testing.assert_array_equal(tokens[:-1, -1], tokens[1:, 0])
    characters = sorted(set(text))
    assert data.num_classes == len(characters)
    assert "".join(characters[i] for i in tokens[0]) == ("ab" * 41)[:81]
    params = workloads.initial_params(workload, data)
    assert workloads.loss(workload, params, data) == pytest.approx(np.log(len(characters)), rel=0.1)


def test_medians_and_ratios_are_taken_within_repeats():
    # The machine is twice as slow in the second repeat: the ratio is 3 in each all the same.
    ours = [answer(1.0), answer(2.0), answer(1.5)]
    theirs = [answer(3.0), answer(6.0), answer(4.5)]
    rows = rounds.summarise({rounds.OURS: ours, "peer": theirs}, [4.0, 2.0, 8 / 3])
    assert rows["peer"]["ratio"] == pytest.approx(3.0)
    assert rows[rounds.OURS]["seconds_per_round"] == 1.5
    assert rows["peer"]["client_steps_per_second"] == pytest.approx(5 / 4.5)
    assert rows[rounds.OURS]["step_padding"] == 1.5
    assert rows[rounds.OURS]["row_padding"] is None
    # 2 GFLOP a round: 2, 1 and 1.33 GFLOP/s, each half of the peak then.
    assert rows[rounds.OURS]["utilisation"] == pytest.approx(0.5)
    assert rounds.summarise({"peer": theirs}, [1.0] * 3)["peer"]["ratio"] is None


def test_best_thread_count_stands_for_its_peer():
    rows = {
        "a, 1 thread": {"peer": "a", "seconds_per_round": 2.0},
        "a, 2 threads": {"peer": "a", "seconds_per_round": 1.0},
        "b": {"peer": "b", "error": "broken"},
    }
    assert rounds.best_labels(rows) == {"a": "a, 2 threads"}


def test_workers_take_turns_and_the_table_tells(tmp_path):
    variants = [
        fake(tmp_path, rounds.OURS, FAKE.replace("SECONDS", "0.5"), peer="ours"),
        fake(tmp_path, "slow", FAKE.replace("SECONDS", "2.0")),
        fake(tmp_path, "broken", "import sys; input(); sys.exit('no module of that name')"),
        fake(tmp_path, "wrong", 'input(); print(\'{"error": "ValueError: 1"}\')'),
    ]
    rows, machine = rounds.measure(TINY, variants, 2)
    assert len(machine) == 2
    assert all(x["peak_gflops"] > 0 for x in machine)
    assert rows["slow"]["seconds"] == [2.0, 2.0]
    assert rows["slow"]["ratio"] == 4.0
    assert rows["slow"]["compile_s"] == 1.0
    assert "no module of that name" in rows["broken"]["error"]
    assert rows["wrong"]["error"] == "ValueError: 1"
    rows["slow"]["check"] = {"copies": 2e-4}
    rows["none"] = {"peer": "none", "skipped": "a | b\nc"}
    best = rounds.best_labels(rows)
    lines = rounds.table({"workloads": {"tiny": {"rows": rows, "best": best}}}).splitlines()
    assert "| tiny | **slow** | 2.0000 | 4.00 | 4 |" in lines[3]
    assert lines[3].endswith("| 2e-04 DIFFERS |")
    assert lines[4].startswith("| tiny | broken | error: the worker ended with status 1: no module")
    assert lines[6] == "| tiny | none | skipped: a / b c |"
    assert json.loads(json.dumps(rows)) == rows


def test_a_worker_that_says_nothing_is_given_up(tmp_path):
    variant = fake(tmp_path, "silent", "import time; time.sleep(60)")
    ended = pytest.raises(worker.WorkerError, match="ended with status -9")
    with worker.Worker(variant.command, limit_s=0.2) as silent, ended:
        silent.ask(run=1)


def test_what_a_library_prints_is_no_answer(tmp_path):
    # `serve` itself, with a session that does nothing but talk.
    code = """
        import sys
        from benchmarks.peers import protocol
        class Session:
            def __init__(self, workload, data, params):
                self._params = params
            def run(self, cohorts):
                print("hello from a library", [len(x) for x in cohorts])
            def params(self):
                return self._params
            def executed(self, sizes):
                return None, int(sizes.sum())
        sys.exit(protocol.serve(Session, ("numpy",), lambda threads: None))
    """
    variant = fake(tmp_path, "talker", f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    script = pathlib.Path(variant.command[-1])
    script.write_text(script.read_text() + "\n" + textwrap.dedent(code))
    path = tmp_path / "params.npz"
    with worker.Worker(variant.command) as talker:
        ready = talker.ask(workload=dataclasses.asdict(TINY), params_file=str(path))
        assert ready["ready"]
        assert ready["versions"]["numpy"] == np.__version__
        with np.load(path) as params:
            assert params["Dense_0/kernel"].shape == (784, 10)
        told = talker.ask(run=2)
        data = workloads.make(TINY)
        cohorts = [workloads.cohort(TINY, data, TINY.num_warmup + i) for i in range(2)]
        sizes = [data.sizes[cohort] for cohort in cohorts]
        assert told["client_steps"] == sum(workloads.steps(TINY, x).sum() for x in sizes)
        assert told["examples"] == told["rows_executed"] == sum(x.sum() for x in sizes)
        assert told["steps_executed"] is None
        assert told["peak_rss_mb"] > 1
        with pytest.raises(worker.WorkerError, match="KeyError: 'run'"):
            talker.ask(nothing=1)


def test_the_check_tells_other_arithmetic(tmp_path):
    code = """
        import json, sys
        import numpy as np
        for line in sys.stdin:
            np.savez(json.loads(line)["params_file"], w=np.array([1.0, VALUE]))
            print(json.dumps({"ready": True}), flush=True)
    """
    variants = [
        fake(tmp_path, rounds.OURS, code.replace("VALUE", "2.0"), peer="ours"),
        fake(tmp_path, "same", code.replace("VALUE", "2.00001")),
        fake(tmp_path, "other", code.replace("VALUE", "2.1")),
        fake(tmp_path, "nan", code.replace("VALUE", "np.nan")),
    ]
    found = rounds.check(TINY, variants)
    assert found["same"]["copies"] == pytest.approx(1e-5)
    assert [label for label, row in found.items() if rounds.has_failed(row)] == ["other", "nan"]


def test_a_peer_that_cannot_be_made_is_reported(tmp_path, capsys):
    def ensure(peer):
        return environments.ensure(peer, tmp_path / "peers", fake_program(tmp_path, 1))

    variants, skipped = rounds.make_variants(
        ["fedjax", "pytorch"], python="python", threads=[1, 2], ensure=ensure
    )
    assert [v.label for v in variants] == [rounds.OURS]
    assert "ERROR: no such thing" in skipped["fedjax"]["skipped"]
    assert "skipped pytorch: -m pip install" in capsys.readouterr().err
    assert not (tmp_path / "peers" / "fedjax").exists()
    with pytest.raises(environments.Unavailable, match="No such file"):
        environments.ensure("pfl", tmp_path, str(tmp_path / "nowhere"))


def test_an_environment_is_made_once(tmp_path):
    folder, program = tmp_path / "peers", fake_program(tmp_path, 0)
    own = environments.ensure("pfl", folder, program)
    assert own == folder / "pfl" / "bin" / "python"
    assert environments.ensure("pfl", folder, "nothing that could make it") == own
    variants, skipped = rounds.make_variants(
        ["fedjax", "pfl"],
        python="python",
        threads=[1, 2],
        ensure=lambda peer: environments.ensure(peer, folder, program),
    )
    labels = [rounds.OURS, "fedjax", "pfl, 1 thread", "pfl, 2 threads"]
    assert [v.label for v in variants] == labels
    assert not skipped


def test_numbers_of_lanes_are_variants_of_ours():
    """They are measured beside the choice, and are not taken for it."""
    variants, _ = rounds.make_variants(
        ["fedjax"],
        python="here",
        threads=[1],
        ensure=lambda peer: pathlib.Path("here"),
        lanes=[1, 4],
    )
    assert [v.label for v in variants] == [
        *(rounds.OURS, f"{rounds.OURS}, 1 lane", f"{rounds.OURS}, 4 lanes", "fedjax"),
    ]
    assert [v.peer for v in variants] == ["ours", "lanes", "lanes", "fedjax"]
    assert variants[2].command == ["here", "-m", "benchmarks.peers.ours_worker", "4"]
    # A peer that is installed beside ours needs the same paths.
    assert "-E" not in variants[3].command


@pytest.mark.parametrize("peer", rounds.PEERS)
def test_each_peer_has_a_worker_and_pins(peer):
    assert (ROOT / "benchmarks" / "peers" / f"{peer}_worker.py").exists()
    pins = environments._lines(environments.REQUIREMENTS / f"requirements-{peer}.txt")
    assert [line for line in pins if "==" in line]
    assert not [line for line in pins if "/" in line]


def test_command_line():
    args = rounds.parse_args(["--workloads", "cnn,overhead", "--threads", "2,1,2"])
    assert (args.workloads, args.threads) == (["cnn", "overhead"], [1, 2])
    assert rounds.parse_args([]).workloads == list(workloads.WORKLOADS)
    quick = rounds.parse_args(["--quick", "--peers", ""])
    assert (quick.workloads, quick.threads, quick.repeats, quick.peers) == (
        ["linear_100"],
        [1],
        1,
        [],
    )
    # What is committed is not overwritten by a smoke run.
    assert quick.output is None
    output = rounds.parse_args([]).output
    assert output.parent == ROOT / "benchmarks" / "results"
    assert re.fullmatch(r"rounds_jax\d{3}\.json", output.name)
    with pytest.raises(SystemExit):
        rounds.parse_args(["--workloads", "cnm"])


def test_a_figure_is_beside_its_limit():
    figures = [
        simulation.Figure("told only", 2.0),
        simulation.Figure("small enough", 1.0, 1.3),
        simulation.Figure("too small", 3.9, 4, "at least"),
        simulation.Figure("no number", float("nan"), 0, unit=" MB"),
    ]
    described = [simulation.describe(x, is_quick=False) for x in figures]
    assert [x["is_met"] for x in described] == [True, True, False, False]
    results = {"parts": {"a": {"figures": described}, "b": {"figures": [], "error": "broken"}}}
    assert simulation.table(results).splitlines()[2:] == [
        "| a | told only | 2x | - |  |",
        "| a | small enough | 1x | at most 1.3x | met |",
        "| a | too small | 3.9x | at least 4x | MISSED |",
        "| a | no number | nan MB | at most 0 MB | MISSED |",
        "| b | failed: broken | | | FAILED |",
    ]
    assert simulation.has_failed({"parts": {"b": {"figures": [], "error": "broken"}}})
    assert simulation.has_failed({"parts": {"a": {"figures": described}}})
    assert not simulation.has_failed({"parts": {"a": {"figures": described[:2]}}})
    assert simulation.describe(figures[2], is_quick=True)["is_met"] is None


def test_ways_take_turns():
    turns = []
    seconds = measuring.alternate(2, lambda: turns.append("a"), lambda: turns.append("b"))
    assert turns == ["a", "b", "a", "b"]
    assert [len(x) for x in seconds] == [2, 2]
    # Twice as slow in the second repeat, both of them.
    assert measuring.ratio([3.0, 6.0, 4.5], [1.0, 2.0, 1.5]) == pytest.approx(3.0)


def test_unequal_clients_are_those_stated():
    lengths = measuring.unequal_lengths(200)
    assert (lengths.min() >= 1, lengths.max() <= measuring.LARGEST) == (True, True)
    # The mean of 200 clipped draws: within four of its standard errors, 131 / sqrt(200).
    assert abs(lengths.mean() - measuring.MEAN_SIZE) < 40


@pytest.mark.parametrize("lanes", [1, 2])
def test_executed_steps_are_counted(lanes):
    # Of 1, 1, 2 and 3 steps: beside the one of 3 runs that of 2, three steps long.
    dataset = measuring.images(np.array([1, 20, 40, 41]))
    executed = engine_parts.executed_steps(dataset, fc.Execution(lanes=lanes))
    assert executed == {1: 7, 2: 2 * 3 + 2 * 1}[lanes]


def test_padded_training_is_local_training():
    dataset = measuring.images(np.array([1, 41]))
    model, optimizer = fc.models.linear(), optax.sgd(0.1)
    ours = measuring.fed_avg(model, client_optimizer=optimizer)
    work = engine_parts.padded_training(model, optimizer, num_steps=4)
    padded = engine_parts.federated_learning(model, work, fc.aggregators.mean(), optax.sgd(1.0))
    state, cohort = ours.init(jax.random.key(0)), dataset.cohort(dataset.client_ids)
    (a, metrics), (b, others) = ours.update(state, cohort), padded.update(state, cohort)
    assert measuring.largest_difference(a.params, b.params) < 1e-6
    assert metrics.train["num_batches"] == others.train["num_batches"] == 4


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(name, marks=() if name == "overhead" else pytest.mark.slow)
        for name in simulation.PARTS
        if name != "speakers"  # whose data are not ours to give away
    ],
)
def test_each_part_of_simulation_runs(part, tmp_path, capsys):
    path = tmp_path / "simulation.json"
    assert simulation.main(["--quick", "--parts", part, "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["quick"]
    assert written["parts"][part]["machine"]["jax"] == jax.__version__
    assert written["parts"][part]["figures"]
    assert f"| {part} | " in capsys.readouterr().out


def test_a_part_that_fails_is_no_silent_pass(monkeypatch, capsys):
    monkeypatch.delenv("FEDJAX_CORE_DATA", raising=False)
    assert simulation.main(["--quick", "--parts", "speakers"]) == 1
    assert "failed: LookupError: set FEDJAX_CORE_DATA" in capsys.readouterr().out


def test_command_line_of_simulation():
    args = simulation.parse_args(["--parts", "memory,run"])
    assert args.parts == ["memory", "run"]
    assert args.output == ROOT / "benchmarks" / "results" / "simulation.json"
    assert simulation.parse_args(["--quick"]).output is None
    for wrong in ("memroy", ""):
        with pytest.raises(SystemExit):
            simulation.parse_args(["--parts", wrong])


@pytest.mark.parametrize("step", [0.3, 1.0, 2.5])
def test_rounding_of_a_laplacian_source_in_closed_form(step):
    """Against a million draws."""
    x = np.random.default_rng(0).laplace(size=1_000_000)
    symbols = np.rint(x / step).astype(int)
    count = np.bincount(symbols - symbols.min())
    share = count[count > 0] / x.size
    sums = np.bincount(symbols - symbols.min(), weights=x)
    centroids = sums / np.maximum(count, 1)
    error = np.mean((x - centroids[symbols - symbols.min()]) ** 2) / 2
    rate, expected = rate_distortion.rounded_laplace(step)
    assert -np.sum(share * np.log2(share)) == pytest.approx(rate, rel=0.01)
    assert error == pytest.approx(expected, rel=0.02)


def test_rates_and_errors_are_judged_by_their_tolerances():
    measured = rate_distortion.Measured(1.02, 0.104, True, 1.0)
    assert rate_distortion.judge((1.0, 0.1), measured)
    assert not rate_distortion.judge((0.98, 0.1), measured)
    assert not rate_distortion.judge((1.0, 0.098), measured)


def test_a_codec_is_measured_from_its_bytes():
    x = rate_distortion.source("gaussian")
    measured = rate_distortion.measure(rate_distortion.scaled_sign(), x)
    assert measured.rate == (8 * -(-x.size // 8) + 32) / x.size
    assert measured.error == pytest.approx(1 - 2 / np.pi, rel=0.01)
    assert measured.is_counted


def test_goals_lie_on_a_line_in_logarithms():
    study = ((4.0, 0.01), (1.0, 0.09))
    assert real_updates.goal(study, 0.03) == pytest.approx(2.0)
    assert real_updates.goal(study, 0.001) == pytest.approx(4.0)
    assert real_updates.goal(study, 0.1) is None
    assert real_updates.goal(((18.0, 0.0),), 0.0) == 18.0
