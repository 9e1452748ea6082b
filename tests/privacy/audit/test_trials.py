import numpy as np
import pytest
from scipy import stats

from fl.errors import ShoalError
from fl.keys import generator
from privacy.audit.evidence import TRIAL_STATISTICS, trial_statistics
from privacy.audit.gaussians import gaussian_epsilon
from privacy.audit.result import clopper_pearson
from privacy.audit.trials import event_epsilon, lower_bound
from tests.privacy.audit.mechanisms import FAULTS, Run

DELTA = 1e-5


def repeated(run, runs, *key):
    """Statistics of ``runs`` independent runs with one canary alone in the data, and as many without it."""
    tables = []
    for present in (True, False):
        rng, direction = generator(*key, int(present)), np.eye(1, 65)[0]
        table = [trial_statistics(run.releases(np.array([present]), rng), direction) for _ in range(runs)]
        tables.append(np.array(table))
    return lower_bound(*tables, DELTA, names=TRIAL_STATISTICS)


def test_the_bound_of_an_event_is_the_ratio_of_the_limits():
    low = clopper_pearson(60, 100, 0.025)[0]
    high = clopper_pearson(3, 200, 0.025)[1]
    assert event_epsilon(60, 100, 3, 200, 0.01, 0.95) == pytest.approx(np.log((low - 0.01) / high))
    assert event_epsilon(60, 100, 120, 200, 0.0, 0.95) == 0.0
    assert event_epsilon(0, 100, 0, 200, 0.1, 0.95) == 0.0  # nothing is left after delta


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exchanged", [False, True])
def test_every_side_and_direction_is_found(sign, exchanged):
    rng = generator("sides")
    # Half of the runs with the canary betray it; the runs without never look like it.
    seen = np.where(rng.random(400) < 0.5, 5.0, 0.0) * sign
    pair = (np.zeros(400), seen) if exchanged else (seen, np.zeros(400))
    bound = lower_bound(*pair, 0.0)
    hits = int((seen[1::2] != 0).sum())
    assert bound.epsilon == pytest.approx(float(event_epsilon(hits, 200, 0, 200, 0.0, 0.95)))
    assert bound.epsilon > 2.5


def test_runs_that_are_told_apart_reach_the_ceiling():
    bound = lower_bound(np.arange(1000) + 1e6, np.arange(1000.0), DELTA)
    right = 0.025 ** (1 / 500)
    assert bound.epsilon == bound.ceiling == pytest.approx(np.log((right - DELTA) / (1 - right)))


def test_the_choice_of_the_event_costs_no_validity():
    """Six statistics of noise: what is chosen on one half is confirmed by chance in at most 5 % of the seeds."""
    seeds, alarms = 200, 0
    for s in range(seeds):
        rng = generator("null", s)
        alarms += lower_bound(rng.normal(size=(60, 6)), rng.normal(size=(60, 6)), 0.0).epsilon > 0
    assert alarms <= stats.binom.isf(1e-6, seeds, 0.05)  # more has probability below 1e-6


def test_the_bound_is_below_the_epsilon_of_the_gaussian_mechanism_and_near_it():
    seeds, epsilon = 100, gaussian_epsilon(1, 1, 0, 1, 0.05)
    bounds = []
    for s in range(seeds):
        rng = generator("gauss", s)
        bounds.append(lower_bound(rng.normal(1, 1, 2000), rng.normal(0, 1, 2000), 0.05).epsilon)
    above = sum(bound > epsilon for bound in bounds)
    assert above <= stats.binom.isf(1e-6, seeds, 0.05)  # more has probability below 1e-6
    assert np.median(bounds) > 0.6 * epsilon


@pytest.mark.parametrize("fault", [*FAULTS, "empty batches skipped"])
def test_a_planted_fault_is_above_the_claimed_epsilon(fault):
    run = Run(noise=4.0, rate=0.5, steps=10, fault=fault)
    claimed = run.epsilon(DELTA)
    bound = repeated(run, 1000, "fault", fault)
    assert bound.contradicts(claimed), bound.sentence(claimed)
    if fault == "empty batches skipped":
        assert "steps that are exactly zero" in bound.evidence or "smallest norm" in bound.evidence


def test_the_right_mechanism_is_not_above_its_epsilon():
    run = Run(noise=4.0, rate=0.5, steps=10)
    bound = repeated(run, 1000, "right")
    assert bound.epsilon <= run.epsilon(DELTA) < bound.ceiling


def test_an_event_is_a_statistic_of_ones_and_zeros():
    happened = np.arange(100) % 4 < 2
    bound = lower_bound(happened, np.zeros(100, dtype=bool), 0.0, names=("the release is zero",))
    assert bound.evidence.startswith("the release is zero at least 0.5 in 25 of 50 runs with the canary and 0 of 50")
    assert bound.epsilon > 0


def test_too_few_runs_and_values_that_are_not_finite_are_refused():
    with pytest.raises(ShoalError, match="has 7 runs: the audit needs at least 8"):
        lower_bound(np.zeros(7), np.zeros(8), 0.0)
    with pytest.raises(ShoalError, match="without has 8 runs.*finite"):
        lower_bound(np.zeros(8), np.full(8, np.inf), 0.0)
    with pytest.raises(ShoalError, match="1 statistics with the canary and 2 without"):
        lower_bound(np.zeros(8), np.zeros((8, 2)), 0.0)
