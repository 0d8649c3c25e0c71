"""The best architectures by scores of slots against brute force over small spaces."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from search.problem.limit import within
from search.problem.solution_pool import best_architectures
from space import Space
from space.genome import Genomes, encoding, split
from space.slot_scores import PairTerms, SlotScores
from tests.search.problem.test_feasibility import (
    SPACES,
    bounds_to_try,
    everything,
    priced,
    random_cost,
)

Floats = NDArray[np.float64]
GROUPS = 3


def random_scores(
    space: Space, rng: np.random.Generator, *, pairs: bool, ordered: bool = False
) -> SlotScores:
    slots, mixers = encoding(space).slots, len(space.mixer_options)
    heads, ffns = len(space.head_options), len(space.ffn_options)
    terms = None
    if pairs:
        terms = PairTerms(
            mixer_group=rng.integers(0, GROUPS, (slots, mixers, heads)),
            empty_group=rng.integers(0, GROUPS, slots),
            ffn_group=rng.integers(0, GROUPS, (slots, ffns)),
            mixers=rng.normal(size=(slots - 1, GROUPS, GROUPS)),
            ffns=rng.normal(size=(slots - 1, GROUPS, GROUPS)),
            layers=rng.normal(size=(slots, GROUPS, GROUPS)) * (rng.random((slots, 1, 1)) < 0.7),
        )
    return SlotScores(
        space=space,
        constant=float(rng.normal()),
        width=rng.normal(size=len(space.width)),
        mixer=rng.normal(size=(slots, mixers, heads)),
        ffn=rng.normal(size=(slots, ffns)),
        empty=rng.normal(size=slots),
        pairs=terms,
        removal_order=tuple(int(s) for s in rng.permutation(slots)[: slots - 1]) if ordered else None,
    )


def naive_score(scores: SlotScores, genome: NDArray[np.int16]) -> float:
    """The score of one genome, slot by slot."""
    slots = genome[1:].reshape(-1, 3).tolist()
    total = scores.constant + scores.width[genome[0]]
    groups = []
    for slot, (mixer, heads, ffn) in enumerate(slots):
        empty = mixer == ffn == 0
        total += scores.empty[slot] if empty else scores.mixer[slot, mixer, heads] + scores.ffn[slot, ffn]
        if scores.pairs is not None:
            of_mixer = scores.pairs.mixer_group[slot, mixer, heads]
            groups.append(
                (scores.pairs.empty_group[slot], 0)
                if empty
                else (of_mixer, scores.pairs.ffn_group[slot, ffn])
            )
            total += scores.pairs.layers[slot, groups[-1][0], groups[-1][1]]
    if scores.pairs is not None:
        for slot, (one, other) in enumerate(pairwise(groups)):
            total += scores.pairs.mixers[slot, one[0], other[0]] + scores.pairs.ffns[slot, one[1], other[1]]
    return float(total)


def in_order(scores: SlotScores, genomes: Genomes) -> NDArray[np.bool_]:
    """The genomes whose empty slots are the first of the removal order."""
    _, mixer, _, ffn = split(genomes)
    empty = [set(np.flatnonzero(row).tolist()) for row in (mixer == 0) & (ffn == 0)]
    order = scores.removal_order or ()
    return np.array([slots == set(order[: len(slots)]) for slots in empty])


@pytest.mark.parametrize("name", SPACES)
def test_scores_are_sums_over_slots_and_pairs(name: str) -> None:
    rng = np.random.default_rng(0)
    genomes = everything(name)
    some = genomes[rng.integers(0, len(genomes), 50)]
    for pairs in (False, True):
        scores = random_scores(SPACES[name], rng, pairs=pairs)
        np.testing.assert_allclose(scores(some), [naive_score(scores, row) for row in some], rtol=1e-12)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("name", SPACES)
def test_best_architectures_equal_brute_force(name: str, pairs: bool, ordered: bool) -> None:
    """Under up to three limits with peaks, shared costs and footprints: the best and the next best ones."""
    space, genomes = SPACES[name], everything(name)
    rng = np.random.default_rng((3, pairs, ordered))
    decided = set()
    for style, number in (("any", 1), ("ties", 2), ("lacking", 3)):
        scores = random_scores(space, rng, pairs=pairs, ordered=ordered)
        costs = [random_cost(space, rng, style) for _ in range(number)]
        values = priced(costs, genomes)
        tried = bounds_to_try(values, rng)
        for bounds in [tried[i] for i in rng.permutation(len(tried))[:2]]:
            kept = (values <= bounds * (1 + 1e-9)).all(axis=1) & np.isfinite(values).all(axis=1)
            if ordered:
                kept &= in_order(scores, genomes)
            expected = np.sort(scores(genomes[kept]))[:4]
            found = best_architectures(scores, costs, list(bounds), 4)
            np.testing.assert_allclose(scores(found), expected, rtol=1e-7, atol=1e-7)
            assert len(np.unique(found, axis=0)) == len(found)
            for row, cost in zip(priced(costs, found), bounds[None].repeat(len(found), 0), strict=True):
                assert all(within(value, bound) for value, bound in zip(row, cost, strict=True))
            decided.add(len(expected))
    assert len(decided) > 1


def test_all_architectures_are_listed_once() -> None:
    """More are wanted than there are."""
    space = SPACES["no FFN"]
    rng = np.random.default_rng(0)
    scores = random_scores(space, rng, pairs=True)
    costs = [random_cost(space, rng, "any")]
    values = priced(costs, everything("no FFN"))[:, 0]
    bound = float(np.sort(values)[12])
    found = best_architectures(scores, costs, [bound], 100)
    kept = everything("no FFN")[values <= bound * (1 + 1e-9)]
    assert {row.tobytes() for row in found} == {row.tobytes() for row in kept}
    assert (np.diff(scores(found)) >= -1e-9).all()
