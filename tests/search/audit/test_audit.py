"""The audit: statistics, sets of architectures, verdicts, and a small real audit that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from latency import Card, Predictor, load_card, load_predictor
from latency.device_runner.fingerprint import Fingerprint
from latency.predictor.bounds import Spread
from latency.predictor.op_latencies import OpLatencies
from latency.predictor.predictor import WorkloadModel
from search import pipeline
from search.audit.audit import AuditConfig, audit, judge
from search.audit.page import audit_section, correlation_rows
from search.audit.rank_correlation import (
    Estimate,
    RankCorrelations,
    correlations,
    rank_correlations,
    verdict,
)
from search.audit.result import AuditedArchitecture, AuditResult, StandAlone
from search.audit.stratified import (
    axis_levels,
    choose_diverse,
    choose_equal,
    crowded_level,
    features,
    sample_pool,
)
from search.config import Run, load_run_config
from space import Architecture, InputError, Workload, genome, load_space
from space.cost import op_flops, params_cost
from space.onnx.graph import VERSION
from space.ops import space_ops
from supernet.data.corpus import load_corpus
from supernet.evaluate import evaluate, evaluation_set
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_stand_alone, train
from tests.conftest import Quiet, run_program
from tests.contracts import TINY_SPACES, every_genome, tiny_space
from tests.search.records import make_member
from tests.search.test_pipeline import ROOT


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipy(ties: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 12))
    y = y + x
    if ties:
        x, y = x.round(), y.round()
    tau, rho = correlations(x, y)
    for i in range(len(x)):
        assert tau[i] == pytest.approx(kendalltau(x[i], y[i]).statistic, abs=1e-12)
        assert rho[i] == pytest.approx(spearmanr(x[i], y[i]).statistic, abs=1e-12)


def test_correlations_by_hand() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert correlations(x, 10 * x) == (1.0, 1.0)
    assert correlations(x, -(x**3)) == (-1.0, -1.0)
    assert correlations(x, np.array([1.0, 2.0, 4.0, 3.0]))[0] == pytest.approx(4 / 6)  # one of six pairs
    # One tie in y: five ordered pairs over the root of 6 x 5.
    assert correlations(x, np.array([1.0, 2.0, 3.0, 3.0]))[0] == pytest.approx(5 / np.sqrt(30))
    assert np.isnan(correlations(x, np.ones(4))).all()


def test_intervals_equal_a_loop_over_resamples() -> None:
    """The intervals equal those of a loop over the same resamples with scipy's statistics."""
    rng = np.random.default_rng(1)
    alone = rng.normal(size=(2, 12)) * 0.3 + np.arange(12.0)
    inside, size = np.arange(12.0) + rng.normal(size=12), rng.normal(size=12)
    found = rank_correlations(alone, {"supernet": inside, "params": size}, seed=3, resamples=100)
    rows = np.random.default_rng([3, 6]).integers(12, size=(100, 12))
    mean = alone.mean(axis=0)
    taus = [kendalltau(inside[r], mean[r]).statistic for r in rows]
    others = [kendalltau(size[r], mean[r]).statistic for r in rows]
    seeds = [spearmanr(alone[0][r], alone[1][r]).statistic for r in rows]
    expected = {
        "supernet": (found.kendall_tau["supernet"], taus, kendalltau(inside, mean).statistic),
        "params": (found.kendall_tau["params"], others, kendalltau(size, mean).statistic),
        "two_seeds": (found.spearman_rho["two_seeds"], seeds, spearmanr(*alone).statistic),
        "difference": (
            found.supernet_minus_params,
            np.subtract(taus, others),
            kendalltau(inside, mean).statistic - kendalltau(size, mean).statistic,
        ),
    }
    for name, (estimate, draws, value) in expected.items():
        assert estimate.value == pytest.approx(value), name
        assert [estimate.low, estimate.high] == pytest.approx(list(np.percentile(draws, [2.5, 97.5]))), name


def test_undefined_correlations_round_trip_through_json() -> None:
    """Equal sizes rank nothing; one seed is not compared with another."""
    found = rank_correlations(np.arange(5.0)[None], {"supernet": np.arange(5.0), "params": np.ones(5)})
    assert "two_seeds" not in found.kendall_tau
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["kendall_tau"]["params"]["value"] is None
    assert str(Estimate.from_json(value["kendall_tau"]["params"])) == "undefined"
    assert Estimate.from_json(value["kendall_tau"]["supernet"]) == Estimate(1.0, 1.0, 1.0)
    assert "parameter count cannot rank these" in verdict(found, "here")[1]
    assert "with one seed, the agreement of two is unknown" in verdict(found, "here")[1]


VERDICTS = {  # supernet's tau, two seeds', supernet minus parameters -> word, text
    "trusted": ((0.81, 0.6, 0.95), (0.9, 0.7, 1), (0.1, 0.02, 0.3), "can be trusted", "is better than"),
    "loose": ((0.5, 0.1, 0.8), (0.9, 0.7, 1), (0.1, -0.2, 0.3), "but loose", "cannot be distinguished from"),
    "chance": ((0.3, -0.1, 0.7), (0.9, 0.7, 1), (-0.4, -0.6, -0.1), "from chance", "is worse than"),
    "reversed": ((-0.5, -0.8, -0.1), None, (0, -1, 1), "is reversed", "cannot be distinguished from"),
    "unclear": ((0.3, -0.1, 0.7), (0.2, -0.3, 0.6), (0, -1, 1), "Inconclusive", "train longer"),
}


@pytest.mark.parametrize("word", VERDICTS)
def test_verdicts_in_words(word: str) -> None:
    tau, repeat, difference, says, compares = VERDICTS[word]
    taus = {"supernet": Estimate(*tau), "params": Estimate(0.7, 0.4, 0.9)}
    if repeat:
        taus["two_seeds"] = Estimate(*repeat)
    found = RankCorrelations(kendall_tau=taus, spearman_rho={}, supernet_minus_params=Estimate(*difference))
    given, text = verdict(found, "over the axes")
    assert given == word
    assert "over the axes" in text
    assert says in text
    assert compares in text
    assert text.endswith(".")
    if word == "trusted":
        assert "tau 0.81 [0.60, 0.95]" in text
        assert "0.70 [0.40, 0.90]" in text
        assert "two seeds agree with tau 0.90 [0.70, 1.00]" in text


def test_significant_ranking_is_trusted_despite_disagreeing_seeds() -> None:
    taus = {"supernet": Estimate(0.8, 0.6, 1), "params": Estimate(0, -1, 1), "two_seeds": Estimate(0, -1, 1)}
    found = RankCorrelations(kendall_tau=taus, spearman_rho={}, supernet_minus_params=Estimate(0.8, 0.1, 1))
    assert verdict(found, "here")[0] == "trusted"


@pytest.mark.parametrize("name", TINY_SPACES)
def test_diverse_set_has_every_value_of_every_axis(name: str) -> None:
    """In spaces small enough to enumerate, every value of an axis is in the set of twelve."""
    space = tiny_space(**TINY_SPACES[name])
    everything = every_genome(space)
    if len(everything) < 3:
        with pytest.raises(InputError, match="at least 3"):
            choose_diverse(space, everything, 12)
        return
    chosen = choose_diverse(space, everything, 12)
    assert len(np.unique(chosen, axis=0)) == len(chosen) == min(12, len(everything))
    assert genome.contains(space, chosen).all()
    found, there = axis_levels(space, chosen), axis_levels(space, everything)
    for axis, levels in there.items():
        assert set(found[axis]) == set(levels), axis
    assert set(axis_levels(space, everything)["depth"]) == {depth for depth, _ in space.patterns}


def test_ratios_of_known_architectures() -> None:
    space = tiny_space(heads=[1], ffn=[16], depth=[4], ratios=["full", 1, 3, "linear"])
    fulls = {"full": 4, 1: 2, 3: 1, "linear": 0}
    everything = every_genome(space)
    full = np.array([sum(m == "attention" for m in a.pattern) for a in genome.decode(space, everything)])
    level = axis_levels(space, everything)["ratio"]
    for i, ratio in enumerate(["full", "linear", 1, 3]):
        assert set(level[full == fulls[ratio]]) == {i}


def test_diverse_set_depends_on_the_seed_only() -> None:
    space = load_space(ROOT / "configs/spaces/quickstart.yaml")
    pool = sample_pool(space, 0, 3000)
    assert np.array_equal(pool, sample_pool(space, 0, 3000))
    chosen = choose_diverse(space, pool, 12)
    assert np.array_equal(chosen, choose_diverse(space, pool, 12))
    assert not np.array_equal(chosen, choose_diverse(space, sample_pool(space, 1, 3000), 12))
    counts = np.bincount(axis_levels(space, chosen)["width"])
    assert counts.max() - counts.min() <= 1

    def nearest(genomes: np.ndarray) -> float:
        points = features(space, genomes)
        apart = np.linalg.norm(points[:, None] - points[None], axis=2)
        return float(apart[~np.eye(len(points), dtype=bool)].min())

    drawn = [nearest(pool[i : i + 12]) for i in range(0, 1200, 12)]
    assert nearest(chosen) > np.quantile(drawn, 0.95)


def test_crowded_level_has_the_most_neighbours() -> None:
    seconds = np.array([1.0, 2.0, 5.0, 5.2, 5.4, 9.0, 9.1])
    assert crowded_level(seconds, 0.1) in (5.0, 5.2, 5.4)
    within = [(np.abs(seconds / s - 1) <= 0.1).sum() for s in seconds]
    level = crowded_level(seconds, 0.1)
    assert (np.abs(seconds / level - 1) <= 0.1).sum() == max(within)


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_latency_set_is_within_the_band(seed: int) -> None:
    """Any additive cost will do: parameters have the form of a latency."""
    space = load_space(ROOT / "configs/spaces/quickstart.yaml")
    cost = params_cost(space)
    pool = sample_pool(space, seed, 2000)
    chosen, level = choose_equal(space, pool, cost, 0.1, 12)
    assert len(np.unique(chosen, axis=0)) == 12
    assert np.abs(cost(chosen) / level - 1).max() <= 0.1
    assert len(set(axis_levels(space, chosen)["ratio"])) > 1


def test_judge_ranks_low_loss_and_large_size_first() -> None:
    """A supernet that ranks as stand-alone training does, with larger models better: all taus are 1."""
    architectures = []
    for i in range(6):
        trainings = tuple(
            StandAlone(seed=s, losses={"loss_nats": 2.0 - 0.1 * i + 0.001 * s, "recall_loss_nats": None})
            for s in (1, 2)
        )
        architectures.append(
            AuditedArchitecture(
                architecture=make_member(i).architecture,
                sets=("axes", "equal_latency")[: 1 + i % 2 + (i == 0)],
                params=100 + i,
                flops=100 - i,
                predicted_latency_ms=1.0,
                supernet={"loss_nats": 3.0 - i, "recall_loss_nats": None},
                stand_alone=trainings,
            )
        )
    found = judge(architectures, seed=0)
    taus = {name: tau.value for name, tau in found["axes"].loss.kendall_tau.items()}
    assert taus == {"supernet": 1.0, "params": 1.0, "flops": -1.0, "two_seeds": 1.0}
    assert found["axes"].recall_loss is None
    assert found["axes"].verdict == "trusted"
    assert found["equal_latency"].architectures == tuple(architectures[i].key for i in (0, 1, 3, 5))


def test_stand_alone_training_settings() -> None:
    config = TrainConfig(steps=100, batch=4, seed=5, workers=2, threads=2, learning_rate=1e-2)
    alone = AuditConfig().training(config)
    assert alone == TrainConfig(steps=25, batch=4, seed=6, workers=0, threads=1, learning_rate=1e-2)
    assert AuditConfig(steps=7, batch=2).training(config).steps == 7
    assert AuditConfig(steps=7, batch=2).training(config).batch == 2


@pytest.fixture
def trained(tmp_path: Path, config_file: Path) -> Run:
    """A trained run, and a card whose predicted latencies follow from FLOPs."""
    run = Run(tmp_path / "run", load_run_config(config_file), tmp_path / "devices")
    run.save_config()
    pipeline.trained(run, Quiet(), load_corpus(run.config.train.data))
    space, workload = run.space, Workload(phase="prefill", length=64)
    model = WorkloadModel(
        op_seconds={op.key: 1e-6 + 1e-11 * op_flops(op, workload, space.config) for op in space_ops(space)},
        run=1e-5,
        shared=(2e-6, 0.0, 0.0),
        caches={},
        spread=Spread(0.0, 0.01),
        run_spread=0.02,
    )
    card = Card(
        run.devices / "desk",
        Fingerprint(machine="", cpu="made up", system="", runtime="onnxruntime", runtime_version="0"),
    )
    card.save()
    unmeasured = OpLatencies(space, {}, {})
    predictor = Predictor(space=space, ops=unmeasured, models={workload: model}, residuals=[0.0])
    predictor.save(card.predictor_path(space.name, "onnxruntime", 1, "fp32"), {"graphs": str(VERSION)})
    return run


def test_missing_predictor_error_names_the_command(trained: Run) -> None:
    for device, workload, expected in (
        ("moon", None, "audit: .* needs a predictor: .*`formfit profile --space SPACE --device moon`"),
        ("desk", "prefill@32", "--workload prefill@64 --workload prefill@32`"),
    ):
        with pytest.raises(InputError, match=expected) as found:
            audit(trained, AuditConfig(workload=workload), device, Quiet())
        assert "\n" not in str(found.value)


def command(run: Run) -> list[str]:
    return [
        "--devices", str(run.devices), "audit", "--run", str(run.folder), "--size", "3", "--steps", "2",
        "--batch", "2", "--workers", "1", "--json",
    ]  # fmt: skip


def start(run: Run) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from search.cli import main; main()", *command(run)],
        cwd=run.folder.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(600)  # Ray starts twice, slowly where the cores are busy
def test_resume_after_sigkill(trained: Run) -> None:
    trials = trained.folder / "audit" / "trials"
    first = start(trained)
    try:
        deadline = time.monotonic() + 240
        while not list(trials.glob("*/result.json")):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert not (trials.parent / "audit.json").exists()
    kept = {path: path.stat().st_ino for path in trials.glob("*/result.json")}  # a new file is another inode
    logs = {path.parent: (path.parent / "metrics.jsonl").read_text() for path in kept}
    second = run_program(*command(trained))
    assert second.returncode == 0, second.stderr
    value = json.loads(second.stdout)
    assert value == json.loads((trials.parent / "audit.json").read_text())
    for path, inode in kept.items():
        assert path.stat().st_ino == inode
        assert (path.parent / "metrics.jsonl").read_text() == logs[path.parent]
    assert not (trials.parent / "tune").exists()
    assert not list(trials.glob("*/step-*"))
    check_values(trained, value)
    check_report(trained.folder, value)


def check_values(run: Run, value: dict[str, Any]) -> None:
    """The audit's numbers equal those of its parts, without Ray."""
    space, rows = run.space, value["architectures"]
    assert [len([r for r in rows if name in r["sets"]]) for name in ("axes", "equal_latency")] == [3, 3]
    workload = Workload(phase="prefill", length=64)
    card = load_card(run.devices, "desk")
    path = card.predictor_path(space.name, "onnxruntime", 1, "fp32")
    cost = load_predictor(path, space, "").cost(workload)
    members = [Architecture.from_json(r["architecture"]) for r in rows if "equal_latency" in r["sets"]]
    level = value["equal_latency_ms"]
    assert np.abs(1e3 * cost(genome.encode(space, members)) / level - 1).max() <= 0.1
    # One of the trainings again, in this process.
    row = rows[-1]
    architecture = Architecture.from_json(row["architecture"])
    corpus = load_corpus(run.config.train.data)
    seed = row["stand_alone"][1]["seed"]
    config = run.config.train.model_copy(update={"steps": 2, "batch": 2, "seed": seed})
    checkpoint = train(space, config, run.folder / "again", None, corpus, architecture)
    weights = dict(load_stand_alone(space, checkpoint, architecture).named_parameters())
    data = evaluation_set(corpus, run.config.search.front_windows, space.max_seq_len)
    quality = evaluate(weights, architecture, space.config, data)
    assert quality.loss_nats == row["stand_alone"][1]["loss_nats"]
    assert row["stand_alone"][0]["loss_nats"] != row["stand_alone"][1]["loss_nats"]


def check_report(run: Path, value: dict[str, Any]) -> None:
    """The page has all architectures and loads nothing; a run's report has the audit of its supernet only."""
    page = (run / "audit" / "audit.html").read_text()
    assert all(row["key"] in page for row in value["architectures"])
    assert "<script src" not in page
    supernet = value["header"]["inputs"]["supernet"]
    section = audit_section(run, supernet)
    for judged in value["sets"].values():
        assert judged["text"] in value["verdict"]
        assert escape(judged["text"]) in section
    assert section.count("<tr>") == 1 + len(correlation_rows(AuditResult.from_json(value))) == 1 + 2 * 5
    assert audit_section(run, "0" * 64) == ""
    assert audit_section(run.parent, supernet) == ""
