"""Searches led by an integer programme: a supernet's KL, a made objective, resumed and with workers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import kendalltau

from search.engine.block_scores import BLOCK_SCORES, read_block_scores, score_file
from search.engine.config import SearchConfig
from search.engine.entry import run_search
from search.engine.evaluations import EVALUATIONS, genomes_of
from search.engine.front import Front
from search.engine.search import Search
from search.engine.supernet_evaluator import evaluator
from search.problem.problem import Problem
from search.strategies.pareto import hypervolume
from search.testing import contract_space
from space import Architecture, InputError, Space, genome
from space.cost import params
from space.io.parquet import read_table, write_table
from space.slot_scores import SlotScores
from supernet.evaluate import EvaluationSet
from supernet.supernet import Supernet
from tests.contracts import scatter
from tests.search.problem.test_slot_program import random_scores

SPACE = contract_space(depth=[2, 3, 4], mixer=["attention", "linear", "gated_deltanet", "none"])
CONFIG = SearchConfig(
    objectives=("kl", "params"), limits=("params<=60%",), strategy="mip-nsga2", generations=4, population=8
)
PROBLEM = Problem(SPACE, objectives=CONFIG.objectives, limits=CONFIG.limits)


def made_loss(space: Space, rng: np.random.Generator) -> SlotScores:
    """Scores with pair terms: every replacement of the parent costs something, neighbours some more."""
    scores = random_scores(space, rng, pairs=True)
    parent = genome.encode(space, [genome.largest(space)])[0]
    _, mixer, heads, ffn = (part[0] for part in genome.split(parent[None]))
    slots = np.arange(len(mixer))
    parts = [np.exp(rng.normal(-2, 1, part.shape)) for part in (scores.mixer, scores.ffn, scores.empty)]
    parts[0][slots, mixer, heads] = parts[1][slots, ffn] = 0.0
    assert scores.pairs is not None
    pairs = replace(scores.pairs, **{
        name: 0.2 * np.abs(getattr(scores.pairs, name)) for name in ("mixers", "ffns", "layers")
    })  # fmt: skip
    width = np.linspace(0.5, 0.0, len(space.width))
    return replace(
        scores, constant=1.0, width=width, mixer=parts[0], ffn=parts[1], empty=parts[2] + 0.3, pairs=pairs
    )


def data() -> EvaluationSet:
    rng = np.random.default_rng(0)
    windows = rng.integers(0, SPACE.vocab_size, (4, 17))
    return EvaluationSet(
        tokens=windows[:, :-1], targets=windows[:, 1:], recallable=rng.random((4, 16)) < 0.5, text_bytes=None
    )


def kl_search(folder: Path, workers: int = 0, **options: Any) -> bytes:
    supernet = Supernet(SPACE)
    scatter(supernet)
    sets = dict.fromkeys(CONFIG.windows_by_stage(), data())
    with evaluator(supernet, sets, workers, objectives=PROBLEM.registered_qualities) as evaluate:
        Search(PROBLEM, CONFIG, folder, {}, **options).run(evaluate)
    return (folder / "front.json").read_bytes()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    kl_search(folder)
    return folder


def parts(folder: Path, pattern: str) -> dict[str, tuple[NDArray[np.int16], NDArray[np.float64]]]:
    """Genomes and KLs of the parts of the record."""
    tables = {p.stem: read_table(p, EVALUATIONS)[0] for p in sorted(folder.glob(f"evaluations/{pattern}"))}
    return {name: (genomes_of(t), t["kl"].to_numpy(float)) for name, t in tables.items()}


def test_front_keeps_the_limits_and_names_the_kl(searched: Path) -> None:
    front = Front.read(searched / "front.json")
    bound = front.limits[0].bound
    assert front.ranking_quality == "kl"
    assert front.evaluations == 32
    written = json.loads((searched / "front.json").read_text())["members"]
    for member, value in zip(front.members, written, strict=True):
        assert member.predicted.params <= bound
        assert value["kl_nats"] == member.quality("kl") > 0
        assert member.loss_nats > 0
    probes = parts(searched, "part-probes-*")
    first, values = probes["part-probes-0000"]
    assert genome.decode(SPACE, first[:1]) == [genome.largest(SPACE)]
    assert values[0] == 0.0  # the parent itself
    assert (values[1:] > 0).all()


def test_removals_are_conditional_and_greedy(searched: Path) -> None:
    """Each round removes one layer more, beside the best of the last; the last keeps the least depth."""
    rounds = list(parts(searched, "part-probes-*").values())
    depths = [np.unique((rows[:, 1::3] + rows[:, 3::3] > 0).sum(axis=1)) for rows, _ in rounds]
    assert [found.tolist() for found in depths] == [[3, 4], [2]]
    removed = (rounds[0][0][:, 1::3] == 0) & (rounds[0][0][:, 3::3] == 0)
    singles = removed.sum(axis=1) == 1
    best = removed[singles][np.argmin(rounds[0][1][singles])]
    second = (rounds[1][0][:, 1::3] == 0) & (rounds[1][0][:, 3::3] == 0)
    assert (second & best == best).all()
    assert len(second) == 3


def test_agreement_of_the_scores_is_that_of_the_record(searched: Path) -> None:
    """Kendall's tau of plain sums of single replacements, and the number of evaluations."""
    single: dict[bytes, float] = {}
    for rows, values in parts(searched, "part-probes-*").values():
        single |= dict(zip((row.tobytes() for row in rows), values.tolist(), strict=True))
    parent = genome.encode(SPACE, [genome.largest(SPACE)])[0]

    def replaced(*changes: tuple[int, list[int]]) -> float:
        row = parent.copy()
        for place, genes in changes:
            row[place : place + len(genes)] = genes
        return single[row.tobytes()]

    def removed(slots: list[int]) -> float:
        return replaced(*((1 + 3 * slot, [0, 0, 0]) for slot in slots))

    order: list[int] = []
    while True:
        rest = [slot for slot in range(4) if slot not in order]
        if 4 - len(order) == 2:
            break
        order.append(min(rest, key=lambda slot: removed([*order, slot])))
    sums, kls = [], []
    for rows, values in parts(searched, "part-0*").values():
        for row, value in zip(rows, values, strict=True):
            total = replaced((0, [int(row[0])]))
            for slot in range(4):
                genes = row[1 + 3 * slot : 4 + 3 * slot].tolist()
                if genes[0] == genes[2] == 0:
                    n = order.index(slot) if slot in order else -1
                    total += removed([slot]) if n < 0 else removed(order[: n + 1]) - removed(order[:n])
                else:
                    total += replaced((1 + 3 * slot, genes[:2])) + replaced((3 + 3 * slot, genes[2:]))
            sums.append(total)
            kls.append(value)
    front = Front.read(searched / "front.json")
    agreement = front.scores["kl"]
    assert agreement.evaluations == len(kls) == 32
    assert agreement.probes == len(single)
    assert agreement.kendall_tau == pytest.approx(kendalltau(sums, kls).statistic, abs=1e-9)
    assert -1 <= agreement.kendall_tau_with_pairs <= 1


@pytest.mark.parametrize("lost", ["part-probes-0001", "part-0002"])
def test_resumed_search_gives_the_same_front(searched: Path, tmp_path: Path, lost: str) -> None:
    """With the parts of the record before one of them."""
    (tmp_path / "evaluations").mkdir()
    order = [f"part-probes-000{i}" for i in range(2)] + [f"part-000{i}" for i in range(4)]
    for name in order[: order.index(lost)]:
        path = Path("evaluations") / f"{name}.parquet"
        (tmp_path / path).write_bytes((searched / path).read_bytes())
    assert kl_search(tmp_path) == (searched / "front.json").read_bytes()


def test_workers_change_no_byte(searched: Path, tmp_path: Path) -> None:
    assert kl_search(tmp_path, workers=2) == (searched / "front.json").read_bytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_front_is_no_worse_than_that_of_random_search(tmp_path: Path, seed: int) -> None:
    """On sums with pair terms, with as many evaluations in all: the hypervolume, and what is best of all."""
    scores = made_loss(SPACE, np.random.default_rng(seed))
    calls = 0

    def loss(architecture: Architecture) -> float:
        nonlocal calls
        calls += 1
        return float(scores(genome.encode(SPACE, [architecture]))[0])

    problem = Problem(SPACE, objectives=["loss", "params"], limits=["params<=70%"])
    fronts = {}
    for strategy in ("mip-nsga2", "random"):
        generations = 5 if strategy == "mip-nsga2" else math.ceil(calls / 8)
        front = run_search(problem, loss, tmp_path / strategy, strategy, 8, generations, seed)
        fronts[strategy] = np.array([[m.loss_nats, m.predicted.params] for m in front.members])
    largest = genome.largest(SPACE)
    worst = scores(genome.encode(SPACE, [genome.smallest(SPACE)]))[0]
    reference = np.array([worst, params(largest, SPACE.config)])
    volume = {name: hypervolume(front, reference) for name, front in fronts.items()}
    assert volume["mip-nsga2"] >= volume["random"]
    assert fronts["mip-nsga2"][:, 0].min() <= fronts["random"][:, 0].min() + 1e-9


def test_block_scores_of_the_training_are_taken(tmp_path: Path) -> None:
    """Each row as the probe of its replacement; removals and the generations are evaluated."""
    rows = [
        {
            "slot": slot,
            "candidate": name,
            "kl": 1000 + slot + 0.01 * i,
            "loss_nats": 3.0,
            "recall_loss_nats": None,
        }
        for slot in range(4)
        for i, name in enumerate(["none", "linear-h1-k1", "gated_deltanet-h2-k2", "ffn-0", "ffn-16"])
    ]
    table = pd.DataFrame(rows).astype({"recall_loss_nats": float})
    write_table(tmp_path / "scores.parquet", BLOCK_SCORES, {}, table)
    assert score_file(tmp_path, PROBLEM, CONFIG) == tmp_path / "scores.parquet"
    assert score_file(tmp_path, PROBLEM, CONFIG.model_copy(update={"strategy": "nsga2"})) is None
    assert score_file(tmp_path, Problem(SPACE, objectives=["loss"]), CONFIG) is None
    known = read_block_scores(tmp_path / "scores.parquet", SPACE)
    kl_search(tmp_path, known_probes=known)
    probes = {key: float(kl) for rows, kls in parts(tmp_path, "part-probes-*").values()
              for key, kl in zip((a.key for a in genome.decode(SPACE, rows)), kls, strict=True)}  # fmt: skip
    own = genome.largest(SPACE)
    for row in rows:
        layer = own.layers[row["slot"]]
        changed = {
            "none": replace(layer, mixer="none", heads=0, kv_heads=0),
            "linear-h1-k1": replace(layer, mixer="linear", heads=1, kv_heads=1),
            "gated_deltanet-h2-k2": replace(layer, mixer="gated_deltanet", heads=2, kv_heads=2),
            "ffn-0": replace(layer, ffn=0),
            "ffn-16": replace(layer, ffn=16),
        }[row["candidate"]]
        layers = list(own.layers)
        layers[row["slot"]] = changed
        assert probes[Architecture(own.width, tuple(layers)).key] == row["kl"]
    assert sum(value >= 1000 for value in probes.values()) == len(rows)
    assert all(kl < 1000 for _, kls in parts(tmp_path, "part-0*").values() for kl in kls)
    write_table(tmp_path / "scores.parquet", BLOCK_SCORES, {}, table.assign(candidate="mamba2-h1-k1"))
    with pytest.raises(InputError, match="mamba2-h1-k1 at slot 0 is no block of space contract"):
        read_block_scores(tmp_path / "scores.parquet", SPACE)
