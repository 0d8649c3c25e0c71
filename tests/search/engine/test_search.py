"""The search: the same front whoever evaluates and whatever happens; limits that bind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from search.engine.evaluations import EVALUATIONS
from search.strategies.pareto import non_dominated
from space import Architecture, Workload, genome
from space.io.parquet import read_table
from tests.conftest import Program

ROOT = str(Path(__file__).parents[3])


def command(folder: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-c", "from search.cli import main; main()", "--devices", str(folder / "devices"),
        "search", "--run", str(folder / "run"), "--device", "desk", *options, "--json",
    ]  # fmt: skip


def new_process(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *options), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture
def call(formfit: Program) -> Program:
    """The same command as :func:`new_process` runs, within this process."""
    return lambda folder, *options: formfit(*command(folder, *options)[3:])


def front_of(done: subprocess.CompletedProcess[str], folder: Path, name: str) -> bytes:
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["members"]
    return (folder / "run" / "searches" / name / "front.json").read_bytes()


@pytest.fixture(scope="session")
def expected(finished_run: Path) -> bytes:
    return (finished_run / "run" / "searches" / "desk" / "front.json").read_bytes()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_no_byte(run_folder: Path, expected: bytes, workers: int, call: Program) -> None:
    name = f"with{workers}"
    done = call(run_folder, "--name", name, "--workers", str(workers))
    assert front_of(done, run_folder, name) == expected


def test_another_seed_gives_another_front(run_folder: Path, expected: bytes, call: Program) -> None:
    done = call(run_folder, "--name", "other", "--workers", "0", "--seed", "1")
    assert front_of(done, run_folder, "other") != expected


def descendants(root: int) -> set[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int(entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = set(), [root]
    while todo:
        process = todo.pop()
        found.add(process)
        todo += children.get(process, [])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("moment", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_killed_search_continues_to_the_same_front(run_folder: Path, expected: bytes, moment: int) -> None:
    """A real SIGKILL of the process group and of Ray's processes at any moment, then the same command."""
    rng = np.random.default_rng()
    folder = run_folder / "run" / "searches" / "killed"
    for attempt in range(8):  # a moment after the end kills nothing
        process = subprocess.Popen(
            command(run_folder, "--name", "killed", "--workers", "2"),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        parts = int(rng.integers(0, 7))  # four generations and two re-evaluations
        deadline = time.monotonic() + 120
        while len(list(folder.glob("evaluations/part-*.parquet"))) < parts and process.poll() is None:
            assert time.monotonic() < deadline
        time.sleep(rng.uniform(0, 0.3))
        for one in descendants(process.pid):
            with suppress(ProcessLookupError):  # it ended since
                os.kill(one, signal.SIGKILL)
        process.wait(30)
        if not (folder / "front.json").exists():
            break
        assert attempt < 7
        shutil.rmtree(folder)
    assert not (folder / "front.json").exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "study.log").open("ab") as file:
        file.write(b'{"op_code": 4, "wor')  # what a kill in the middle of a write leaves
    (folder / "study.log.lock").touch()
    done = new_process(run_folder, "--name", "killed", "--workers", "2")
    assert front_of(done, run_folder, "killed") == expected


def test_cluster_that_loses_a_node_gives_the_same_front(run_folder: Path, expected: bytes) -> None:
    """Two real nodes of a local cluster, joined by address; one is killed while it evaluates."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        process = subprocess.Popen(
            command(run_folder, "--name", "cluster", "--workers", "2", "--ray-address", cluster.address),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        folder = run_folder / "run" / "searches" / "cluster"
        deadline = time.monotonic() + 120
        while not (folder / "evaluations" / "part-0000.parquet").exists() and process.poll() is None:
            assert time.monotonic() < deadline
        cluster.remove_node(lost, allow_graceful=False)
        assert not (folder / "front.json").exists()
        _, said = process.communicate(timeout=150)
        assert process.returncode == 0, said
    finally:
        cluster.shutdown()
    assert (folder / "front.json").read_bytes() == expected


def test_front_is_non_dominated_and_keeps_the_limits(finished_run: Path) -> None:
    folder = finished_run / "run" / "searches" / "desk"
    front = json.loads((folder / "front.json").read_text())
    space = load_space_of(finished_run)
    table, _ = read_table(folder / "evaluations" / "part-front.parquet", EVALUATIONS)
    values = table[front["objectives"]].to_numpy(float)
    assert {m["key"] for m in front["members"]} == set(table["key"][non_dominated(values)])
    bounds = {item["limit"]: item["bound"] for item in front["limits"]}
    for member in front["members"]:
        architecture = Architecture.from_json(member["architecture"])
        assert architecture.key == member["key"]
        assert genome.contains(space, genome.encode(space, [architecture])).all()
        upper = member["predicted"]["latency"]["desk"]["prefill@64"]["upper_ms"]
        assert upper / 1e3 <= bounds["prefill@64<=90%"] * (1 + 1e-12)
        assert member["predicted"]["params"] <= bounds["params<=95%"]
    assert set(front["picks"].values()) <= {m["key"] for m in front["members"]}
    best = min(front["members"], key=lambda m: m["loss_nats"])
    assert front["picks"]["best"] == best["key"]
    assert "time" not in json.dumps(front)


def load_space_of(folder: Path) -> object:
    from search.config import load_run_config

    return load_run_config(folder / "run" / "config.yaml").space


def test_no_architecture_is_evaluated_twice(finished_run: Path) -> None:
    folder = finished_run / "run" / "searches" / "desk" / "evaluations"
    keys = []
    for part in sorted(folder.glob("part-0*.parquet")):
        keys += list(read_table(part, EVALUATIONS)[0]["key"])
    assert len(keys) == len(set(keys)) == 32


def test_study_equals_the_record(run_folder: Path) -> None:
    from search.engine.optuna_study import open_projection

    folder = run_folder / "run" / "searches" / "desk"
    study = open_projection(
        folder / "study.log", "desk", ["loss", "latency:prefill@64"], load_space_of(run_folder).hash
    ).study
    table, _ = read_table(folder / "evaluations" / "part-0000.parquet", EVALUATIONS)
    trials = study.get_trials()
    assert len(trials) == 32
    assert [t.user_attrs["key"] for t in trials[:8]] == list(table["key"])
    assert [t.values[0] for t in trials[:8]] == list(table["loss"])
    assert {"width", "depth", "linear_kind"} <= set(trials[0].params)
    import optuna

    assert optuna.visualization.plot_pareto_front(study).data


@pytest.mark.parametrize("lock", [False, True])
def test_truncated_journal_is_repaired(tmp_path: Path, lock: bool) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from search.engine.optuna_study import open_projection

    path = tmp_path / "study.log"

    def plainly() -> optuna.Study:
        """As anyone opens it, with Optuna alone."""
        return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path))))

    open_projection(path, "s", ["loss"], "space")
    for value in (1.0, 2.0):
        plainly().add_trial(optuna.trial.create_trial(values=[value]))
    data = path.read_bytes()
    last = len(data.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1, 1 if not lock else 17):
        path.write_bytes(data[:-cut])
        if lock:
            (tmp_path / "study.log.lock").touch()
        again = open_projection(path, "s", ["loss"], "space")
        assert [t.values[0] for t in again.study.get_trials()] == [1.0]
        plainly().add_trial(optuna.trial.create_trial(values=[3.0]))
        assert open_projection(path, "s", ["loss"], "space").count == 2


def test_record_of_another_search_is_refused(run_folder: Path, call: Program) -> None:
    front = run_folder / "run" / "searches" / "desk" / "front.json"
    front.unlink()
    done = call(run_folder, "--seed", "9", "--workers", "0")
    assert done.returncode == 2
    assert done.stderr.count("made for search") == 1
    part = run_folder / "run" / "searches" / "desk" / "evaluations" / "part-0001.parquet"
    part.write_bytes(part.read_bytes()[:200])
    done = call(run_folder, "--workers", "0")
    assert done.returncode == 2
    assert "part-0001.parquet: not a whole evaluations file" in done.stderr


def test_infeasible_limit_is_refused_with_the_least_value(run_folder: Path, call: Program) -> None:
    done = call(run_folder, "--name", "no", "--limit", "prefill@64<=1ns")
    assert done.returncode == 3
    assert "prefill@64<=1ns" in done.stderr
    assert "the least is" in done.stderr
    assert done.stdout == ""
    assert not (run_folder / "run" / "searches" / "no").exists()


def words(folder: Path) -> tuple[object, ...]:
    """A search under another name, in this process."""
    return (
        "--devices", folder / "devices", "search", "--run", folder / "run", "--device", "desk",
        "--workers", "0", "--name", "other",
    )  # fmt: skip


def card_file(folder: Path) -> Path:
    return next((folder / "devices" / "desk" / "predictors").glob("*.json"))


@pytest.mark.parametrize("limit", ["params<=95%", "prefill@64<=9s"])
def test_ops_that_a_device_lacks_are_not_searched(run_folder: Path, limit: str, formfit: Program) -> None:
    path = card_file(run_folder)
    value = json.loads(path.read_text())
    for model in value["workloads"].values():
        lacked = {key for key in model["op_seconds"] if key.startswith("linear-")}
        assert lacked
        model["op_seconds"] = {k: v for k, v in model["op_seconds"].items() if k not in lacked}
    path.write_text(json.dumps(value))
    done = formfit(*words(run_folder), "--limit", limit, "--json")
    assert done.returncode == 0, done.stderr
    front = json.loads(done.stdout)
    assert front["members"]
    for member in front["members"]:
        assert all(layer["mixer"] != "linear" for layer in member["architecture"]["layers"])


def test_percentage_of_an_architecture_that_cannot_run_is_refused(run_folder: Path, formfit: Program) -> None:
    path = card_file(run_folder)
    value = json.loads(path.read_text())
    for model in value["workloads"].values():
        model["op_seconds"] = {k: v for k, v in model["op_seconds"].items() if not k.startswith("attention")}
    path.write_text(json.dumps(value))
    done = formfit(*words(run_folder), "--limit", "prefill@64<=50%")
    assert done.returncode == 2
    assert "cannot run the largest architecture; give it in units" in done.stderr.splitlines()[-1]


def test_rss_is_a_limit_and_an_objective(run_folder: Path, formfit: Program) -> None:
    objectives = ("--objective", "loss", "--objective", "rss:prefill@64")
    done = formfit(*words(run_folder), "--limit", "rss@64<=64MiB", *objectives, "--json")
    assert done.returncode == 0, done.stderr
    front = json.loads(done.stdout)
    assert front["limits"][0] == {"limit": "rss@64<=64MiB", "bound": 2**26, "unit": "bytes"}
    refused = formfit(*words(run_folder), "--limit", "rss@32<=1MiB")
    assert refused.returncode == 2
    assert "outside what was measured" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["../elsewhere", "desk/random", ".", ""])
def test_invalid_search_name_is_refused(run_folder: Path, formfit: Program, name: str) -> None:
    done = formfit(*words(run_folder)[:-1], name or " ")
    assert done.returncode == 2
    assert done.stderr.startswith("formfit: --name ")


def test_two_searches_at_once_in_a_folder_are_refused(
    run_folder: Path, formfit: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from supernet.training import checkpoint
    from supernet.training.checkpoint import sole_writer

    monkeypatch.setattr(checkpoint, "LOCK_TIMEOUT_S", 0.2)
    with sole_writer(run_folder / "run" / "searches" / "other"):
        done = formfit(*words(run_folder))
    assert done.returncode == 2
    assert "another process writes here" in done.stderr.splitlines()[-1]


def test_search_ends_when_no_architecture_is_left(run_folder: Path, formfit: Program) -> None:
    """Beside it random search, which ends likewise; the same command again does nothing."""
    from latency import load_predictor
    from search.problem.milp import least

    space = load_space_of(run_folder)
    predictor = load_predictor(card_file(run_folder), space, "formfit profile")
    bound = 1.0001 * least(space, predictor.cost(Workload.parse("prefill@64"), 0.975))[0]
    limit = ("--limit", f"prefill@64<={1e3 * bound!r}ms", "--baseline", "random", "--json")
    done = formfit(*words(run_folder), *limit)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluations"] < 32
    again = formfit(*words(run_folder), *limit)
    assert again.stdout == done.stdout
    assert "search: done already" in again.stderr


def test_each_strategy_searches(run_folder: Path, formfit: Program) -> None:
    objectives = {"hat": ["loss"], "mip-nsga2": ["kl", "latency:prefill@64"]}
    for strategy in ("hat", "random", "mip-nsga2", "optuna-nsga2", "optuna-tpe"):
        some = ["--strategy", strategy, "--generations", "2", "--population", "8", "--name", strategy]
        for objective in objectives.get(strategy, []):
            some += ["--objective", objective]
        done = formfit(*words(run_folder)[:-2], *some, "--json")
        assert done.returncode == 0, done.stderr
        front = json.loads(done.stdout)
        assert front["strategy"] == strategy
        assert front["evaluations"] in (14, 16)
        assert ("kl" in front.get("scores", {})) == (strategy == "mip-nsga2")
    done = formfit(*words(run_folder), "--strategy", "hat", "--objective", "loss", "--objective", "params")
    assert done.returncode == 2
    assert "strategy hat: it has one objective" in done.stderr


def test_limits_of_two_devices_are_kept(run_folder: Path, formfit: Program) -> None:
    """A card under another name, whose ops all take twice as long."""
    shutil.copytree(run_folder / "devices" / "desk", run_folder / "devices" / "slow")
    path = next((run_folder / "devices" / "slow" / "predictors").glob("*.json"))
    value = json.loads(path.read_text())
    model = value["workloads"]["prefill@64"]
    model["run_seconds"] *= 2
    for table in ("op_seconds", "shared_seconds", "cache_seconds_per_mib"):
        model[table] = {name: seconds * 2 for name, seconds in model[table].items()}
    path.write_text(json.dumps(value))
    limits = ("--limit", "prefill@64<=90%", "--limit", "slow:prefill@64<=70%")
    objectives = ("--objective", "loss", "--objective", "slow:latency:prefill@64")
    done = formfit(*words(run_folder), "--device", "slow", *limits, *objectives, "--json")
    assert done.returncode == 0, done.stderr
    front = json.loads(done.stdout)
    bounds = [item["bound"] for item in front["limits"]]
    assert bounds[1] == pytest.approx(bounds[0] * 2 * 7 / 9)
    for member in front["members"]:
        latency = member["predicted"]["latency"]
        assert latency["slow"]["prefill@64"]["latency_ms"] == pytest.approx(
            2 * latency["desk"]["prefill@64"]["latency_ms"]
        )
        assert latency["slow"]["prefill@64"]["upper_ms"] / 1e3 <= bounds[1] * (1 + 1e-6)
    refused = formfit(*words(run_folder), "--limit", "moon:prefill@64<=70%")
    assert "device moon: not among those given (desk)" in refused.stderr.splitlines()[-1]


def test_card_of_another_onnxruntime_gives_a_warning(run_folder: Path, formfit: Program) -> None:
    path = run_folder / "devices" / "desk" / "device.json"
    value = json.loads(path.read_text())
    version = value["fingerprint"]["runtime_version"]
    value["fingerprint"]["runtime_version"] = "1.0.0"
    path.write_text(json.dumps(value))
    done = formfit(*words(run_folder)[:-2])  # the search that is there: nothing is evaluated
    assert done.returncode == 0, done.stderr
    expected = f"device desk: measured with onnxruntime 1.0.0, here is {version}"
    assert expected in done.stderr
    assert f"formfit profile --space SPACE --device desk-{version}" in done.stderr


def test_limit_between_profiled_lengths_is_among_the_predictions(run_folder: Path, call: Program) -> None:
    """The workload of a limit stands among the predictions, which are what verification measures."""
    path = card_file(run_folder)
    value = json.loads(path.read_text())
    value["workloads"]["prefill@16"] = value["workloads"]["prefill@64"]
    path.write_text(json.dumps(value))
    done = call(run_folder, "--name", "between", "--workers", "0", "--limit", "prefill@32<=9s")
    assert done.returncode == 0, done.stderr
    member = json.loads(done.stdout)["members"][0]
    assert "prefill@32" in member["predicted"]["latency"]["desk"]
