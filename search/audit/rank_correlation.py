"""Rank correlations of predictors with stand-alone losses, with bootstrap intervals.

Kendall's tau-b and Spearman's rho, with percentile intervals from a bootstrap over architectures (Efron
1979). All numbers of a set are computed on the same resamples, so that their differences are paired. A loss
enters as it is, a size (parameters, FLOPs) as its negative, since a larger model should have a lower loss: 1
is always perfect agreement.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.io.record import mapping_of, read_record

RESAMPLES = 2000
COVERAGE = 95  # percent
TRUSTED = 0.5  # tau: three of four pairs are in the right order
DIFFERENCE_KEY = "supernet_minus_params_kendall_tau"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95% bootstrap interval; NaN if it is undefined because all values are equal.

    Attributes:
        value: of the sample.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, float | None]:
        """The JSON object; undefined numbers are null."""
        named = {"value": self.value, f"low_{COVERAGE}": self.low, f"high_{COVERAGE}": self.high}
        return {name: None if math.isnan(number) else number for name, number in named.items()}

    @staticmethod
    def from_json(value: Mapping[str, float | None]) -> "Estimate":
        """The inverse of :meth:`to_json`."""
        numbers = (value["value"], value[f"low_{COVERAGE}"], value[f"high_{COVERAGE}"])
        return Estimate(*(math.nan if number is None else number for number in numbers))


@dataclass(frozen=True, kw_only=True)
class RankCorrelations:
    """Rank correlations with the mean stand-alone losses of one set.

    Attributes:
        kendall_tau: by the name of a predictor; ``two_seeds`` is the mean over pairs of seeds of the
            correlation of their losses, and is absent with one seed.
        spearman_rho: the same for Spearman's rho.
        supernet_minus_params: paired difference of the taus of ``supernet`` and ``params``.
    """

    kendall_tau: Mapping[str, Estimate]
    spearman_rho: Mapping[str, Estimate]
    supernet_minus_params: Estimate

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "kendall_tau": {name: e.to_json() for name, e in self.kendall_tau.items()},
            "spearman_rho": {name: e.to_json() for name, e in self.spearman_rho.items()},
            DIFFERENCE_KEY: self.supernet_minus_params.to_json(),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RankCorrelations":
        """The inverse of :meth:`to_json`."""
        estimates = mapping_of(Estimate.from_json)
        return read_record(
            RankCorrelations,
            {**value, "supernet_minus_params": Estimate.from_json(value[DIFFERENCE_KEY])},
            kendall_tau=estimates,
            spearman_rho=estimates,
        )


def correlations(x: Array, y: Array) -> tuple[Array, Array]:
    """Kendall's tau-b and Spearman's rho along the last axis; NaN without variation.

    Args:
        x: samples [..., n].
        y: samples [..., n].
    """
    dx, dy = (np.sign(v[..., :, None] - v[..., None, :]) for v in (x, y))
    rx, ry = dx.sum(axis=-1), dy.sum(axis=-1)  # the sum of signs is twice the centred mean rank
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = (dx * dy).sum(axis=(-1, -2)) / np.sqrt((dx**2).sum(axis=(-1, -2)) * (dy**2).sum(axis=(-1, -2)))
        rho = (rx * ry).sum(axis=-1) / np.sqrt((rx**2).sum(axis=-1) * (ry**2).sum(axis=-1))
    return tau, rho


def rank_correlations(
    losses: Array, predictors: Mapping[str, Array], seed: int = 0, resamples: int = RESAMPLES
) -> RankCorrelations:
    """Rank correlations of predictors with mean stand-alone losses.

    Args:
        losses: stand-alone losses [seeds, n].
        predictors: by name, values [n] that increase with the loss; ``supernet`` and ``params`` are among
            them.
        seed: of the bootstrap.
        resamples: of the architectures.
    """
    seeds, count = losses.shape
    rows = np.random.default_rng([seed, 6]).integers(count, size=(resamples, count))
    rows = np.vstack([np.arange(count), rows])  # the first is the sample itself
    mean = losses.mean(axis=0)
    found = {name: correlations(values[rows], mean[rows]) for name, values in predictors.items()}
    difference = found["supernet"][0] - found["params"][0]
    if seeds > 1:
        pairs = [correlations(losses[a][rows], losses[b][rows]) for a, b in combinations(range(seeds), 2)]
        found["two_seeds"] = (np.mean([p[0] for p in pairs], axis=0), np.mean([p[1] for p in pairs], axis=0))
    return RankCorrelations(
        kendall_tau={name: _estimate(tau) for name, (tau, _) in found.items()},
        spearman_rho={name: _estimate(rho) for name, (_, rho) in found.items()},
        supernet_minus_params=_estimate(difference),
    )


def _estimate(values: Array) -> Estimate:
    """An estimate from the statistic of the sample and its resamples [1 + R]; NaN is left out."""
    known = values[1:][~np.isnan(values[1:])]
    if math.isnan(values[0]) or not len(known):
        return Estimate(math.nan, math.nan, math.nan)
    outside = (100 - COVERAGE) / 2
    low, high = np.percentile(known, [outside, 100 - outside])
    return Estimate(float(values[0]), float(low), float(high))


def verdict(result: RankCorrelations, where: str) -> tuple[str, str]:
    """The conclusion from a set's rank correlations, as one word and as a sentence.

    It depends on the 95% interval of the supernet's tau: ``trusted`` if its lower end is at least 0.5 (three
    of four pairs in the right order), ``loose`` if it is above 0, ``reversed`` if the upper end is below 0.
    If the interval contains 0, it is ``chance``, or ``unclear`` if that of two seeds of the same training
    contains 0 too: then the trainings give no ranking to compare with. The sentence also compares the
    supernet with parameter count, by the interval of the paired difference of their taus.

    Args:
        result: rank correlations of the set.
        where: the property of the set, such as ``over the axes``.
    """
    tau, repeat = result.kendall_tau["supernet"], result.kendall_tau.get("two_seeds")
    significant = tau.low > 0 or tau.high < 0  # both are False for NaN
    if not significant and repeat and not repeat.low > 0:
        return "unclear", (
            f"Inconclusive {where}: two seeds of the same training agree with tau {repeat}, no better than "
            "chance; train longer (--steps)."
        )
    if tau.high < 0:
        word, text = "reversed", f"The supernet's ranking is reversed {where}"
    elif not significant:
        word, text = "chance", f"The supernet's ranking cannot be distinguished from chance {where}"
    elif tau.low >= TRUSTED:
        word, text = "trusted", f"The supernet's ranking can be trusted {where}"
    else:
        word, text = "loose", f"The supernet's ranking is better than chance {where}, but loose"
    seeds = (
        f"two seeds agree with tau {repeat}" if repeat else "with one seed, the agreement of two is unknown"
    )
    return word, f"{text}: tau {tau}; {_beside_params(result)}; {seeds}."


def _beside_params(result: RankCorrelations) -> str:
    """The supernet's ranking compared with that by parameter count, in words."""
    difference, params = result.supernet_minus_params, result.kendall_tau["params"]
    if math.isnan(params.value):
        return "parameter count cannot rank these"
    relation = "cannot be distinguished from"
    if difference.low > 0:
        relation = "is better than"
    elif difference.high < 0:
        relation = "is worse than"
    return f"it {relation} parameter count alone, {params} (difference {difference})"
