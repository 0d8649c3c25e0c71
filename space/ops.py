"""Ops: the units that a runtime executes and a profile measures.

An architecture consists of the embedding, a mixer block and an FFN block for each layer that has them, and
the head. Quantities that are sums over ops (parameters, bytes, latency) are tabulated once for the ops of a
space and then gathered for arrays of genomes. Shape suffixes: N genomes, L slots.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from space.architecture import Architecture, Layer, has_heads
from space.genome import FULL, LINEAR, LOCAL, Genomes, encoding, split
from space.space import Space

MIXER_CLASSES = (FULL, LINEAR, LOCAL)


@dataclass(frozen=True, kw_only=True, order=True)
class Op:
    """One block and its sizes.

    Attributes:
        kind: ``embedding``, ``head``, ``ffn`` or the name of a mixer.
        width: residual width; 0 for what is not of one width.
        heads: query heads; 0 if the block has none.
        kv_heads: key and value heads.
        window: tokens that a windowed mixer sees; 0 for others.
        ffn: hidden size of an FFN.
    """

    kind: str
    width: int = 0
    heads: int = 0
    kv_heads: int = 0
    window: int = 0
    ffn: int = 0

    @property
    def key(self) -> str:
        """Unique readable name, such as ``attention-w128-h4-k2``."""
        letters = (
            ("w", self.width),
            ("h", self.heads),
            ("k", self.kv_heads),
            ("n", self.window),
            ("f", self.ffn),
        )
        return "-".join([self.kind, *(f"{letter}{value}" for letter, value in letters if value)])

    @staticmethod
    def parse(key: str) -> "Op":
        """The op with a key; the inverse of :attr:`key`.

        Args:
            key: such as ``attention-w128-h4-k2``.
        """
        kind, *sizes = key.split("-")
        names = {"w": "width", "h": "heads", "k": "kv_heads", "n": "window", "f": "ffn"}
        return Op(kind=kind, **{names[size[0]]: int(size[1:]) for size in sizes})

    @property
    def layer(self) -> Layer:
        """A layer that consists of this op only."""
        if self.kind == "ffn":
            return Layer(ffn=self.ffn)
        return Layer(mixer=self.kind, heads=self.heads, kv_heads=self.kv_heads, window=self.window)


def mixer_op(width: int, layer: Layer) -> Op:
    """The op of a layer's mixer.

    Args:
        width: residual width.
        layer: a layer with a mixer.
    """
    return Op(kind=layer.mixer, width=width, heads=layer.heads, kv_heads=layer.kv_heads, window=layer.window)


def count_ops(architecture: Architecture) -> Counter[Op]:
    """The ops of an architecture with their multiplicity.

    Args:
        architecture: the architecture.
    """
    width = architecture.width
    ops = Counter([Op(kind="embedding", width=width), Op(kind="head", width=width)])
    for layer in architecture.layers:
        if layer.mixer != "none":
            ops[mixer_op(width, layer)] += 1
        if layer.ffn:
            ops[Op(kind="ffn", width=width, ffn=layer.ffn)] += 1
    return ops


@lru_cache(maxsize=64)
def space_ops(space: Space) -> tuple[Op, ...]:
    """All ops of a space's architectures, sorted.

    Args:
        space: the space.
    """
    ops = set()
    for width in space.width:
        ops |= {Op(kind="embedding", width=width), Op(kind="head", width=width)}
        ops |= {Op(kind="ffn", width=width, ffn=ffn) for ffn in space.ffn_options if ffn}
        for mixer, window in space.mixer_options[1:]:
            heads = space.head_options if has_heads(mixer) else ((0, 0),)
            ops |= {Op(kind=mixer, width=width, heads=h, kv_heads=k, window=window) for h, k in heads}
    return tuple(sorted(ops))


@lru_cache(maxsize=64)
def op_kinds(space: Space) -> tuple[str, ...]:
    """The kinds of a space's ops, sorted.

    Args:
        space: the space.
    """
    return tuple(sorted({op.kind for op in space_ops(space)}))


class OpTables:
    """One number for each op of a space, indexed by genes.

    Args:
        space: the space.
        number: the number of an op; called once for each op.
    """

    def __init__(self, space: Space, number: Callable[[Op], float]) -> None:
        self.space = space
        widths = space.width
        self.ends = np.array(
            [[number(Op(kind=kind, width=w)) for kind in ("embedding", "head")] for w in widths]
        )  # [widths, 2]
        self.ffn = np.array(
            [
                [number(Op(kind="ffn", width=w, ffn=f)) if f else 0.0 for f in space.ffn_options]
                for w in widths
            ]
        )  # [widths, ffn options]
        self.mixer = np.zeros((len(widths), len(space.mixer_options), len(space.head_options)))
        for i, width in enumerate(widths):
            for j, (mixer, window) in enumerate(space.mixer_options[1:], 1):
                for k, (heads, kv) in enumerate(space.head_options):
                    headless = not has_heads(mixer)
                    layer = Layer(
                        mixer=mixer,
                        window=window,
                        heads=0 if headless else heads,
                        kv_heads=0 if headless else kv,
                    )
                    self.mixer[i, j, k] = number(mixer_op(width, layer))

    def gather(self, genomes: Genomes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The numbers of each slot's mixer [N, L] and FFN [N, L].

        Args:
            genomes: genomes [N, G].
        """
        width, mixer, heads, ffn = split(genomes)
        return self.mixer[width[:, None], mixer, heads], self.ffn[width[:, None], ffn]

    def totals(self, genomes: Genomes) -> NDArray[np.float64]:
        """The sum over all ops of each genome [N].

        Args:
            genomes: genomes [N, G].
        """
        mixers, ffns = self.gather(genomes)
        ends = self.ends.sum(axis=1)[genomes[:, 0]]
        return np.asarray(ends + mixers.sum(axis=1) + ffns.sum(axis=1), dtype=np.float64)

    def greatest(self, genomes: Genomes) -> NDArray[np.float64]:
        """The maximum over all ops of each genome [N].

        Args:
            genomes: genomes [N, G].
        """
        mixers, ffns = self.gather(genomes)
        ends = self.ends.max(axis=1)[genomes[:, 0]]
        return np.asarray(
            np.maximum(ends, np.maximum(mixers.max(axis=1), ffns.max(axis=1))), dtype=np.float64
        )

    def by_kind(self, genomes: Genomes) -> NDArray[np.float64]:
        """The sum over the ops of each kind [N, kinds], in the order of :func:`op_kinds`.

        Args:
            genomes: genomes [N, G].
        """
        kinds = op_kinds(self.space)
        sums = np.zeros((len(genomes), len(kinds)))
        mixers, ffns = self.gather(genomes)
        kind_of = np.array([-1] + [kinds.index(m) for m, _ in self.space.mixer_options[1:]])
        slot_kinds = kind_of[split(genomes)[1]]
        for i, kind in enumerate(kinds):
            if kind == "ffn":
                sums[:, i] = ffns.sum(axis=1)
            elif kind in ("embedding", "head"):
                sums[:, i] = self.ends[genomes[:, 0], ("embedding", "head").index(kind)]
            else:
                sums[:, i] = np.where(slot_kinds == i, mixers, 0.0).sum(axis=1)
        return sums


def classes_present(space: Space, genomes: Genomes) -> NDArray[np.bool_]:
    """Masks of the genomes that have a layer with a full, a linear and a local mixer [N, 3], in this order.

    Args:
        space: the space.
        genomes: genomes [N, G].
    """
    classes = encoding(space).classes[split(genomes)[1]]
    return np.stack([(classes == kind).any(axis=1) for kind in MIXER_CLASSES], axis=1)


def has_full(space: Space, genomes: Genomes) -> NDArray[np.bool_]:
    """Mask of the genomes that have a layer with a full mixer [N].

    Args:
        space: the space.
        genomes: genomes [N, G].
    """
    return np.asarray(classes_present(space, genomes)[:, MIXER_CLASSES.index(FULL)])


def depths(genomes: Genomes) -> NDArray[np.int64]:
    """The depth of each genome [N]: its number of layers that are not empty.

    Args:
        genomes: genomes [N, G].
    """
    _, mixer, _, ffn = split(genomes)
    return np.asarray(((mixer > 0) | (ffn > 0)).sum(axis=1))


@dataclass(frozen=True)
class Footprint:
    """A cost that rises with another sum over ops, such as seconds with the bytes that a model holds.

    It is 0 at sum 0, continuous, piecewise linear, and never falls; pieces may be steeper or flatter than
    those before them.

    Attributes:
        sums: the other quantity of each op, finite and at least 0.
        starts: sums at which the linear pieces start, ascending; the first is 0.
        slopes: cost per unit of the sum on each piece, at least 0.

    Raises:
        ValueError: a number is not as described.
    """

    sums: OpTables
    starts: tuple[float, ...]
    slopes: tuple[float, ...]

    def __post_init__(self) -> None:
        starts, slopes = np.array(self.starts), np.array(self.slopes)
        if len(starts) != len(slopes) or not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise ValueError(f"a slope for each start, and starts that rise from 0: {self.starts}")
        parts = (slopes, self.sums.ends, self.sums.ffn, self.sums.mixer)
        if not all(((part >= 0) & np.isfinite(part)).all() for part in parts):
            raise ValueError("slopes and sums must be finite and at least 0")

    @property
    def heights(self) -> NDArray[np.float64]:
        """The cost at each start [pieces]."""
        rises = np.array(self.slopes[:-1]) * np.diff(self.starts)
        return np.concatenate([[0.0], np.cumsum(rises)])

    def __call__(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The cost at sums, of the same shape.

        Args:
            sums: at least 0.
        """
        starts, slopes = np.array(self.starts), np.array(self.slopes)
        piece = np.searchsorted(starts, sums, side="right") - 1
        return np.asarray(self.heights[piece] + slopes[piece] * (sums - starts[piece]))


@dataclass(frozen=True)
class Cost:
    """A cost of architectures that can be minimised and limited exactly.

    The value is ``constant + per_layer * depth + sum of table over ops``, plus ``shared`` of each mixer class
    that a layer has, plus the maximum of ``max_op`` over ops, plus ``footprint`` of its sum over ops.

    Attributes:
        table: cost of each op.
        constant: cost of every architecture.
        per_layer: cost of a layer, beside its ops.
        shared: cost that all layers with a full, a linear and a local mixer share, in this order, such as a
            mask.
        max_op: if given, its maximum over the architecture's ops is added.
        footprint: if given, its value is added.
    """

    table: OpTables
    constant: float = 0.0
    per_layer: float = 0.0
    shared: tuple[float, float, float] = (0.0, 0.0, 0.0)
    max_op: OpTables | None = None
    footprint: Footprint | None = None

    def __call__(self, genomes: Genomes) -> NDArray[np.float64]:
        """Evaluate the cost of each genome [N].

        Args:
            genomes: genomes [N, G].
        """
        total = self.constant + self.per_layer * depths(genomes) + self.table.totals(genomes)
        if any(self.shared):
            total += classes_present(self.table.space, genomes) @ np.array(self.shared)
        if self.max_op is not None:
            total += self.max_op.greatest(genomes)
        if self.footprint is not None:
            total += self.footprint(self.footprint.sums.totals(genomes))
        return total
