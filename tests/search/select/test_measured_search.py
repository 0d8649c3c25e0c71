"""Measured search: finalists are measured, the predictor is recalibrated, the chosen one keeps the limits."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latency import load_predictor
from latency.predictor.predictor import Predictor
from search.config import load_run_config
from search.engine.choice import Choice
from search.select.measured_search import TARGET_USE, require_kept
from search.select.measurements import MeasuredFinalist, MeasuredSearch, Round, choose_finalist
from space import LimitMissedError, Workload, genome, variation
from space.io.errors import ParityError
from tests.conftest import Program
from tests.search.records import limit_result, make_member

PREFILL = Workload.parse("prefill@64")


def words(folder: Path, *options: object) -> tuple[object, ...]:
    return (
        "--devices", folder / "devices", "search", "--run", folder / "run", "--device", "desk",
        "--workers", "0", "--name", "kept", "--verify", *options, "--json",
    )  # fmt: skip


def predictor_of(folder: Path) -> Predictor:
    path = next((folder / "devices" / "desk" / "predictors").glob("*.json"))
    return load_predictor(path, load_run_config(folder / "run" / "config.yaml").space, "formfit profile")


def test_chosen_finalist_was_measured_and_kept_the_limits(run_folder: Path, formfit: Program) -> None:
    done = formfit(*words(run_folder, "--limit", "prefill@64<=9s", "--limit", "params<=95%"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    measured_search = found["measured_search"]
    chosen = measured_search["chosen"]
    assert measured_search["kept"]
    assert {item["status"] for item in chosen["limits"]} == {"kept"}
    for one in measured_search["rounds"]:
        for row in one["finalists"]:
            folder = run_folder / "run" / "submodels" / row["key"]
            verified = json.loads((folder / "verify.json").read_text())
            assert verified["latency"]["prefill@64"]["measured_latency_ms"] == row["latency_ms"]["prefill@64"]
            assert row["used"] == verified["limits"][0]["used"]  # parameters are no matter of measuring
            assert row["tightest"] == "prefill@64<=9s"
    out = run_folder / "model"
    taken = formfit(
        "extract",
        "--run",
        run_folder / "run",
        "--search",
        "kept",
        "--out",
        out,
        "--format",
        "onnx",
        "--json",
    )
    assert json.loads(taken.stdout)["key"] == chosen["key"]  # without --pick it is the chosen one
    again = formfit(*words(run_folder, "--limit", "prefill@64<=9s", "--limit", "params<=95%"))
    assert json.loads(again.stdout) == found  # nothing is measured twice


def test_optimistic_predictor_is_recalibrated(run_folder: Path, formfit: Program) -> None:
    """Predictions are a third of the truth: finalists miss, and the search recalibrates."""
    path = next((run_folder / "devices" / "desk" / "predictors").glob("*.json"))
    value = json.loads(path.read_text())
    model = value["workloads"]["prefill@64"]
    model["run_seconds"] /= 3
    for table in ("op_seconds", "shared_seconds", "cache_seconds_per_mib"):
        model[table] = {name: seconds / 3 for name, seconds in model[table].items()}
    path.write_text(json.dumps(value))
    space = load_run_config(run_folder / "run" / "config.yaml").space
    ends = genome.encode(space, [genome.smallest(space), genome.largest(space)])
    low, high = 1e3 * predictor_of(run_folder).predict(ends, PREFILL)
    assert high > 2 * low
    limit = f"prefill@64<={1.5 * 3 * low:.6f}ms"  # truly half above the least
    done = formfit(*words(run_folder, "--limit", limit, "--confidence", "0.55"))
    assert done.returncode in (0, 3), done.stderr
    measured_search = json.loads(
        (run_folder / "run" / "searches" / "kept" / "measured_search.json").read_text()
    )
    assert not all(row["kept"] for row in measured_search["rounds"][0]["finalists"]), measured_search
    assert measured_search["kept"] == (done.returncode == 0)
    if done.returncode == 3:  # the smallest may take longer than that
        assert "finalists kept the limits" in done.stderr.splitlines()[-1]
    else:
        assert measured_search["chosen"]["used"] <= 1
    second = run_folder / "run" / "searches" / "kept" / "rounds" / "2" / "front.json"
    # A first finalist may use what there is, or nothing keep the limit as measured: then there is no second.
    settled = any(
        row["kept"] and row["used"] >= TARGET_USE for row in measured_search["rounds"][0]["finalists"]
    )
    if not settled and done.returncode == 0:
        assert second.exists(), measured_search
    if second.exists():
        bound = json.loads(second.read_text())["limits"][0]["bound"]
        assert bound == pytest.approx(float(limit[12:-2]) / 1e3)


def test_recalibration_by_hand(finished_run: Path) -> None:
    predictor = predictor_of(finished_run)
    rows = variation.sample(predictor.space, np.random.default_rng(0), 4)
    before = predictor.predict(rows, PREFILL)
    measured = before * np.array([1.1, 1.12, 1.08, 1.1])
    after = predictor.recalibrated(rows, {PREFILL: measured}, {})
    shift = 0.4 / 5  # the mean of four residuals and of what was known before, which is none
    np.testing.assert_allclose(after.predict(rows, PREFILL), before * (1 + shift), rtol=1e-12)
    residuals = np.array([0.1, 0.12, 0.08, 0.1]) - shift
    known = float(np.mean(predictor.models[PREFILL].spread.at(before) / before))
    scale = math.sqrt((float((residuals**2).sum()) + known**2) / 5)
    assert after.spread(PREFILL).relative == pytest.approx(
        math.hypot(scale, predictor.models[PREFILL].run_spread)
    )
    assert after.spread(PREFILL).seconds == 0
    others = [w for w in predictor.models if w != PREFILL]
    assert all(after.models[w] == predictor.models[w] for w in others)


def finalist(number: int, loss: float, used: float, *, passed: bool = True) -> MeasuredFinalist:
    return MeasuredFinalist(
        member=make_member(number, loss),
        latency_ms={},
        rss_bytes={},
        limits=(),
        used=used,
        tightest=None,
        passed=passed,
        choice=Choice(),
    )


def test_chosen_finalist_is_the_best_with_a_safety_margin() -> None:
    a, b, c = finalist(1, 1.0, 0.99), finalist(2, 1.2, 0.95), finalist(3, 1.1, 0.97)
    d, e = finalist(4, 0.9, 1.1, passed=False), finalist(5, 0.8, 1.05, passed=False)
    assert choose_finalist([a, b, c, d], "loss") == c
    assert choose_finalist([a, d], "loss") == a
    assert choose_finalist([d, e], "loss") == e


def test_finalist_that_misses_a_limit_or_parity_is_refused() -> None:
    def result(chosen: MeasuredFinalist) -> MeasuredSearch:
        rounds = (Round(confidence=0.9, evaluations=4, finalists=(chosen,)),)
        return MeasuredSearch(device="desk", chosen=chosen, rounds=rounds, inputs={})

    require_kept(result(finalist(1, 1.0, 0.9)))
    differs = finalist(1, 1.0, 0.9, passed=False)
    with pytest.raises(ParityError, match="missed no limit but differs") as parity:
        require_kept(result(differs))
    over = replace(differs, limits=(limit_result("decode@8<=2ms", 2e-3, 2.2e-3),))
    with pytest.raises(
        LimitMissedError, match=rf"{differs.key}, missed decode@8<=2ms \(110.0% of it\)"
    ) as missed:
        require_kept(result(over))
    assert parity.value.exit_code == missed.value.exit_code == 3
    assert (differs.outcome, over.outcome, finalist(1, 1.0, 0.9).outcome) == ("parity", "missed", "kept")


def test_noisy_machine_is_refused_before_limits_are_judged(run_folder: Path, formfit: Program) -> None:
    done = formfit(*words(run_folder, "--limit", "prefill@64<=9s", "--max-noise", "0.01"))
    assert done.returncode == 2
    assert "noise" in done.stderr.splitlines()[-1] or "differ" in done.stderr.splitlines()[-1]
    assert not (run_folder / "run" / "searches" / "kept" / "measured_search.json").exists()


def test_card_of_another_machine_is_refused(run_folder: Path, formfit: Program) -> None:
    card = run_folder / "devices" / "desk" / "device.json"
    value = json.loads(card.read_text())
    value["fingerprint"]["cpu"] = "Other"
    card.write_text(json.dumps(value))
    done = formfit(*words(run_folder))
    assert done.returncode == 2
    assert "this machine is not the one of the card (cpu: card Other" in done.stderr.splitlines()[-1]


def test_best_finalists_are_distilled_before_one_is_chosen(run_folder: Path, formfit: Program) -> None:
    given = words(run_folder, "--limit", "prefill@64<=9s", "--distill-top", "2")
    done = formfit(*given)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["finalists"]
    assert first["after"]["loss_nats"] <= second["after"]["loss_nats"]
    measured = {row["key"] for one in found["measured_search"]["rounds"] for row in one["finalists"]}
    assert {first["key"], second["key"]} <= measured
    folder = run_folder / "run" / "submodels" / f"{first['key']}-kept"
    architecture = json.loads((folder / "architecture.json").read_text())
    assert architecture["key"] == first["key"]
    assert json.loads((folder / "verify.json").read_text())["parity"]["kept"]
    plain = (folder.parent / first["key"] / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() != plain
    assert json.loads(formfit(*given).stdout) == found
