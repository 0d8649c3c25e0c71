"""Genomes: architectures as rows of small integers.

A genome has 1 + 3 * slots genes: the width, then a mixer option, a head option and an FFN option for each
slot. Each gene is an index into a list of the space; index 0 of mixer and FFN means absent. Genes without
effect are 0 in the canonical form, so that every architecture has exactly one genome. Functions work on
arrays [N, G] of genomes. Sampling, repair, mutation and crossover are in :mod:`space.variation`.

Shape suffixes: N genomes, G genes, L slots, P patterns (layer counts).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from space.architecture import Architecture, Layer, has_heads
from space.io.errors import InputError
from space.space import LayerCounts, Space

Genomes = NDArray[np.int16]
Option = TypeVar("Option")
EMPTY, FFN_ONLY, FULL, LINEAR, LOCAL = range(5)
_CLASS = {"full": FULL, "linear": LINEAR, "local": LOCAL}


@dataclass(frozen=True)
class Encoding:
    """The lists of a space as arrays.

    Attributes:
        slots: number of layer slots L.
        cardinalities: number of values of each gene [G].
        classes: class of each mixer option [mixer options].
        linear_kinds: index of each mixer option's linear mixer [mixer options]; -1 for other classes.
        headless: mixer options without heads [mixer options].
        kind_count: number of linear mixers.
        must_be_full: slots that must have a full mixer [L].
        patterns: layer counts of the space [P, 4].
        least_ffn: smallest FFN gene of a layer with a mixer.
    """

    slots: int
    cardinalities: NDArray[np.int64]
    classes: NDArray[np.int64]
    linear_kinds: NDArray[np.int64]
    headless: NDArray[np.bool_]
    kind_count: int
    must_be_full: NDArray[np.bool_]
    patterns: NDArray[np.int64]
    least_ffn: int

    @property
    def genes(self) -> int:
        """Number of genes G."""
        return len(self.cardinalities)


@lru_cache(maxsize=64)
def encoding(space: Space) -> Encoding:
    """The encoding of a space, cached.

    Args:
        space: the space.
    """
    options = space.mixer_options
    names = sorted({m for m, _ in options[1:] if space.mixer_class(m) == "linear"})
    must_be_full = np.zeros(space.slots, bool)
    must_be_full[list(space.hybrid.full_layers)] = True
    per_slot = [len(options), len(space.head_options), len(space.ffn_options)]
    return Encoding(
        slots=space.slots,
        cardinalities=np.array([len(space.width), *per_slot * space.slots]),
        classes=np.array([EMPTY] + [_CLASS[space.mixer_class(m)] for m, _ in options[1:]]),
        linear_kinds=np.array([names.index(m) if m in names else -1 for m, _ in options]),
        headless=np.array([not has_heads(m) for m, _ in options]),
        kind_count=len(names),
        must_be_full=must_be_full,
        patterns=np.array(space.all_patterns),
        least_ffn=0 if space.layer.ffn[0] == 0 else 1,
    )


def split(genomes: Genomes) -> tuple[Genomes, Genomes, Genomes, Genomes]:
    """Split genomes [N, G] into views: width [N], mixer [N, L], heads [N, L], ffn [N, L].

    Args:
        genomes: genomes [N, G].
    """
    return genomes[:, 0], genomes[:, 1::3], genomes[:, 2::3], genomes[:, 3::3]


def encode(space: Space, architectures: Sequence[Architecture]) -> Genomes:
    """Encode architectures as genomes [N, G].

    Args:
        space: the space.
        architectures: the architectures.

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


def _index(options: Sequence[Option], value: Option, where: str) -> int:
    if value not in options:
        raise ValueError(f"{where}: {value} is not among {', '.join(map(str, options))}")
    return options.index(value)


def decode(space: Space, genomes: Genomes) -> list[Architecture]:
    """Decode canonical genomes.

    Args:
        space: the space.
        genomes: canonical genomes [N, G].
    """
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
    """Copy genomes with genes without effect set to 0.

    Args:
        space: the space.
        genomes: genomes [N, G].
    """
    genomes = genomes.copy()
    _, mixer, heads, _ = split(genomes)
    heads[encoding(space).headless[mixer]] = 0
    return genomes


def slot_classes(space: Space, genomes: Genomes) -> NDArray[np.int64]:
    """The class of every slot [N, L]: EMPTY, FFN_ONLY, FULL, LINEAR or LOCAL.

    Args:
        space: the space.
        genomes: genomes [N, G].
    """
    _, mixer, _, ffn = split(genomes)
    classes = encoding(space).classes[mixer]
    return np.where((mixer == 0) & (ffn > 0), FFN_ONLY, classes)


def pattern_counts(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of slots that are FFN_ONLY, FULL, LINEAR and LOCAL [N, 4].

    Args:
        classes: class of every slot [N, L].
    """
    return np.stack([(classes == c).sum(axis=1) for c in (FFN_ONLY, FULL, LINEAR, LOCAL)], axis=1)


def kinds_used(space: Space, genomes: Genomes) -> NDArray[np.int64]:
    """The number of slots that use each linear mixer [N, kinds].

    Args:
        space: the space.
        genomes: genomes [N, G].
    """
    enc = encoding(space)
    kinds = enc.linear_kinds[split(genomes)[1]]
    return np.asarray((kinds[:, :, None] == np.arange(enc.kind_count)).sum(axis=1))


def contains(space: Space, genomes: Genomes) -> NDArray[np.bool_]:
    """Mask of the rows that are canonical genomes of the space [N].

    Args:
        space: the space.
        genomes: any integers [N, G].
    """
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


def reasons_outside(space: Space, genome: NDArray[np.int16]) -> str:
    """Why the hybrid rule excludes a genome, and what it allows instead.

    Args:
        space: the space.
        genome: with values of the space [G].
    """
    enc, row = encoding(space), genome[None]
    classes = slot_classes(space, row)[0]
    counts = LayerCounts(*map(int, pattern_counts(classes[None])[0]))
    slots = [int(i) for i in np.flatnonzero(enc.must_be_full & (classes != FULL))]
    if slots:
        return f"slot {slots[0]} has no full mixer, and full_layers {list(space.hybrid.full_layers)} need one"
    kinds = int((kinds_used(space, row) > 0).sum())
    if kinds > space.max_linear_kinds:
        return f"it has {kinds} kinds of linear mixers, max_linear_kinds is {space.max_linear_kinds}"
    if counts.depth not in space.depth:
        return f"it has {counts.depth} layers, depth is {list(space.depth)}"
    if counts not in space.all_patterns:
        mixers = counts.full + counts.linear
        alike = {
            f"{p.full} full and {p.linear} linear" for p in space.all_patterns if p.full + p.linear == mixers
        }
        return (
            f"it has {counts.full} full and {counts.linear} linear layers; ratios "
            f"{list(space.hybrid.ratios)} allow {', '.join(sorted(alike)[:8]) or 'no such number of layers'}"
        )
    return "a layer with a mixer has no FFN, or the values of an empty slot are not zero"


def size(space: Space) -> int:
    """The exact number of distinct architectures of a space.

    Dynamic programming over slots; the state is the number of layers of each class and the set of linear
    mixers.

    Args:
        space: the space.
    """
    enc = encoding(space)
    limited = space.max_linear_kinds < enc.kind_count  # otherwise the kinds in use make no difference
    heads = {
        option: 1 if enc.headless[option] else len(space.head_options)
        for option in range(len(enc.linear_kinds))
    }
    ffns = len(space.ffn_options) - enc.least_ffn
    by_class: Counter[tuple[int, int]] = Counter()  # (class, linear kind) -> choices of one slot
    by_class[EMPTY, -1] = 1
    if "none" in space.layer.mixer:
        by_class[FFN_ONLY, -1] = len(space.ffn_options) - 1
    for option in range(1, len(enc.linear_kinds)):
        kind = int(enc.linear_kinds[option]) if limited else -1
        by_class[int(enc.classes[option]), kind] += heads[option] * ffns

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


def largest(space: Space) -> Architecture:
    """The architecture with the greatest value on every axis and as many full mixers as the space allows.

    Args:
        space: the space.
    """
    depth = max(pattern.depth for pattern in space.all_patterns)
    patterns = [pattern for pattern in space.all_patterns if pattern.depth == depth]
    pattern = max(patterns, key=lambda p: (p.full - p.ffn_only, p.full, p.linear))
    ffn = len(space.ffn_options) - 1
    return _build(space, pattern, len(space.width) - 1, len(space.head_options) - 1, ffn, ffn)


def smallest(space: Space) -> Architecture:
    """The architecture with the least value on every axis and as few full mixers as the space allows.

    Args:
        space: the space.
    """
    depth = min(pattern.depth for pattern in space.all_patterns)
    patterns = [pattern for pattern in space.all_patterns if pattern.depth == depth]
    pattern = max(patterns, key=lambda p: (p.ffn_only - p.full, -p.full, -p.local))
    return _build(space, pattern, 0, 0, encoding(space).least_ffn, 1)


def _build(
    space: Space, pattern: LayerCounts, width: int, heads: int, ffn: int, ffn_only: int
) -> Architecture:
    """The architecture with evenly spread layers of a pattern; the last four arguments are genes."""
    enc = encoding(space)
    genome = np.zeros((1, enc.genes), np.int16)
    genome[0, 0] = width
    for slot, slot_class in _spread(enc, pattern).items():
        genes = (0, 0, ffn_only)
        if slot_class != FFN_ONLY:
            first_option = int(np.flatnonzero(enc.classes == slot_class)[0])
            genes = (first_option, heads, ffn)
        genome[0, 1 + 3 * slot : 4 + 3 * slot] = genes
    return decode(space, canonical(space, genome))[0]


def _spread(enc: Encoding, pattern: LayerCounts) -> dict[int, int]:
    """The class of each slot that is not empty: layers, and full ones among them, evenly spread."""
    forced = [int(slot) for slot in np.flatnonzero(enc.must_be_full)]
    even = [int(slot) for slot in np.linspace(0, enc.slots - 1, pattern.depth).round()]
    present = forced + [slot for slot in even if slot not in forced][: pattern.depth - len(forced)]
    unused = [slot for slot in range(enc.slots) if slot not in present]  # rounding may repeat a slot
    present = sorted(present + unused[: pattern.depth - len(present)])
    classes = dict.fromkeys(present, LINEAR)
    rest = [slot for slot in present if slot not in forced]
    more_full = np.linspace(0, len(rest) - 1, pattern.full - len(forced)).round()
    classes |= dict.fromkeys(forced + [rest[int(i)] for i in more_full], FULL)
    others = [slot for slot in present if classes[slot] != FULL]
    classes |= dict.fromkeys(others[: pattern.ffn_only], FFN_ONLY)
    classes |= dict.fromkeys(others[pattern.ffn_only : pattern.ffn_only + pattern.local], LOCAL)
    return classes
