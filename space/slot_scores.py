"""Scores of architectures that add up over slots, and over pairs of neighbouring blocks.

Costs are sums over ops, which cost the same in every slot (:class:`space.ops.Cost`). A quality is not: what a
replaced block loses depends on its slot, and on the blocks beside it.

Shapes: N genomes, W widths, L slots, M mixer options, H head options, F FFN options, K groups.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from space.genome import Genomes, split
from space.space import Space

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTerms:
    """Terms of neighbouring blocks, which depend on their groups.

    The mixer of an empty slot is in ``empty_group``, and its FFN in group 0.

    Attributes:
        mixer_group: group of each slot's mixer options [L, M, H].
        empty_group: group of the mixer of each slot where it is empty [L].
        ffn_group: group of each slot's FFN options [L, F].
        mixers: terms of the mixers of a slot and the next [L - 1, K, K].
        ffns: terms of the FFNs of a slot and the next [L - 1, K, K].
        layers: terms of the mixer and the FFN of a slot [L, K, K].
    """

    mixer_group: Ints
    empty_group: Ints
    ffn_group: Ints
    mixers: Floats
    ffns: Floats
    layers: Floats

    def groups(self, genomes: Genomes) -> tuple[Ints, Ints]:
        """The groups of each slot's mixer [N, L] and FFN [N, L].

        Args:
            genomes: [N, G].
        """
        _, mixer, heads, ffn = split(genomes)
        slots = np.arange(mixer.shape[1])
        empty = (mixer == 0) & (ffn == 0)
        of_mixers = np.where(empty, self.empty_group, self.mixer_group[slots, mixer, heads])
        return of_mixers, np.where(empty, 0, self.ffn_group[slots, ffn])

    def __call__(self, genomes: Genomes) -> Floats:
        """The sum of the terms of each genome [N].

        Args:
            genomes: [N, G].
        """
        mixers, ffns = self.groups(genomes)
        slots = np.arange(mixers.shape[1])
        total: Floats = self.layers[slots, mixers, ffns].sum(axis=1)
        for table, groups in ((self.mixers, mixers), (self.ffns, ffns)):
            total += table[slots[:-1], groups[:, :-1], groups[:, 1:]].sum(axis=1)
        return total


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotScores:
    """The score of an architecture: a sum over its slots, plus terms of neighbouring blocks.

    Attributes:
        space: the space.
        constant: score of every architecture.
        width: of each width [W].
        mixer: of each slot's mixer options [L, M, H]; the first is no mixer beside an FFN.
        ffn: of each slot's FFN options [L, F]; the first is no FFN beside a mixer.
        empty: of each slot where it has neither [L].
        pairs: terms of neighbouring blocks; None without any.
        removal_order: slots that may be empty, each only if those before it are; None: any.
    """

    space: Space
    constant: float
    width: Floats
    mixer: Floats
    ffn: Floats
    empty: Floats
    pairs: PairTerms | None = None
    removal_order: tuple[int, ...] | None = None

    def additive(self, genomes: Genomes) -> Floats:
        """The score [N] without terms of pairs.

        Args:
            genomes: [N, G].
        """
        width, mixer, heads, ffn = split(genomes)
        slots = np.arange(mixer.shape[1])
        blocks = self.mixer[slots, mixer, heads] + self.ffn[slots, ffn]
        layers = np.where((mixer == 0) & (ffn == 0), self.empty, blocks)
        total: Floats = self.constant + self.width[width] + layers.sum(axis=1)
        return total

    def __call__(self, genomes: Genomes) -> Floats:
        """The score [N].

        Args:
            genomes: [N, G].
        """
        total = self.additive(genomes)
        return total if self.pairs is None else total + self.pairs(genomes)
