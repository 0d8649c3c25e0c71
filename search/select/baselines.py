"""Baselines of an adapted model: uniform cuts of the parent within the same limits, and a random model.

They are what one would try without a search. Each family is a sequence of architectures, from the largest
down, and its member is the first that keeps all limits by the same predictions as the search's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from search.engine.block_scores import BLOCK_SCORES
from search.problem.limit import within
from search.problem.problem import Problem
from space import Architecture, InputError, Layer, Space, genome, variation
from space.io.parquet import read_table

PERIOD = 4  # one layer of attention in as many
HYBRID_MIXERS = ("sliding", "gated_deltanet")
DRAWN = 4096  # random architectures, of which the costliest that keeps the limits is taken


def baselines(problem: Problem, removal_order: Sequence[int] = (), seed: int = 0) -> dict[str, Architecture]:
    """The baselines that a space has and that keep the limits, by name.

    Args:
        problem: the space, the predictors and the limits.
        removal_order: slots in the order in which layers are removed; the last but one first by default.
        seed: of the random architecture.

    Raises:
        InputError: a limit needs a device that is not given.
    """
    space = problem.space
    families = {
        "fewer layers": _fewer_layers(space, removal_order),
        "smaller FFNs": _smaller_ffns(space, genome.largest(space)),
        **{f"1:{PERIOD - 1} {mixer}": _hybrids(space, mixer) for mixer in HYBRID_MIXERS},
        "random": _random(problem, seed),
    }
    found = {name: _first_kept(problem, list(family)) for name, family in families.items()}
    return {name: architecture for name, architecture in found.items() if architecture}


def removal_order(folder: Path, space: Space) -> tuple[int, ...]:
    """Slots in the order in which layers are removed: those first whose mixer and FFN lose least alone.

    Args:
        folder: of the supernet's training, with the scores of its blocks.
        space: of the supernet.

    Returns:
        All slots; none where the blocks were not scored.

    Raises:
        InputError: the file of scores is not whole.
    """
    path = folder / "scores.parquet"
    if not path.is_file():
        return ()
    table, _ = read_table(path, BLOCK_SCORES)
    lost = table[table["candidate"].isin(["none", "ffn-0"])].groupby("slot")["kl"].sum()
    return tuple(map(int, lost.sort_values(kind="stable").index)) if len(lost) == space.slots else ()


def _first_kept(problem: Problem, family: Sequence[Architecture]) -> Architecture | None:
    """The first architecture of the space that keeps all limits."""
    family = [architecture for architecture in family if _is_of(problem.space, architecture)]
    if not family:
        return None
    rows, kept = genome.encode(problem.space, family), np.ones(len(family), bool)
    for constraint in problem.constraints():
        kept &= within(constraint.cost(rows), constraint.bound)
    return family[int(kept.argmax())] if kept.any() else None


def _is_of(space: Space, architecture: Architecture) -> bool:
    try:
        genome.encode(space, [architecture])
    except InputError:
        return False
    return True


def _fewer_layers(space: Space, removal_order: Sequence[int]) -> Iterator[Architecture]:
    """The largest architecture with ever more layers removed, the fewest that the space allows at last."""
    largest = genome.largest(space)
    layers = list(largest.layers)
    order = list(removal_order) or [*range(space.slots - 2, -1, -1), space.slots - 1]
    yield largest
    for slot in order[: len(largest.layers) - min(space.depth)]:
        layers[slot] = Layer()
        yield replace(largest, layers=tuple(layers))


def _smaller_ffns(space: Space, base: Architecture) -> Iterator[Architecture]:
    """An architecture with one FFN size in all layers, the largest size first."""
    for size in sorted((size for size in space.layer.ffn if size), reverse=True):
        yield replace(base, layers=tuple(replace(layer, ffn=size) for layer in base.layers))


def _hybrids(space: Space, mixer: str) -> Iterator[Architecture]:
    """Every fourth layer as in the largest architecture, the others of one mixer, with ever smaller FFNs."""
    if mixer not in {name for name, _ in space.mixer_options}:
        return
    largest = genome.largest(space)
    window = max((window for name, window in space.mixer_options if name == mixer), key=lambda w: w or 0)
    layers = [
        layer if slot % PERIOD == PERIOD - 1 else replace(layer, mixer=mixer, window=window)
        for slot, layer in enumerate(largest.layers)
    ]
    yield from _smaller_ffns(space, replace(largest, layers=tuple(layers)))


def _random(problem: Problem, seed: int) -> Iterator[Architecture]:
    """Random architectures, those that use most of their tightest limit first."""
    rows = variation.sample(problem.space, np.random.default_rng(seed), DRAWN)
    constraints = problem.constraints()
    if not constraints:
        return
    used = np.max([one.cost(rows) / one.bound for one in constraints], axis=0)
    order = np.argsort(-used, kind="stable")
    order = order[used[order] <= 1]
    yield from genome.decode(problem.space, rows[order[:1]])
