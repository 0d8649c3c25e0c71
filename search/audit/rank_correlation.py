"""How well two rankings of the same architectures agree, and how sure that is.

Kendall's tau-b and Spearman's rho, with percentile intervals from a bootstrap over architectures
(Efron 1979). All figures of a set come from the same resamples, so that their differences are
paired. A loss counts as it is; a size (parameters, FLOPs) counts as its negative, since the larger
model should have the lower loss: 1 is always the perfect agreement.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
COVERAGE = 95  # percent
TRUSTED = 0.5  # tau: three of four pairs stand in the right order
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% bootstrap interval; NaN where it is undefined (all values equal)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, float | None]:
        """As a JSON value; what is undefined is null."""
        named = {"value": self.value, f"low_{COVERAGE}": self.low, f"high_{COVERAGE}": self.high}
        return {name: None if math.isnan(number) else number for name, number in named.items()}

    @staticmethod
    def from_json(value: Mapping[str, float | None]) -> "Estimate":
        """The inverse of :meth:`to_json`."""
        numbers = (value["value"], value[f"low_{COVERAGE}"], value[f"high_{COVERAGE}"])
        return Estimate(*(math.nan if number is None else number for number in numbers))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What ranks the stand-alone losses of one set, and how well.

    ``kendall_tau`` and ``spearman_rho`` map each predictor's name to its agreement with the mean
    stand-alone loss; ``two_seeds`` (absent with one seed) is the mean agreement of two
    seeds' losses; ``supernet_minus_params`` is the paired difference of two taus.
    """

    kendall_tau: Mapping[str, Estimate]
    spearman_rho: Mapping[str, Estimate]
    supernet_minus_params: Estimate

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return {
            "kendall_tau": {name: e.to_json() for name, e in self.kendall_tau.items()},
            "spearman_rho": {name: e.to_json() for name, e in self.spearman_rho.items()},
            "supernet_minus_params_kendall_tau": self.supernet_minus_params.to_json(),
        }


def correlations(x: Array, y: Array) -> tuple[Array, Array]:
    """Kendall's tau-b and Spearman's rho of samples along the last axis [..., n]; NaN without variation."""
    dx, dy = (np.sign(v[..., :, None] - v[..., None, :]) for v in (x, y))
    rx, ry = dx.sum(axis=-1), dy.sum(axis=-1)  # twice the centred mean ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = (dx * dy).sum(axis=(-1, -2)) / np.sqrt((dx**2).sum(axis=(-1, -2)) * (dy**2).sum(axis=(-1, -2)))
        rho = (rx * ry).sum(axis=-1) / np.sqrt((rx**2).sum(axis=-1) * (ry**2).sum(axis=-1))
    return tau, rho


def agreement(alone: Array, predictors: Mapping[str, Array], seed: int = 0, draws: int = DRAWS) -> Agreement:
    """How well predictors rank stand-alone losses.

    Args:
        alone: losses [seeds, n] of architectures trained alone.
        predictors: by name, values [n] that rise with the loss; ``supernet`` and ``params`` are among them.
        seed: of the bootstrap.
        draws: resamples of the architectures.
    """
    seeds, count = alone.shape
    rows = np.random.default_rng([seed, 6]).integers(count, size=(draws, count))
    rows = np.vstack([np.arange(count), rows])  # the first is the sample itself
    mean = alone.mean(axis=0)
    found = {name: correlations(values[rows], mean[rows]) for name, values in predictors.items()}
    difference = found["supernet"][0] - found["params"][0]
    if seeds > 1:
        pairs = [correlations(alone[a][rows], alone[b][rows]) for a, b in combinations(range(seeds), 2)]
        found["two_seeds"] = (np.mean([p[0] for p in pairs], axis=0), np.mean([p[1] for p in pairs], axis=0))
    return Agreement(
        kendall_tau={name: _estimate(tau) for name, (tau, _) in found.items()},
        spearman_rho={name: _estimate(rho) for name, (_, rho) in found.items()},
        supernet_minus_params=_estimate(difference),
    )


def _estimate(values: Array) -> Estimate:
    """From the figure of the sample and those of its resamples [1 + draws]; undefined ones are left out."""
    known = values[1:][~np.isnan(values[1:])]
    if math.isnan(values[0]) or not len(known):
        return Estimate(math.nan, math.nan, math.nan)
    outside = (100 - COVERAGE) / 2
    low, high = np.percentile(known, [outside, 100 - outside])
    return Estimate(float(values[0]), float(low), float(high))


def verdict(found: Agreement, where: str) -> tuple[str, str]:
    """What the figures of a set say, as one word and in words.

    By the 95% interval of the supernet's tau: ``trusted`` where its lower end is at least 0.5 (three
    of four pairs in the right order), ``loose`` where it is above 0, ``reversed`` where the upper end
    is below 0. Where the interval holds 0 it is ``chance``, or ``unclear`` if that of two seeds of the
    same training holds 0 too: then the trainings themselves give no ranking to compare with. Beside
    it, whether the supernet ranks better or worse than parameter count, by the interval of the paired
    difference of their taus; where it holds 0, the two cannot be told apart.

    Args:
        found: the figures.
        where: what the set varies, such as ``over the axes``.
    """
    tau, repeat = found.kendall_tau["supernet"], found.kendall_tau.get("two_seeds")
    apart = tau.low > 0 or tau.high < 0  # neither is true of what is undefined
    if not apart and repeat and not repeat.low > 0:
        return "unclear", (
            f"Nothing can be said {where}: two seeds of the same training agree with tau {repeat}, "
            "no better than chance; train longer (--steps)."
        )
    if tau.high < 0:
        word, text = "reversed", f"The supernet's ranking is the wrong way round {where}"
    elif not apart:
        word, text = "chance", f"The supernet's ranking cannot be told from chance {where}"
    elif tau.low >= TRUSTED:
        word, text = "trusted", f"The supernet's ranking can be trusted {where}"
    else:
        word, text = "loose", f"The supernet's ranking is better than chance {where}, but loose"
    difference, params = found.supernet_minus_params, found.kendall_tau["params"]
    if math.isnan(params.value):
        compared = "parameter count cannot rank these"
    else:
        told = "cannot be told from"
        if difference.low > 0:
            told = "is better than"
        elif difference.high < 0:
            told = "is worse than"
        compared = f"it {told} parameter count alone, {params} (difference {difference})"
    limit = f"two seeds agree with tau {repeat}" if repeat else "one seed cannot say how well two agree"
    return word, f"{text}: tau {tau}; {compared}; {limit}."
