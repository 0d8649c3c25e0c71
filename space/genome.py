"""Genomes: architectures as rows of small integers, and what evolution does to them.

A genome has 1 + 3 * slots genes: the width, then for each slot a mixer option, a head
option and an FFN option, each an index into the space's lists (index 0 of mixer and FFN
means absent). Genes without effect are 0 in the canonical form, so that one architecture
has one genome. Everything here works on arrays [N, G] and takes the random generator that
it draws from; nothing loops until it happens to succeed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.architecture import Architecture, Layer, has_heads
from space.io.errors import InputError
from space.space import Space

Genomes = NDArray[np.int16]
EMPTY, FFN_ONLY, FULL, LINEAR, LOCAL = range(5)
_CLASS = {"full": FULL, "linear": LINEAR, "local": LOCAL}


@dataclass(frozen=True)
class Encoding:
    """A space's lists as arrays, made once."""

    slots: int
    cardinalities: NDArray[np.int64]  # [G] number of values of each gene
    classes: NDArray[np.int64]  # [mixer options] class of each mixer option
    max_linear_kinds: NDArray[np.int64]  # [mixer options] which linear kind an option is, -1 for the others
    headless: NDArray[np.bool_]  # [mixer options]
    kind_count: int
    must_be_full: NDArray[np.bool_]  # [slots] must be full
    patterns: NDArray[np.int64]  # [P, 4]
    least_ffn: int  # the smallest FFN gene of a layer that has a mixer

    @property
    def genes(self) -> int:
        """Genes of a genome."""
        return len(self.cardinalities)


@lru_cache(maxsize=64)
def encoding(space: Space) -> Encoding:
    """The arrays that the functions of this module work on."""
    options = space.mixer_options
    names = sorted({m for m, _ in options[1:] if space.mixer_class(m) == "linear"})
    must_be_full = np.zeros(space.slots, bool)
    must_be_full[list(space.hybrid.full_layers)] = True
    per_slot = [len(options), len(space.head_options), len(space.ffn_options)]
    return Encoding(
        slots=space.slots,
        cardinalities=np.array([len(space.width), *per_slot * space.slots]),
        classes=np.array([EMPTY] + [_CLASS[space.mixer_class(m)] for m, _ in options[1:]]),
        max_linear_kinds=np.array([names.index(m) if m in names else -1 for m, _ in options]),
        headless=np.array([not has_heads(m) for m, _ in options]),
        kind_count=len(names),
        must_be_full=must_be_full,
        patterns=np.array(space.all_patterns),
        least_ffn=0 if space.layer.ffn[0] == 0 else 1,
    )


def split(genomes: Genomes) -> tuple[Genomes, Genomes, Genomes, Genomes]:
    """Views of a genome array: width [N], mixer [N, L], heads [N, L], ffn [N, L]."""
    return genomes[:, 0], genomes[:, 1::3], genomes[:, 2::3], genomes[:, 3::3]


def encode(space: Space, architectures: Sequence[Architecture]) -> Genomes:
    """The genomes [N, G] of architectures.

    Raises:
        InputError: an architecture has a value that the space does not list.
    """
    rows = np.zeros((len(architectures), encoding(space).genes), np.int16)
    for row, architecture in zip(rows, architectures, strict=True):
        try:
            if len(architecture.layers) != space.slots:
                raise ValueError(f"{len(architecture.layers)} layers, the space has {space.slots}")
            row[0] = _index(space.width, architecture.width, "width")
            for slot, layer in enumerate(architecture.layers):
                where = f"layers[{slot}]"
                heads = (layer.heads, layer.kv_heads)
                head_options = space.head_options if has_heads(layer.mixer) else ((0, 0),)
                row[1 + 3 * slot] = _index(space.mixer_options, (layer.mixer, layer.window), where)
                row[2 + 3 * slot] = _index(head_options, heads, f"{where} (heads, kv_heads)")
                row[3 + 3 * slot] = _index(space.ffn_options, layer.ffn, f"{where}.ffn")
        except ValueError as error:
            raise InputError(
                f"architecture {architecture.key} is not of space {space.name}: {error}"
            ) from None
    return rows


def _index(options: tuple[Any, ...], value: Any, where: str) -> int:
    if value not in options:
        raise ValueError(f"{where}: {value} is not among {', '.join(map(str, options))}")
    return options.index(value)


def decode(space: Space, genomes: Genomes) -> list[Architecture]:
    """The architectures of canonical genomes [N, G]."""
    return [_decode(space, tuple(int(g) for g in row)) for row in genomes]


def _decode(space: Space, genome: tuple[int, ...]) -> Architecture:
    layers = []
    for mixer_gene, head_gene, ffn_gene in zip(genome[1::3], genome[2::3], genome[3::3], strict=True):
        mixer, window = space.mixer_options[mixer_gene]
        heads, kv_heads = space.head_options[head_gene] if has_heads(mixer) else (0, 0)
        layers.append(
            Layer(mixer=mixer, heads=heads, kv_heads=kv_heads, window=window, ffn=space.ffn_options[ffn_gene])
        )
    return Architecture(space.width[genome[0]], tuple(layers))


def canonical(space: Space, genomes: Genomes) -> Genomes:
    """A copy in which genes without effect are 0."""
    genomes = genomes.copy()
    _, mixer, heads, _ = split(genomes)
    heads[encoding(space).headless[mixer]] = 0
    return genomes


def slot_classes(space: Space, genomes: Genomes) -> NDArray[np.int64]:
    """The class [N, L] of every slot: EMPTY, FFN_ONLY, FULL, LINEAR or LOCAL."""
    _, mixer, _, ffn = split(genomes)
    classes = encoding(space).classes[mixer]
    return np.where((mixer == 0) & (ffn > 0), FFN_ONLY, classes)


def pattern_counts(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many slots [N, 4] are FFN_ONLY, FULL, LINEAR and LOCAL."""
    return np.stack([(classes == c).sum(axis=1) for c in (FFN_ONLY, FULL, LINEAR, LOCAL)], axis=1)


def kinds_used(space: Space, genomes: Genomes) -> NDArray[np.int64]:
    """How many slots [N, kinds] use each kind of linear mixer."""
    enc = encoding(space)
    kinds = enc.max_linear_kinds[split(genomes)[1]]
    return np.asarray((kinds[:, :, None] == np.arange(enc.kind_count)).sum(axis=1))


def contains(space: Space, genomes: Genomes) -> NDArray[np.bool_]:
    """Which rows [N] are canonical genomes of the space."""
    enc = encoding(space)
    genomes = np.asarray(genomes)
    inside = np.asarray(((genomes >= 0) & (genomes < enc.cardinalities)).all(axis=1))
    safe = np.where(inside[:, None], genomes, 0).astype(np.int16)
    classes = slot_classes(space, safe)
    counts = pattern_counts(classes)
    known = (counts[:, None, :] == enc.patterns[None]).all(axis=2).any(axis=1)
    must_be_full = np.equal(classes[:, enc.must_be_full], FULL).all(axis=1)
    kinds = (kinds_used(space, safe) > 0).sum(axis=1) <= space.max_linear_kinds
    ffn = ~((split(safe)[3] < enc.least_ffn) & (classes > FFN_ONLY)).any(axis=1)
    same = (canonical(space, safe) == safe).all(axis=1)
    return np.asarray(inside & known & must_be_full & kinds & ffn & same)


def size(space: Space) -> int:
    """How many distinct architectures the space has, exactly."""
    enc = encoding(space)
    heads = {
        option: 1 if enc.headless[option] else len(space.head_options)
        for option in range(len(enc.max_linear_kinds))
    }
    ffns = len(space.ffn_options) - enc.least_ffn
    by_class: Counter[tuple[int, int]] = Counter()  # (class, linear kind) -> choices of one slot
    by_class[EMPTY, -1] = 1
    if "none" in space.layer.mixer:
        by_class[FFN_ONLY, -1] = len(space.ffn_options) - 1
    for option in range(1, len(enc.max_linear_kinds)):
        by_class[int(enc.classes[option]), int(enc.max_linear_kinds[option])] += heads[option] * ffns

    # (ffn only, full, linear, local, set of kinds) -> ways to fill the slots so far
    ways: Counter[tuple[int, int, int, int, frozenset[int]]] = Counter({(0, 0, 0, 0, frozenset()): 1})
    for slot in range(enc.slots):
        following: Counter[tuple[int, int, int, int, frozenset[int]]] = Counter()
        for (ffn_only, full, linear, local, kinds), number in ways.items():
            for (kind_class, kind), choices in by_class.items():
                if enc.must_be_full[slot] and kind_class != FULL:
                    continue
                used = kinds | {kind} if kind_class == LINEAR else kinds
                if len(used) > space.max_linear_kinds:
                    continue
                state = (
                    ffn_only + (kind_class == FFN_ONLY),
                    full + (kind_class == FULL),
                    linear + (kind_class == LINEAR),
                    local + (kind_class == LOCAL),
                    used,
                )
                following[state] += number * choices
        ways = following
    allowed = set(space.all_patterns)
    return len(space.width) * sum(n for state, n in ways.items() if state[:4] in allowed)


def _extreme(space: Space, *, largest: bool) -> Architecture:
    """The architecture at one end of every axis."""
    end = -1 if largest else 0
    patterns = [
        p
        for p in space.all_patterns
        if p.depth == (max if largest else min)(q.depth for q in space.all_patterns)
    ]
    # Most attention and fewest FFN-only layers for the largest, the opposite for the smallest.
    pattern = max(
        patterns, key=lambda p: (p[1] - p[0], p[1], p[2]) if largest else (p[0] - p[1], -p[1], -p[3])
    )
    enc = encoding(space)
    must_be_full = [int(s) for s in np.flatnonzero(enc.must_be_full)]
    spread = [int(s) for s in np.linspace(0, enc.slots - 1, pattern.depth).round()]
    present = sorted(
        must_be_full + [s for s in spread if s not in must_be_full][: pattern.depth - len(must_be_full)]
    )
    if len(present) < pattern.depth:
        present = sorted(
            present + [s for s in range(enc.slots) if s not in present][: pattern.depth - len(present)]
        )
    wanted = dict.fromkeys(present, LINEAR)
    rest = [s for s in present if s not in must_be_full]
    more = pattern[1] - len(must_be_full)
    full = (
        must_be_full + [rest[int(i)] for i in np.linspace(0, len(rest) - 1, more).round()]
        if more
        else must_be_full
    )
    wanted |= dict.fromkeys(full, FULL)
    others = [s for s in present if wanted[s] != FULL]
    wanted |= dict.fromkeys(others[: pattern[0]], FFN_ONLY)
    wanted |= dict.fromkeys(others[pattern[0] : pattern[0] + pattern[3]], LOCAL)
    first = {c: int(np.flatnonzero(enc.classes == c)[0]) for c in set(wanted.values()) if c > FFN_ONLY}
    genome = np.zeros((1, enc.genes), np.int16)
    genome[0, 0] = len(space.width) - 1 if largest else 0
    for slot, kind in wanted.items():
        ffn = len(space.ffn_options) - 1 if largest else (1 if kind == FFN_ONLY else enc.least_ffn)
        heads = range(len(space.head_options))[end] if kind > FFN_ONLY else 0
        genome[0, 1 + 3 * slot : 4 + 3 * slot] = (first.get(kind, 0), heads, ffn)
    return decode(space, canonical(space, genome))[0]


def largest(space: Space) -> Architecture:
    """Every axis at its greatest, with attention wherever the rule allows it."""
    return _extreme(space, largest=True)


def smallest(space: Space) -> Architecture:
    """Every axis at its least, with as little attention as the rule allows."""
    return _extreme(space, largest=False)
