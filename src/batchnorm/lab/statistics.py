"""What a handful of seeds can say: intervals, p-values, power, and a verdict by a declared rule.

The data are differences per seed: each arm starts from the same weights and sees the same order of
images, so what differs between seeds cancels. Nothing here knows of networks.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from batchnorm.errors import BatchNormError

ALPHA = 0.05  # false positives of a study, over all its questions together
LEVEL = 0.95  # of the intervals
POWER = 0.8  # with which a difference of `detectable` size is found
EXPLORATORY_BELOW = 6  # seeds: with 5 no two-sided p is below 2/2⁵ = 0.0625
RESAMPLES = 9_999
EXACT_UP_TO = 13  # values: 2¹³ patterns of signs are fewer than `RESAMPLES`
DRAWS = 2_000

Word = Literal["supported", "contradicted", "inconclusive"]


@dataclass(frozen=True)
class Rule:
    """The claim, as a range of the true mean effect: low < effect < high; None is no bound.

    `Rule(low=0)` claims a gain, `Rule(high=0)` a loss or, read the other way, that there is no
    gain; `Rule(-0.01, 0.01)` claims that there is no difference worth speaking of.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not self.bounds or (len(self.bounds) == 2 and self.bounds[0] >= self.bounds[1]):
            raise BatchNormError(
                f"a decision rule got low={self.low} and high={self.high}, and wants one of them, "
                "or both with low below high."
            )

    @property
    def bounds(self) -> tuple[float, ...]:
        return tuple(bound for bound in (self.low, self.high) if bound is not None)

    def holds(self, low: float, high: float) -> bool:
        """Whether the interval lies inside the claim."""
        return (self.low is None or low > self.low) and (self.high is None or high < self.high)

    def excludes(self, low: float, high: float) -> bool:
        """Whether the interval lies outside the claim, all of it on one side."""
        return (self.low is not None and high < self.low) or (
            self.high is not None and low > self.high
        )


@dataclass(frozen=True)
class Finding:
    """What the seeds say of one question."""

    verdict: Word
    effect: float | None  # the mean over the seeds; None without any
    interval: tuple[float, float] | None  # BCa, at `LEVEL`; None below two seeds
    p: float | None  # sign-flip, two-sided, against the bound that decides
    p_adjusted: float | None  # Holm's, over the questions of the study
    seeds: int
    exploratory: bool  # too few seeds for any verdict but `inconclusive`


def judge(questions: Sequence[tuple[Sequence[float], Rule]]) -> list[Finding]:
    """Judge the questions of one study together: (differences per seed, rule) each.

    *supported*: the interval lies inside the rule and Holm's p is at most `ALPHA`; *contradicted*:
    it lies outside, with the same p; *inconclusive* otherwise. The p of a rule with two bounds is
    the larger one where the effect lies between them (two one-sided tests).
    """
    ps = [deciding_p(values, rule) for values, rule in questions]
    adjusted = holm(ps)
    return [
        _finding(values, rule, p, corrected)
        for (values, rule), p, corrected in zip(questions, ps, adjusted, strict=True)
    ]


def _finding(
    values: Sequence[float], rule: Rule, p: float | None, adjusted: float | None
) -> Finding:
    effect = math.fsum(values) / len(values) if values else None
    found = interval(values) if len(values) > 1 else None
    verdict: Word = "inconclusive"
    if found is not None and adjusted is not None and adjusted <= ALPHA:
        if rule.holds(*found):
            verdict = "supported"
        elif rule.excludes(*found):
            verdict = "contradicted"
    return Finding(
        verdict, effect, found, p, adjusted, len(values), len(values) < EXPLORATORY_BELOW
    )


def deciding_p(values: Sequence[float], rule: Rule) -> float | None:
    """The p-value on which the verdict hangs; None without values."""
    if not values:
        return None
    effect = math.fsum(values) / len(values)
    if rule.holds(effect, effect):
        return max(sign_flip(values, bound) for bound in rule.bounds)
    violated = rule.low if rule.low is not None and effect <= rule.low else rule.high
    assert violated is not None  # noqa: S101  # for the type checker: a rule has a bound
    return sign_flip(values, violated)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """BCa bootstrap interval of the mean, at a level that is right for few values, too.

    A bootstrap of n values is too narrow: its variance lacks the factor n/(n−1), and it knows
    nothing of Student's t. The percentiles asked of it are therefore wider, by
    α' = 2Φ(−√(n/(n−1)) · t(α/2, n−1)) (Hesterberg 2015, https://arxiv.org/abs/1411.5279). Without
    that, ten values of a normal distribution give a "95%" interval that covers 90%; with it 95% (six
    values: 93%; ten of an exponential distribution: 92%).
    """
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        raise BatchNormError(f"an interval got {len(data)} values and wants 2 or more.")
    n = len(data)
    if n == 2 or np.ptp(data) == 0:
        # nothing to resample: BCa is 0/0, and the range is all there is
        return float(data.min()), float(data.max())
    t = stats.t.isf((1 - level) / 2, n - 1)
    wide = 1 - 2 * stats.norm.sf(math.sqrt(n / (n - 1)) * t)
    found = stats.bootstrap(
        (data,), np.mean, confidence_level=wide, n_resamples=RESAMPLES, method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def sign_flip(values: Sequence[float], null: float = 0.0) -> float:
    """Two-sided p of the hypothesis that the values are symmetric around `null`.

    Every pattern of signs is tried up to `EXACT_UP_TO` values; beyond, `RESAMPLES` random ones.
    """
    data = np.asarray(values, dtype=float) - null
    if len(data) < 2 or not np.any(data):
        return 1.0
    data /= np.abs(data).max()

    def mean(signed: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        # sums of the same numbers in another order differ in their last digits, and are ties
        return np.asarray(np.round(signed.mean(axis=axis), 12))

    found = stats.permutation_test(
        (data,), mean, permutation_type="samples", n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's p-values: the chance of any false positive among all of them stays below α.

    The smallest is multiplied by their number, the next by one less, and so on; none is smaller
    than the one before it. A question without an answer (None) counts as asked.
    """
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * p))
        adjusted[place] = largest
    return adjusted


def smallest_p(seeds: int) -> float:
    """2/2ⁿ: no data of so many seeds give a smaller p."""
    return min(1.0, 2.0 ** (1 - seeds))


def detectable(seeds: int, questions: int = 1) -> float | None:
    """The effect, in standard deviations of the differences, that is found with `POWER`.

    For normal differences and α/questions, the worst that Holm's correction does; None where the
    smallest p is above that. Up to 13 seeds the test itself is run on `DRAWS` samples: there its p
    is so coarse that Student's t would promise too much (6 seeds: 0.80 for a true 0.59).
    """
    alpha = ALPHA / questions
    if smallest_p(seeds) > alpha:
        return None
    found = (
        _power_of_sign_flips(seeds, alpha) if seeds <= EXACT_UP_TO else _power_of_t(seeds, alpha)
    )
    low, high = 0.0, 100.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= POWER else (middle, high)
    return high


def _power_of_sign_flips(seeds: int, alpha: float) -> Callable[[float], float]:
    noise = np.random.default_rng(0).normal(size=(seeds, DRAWS))
    # the other half of the patterns are these, negated
    signs = np.array(list(itertools.product([1.0], *[[1.0, -1.0]] * (seeds - 1))))

    def power(effect: float) -> float:
        sums = np.abs(signs @ (noise + effect))  # (patterns, DRAWS); the first is as observed
        p = (sums >= sums[0] * (1 - 1e-12)).mean(axis=0)
        return float((p <= alpha).mean())

    return power


def _power_of_t(seeds: int, alpha: float) -> Callable[[float], float]:
    critical = stats.t.isf(alpha / 2, seeds - 1)
    return lambda effect: float(stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds)))
