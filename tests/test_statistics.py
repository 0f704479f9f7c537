"""The statistics on data whose truth is known: they cover, and are wrong, as often as they say."""

import functools
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from batchnorm import BatchNormError
from batchnorm.lab import statistics
from batchnorm.lab.statistics import Rule, judge

TRIALS = 600
DRAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, size=n),
}


def within(share, rate, trials=TRIALS):
    """Whether a counted share could be that of `rate`; a right one fails once in 10,000."""
    low, high = stats.binom.ppf([5e-5, 1 - 5e-5], trials, rate) / trials
    return low <= share <= high


@functools.cache
def covered(interval, distribution, n):
    rng = np.random.default_rng(11)
    found = [interval(DRAWS[distribution](rng, n)) for _ in range(TRIALS)]
    return sum(low <= 0 <= high for low, high in found) / TRIALS


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1_999)


@pytest.mark.parametrize("distribution", DRAWS)
def test_intervals_of_ten_values_cover_as_often_as_they_say(distribution):
    # of the distribution's own shape the second digit depends: a percentage point is allowed for it
    share = covered(statistics.interval, distribution, 10)
    assert within(share, 0.95 - 0.01) or within(share, 0.95 + 0.01)


def test_intervals_of_six_values_cover_what_the_docstring_says():
    assert within(covered(statistics.interval, "normal", 6), 0.93)


def test_a_plain_bootstrap_interval_is_seen_to_cover_too_little():
    def plain(values):
        found = stats.bootstrap(
            (values,), np.mean, n_resamples=1_999, method="BCa", rng=np.random.default_rng(0)
        )
        return found.confidence_interval

    share = covered(plain, "normal", 10)
    assert not within(share, 0.94)
    assert within(share, 0.90)


def test_an_interval_is_where_its_values_are():
    values = [0.1, 0.2, 0.15, 0.3, 0.22, 0.18]
    low, high = statistics.interval(values)
    assert low < np.mean(values) < high
    shifted = statistics.interval([v + 5 for v in values])
    assert shifted == pytest.approx((low + 5, high + 5))
    wide, wider = statistics.interval(values, 0.99)
    assert wide < low < high < wider


@pytest.mark.parametrize(
    ("values", "expected"), [([0.3] * 8, (0.3, 0.3)), ([0.1, 0.2], (0.1, 0.2))]
)
def test_an_interval_of_values_that_hardly_spread(values, expected):
    assert statistics.interval(values) == pytest.approx(expected)


def test_an_interval_of_one_value_is_refused():
    with pytest.raises(BatchNormError, match="got 1 values and wants 2"):
        statistics.interval([1.0])


def every_sign(values):
    """The definition: the share of sign patterns whose mean is as far from 0 as the one seen."""
    signs = np.array(list(itertools.product([1, -1], repeat=len(values))))
    means = np.abs((signs * values).mean(1))
    return (means >= abs(np.mean(values)) * (1 - 1e-12)).mean()


@pytest.mark.parametrize("n", [3, 6, 10])
def test_the_sign_flip_test_tries_every_sign(n):
    values = np.random.default_rng(n).normal(0.4, 1, size=n)
    assert statistics.sign_flip(values) == pytest.approx(every_sign(values))
    assert statistics.sign_flip(values + 3, 3) == pytest.approx(every_sign(values))


@pytest.mark.parametrize(("n", "p"), [(5, 0.0625), (6, 0.03125), (10, 2 / 1024)])
def test_the_smallest_p(n, p):
    assert statistics.smallest_p(n) == p == statistics.sign_flip(np.arange(1, n + 1))


def test_no_difference_at_all_has_p_1():
    assert statistics.sign_flip([0.0] * 8) == 1
    assert statistics.sign_flip([0.5] * 8, 0.5) == 1


def false_positives(p_of, n):
    rng = np.random.default_rng(5)
    return sum(p_of(rng.normal(size=n)) <= 0.05 for _ in range(TRIALS)) / TRIALS


@pytest.mark.parametrize("n", [6, 10])
def test_false_positives_at_the_stated_rate(n):
    attained = math.floor(0.05 * 2 ** (n - 1)) / 2 ** (n - 1)  # the largest p that is not above α
    assert within(false_positives(statistics.sign_flip, n), attained)


def test_a_one_sided_test_taken_for_two_sided_is_seen():
    def one_sided(values):
        return min(1.0, every_sign(values) / 2)

    assert not within(false_positives(one_sided, 6), 0.03125)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([None, 0.02]) == [None, pytest.approx(0.04)]
    assert statistics.holm([]) == []


def family_errors(correct):
    """How often a study of five questions, none of them true, says something."""
    rng, wrong = np.random.default_rng(3), 0
    trials = 400
    for _ in range(trials):
        ps = [statistics.sign_flip(rng.normal(size=10)) for _ in range(5)]
        wrong += min(correct(ps)) <= 0.05
    return wrong / trials, trials


def test_several_questions_together_err_at_the_rate_of_one():
    share, trials = family_errors(statistics.holm)
    assert share <= stats.binom.ppf(1 - 1e-4, trials, 0.05) / trials
    uncorrected, _ = family_errors(list)
    assert uncorrected > stats.binom.ppf(1 - 1e-4, trials, 0.05) / trials


@pytest.mark.parametrize(("seeds", "questions"), [(6, 1), (10, 1), (10, 4), (20, 1)])
def test_power_is_what_was_said_beforehand(seeds, questions):
    effect = statistics.detectable(seeds, questions)
    rng, trials = np.random.default_rng(8), 500
    found = sum(
        statistics.sign_flip(rng.normal(effect, 1, size=seeds)) <= 0.05 / questions
        for _ in range(trials)
    )
    assert within(found / trials, 0.8, trials)


def test_too_few_seeds_find_nothing():
    assert statistics.detectable(5) is None
    assert statistics.detectable(6, questions=2) is None


@pytest.mark.parametrize("bounds", [(None, None), (1.0, 1.0), (2.0, 1.0)])
def test_a_rule_that_claims_nothing_is_refused(bounds):
    with pytest.raises(BatchNormError, match="a decision rule got"):
        Rule(*bounds)


def around(center, n=10):
    return list(center + 0.1 * np.linspace(-1, 1, n))


@pytest.mark.parametrize(
    ("values", "rule", "verdict"),
    [
        (around(1), Rule(low=0), "supported"),
        (around(-1), Rule(low=0), "contradicted"),
        (around(0), Rule(low=0), "inconclusive"),
        (around(-1), Rule(high=0), "supported"),
        (around(1), Rule(high=0), "contradicted"),
        (around(0), Rule(-1, 1), "supported"),
        (around(2), Rule(-1, 1), "contradicted"),
        (around(-2), Rule(-1, 1), "contradicted"),
        (around(1), Rule(-1, 1), "inconclusive"),
        (around(1, 5), Rule(low=0), "inconclusive"),  # five seeds: p cannot be below .0625
        ([0.5] * 8, Rule(low=0), "supported"),
        ([], Rule(low=0), "inconclusive"),
        ([1.0], Rule(low=0), "inconclusive"),
    ],
)
def test_verdicts(values, rule, verdict):
    (finding,) = judge([(values, rule)])
    assert finding.verdict == verdict
    assert finding.seeds == len(values)
    assert finding.exploratory == (len(values) < 6)


def test_a_finding_holds_its_numbers():
    values = around(1, 8)
    finding, other = judge([(values, Rule(low=0)), (around(0, 8), Rule(low=0))])
    assert finding.effect == pytest.approx(1)
    assert finding.interval == statistics.interval(values)
    assert finding.p == 2 / 2**8
    assert finding.p_adjusted == 2 * finding.p
    assert other.p_adjusted == pytest.approx(other.p)


def test_at_the_bound_a_verdict_is_as_rare_as_stated():
    """The truth lies on the bound of the claim: either verdict is a false positive."""
    rng = np.random.default_rng(2)
    trials = 300
    said = sum(
        judge([(list(rng.normal(0.5, 1, size=10)), Rule(low=0.5))])[0].verdict != "inconclusive"
        for _ in range(trials)
    )
    assert said / trials <= stats.binom.ppf(1 - 1e-4, trials, 0.05) / trials
