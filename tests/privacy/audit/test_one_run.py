import itertools

import numpy as np
import pytest
from scipy import stats

from fl.errors import ShoalError
from fl.keys import generator
from privacy.audit.one_run import coins, default_guesses, largest_epsilon, lower_bound, p_value


def most_false_alarms(seeds, share=0.05):
    """More false alarms than this have probability below 1e-6 if each has probability ``share``."""
    return int(stats.binom.isf(1e-6, seeds, share))


@pytest.mark.parametrize(("canaries", "best"), [(20, 1.82), (100, 3.49), (1000, 5.81), (10000, 8.11)])
def test_the_best_possible_bound_is_that_of_the_paper(canaries, best):
    assert largest_epsilon(canaries, canaries, canaries, 0.0, 0.05) == pytest.approx(best, abs=0.005)


def test_with_delta_the_bound_is_that_of_the_paper():
    # 2305.08846, appendix D: m=1000, 75 of 100 guesses right, delta 1e-4.
    assert largest_epsilon(1000, 100, 75, 1e-4, 0.05) == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize(("guesses", "right", "epsilon"), [(10, 8, 0.0), (40, 37, 1.3), (7, 7, 4.0), (5, 0, 1.0)])
def test_without_delta_the_p_value_is_the_binomial_tail(guesses, right, epsilon):
    q = np.exp(epsilon) / (1 + np.exp(epsilon))
    tail = sum(stats.binom.pmf(k, guesses, q) for k in range(right, guesses + 1))
    assert p_value(100, guesses, right, epsilon, 0.0) == pytest.approx(tail)


def test_the_delta_term_is_the_sum_of_the_definition():
    m, r, v, epsilon, delta = 50, 30, 24, 0.4, 1e-3
    q = np.exp(epsilon) / (1 + np.exp(epsilon))
    alpha = max(sum(stats.binom.pmf(k, r, q) for k in range(v - i, v)) / i for i in range(1, v + 1))
    tail = sum(stats.binom.pmf(k, r, q) for k in range(v, r + 1))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(tail + 2 * m * delta * alpha)
    assert p_value(m, r, v, epsilon, 0.9) == 1.0


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_the_p_value_grows_with_epsilon(delta):
    values = [p_value(200, 60, 50, epsilon, delta) for epsilon in np.linspace(0, 6, 40)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[0] < 0.05 < values[-1]


def test_the_bound_is_the_largest_rejected_epsilon():
    epsilon = largest_epsilon(100, 40, 37, 1e-5, 0.05)
    assert p_value(100, 40, 37, epsilon, 1e-5) <= 0.05 < p_value(100, 40, 37, epsilon + 2e-6, 1e-5)
    assert largest_epsilon(100, 40, 20, 1e-5, 0.05) == 0.0


def test_only_the_highest_and_the_lowest_scores_are_guesses():
    included = np.array([False, True] * 10)
    scores = np.where(included, 1.0, -1.0) * np.arange(1, 21)  # the largest magnitudes are the surest
    scores[:4] *= -1  # mistakes among the least sure, which are left open
    bound = lower_bound(scores, included, 0.0, guesses=(6, 6))
    assert bound.epsilon == largest_epsilon(20, 12, 12, 0.0, 0.05 + 1e-15)
    assert bound.evidence == "20 canaries, 12 of 12 guesses right"
    assert lower_bound(scores, included, 0.0, guesses=(10, 10)).evidence == "20 canaries, 16 of 20 guesses right"
    assert lower_bound(scores, ~included, 0.0, guesses=(6, 6)).evidence == "20 canaries, 0 of 12 guesses right"
    assert lower_bound(scores, included, 0.0, guesses=(6, 0)).evidence == "20 canaries, 6 of 6 guesses right"


def test_a_choice_among_numbers_of_guesses_is_paid_for():
    included = coins(200, "paid")
    several = lower_bound(included.astype(float), included, 0.0, guesses=[(80, 80), (40, 40), (20, 0)])
    assert several.epsilon == pytest.approx(largest_epsilon(200, 160, 160, 0.0, 0.05 / 3), abs=1e-5)
    assert several.epsilon == several.ceiling
    assert "the best of 3 numbers of guesses" in several.evidence


@pytest.mark.parametrize("canaries", [1, 2, 5, 8, 20, 100, 1000])
def test_the_default_guesses_fit_the_canaries(canaries):
    pairs = default_guesses(canaries)
    assert pairs and all(min(pair) >= 0 and 1 <= sum(pair) <= canaries for pair in pairs)


def test_an_attack_that_sees_everything_reaches_the_ceiling():
    # The largest pair leaves room for an uneven split up to 2 sqrt(m) / 2, which 49 of 50 seeds keep.
    reached = [
        (bound := lower_bound(included, included, 1e-5)).epsilon == pytest.approx(bound.ceiling)
        for included in (coins(500, "sees", seed) for seed in range(20))
    ]
    assert sum(reached) >= 15  # P[6 or more of 20 fail] < 1e-6


def test_the_order_of_the_canaries_tells_nothing():
    # Equal scores and all that are in first: an order by position would guess everything right.
    included = np.arange(200) < 100
    bound = lower_bound(np.zeros(200), included, 0.0)
    assert bound.epsilon < 1.0  # a uniformly random order exceeds this with probability below 1e-6; it is fixed here
    assert bound.epsilon == lower_bound(np.ones(200), included, 0.0).epsilon


def test_random_guesses_are_rarely_called_a_leak():
    seeds = 400
    alarms = sum(
        lower_bound(generator("noise", s).standard_normal(100), coins(100, "noise", s, "in"), 0.0).epsilon > 0
        for s in range(seeds)
    )
    assert alarms <= most_false_alarms(seeds)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_error_is_that_of_randomised_response(epsilon):
    """The mechanism for which the bound without delta is tight: it tells each coin, right with probability q."""
    seeds, m, above = 2000, 60, 0
    for s in range(seeds):
        rng, included = generator("response", s), coins(m, "response", s, "in")
        told = included ^ (rng.random(m) >= 1 / (1 + np.exp(-epsilon)))
        above += lower_bound(told + 0.01 * rng.random(m), included, 0.0, guesses=(15, 15)).epsilon > epsilon
    # Probability below 1e-6 at an error of 5 %; and not idle: an error of 5 % at most is used to at least 1 %.
    assert seeds * 0.01 < above <= most_false_alarms(seeds)


def test_a_leak_with_probability_delta_is_allowed_for():
    """With probability delta the mechanism shows all coins, else nothing: it is (0, delta)-DP."""
    seeds, delta, alarms = 200, 0.2, 0
    for s in range(seeds):
        rng, included = generator("delta", s), coins(64, "delta", s, "in")
        scores = included if rng.random() < delta else rng.random(64)
        alarms += lower_bound(scores, included, delta).epsilon > 0
    assert alarms <= most_false_alarms(seeds)


def test_what_can_not_be_audited_is_refused():
    included = coins(50, "refused")
    scores = generator("refused").random(50)
    with pytest.raises(ShoalError, match="fair coins do that once in 10\\^9 runs"):
        lower_bound(scores, np.ones(50), 0.0)
    with pytest.raises(ShoalError, match="1 values that are not numbers"):
        lower_bound(np.append(scores[1:], np.nan), included, 0.0)
    with pytest.raises(ShoalError, match=r"guesses=\(40, 20\) is not allowed.*1 and 50"):
        lower_bound(scores, included, 0.0, guesses=(40, 20))
    with pytest.raises(ShoalError, match=r"shape \(49,\): 50 canaries need a coin each"):
        lower_bound(scores, included[1:], 0.0)
    with pytest.raises(ShoalError, match=r"delta=1\.5"):
        lower_bound(scores, included, 1.5)
    with pytest.raises(ShoalError, match=r"confidence=95"):
        lower_bound(scores, included, 0.0, confidence=95)
    with pytest.raises(ShoalError, match="non-empty"):
        lower_bound([], [], 0.0)
