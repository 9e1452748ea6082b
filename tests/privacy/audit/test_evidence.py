import numpy as np
import pytest
from scipy import stats

from fl.errors import ShoalError
from fl.keys import generator
from privacy.audit.evidence import TRIAL_STATISTICS, log_likelihood_ratios, trial_statistics
from privacy.audit.one_run import coins, default_guesses, lower_bound
from tests.privacy.audit.mechanisms import FAULTS, SPARE, Run

DELTA = 1e-5
CANARIES = 1000


def one_run(run, seed):
    included = coins(CANARIES, seed, "in")
    releases = run.releases(included, generator(seed, "releases"))
    scores = log_likelihood_ratios(releases[:, :CANARIES], releases[:, -SPARE:], shift=1.0, rate=run.rate)
    guesses = default_guesses(CANARIES, run.rate)
    return lower_bound(scores, included, DELTA, guesses=guesses), releases, included


@pytest.mark.parametrize("run", [Run(), Run(noise=3.0, rate=0.1, steps=50), Run(noise=3.0, rate=1.0, steps=4)])
def test_the_right_mechanism_is_not_above_its_epsilon(run):
    # 9 or more of 20 bounds are wrong with probability below 1e-6 even if each is with the 5 % that is allowed.
    claimed = run.epsilon(DELTA)
    bounds = [one_run(run, seed)[0] for seed in range(20)]
    assert sum(bound.contradicts(claimed) for bound in bounds) <= 8
    assert np.median([bound.epsilon for bound in bounds]) <= claimed
    assert all(bound.ceiling > claimed for bound in bounds)  # it could have been contradicted


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("noise", "rate", "steps"), [(5.0, 0.5, 20), (3.0, 0.1, 50), (3.0, 1.0, 4)])
def test_a_planted_fault_is_above_the_claimed_epsilon(fault, noise, rate, steps):
    run = Run(noise, rate, steps, fault)
    claimed = run.epsilon(DELTA)
    for seed in range(3):
        bound = one_run(run, seed)[0]
        assert bound.contradicts(claimed), bound.sentence(claimed)


def test_sums_and_maxima_miss_the_step_without_noise():
    """Why the noise of each step is measured."""
    run = Run(noise=5.0, rate=0.5, steps=20, fault="a step without noise")
    bound, releases, included = one_run(run, 0)
    along = releases[:, :CANARIES]
    for simple in (along.sum(axis=0), along.max(axis=0)):
        assert not lower_bound(simple, included, DELTA).contradicts(run.epsilon(DELTA))
    assert bound.contradicts(run.epsilon(DELTA))


def test_scores_are_the_log_likelihood_ratio_of_the_subsampled_gaussian():
    rng = generator("ratio")
    x, shift, q = rng.normal(size=(3, 5)), 0.7, 0.3
    deviation = np.array([0.5, 1.0, 4.0])
    aside = deviation[:, None] * np.array([-1.0, 1.0] * 8)  # median 0, root mean square exactly the deviation
    centre = np.median(aside, axis=1)
    assert np.allclose(centre, 0)
    p = stats.norm.pdf
    s = deviation[:, None]
    expected = np.log(((1 - q) * p(x, 0, s) + q * p(x, shift, s)) / p(x, 0, s)).sum(axis=0)
    assert np.allclose(log_likelihood_ratios(x, aside, shift, q), expected)
    whole = np.log(p(x, shift, s) / p(x, 0, s)).sum(axis=0)
    assert np.allclose(log_likelihood_ratios(x, aside, shift), whole)
    # What the release has in common on all directions tells nothing.
    assert np.allclose(log_likelihood_ratios(x + 3, aside + 3, shift, q), expected)


def test_steps_without_any_spread_have_finite_scores():
    x = np.array([[0.0, 1.0, 0.0], [0.2, -0.1, 0.1]], dtype=np.float32)
    aside = np.concatenate([np.zeros((1, 8)), generator("spread").normal(size=(1, 8))]).astype(np.float32)
    scores = log_likelihood_ratios(x, aside, 1.0, 0.5)
    assert np.isfinite(scores).all() and scores.argmax() == 1
    assert scores[0] != scores[2]  # the noised step still orders the others


def test_shapes_and_ranges_are_refused():
    x, aside = np.zeros((3, 4)), np.zeros((3, 8))
    for references in (aside[:2], aside[:, :7]):
        with pytest.raises(ShoalError, match="at least 8 directions that no canary has"):
            log_likelihood_ratios(x, references, 1.0)
    for shift, rate in ((0.0, 0.5), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ShoalError, match=f"shift={shift}, rate={rate} are not allowed"):
            log_likelihood_ratios(x, aside, shift, rate)


def test_the_statistics_of_a_trial():
    u = np.array([0.6, 0.8, 0.0, 0.0, 0.0])
    across = np.array([0.0, 0.0, 3.0, 4.0, 0.0])  # orthogonal, norm 5, root mean square 2.5 over 4 coordinates
    total, peak, smallest, zeros = trial_statistics(np.stack([2 * u + across, -u, np.zeros(5)]), u)
    assert (total, peak, smallest, zeros) == pytest.approx((1.0, 0.8, 0.0, 1.0))
    assert len(TRIAL_STATISTICS) == 4
    assert trial_statistics(np.stack([u, 50 * across]), u)[1] > 1e6  # a step along the direction and nothing else
