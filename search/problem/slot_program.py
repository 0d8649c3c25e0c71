"""The integer programme of one width over scores of slots, with binaries for every slot.

The programmes of :mod:`search.problem.milp` count layers, because all slots have the same options at the same
costs. Scores (:class:`space.slot_scores.SlotScores`) differ by slot, so here each slot has a binary for each
of its options. Limits, the hybrid rule and footprints are as there. Terms of pairs are linear in the flow
between the groups of two neighbouring blocks.

Shapes: C columns, L slots, O mixer options (mixer with heads), F FFN options, P patterns, K groups.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from search.problem.dynamic_program import Floats, Ints, options_of
from search.problem.integer_program import INFEASIBLE, SCALE, Range, Term, lines_below
from search.problem.limit import ROUNDING_TOLERANCE
from search.problem.milp import is_one_piece, split_range
from space.genome import FULL, LINEAR, LOCAL, Genomes, encoding
from space.slot_scores import PairTerms, SlotScores


class Row(NamedTuple):
    """A row of a programme.

    Attributes:
        columns: with a coefficient.
        factors: of these columns.
        low: least sum.
        high: greatest sum.
    """

    columns: Ints
    factors: Floats
    low: float
    high: float


class SlotProgram:
    """The programme of one width.

    Columns: for each slot its mixer options, no mixer beside an FFN, and empty; for each slot its FFN
    options; indicators of the pattern, of the linear kinds in use if their number is limited, and of the
    level of each cost's largest op; the flows between groups of neighbouring blocks.

    Args:
        scores: to be minimised.
        width: index of the width.
        terms: the costs, with their bounds.
        patterns: the layer counts to consider [P, 4].
        number: of solutions that are wanted.
    """

    def __init__(
        self, scores: SlotScores, width: int, terms: Sequence[Term], patterns: Ints, number: int
    ) -> None:
        self._scores, self._width, self._terms = scores, width, terms
        space = scores.space
        self._enc, self._at = encoding(space), options_of(space)
        enc, at = self._enc, self._at
        slots, options, sizes = enc.slots, len(at.mixer), len(space.ffn_options)
        self._none, self._empty = options, options + 1  # columns of a slot after its mixer options
        self._mixers = np.arange(slots * (options + 2)).reshape(slots, options + 2)
        self._ffns = self._mixers.size + np.arange(slots * sizes).reshape(slots, sizes)
        self._columns = int(self._ffns[-1, -1]) + 1
        self._chosen = self._columns  # the columns before it are an architecture
        self._flow_columns = 0  # the last ones, which need not be whole
        self._rows: list[Row] = []
        self._highest: list[Floats] = [np.ones(self._columns)]
        self._objective: list[Floats] = [self._slot_objective()]
        self._add_layers()
        self._leave_out_dominated(number)
        self._patterns = self._new_columns(len(patterns))
        self._add_patterns(patterns)
        self._prices = [self._add_cost(term, patterns) for term in terms]
        if scores.pairs is not None:
            self._add_pairs(scores.pairs)
        self._highest_all, objective = np.concatenate(self._highest), np.concatenate(self._objective)
        size = float(np.abs(objective).max()) or 1.0
        self._scaled_objective = SCALE * objective / size

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The range of the sums of each footprint, over all architectures of the width."""
        return tuple(term.rise.range for term in self._terms if term.rise)

    def split(self, ranges: tuple[Range, ...], genome: Genomes) -> Iterator[tuple[Range, ...]]:
        """The ranges of parts that tell a genome's pieces from the others; none if all have one piece.

        Args:
            ranges: of the sums of each footprint.
            genome: breaks a bound [1, G].
        """
        rises = [term.rise for term in self._terms if term.rise]
        for place, (rise, one) in enumerate(zip(rises, ranges, strict=True)):
            starts = rise.footprint.starts
            if not is_one_piece(one, starts):
                at = float(rise.footprint.sums.totals(genome)[0])
                for part in split_range(one, starts, at):
                    yield (*ranges[:place], part, *ranges[place + 1 :])
                return

    def solve(self, ranges: Sequence[Range], cuts: Sequence[Ints]) -> tuple[Genomes, Ints] | None:
        """The best genome [1, G] and its columns; None if there is none.

        Args:
            ranges: of the sums of each footprint.
            cuts: columns of solutions that are left out.
        """
        rows = [*self._rows, *self._limits(ranges)]
        rows += [Row(cut, np.ones(len(cut)), -np.inf, len(cut) - 1.0) for cut in cuts]
        starts = np.cumsum([0, *(len(row.columns) for row in rows)])
        matrix = csr_array(
            (
                np.concatenate([row.factors for row in rows]),
                np.concatenate([row.columns for row in rows]),
                starts,
            ),
            shape=(len(rows), self._columns),
        )
        lows, highs = np.array([row.low for row in rows]), np.array([row.high for row in rows])
        integral = np.arange(self._columns) < self._columns - self._flow_columns
        with _stdout_discarded():
            result = milp(
                self._scaled_objective,
                integrality=integral.astype(int),
                bounds=Bounds(0.0, self._highest_all),
                constraints=LinearConstraint(matrix, lows, highs),
                options={"mip_rel_gap": 0.0, "presolve": False},  # presolve takes longer than it saves
            )
        if result.status == INFEASIBLE:
            return None
        if result.x is None:
            raise RuntimeError(f"the integer programme was not solved: {result.message}")
        columns = np.flatnonzero(result.x[: self._chosen] > 0.5)
        return self._genome(columns), columns

    def _genome(self, columns: Ints) -> Genomes:
        """The genome [1, G] of chosen columns."""
        at, genome = self._at, np.zeros((1, self._enc.genes), np.int16)
        genome[0, 0] = self._width
        width = self._mixers.shape[1]
        for column in columns:
            if column < self._mixers.size:
                slot, option = divmod(int(column), width)
                if option < self._none:
                    genome[0, 1 + 3 * slot], genome[0, 2 + 3 * slot] = at.mixer[option], at.heads[option]
            else:
                slot, size = divmod(int(column) - self._mixers.size, self._ffns.shape[1])
                genome[0, 3 + 3 * slot] = size
        return genome

    def _new_columns(self, number: int, objective: Floats | None = None) -> Ints:
        columns = np.arange(self._columns, self._columns + number)
        self._columns += number
        self._highest.append(np.ones(number))
        self._objective.append(np.zeros(number) if objective is None else objective)
        return columns

    def _add(self, low: float, high: float, *parts: tuple[Ints, Floats | float]) -> None:
        columns = np.concatenate([np.ravel(part) for part, _ in parts])
        factors = [
            np.broadcast_to(np.asarray(factor, float), np.shape(part)).ravel() for part, factor in parts
        ]
        self._rows.append(Row(columns, np.concatenate(factors), low, high))

    def _slot_objective(self) -> Floats:
        scores, at = self._scores, self._at
        mixers = np.zeros(self._mixers.shape)
        mixers[:, : self._none] = scores.mixer[:, at.mixer, at.heads]
        mixers[:, self._none], mixers[:, self._empty] = scores.mixer[:, 0, 0], scores.empty
        return np.concatenate([mixers.ravel(), scores.ffn.ravel()])

    def _add_layers(self) -> None:
        """One mixer option and one FFN option for each slot, or neither; only those that the space has."""
        enc, at, highest = self._enc, self._at, self._highest[0]
        for slot in range(enc.slots):
            mixers, ffns = self._mixers[slot], self._ffns[slot]
            self._add(1, 1, (mixers, 1.0))
            self._add(1, 1, (ffns, 1.0), (mixers[[self._empty]], 1.0))
            # A layer without a mixer has an FFN.
            self._add(-np.inf, 1, (ffns[[0]], 1.0), (mixers[[self._none]], 1.0))
            if enc.must_be_full[slot]:
                other = np.append(at.classes != FULL, [True, True])
                highest[mixers[other]] = 0.0
        if enc.least_ffn:
            highest[self._ffns[:, 0]] = 0.0
        if "none" not in self._scores.space.layer.mixer:
            highest[self._mixers[:, self._none]] = 0.0
        order = self._scores.removal_order
        if order is not None:
            empty = self._mixers[:, self._empty]
            highest[np.delete(empty, list(order))] = 0.0
            for before, after in pairwise(order):
                self._add(0, np.inf, (empty[[before]], 1.0), (empty[[after]], -1.0))

    def _leave_out_dominated(self, number: int) -> None:
        """Leave out options for which as many others stand as solutions are wanted, at no more of anything.

        Others may stand for an option if they are of the same slot, class and group, and of the same linear
        kind if the number of kinds is limited. Of any solution with the option there are then as many others
        with no more score or cost.
        """
        scores, at, terms = self._scores, self._at, self._terms
        few = scores.space.max_linear_kinds < self._enc.kind_count
        kinds = np.where(few & (at.classes == LINEAR), LOCAL + 1 + at.kinds, at.classes)
        present = (np.arange(self._ffns.shape[1]) > 0).astype(np.int64)
        sums = [term.rise.sums for term in terms if term.rise]
        mixers = [one for t in terms for one in (t.prices.mixer, t.prices.mixer_peak)]
        ffns = [one for t in terms for one in (t.prices.ffn, t.prices.ffn_peak)]
        mixers += [one.mixer for one in sums]
        ffns += [one.ffn for one in sums]
        for slot in range(self._enc.slots):
            of_mixers, of_ffns = kinds, present
            if scores.pairs is not None:
                of_mixers = (LOCAL + 2 + max(self._enc.kind_count, 1)) * scores.pairs.mixer_group[
                    slot, at.mixer, at.heads
                ] + kinds
                of_ffns = 2 * scores.pairs.ffn_group[slot] + present
            values = np.stack([scores.mixer[slot, at.mixer, at.heads], *mixers], axis=1)
            self._highest[0][self._mixers[slot, : self._none][_dominators(values, of_mixers) >= number]] = 0.0
            values = np.stack([scores.ffn[slot], *ffns], axis=1)
            self._highest[0][self._ffns[slot][_dominators(values, of_ffns) >= number]] = 0.0

    def _add_patterns(self, patterns: Ints) -> None:
        """Exactly one pattern, with its number of layers of each class; a limited number of linear kinds."""
        enc, at, space = self._enc, self._at, self._scores.space
        self._add(1, 1, (self._patterns, 1.0))
        of_class = [np.array([self._none]), *(np.flatnonzero(at.classes == k) for k in (FULL, LINEAR, LOCAL))]
        for column, options in enumerate(of_class):
            self._add(
                0, 0, (self._mixers[:, options], 1.0), (self._patterns, -patterns[:, column].astype(float))
            )
        if space.max_linear_kinds < enc.kind_count:
            kinds = self._new_columns(enc.kind_count)
            self._add(-np.inf, space.max_linear_kinds, (kinds, 1.0))
            for kind, column in enumerate(kinds):
                used = self._mixers[:, np.flatnonzero(at.kinds == kind)]
                self._add(-np.inf, 0, (used, 1.0), (np.array([column]), -float(enc.slots)))

    def _add_cost(self, term: Term, patterns: Ints) -> Row:
        """The row of a cost without the fixed ones and the footprint; its bounds are set by a range."""
        prices, slots = term.prices, self._enc.slots
        mixers, ffns = self._of_blocks(prices.mixer, prices.ffn)
        self._highest[0][~np.isfinite(np.concatenate([mixers.ravel(), ffns.ravel()]))] = 0.0
        peak_mixers, peak_ffns = self._of_blocks(prices.mixer_peak, prices.ffn_peak)
        peak = np.concatenate([peak_mixers.ravel(), peak_ffns.ravel()])
        levels = np.unique(peak[self._highest[0] > 0])
        indicators = self._new_columns(len(levels))
        self._add(1, 1, (indicators, 1.0))  # exactly one level of the largest op
        for value in levels[:-1]:  # an option whose peak is above a level needs a higher level
            above = np.flatnonzero(peak > value)
            self._add(-np.inf, 0, (above, 1.0), (indicators[levels > value], -2.0 * slots))
        parts = [
            (self._mixers, np.where(np.isfinite(mixers), mixers, 0.0)),
            (self._ffns, np.where(np.isfinite(ffns), ffns, 0.0)),
            (self._patterns, prices.of_patterns(patterns)),
            (indicators, levels),
        ]
        columns = np.concatenate([np.ravel(part) for part, _ in parts])
        return Row(columns, np.concatenate([np.ravel(f) for _, f in parts]), -np.inf, np.inf)

    def _of_blocks(self, mixer: Floats, ffn: Floats) -> tuple[Floats, Floats]:
        """Numbers of mixer options [O] and FFN options [F] for all slots [L, O + 2], [L, F]."""
        slots = self._enc.slots
        return np.tile(np.append(mixer, [0.0, 0.0]), (slots, 1)), np.tile(ffn, (slots, 1))

    def _limits(self, ranges: Sequence[Range]) -> Iterator[Row]:
        """The rows of bounds, with the sums of footprints in ranges."""
        place = 0
        for term, cost in zip(self._terms, self._prices, strict=True):
            if not np.isfinite(term.bound):
                continue
            high = term.bound * (1 + ROUNDING_TOLERANCE) - term.prices.fixed
            if term.rise is None:
                yield _scaled(cost, -np.inf, high, term.bound)
                continue
            footprint, held, (first, last) = term.rise.footprint, term.rise.sums.fixed, ranges[place]
            place += 1
            mixers, ffns = self._of_blocks(term.rise.sums.mixer, term.rise.sums.ffn)
            sums = Row(
                np.concatenate([self._mixers.ravel(), self._ffns.ravel()]),
                np.concatenate([mixers.ravel(), ffns.ravel()]),
                0.0,
                0.0,
            )
            most = term.rise.range[1] or 1.0
            yield _scaled(sums, first - held, last - held, most)
            for slope, start in lines_below(footprint, first, last):
                factors = cost.factors.copy()
                factors[: len(sums.factors)] += slope * sums.factors  # the same columns come first
                line = cost._replace(factors=factors)
                yield _scaled(line, -np.inf, high - start - slope * held, max(term.bound, slope * most))

    def _add_pairs(self, pairs: PairTerms) -> None:
        """The flows between the groups of neighbouring blocks, whose terms are the objective."""
        at, slots = self._at, self._enc.slots
        groups = pairs.mixers.shape[-1]
        before = self._columns
        of_mixers = np.zeros(self._mixers.shape, np.int64)
        of_mixers[:, : self._none] = pairs.mixer_group[:, at.mixer, at.heads]
        of_mixers[:, self._none], of_mixers[:, self._empty] = pairs.mixer_group[:, 0, 0], pairs.empty_group
        mixers = [[self._mixers[s][of_mixers[s] == g] for g in range(groups)] for s in range(slots)]
        ffns = [[self._ffns[s][pairs.ffn_group[s] == g] for g in range(groups)] for s in range(slots)]
        for slot in range(slots):
            ffns[slot][0] = np.append(ffns[slot][0], self._mixers[slot, self._empty])
        for slot in range(slots):
            self._add_flow(pairs.layers[slot], mixers[slot], ffns[slot])
        for slot in range(slots - 1):
            self._add_flow(pairs.mixers[slot], mixers[slot], mixers[slot + 1])
            self._add_flow(pairs.ffns[slot], ffns[slot], ffns[slot + 1])
        self._flow_columns = self._columns - before

    def _add_flow(self, terms: Floats, first: Sequence[Ints], second: Sequence[Ints]) -> None:
        """Columns [K, K] that are 1 for the groups of two blocks.

        Args:
            terms: of the groups [K, K].
            first: columns of the options in each group of one block.
            second: columns of the options in each group of the other.
        """
        if not terms.any():
            return
        rows = [i for i, columns in enumerate(first) if len(columns)]
        others = [i for i, columns in enumerate(second) if len(columns)]
        flow = self._new_columns(len(rows) * len(others), terms[np.ix_(rows, others)].ravel())
        flow = flow.reshape(len(rows), len(others))
        for i, group in enumerate(rows):
            self._add(0, 0, (flow[i], 1.0), (first[group], -1.0))
        for i, group in enumerate(others):
            self._add(0, 0, (flow[:, i], 1.0), (second[group], -1.0))


@contextmanager
def _stdout_discarded() -> Iterator[None]:
    """Discard what C code prints: HiGHS has messages that no option turns off, and stdout may be JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C's buffer, which would be written later
        os.dup2(kept, 1)
        os.close(kept)


def _dominators(values: Floats, groups: Ints) -> Ints:
    """The number of rows of the same group that equal or beat each row of values [N, D] everywhere [N].

    Of equal rows, those before count.
    """
    better = (values[None] <= values[:, None]).all(axis=2) & (groups[None] == groups[:, None])  # [row, by]
    order = np.arange(len(values))
    better &= ~better.T | (order[None] < order[:, None])
    found: Ints = better.sum(axis=1)
    return found


def _scaled(row: Row, low: float, high: float, size: float) -> Row:
    """A row in units of a size, scaled for the solver."""
    return Row(row.columns, SCALE * row.factors / size, SCALE * low / size, SCALE * high / size)
