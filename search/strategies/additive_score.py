"""A quality as a sum of what each replaced block loses, with terms of neighbouring blocks.

The parent is the largest architecture of a space. Replacing one of its blocks at a time gives a score for
every option of every slot. Layers are removed one after the other, each the one that loses least after those
before it: single removals say little about several. What composites lose beyond the sum is fitted by terms of
neighbouring blocks: the loss of two small errors a and b is about a + b + 2 c sqrt(a b), with a coefficient c
that says how alike they are, so a term is the product of the roots of two scores. Ridge regression shrinks
the coefficients to zero, with the strength of least leave-one-out error.

Shapes: N genomes, G genes, L slots, M mixer options, H head options, F FFN options, K groups, C coefficients.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import kendalltau

from search.strategies.pareto import Array
from space import Space
from space.genome import FULL, Genomes, canonical, encode, encoding, largest
from space.ops import depths
from space.slot_scores import Floats, Ints, PairTerms, SlotScores

GROUPS = 4  # of the options of a block: the parent's own, and three by their score
REMOVALS_TRIED = 8  # layers that are tried for each removal but the first, which tries all
MIN_COMPOSITES = 20  # before terms of neighbouring blocks are fitted
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, over the mean square of a feature
SHARED_STRENGTH = 0.1  # of the coefficient that all slots share, over that of a slot's own


def replacements(space: Space) -> Genomes:
    """The parent [1, G], then every architecture that differs from it in one block or in the width [N, G].

    Only blocks that an architecture of the space can have are replaced. The rows themselves need not be of
    the space: one linear layer may not keep the hybrid rule.

    Args:
        space: the search space.
    """
    enc, parent = encoding(space), encode(space, [largest(space)])
    rows = [parent[0]]

    def add(column: int, *genes: int) -> None:
        row = parent[0].copy()
        row[column : column + len(genes)] = genes
        rows.append(row)

    for width in range(len(space.width)):
        add(0, width)
    for slot in range(enc.slots):
        column = 1 + 3 * slot
        for mixer in range(len(space.mixer_options)):
            if (mixer == 0 and "none" not in space.layer.mixer) or (
                enc.must_be_full[slot] and enc.classes[mixer] != FULL
            ):
                continue
            for heads in range(len(space.head_options)):
                add(column, mixer, heads)
        for ffn in range(enc.least_ffn, len(space.ffn_options)):
            add(column + 2, ffn)
    every = canonical(space, np.array(rows, np.int16))
    whole = depths(every) == enc.slots  # removals are asked for one after the other
    unique = np.unique(every[whole], axis=0, return_index=True)[1]
    return np.concatenate([parent, every[whole][np.sort(unique)][1:]])


class Measured:
    """Values of the parent, of its single replacements and of its removals, by genome.

    Args:
        space: the search space.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.parent = encode(space, [largest(space)])[0]
        self.values: dict[bytes, float] = {}

    def tell(self, genomes: Genomes, values: Floats) -> None:
        """Take values.

        Args:
            genomes: [N, G].
            values: of the quality [N]; not finite where an evaluation failed.
        """
        self.values |= dict(zip((row.tobytes() for row in genomes), values.tolist(), strict=True))

    def value(self, genome: Genomes) -> float:
        """The value of a genome [G]; not finite where it is not known.

        Args:
            genome: of the parent or another.
        """
        return self.values.get(genome.tobytes(), np.nan)

    def with_genes(self, column: int, *genes: int) -> Genomes:
        """The parent [G] with other genes.

        Args:
            column: of the first of them.
            genes: in place of the parent's.
        """
        row = self.parent.copy()
        row[column : column + len(genes)] = genes
        return np.asarray(canonical(self.space, row[None])[0])

    def removed(self, slots: tuple[int, ...]) -> Genomes:
        """The genome [G] of the parent without the layers of slots.

        Args:
            slots: to be empty.
        """
        row: Genomes = self.parent.copy()
        for slot in slots:
            row[1 + 3 * slot : 4 + 3 * slot] = 0
        return row

    def removals(self) -> tuple[tuple[int, ...], Genomes]:
        """The slots that are removed, in order, and the genomes that decide the next [N, G].

        There are none if the space allows no further removal, or if all that were tried failed.
        """
        enc = encoding(self.space)
        free = [int(slot) for slot in np.flatnonzero(~enc.must_be_full)]
        order: tuple[int, ...] = ()
        last: dict[int, float] = {}  # of each slot, the value when its removal was last tried
        while len(order) < enc.slots - min(self.space.depth):
            left = [slot for slot in free if slot not in order]
            tried = left if not order else sorted(left, key=lambda slot: (last[slot], slot))[:REMOVALS_TRIED]
            rows = {slot: self.removed((*order, slot)) for slot in tried}
            unknown = [row for row in rows.values() if row.tobytes() not in self.values]
            if unknown:
                return order, np.array(unknown)
            values = {slot: self.value(row) for slot, row in rows.items()}
            last |= {slot: value if np.isfinite(value) else np.inf for slot, value in values.items()}
            best = min(tried, key=lambda slot: (last[slot], slot), default=None)
            if best is None or not np.isfinite(last[best]):
                break
            order = (*order, best)
        return order, np.zeros((0, enc.genes), np.int16)

    def scores(self) -> SlotScores | None:
        """The scores of all options; None without a value of the parent.

        An option whose evaluation failed, or was not told, is as bad as the worst one.
        """
        space, enc = self.space, encoding(self.space)
        constant = self.value(self.parent)
        if not np.isfinite(constant):
            return None
        asked = {row.tobytes() for row in replacements(space)}
        order, _ = self.removals()
        known = [self.values[key] for key in asked & self.values.keys()]
        worst = float(np.nanmax([constant, *(value for value in known if np.isfinite(value))])) - constant

        def score(column: int, *genes: int) -> float:
            """The loss of the parent with other genes; 0 for those that no architecture has."""
            row = self.with_genes(column, *genes)
            value = self.value(row) - constant
            return 0.0 if row.tobytes() not in asked else value if np.isfinite(value) else worst

        mixers, heads = range(len(space.mixer_options)), range(len(space.head_options))
        first = [1 + 3 * slot for slot in range(enc.slots)]
        lost = np.array([self.value(self.removed((slot,))) - constant for slot in range(enc.slots)])
        empty = np.where(np.isfinite(lost), lost, worst if min(space.depth) < enc.slots else 0.0)
        removed = np.array([self.value(self.removed(order[:n])) for n in range(len(order) + 1)])
        empty[list(order)] = np.diff(removed)
        return SlotScores(
            space=space,
            constant=constant,
            width=np.array([score(0, width) for width in range(len(space.width))]),
            mixer=np.array([[[score(c, m, h) for h in heads] for m in mixers] for c in first]),
            ffn=np.array([[score(c + 2, ffn) for ffn in range(len(space.ffn_options))] for c in first]),
            empty=empty,
            removal_order=order,
        )


def _grouped(scores: Floats) -> tuple[Ints, Floats]:
    """The group of each score [..., K options] of a slot, and the root of each group's mean score [K]."""
    roots = np.sqrt(np.maximum(scores, 0.0))
    top = roots.max()
    groups = np.zeros(scores.shape, np.int64)
    if top > 0:  # equal steps of the root; a root of 0 is the parent's own
        groups = np.ceil(roots / top * (GROUPS - 1) - 1e-9).astype(np.int64)
    means = [roots[groups == g].mean() if (groups == g).any() else 0.0 for g in range(GROUPS)]
    return groups, np.array([0.0, *means[1:]])


@dataclass(frozen=True)
class Features:
    """The features of neighbouring blocks.

    Attributes:
        pairs: the groups, and tables of zeros.
        mixer_roots: of each slot's groups of mixers [L, K].
        ffn_roots: of each slot's groups of FFNs [L, K].
    """

    pairs: PairTerms
    mixer_roots: Floats
    ffn_roots: Floats

    @staticmethod
    def of(scores: SlotScores) -> "Features":
        """The features for scores.

        Args:
            scores: without terms of pairs.
        """
        slots = len(scores.empty)
        mixer_group, ffn_group = np.zeros(scores.mixer.shape, np.int64), np.zeros(scores.ffn.shape, np.int64)
        empty_group = np.zeros(slots, np.int64)
        mixer_roots, ffn_roots = np.zeros((slots, GROUPS)), np.zeros((slots, GROUPS))
        for slot in range(slots):
            options = np.append(scores.mixer[slot].ravel(), scores.empty[slot])
            groups, mixer_roots[slot] = _grouped(options)
            mixer_group[slot], empty_group[slot] = groups[:-1].reshape(scores.mixer.shape[1:]), groups[-1]
            ffn_group[slot], ffn_roots[slot] = _grouped(scores.ffn[slot])
        tables = np.zeros((slots, GROUPS, GROUPS))
        pairs = PairTerms(
            mixer_group=mixer_group,
            empty_group=empty_group,
            ffn_group=ffn_group,
            mixers=tables[1:],
            ffns=tables[1:],
            layers=tables,
        )
        return Features(pairs, mixer_roots, ffn_roots)

    def __call__(self, genomes: Genomes) -> tuple[Floats, Floats]:
        """The products of roots [N, C], and the penalty of each coefficient [C].

        The first three are sums over all slots; the others are those of mixers, FFNs and layers by slot.

        Args:
            genomes: [N, G].
        """
        mixer_groups, ffn_groups = self.pairs.groups(genomes)
        slots = np.arange(mixer_groups.shape[1])
        mixers, ffns = self.mixer_roots[slots, mixer_groups], self.ffn_roots[slots, ffn_groups]
        own = [mixers[:, :-1] * mixers[:, 1:], ffns[:, :-1] * ffns[:, 1:], mixers * ffns]
        shared = [part.sum(axis=1, keepdims=True) for part in own]
        columns = np.concatenate([*shared, *own], axis=1)
        return columns, np.where(np.arange(columns.shape[1]) < len(shared), SHARED_STRENGTH, 1.0)

    def terms(self, coefficients: Floats) -> PairTerms:
        """The terms of coefficients.

        Args:
            coefficients: of :meth:`__call__` [C].
        """
        slots = len(self.mixer_roots)
        shared, own = coefficients[:3], np.split(coefficients[3:], [slots - 1, 2 * (slots - 1)])
        mixers, ffns, layers = (shared[i] + part for i, part in enumerate(own))
        m, f = self.mixer_roots, self.ffn_roots
        return replace(
            self.pairs,
            mixers=mixers[:, None, None] * m[:-1, :, None] * m[1:, None, :],
            ffns=ffns[:, None, None] * f[:-1, :, None] * f[1:, None, :],
            layers=layers[:, None, None] * m[:, :, None] * f[:, None, :],
        )


@dataclass(frozen=True)
class Fit:
    """Scores fitted to composites.

    Attributes:
        scores: with terms of neighbouring blocks where these lower the error.
        sums: scores of the composites without a fit [N].
        left_out: predictions of the composites, each by a fit without it [N].
    """

    scores: SlotScores
    sums: Floats
    left_out: Floats


def fit(scores: SlotScores, genomes: Genomes, values: Array) -> Fit:
    """Scores with terms of neighbouring blocks, fitted to composites.

    The sum of single replacements gets a constant and a factor, which are not shrunk, and the terms of pairs
    the ridge of least leave-one-out error; none if no ridge is better than none.

    Args:
        scores: of single replacements.
        genomes: composites [N, G].
        values: of the quality, finite [N].
    """
    sums = scores.additive(genomes)
    additive = sums - scores.constant
    if len(genomes) < MIN_COMPOSITES or not np.ptp(additive):
        return Fit(scores, sums, sums)
    features = Features.of(scores)
    products, penalty = features(genomes)
    base = np.stack([np.ones(len(additive)), additive], axis=1)
    columns = np.concatenate([base, products], axis=1)
    unit = float((products**2).mean()) * len(products)
    settings = [None, *STRENGTHS] if unit > 0 else [None]  # None: without pairs
    best: tuple[float, Floats, Floats] | None = None
    for strength in settings:
        used = base if strength is None else columns
        ridge = np.zeros(used.shape[1])
        if strength is not None:
            ridge[2:] = strength * unit * penalty
        # Rows of the ridge below the data: least squares is stable where normal equations are not.
        stacked = np.concatenate([used, np.diag(np.sqrt(ridge))[ridge > 0]])
        inverse = np.linalg.pinv(stacked)[:, : len(used)]
        coefficients, leverage = inverse @ values, np.einsum("nc,cn->n", used, inverse)
        residuals = (values - used @ coefficients) / np.maximum(1 - leverage, 1e-6)
        error = float((residuals**2).mean())
        if coefficients[1] > 0 and (best is None or error < best[0]):
            best = error, coefficients, values - residuals
    if best is None:  # the sum says nothing of the composites
        return Fit(scores, sums, sums)
    _, coefficients, left_out = best
    factor = float(coefficients[1])
    fitted = replace(
        scores,
        constant=float(coefficients[0]),
        width=factor * scores.width,
        mixer=factor * scores.mixer,
        ffn=factor * scores.ffn,
        empty=factor * scores.empty,
        pairs=features.terms(coefficients[2:]) if len(coefficients) > 2 else None,
    )
    return Fit(fitted, sums, left_out)


def rank_agreement(predicted: Array, values: Array) -> float:
    """Kendall's tau-b of predictions and values; NaN where either is constant or there are fewer than three.

    Args:
        predicted: [N].
        values: [N].
    """
    if len(values) < 3 or not np.ptp(predicted) or not np.ptp(values):
        return np.nan
    return float(kendalltau(predicted, values).statistic)
