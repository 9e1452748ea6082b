import json

import numpy as np
import pytest

from fl.errors import ShoalError
from fl.keys import generator
from privacy.audit.client import ClientAudit, audit, cosines, directions
from privacy.audit.gaussians import gaussian_epsilon
from privacy.audit.one_run import coins

DELTA = 1e-5
CANARIES, DIMENSION = 200, 4000


def central(noise, rounds, seed, unnoised=()):
    """Every included canary takes part in each round of central DP: sums of unit vectors plus N(0, noise^2)."""
    unit = directions(CANARIES, DIMENSION, seed, "directions")
    included = coins(CANARIES, seed, "coins")
    rng = generator(seed, "noise")
    scale = np.full((rounds, 1), float(noise))
    scale[list(unnoised)] = 0
    releases = unit[included].sum(axis=0) + scale * rng.standard_normal((rounds, DIMENSION))
    return releases, unit, included


def test_directions_are_units_and_nearly_orthogonal_and_do_not_depend_on_how_many_there_are():
    unit = directions(20, 5000, 7, "canary")
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    # Cosines of independent directions have deviation 1 / sqrt(5000); 7 of them is exceeded with probability 5e-10.
    assert np.abs(unit @ unit.T - np.eye(20)).max() < 7 / np.sqrt(5000)
    assert np.array_equal(directions(3, 5000, 7, "canary"), unit[:3])
    assert not np.array_equal(directions(3, 5000, 8, "canary"), unit[:3])


def test_cosines_and_the_release_of_zeros():
    unit = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert np.allclose(cosines(np.array([[0.0, 5.0], [0.0, 0.0]]), unit), [[0.0, 0.8], [0.0, 0.0]])


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (2.0, 4)])
def test_the_pooled_estimate_is_near_the_epsilon_of_the_mechanism_and_the_bound_below(noise, rounds):
    # The change of the model over the run is the sum of the rounds: one Gaussian mechanism with sqrt(rounds) / noise.
    true = gaussian_epsilon(np.sqrt(rounds) / noise, 1, 0, 1, DELTA)
    estimates = []
    for seed in range(10):
        releases, unit, included = central(noise, rounds, seed)
        result = audit(cosines(releases.sum(axis=0, keepdims=True), unit), included, DELTA)
        assert result.bound.epsilon <= true  # each with at least 95 %; the ten seeds are fixed
        assert result.estimate > result.pooled - 0.5  # a deviation each draws it upward
        estimates.append(result.pooled)
    assert np.median(estimates) == pytest.approx(true, rel=0.15)


def test_both_estimates_reach_the_epsilon_with_many_canaries():
    true, included = gaussian_epsilon(1, 1, 0, 1, 1e-2), coins(100_000, "many")
    result = audit(generator("many").normal(included, 1)[None], included, 1e-2)
    assert result.estimate == pytest.approx(true, rel=0.03) and result.pooled == pytest.approx(true, rel=0.03)


def test_unequal_deviations_are_seen_by_the_estimate_and_not_by_the_pooled_one():
    included = coins(20_000, "unequal")
    scores = generator("unequal").normal(0, np.where(included, 2.0, 1.0))
    result = audit(scores[None], included, 1e-2)
    assert result.estimate == pytest.approx(gaussian_epsilon(0, 2, 0, 1, 1e-2), rel=0.1)
    assert result.pooled < 0.2


def test_the_largest_cosine_of_the_rounds_shows_a_round_without_noise():
    noise, rounds = 60.0, 10
    claimed = gaussian_epsilon(np.sqrt(rounds) / noise, 1, 0, 1, DELTA)
    releases, unit, included = central(noise, rounds, 1, unnoised=[4])
    assert audit(cosines(releases, unit), included, DELTA).bound.contradicts(claimed)
    assert not audit(cosines(releases.sum(axis=0, keepdims=True), unit), included, DELTA).bound.contradicts(claimed)
    releases, unit, included = central(noise, rounds, 1)
    assert not audit(cosines(releases, unit), included, DELTA).bound.contradicts(claimed)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_noise_that_is_missing_or_a_tenth_is_above_the_claim(noise):
    claimed = gaussian_epsilon(1, 1, 0, 1, 1e-2)
    releases, unit, included = central(noise, 1, 3)
    result = audit(cosines(releases, unit), included, 1e-2, confidence=0.9)
    assert result.estimate > claimed
    claimed = gaussian_epsilon(0.5, 1, 0, 1, DELTA)
    assert audit(cosines(releases, unit), included, DELTA).bound.contradicts(claimed)


def test_scores_without_any_spread():
    included = coins(40, "spread")
    apart = audit(included[None].astype(float), included, DELTA)
    assert apart.estimate is None and apart.pooled is None
    same = audit(np.zeros((1, 40)), included, DELTA)
    assert same.estimate == same.pooled == 0.0


def test_the_report():
    releases, unit, included = central(1.0, 1, 5)
    result = audit(cosines(releases, unit), included, DELTA)
    assert result.bound.sentence(3.0) in result.sentence(3.0)
    assert f"put epsilon at {result.estimate:.2f}, or {result.pooled:.2f} with one deviation" in result.sentence()
    assert json.loads(json.dumps(result.as_plain()))["bound"]["epsilon"] == result.bound.epsilon
    assert "at no finite value, or 3.00 with" in ClientAudit(None, 3.0, result.bound).sentence()


def test_few_canaries_are_refused():
    included = np.arange(20) < 7
    with pytest.raises(ShoalError, match="7 canaries took part and 13 did not: a fit needs at least 8"):
        audit(np.zeros((1, 20)), included, DELTA)
