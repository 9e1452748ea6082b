"""What stale updates count for, and delay compensation, by their formulas."""

import itertools

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.staleness import (
    DCASGD,
    Auto,
    Constant,
    Exponential,
    Hinge,
    Polynomial,
    Staleness,
    Treatment,
    drift,
)
from clients.adapters.space import Space
from clients.layout import Layout
from fl.config import build
from fl.errors import ConfigError
from fl.schedules.fedasync import FedAsync
from fl.schedules.fedbuff import FedBuff
from fl.schedules.fedfix import FedFix
from fl.schedules.synchronous import Synchronous
from fl.state import ServerState, Update

LAYOUT = Layout(("x",), ((4,),))
RULES = [
    Constant(), Polynomial(), Polynomial(0.0), Polynomial(2.0), Hinge(), Hinge(0.5, 0), Hinge(0.0, 3), Exponential(),
    Exponential(0.5), DCASGD(),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_fresh_update_counts_whole_and_none_more_than_a_fresher_one(rule):
    factors = [rule.factor(u) for u in range(200)]
    assert factors[0] == 1.0
    assert all(after <= before for before, after in itertools.pairwise(factors))
    assert min(factors) >= 0
    assert rule.weighs or set(factors) == {1.0}


def test_the_factors_are_those_of_the_papers():
    assert [Polynomial(0.5).factor(u) for u in (0, 3, 8)] == [1.0, 0.5, 1 / 3]
    assert [Polynomial(1.0).factor(u) for u in (0, 1, 3)] == [1.0, 0.5, 0.25]
    hinge = Hinge(slope=10.0, threshold=4)
    assert [hinge.factor(u) for u in (0, 4, 5, 6)] == [1.0, 1.0, 1 / 11, 1 / 21]
    assert [Hinge(0.5, 2).factor(u) for u in (2, 3, 4, 6)] == [1.0, 1 / 1.5, 1 / 2, 1 / 3]
    assert [Exponential(2.0).factor(u) for u in (0, 2, 4, 6)] == [1.0, 0.5, 0.25, 0.125]
    assert {Constant().factor(u) for u in (0, 7, 10**6)} == {1.0}


def test_the_hinge_is_continuous_at_its_threshold():
    """Both of its formulas give 1 there, and the slope is the limit of a step beyond it."""
    for slope in (0.0, 1e-9, 0.5, 10.0):
        for threshold in (0, 1, 4, 50):
            rule = Hinge(slope, threshold)
            assert rule.factor(threshold) == 1.0 == 1.0 / (slope * (threshold - threshold) + 1.0)
            assert rule.factor(threshold + 1) == 1.0 / (slope + 1.0)
    assert Hinge(1e-9, 4).factor(5) == pytest.approx(1.0, abs=1e-8)


def test_only_rules_with_a_factor_of_their_own_weigh():
    assert {type(r).__name__ for r in [*RULES, Auto()] if r.weighs} == {"Polynomial", "Hinge", "Exponential"}


def test_auto_is_the_schedule_s_own():
    for schedule, own in ((FedAsync(), Polynomial(0.5)), (FedBuff(), Polynomial(0.5)), (FedFix(), Constant())):
        assert schedule.rule(Auto()) == own
        assert schedule.rule(Hinge()) == Hinge()
    assert Synchronous().rule(Auto()) == Constant()
    assert FedAvg().staleness == Auto()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"_target_": "aggregators.staleness.Polynomial", "exponent": -0.5}, "exponent"),
        ({"_target_": "aggregators.staleness.Hinge", "slope": -1.0}, "slope"),
        ({"_target_": "aggregators.staleness.Hinge", "threshold": -1}, "threshold"),
        ({"_target_": "aggregators.staleness.Exponential", "half_life": 0.0}, "half_life"),
        ({"_target_": "aggregators.staleness.DCASGD", "lam": -1.0}, "lam"),
    ],
)
def test_settings_out_of_range_are_refused(settings, key):
    with pytest.raises(ConfigError, match=rf"aggregator\.staleness\.{key}="):
        build(settings, "aggregator.staleness", Staleness)


# Treatments


def update(vector, start, version=0, columns=None):
    return Update(0, 1, version, np.array(vector, np.float32), 1, start=np.array(start, np.float32), columns=columns)


def server(vector, version=5):
    return ServerState(np.array(vector, np.float32), Space(LAYOUT), version=version)


def test_the_plain_treatment_changes_nothing():
    updates = [update([1, 2, 3, 4], [0, 0, 0, 0]), update([4, 3, 2, 1], [1, 1, 1, 1])]
    for rule in (Constant(), Polynomial(), Hinge(), Exponential()):
        treatment = rule.treatment(None)
        assert type(treatment) is Treatment
        assert treatment.apply(server([9, 9, 9, 9]), updates) == updates
        assert (treatment.parts(), treatment.numbers()) == (({}, {}), {})


def test_drift_is_how_far_the_server_has_moved():
    now = server([1.5, 2.5, 3.5, 4.5])
    np.testing.assert_array_equal(drift(now, update([0] * 4, [1, 1, 1, 1])), [0.5, 1.5, 2.5, 3.5])
    some = update([0, 0], [1, 2, 3, 4], columns=np.array([1, 3]))
    found = drift(now, some)
    np.testing.assert_array_equal(found, [0.5, 0.5])
    assert found.dtype == np.float64


def test_compensation_follows_its_formula_element_by_element():
    now = server([1.0, 1.0, 2.0, 3.0])
    stale = update([0.5, -0.5, 2.0, 0.0], [0.0, 2.0, 2.0, 0.0])
    (fresh,) = DCASGD(lam=2.0).treatment(None).apply(now, [stale])
    np.testing.assert_allclose(fresh.vector, [0.5 - 2 * 0.25 * 1, -0.5 - 2 * 0.25 * -1, 2.0, 0.0])
    assert fresh.start is stale.start and fresh.client == stale.client
    some = update([0.5, 0.25], [0, 0, 0, 0], columns=np.array([0, 3]))
    (fresh,) = DCASGD(lam=1.0).treatment(None).apply(now, [some])
    np.testing.assert_allclose(fresh.vector, [0.5 - 0.25 * 1, 0.25 - 0.0625 * 3])


def test_compensation_leaves_a_fresh_update_and_zero_strength_leaves_all():
    now = server([1, 2, 3, 4])
    fresh = update([0.5, 0.5, -0.5, 1.0], [1, 2, 3, 4], version=5)
    (found,) = DCASGD(lam=100.0).treatment(None).apply(now, [fresh])
    np.testing.assert_array_equal(found.vector, fresh.vector)
    stale = update([0.5, 0.5, -0.5, 1.0], [0, 0, 0, 0])
    (found,) = DCASGD(lam=0.0).treatment(None).apply(now, [stale])
    np.testing.assert_array_equal(found.vector, stale.vector)


def test_compensation_brings_a_stale_step_nearer_to_the_fresh_one():
    """On logistic losses the Hessian is near the square of gradients in the mean; a step taken on an old version and
    compensated is nearer to the step on the new one than the old step is."""
    rng, eta = np.random.default_rng(0), 0.1
    old, gains = np.zeros(4), []
    for _ in range(200):
        x, y = rng.standard_normal((1, 4)), rng.choice([-1.0, 1.0])
        new = old + 0.2 * rng.standard_normal(4)

        def step(w, x=x, y=y):
            return eta * y * x[0] / (1 + np.exp(y * x[0] @ w))

        stale = Update(0, 1, 0, step(old), 1, start=old)
        (found,) = DCASGD(lam=1 / eta).treatment(None).apply(ServerState(new, Space(LAYOUT), version=1), [stale])
        gains.append(np.linalg.norm(step(old) - step(new)) ** 2 - np.linalg.norm(found.vector - step(new)) ** 2)
    assert np.mean(gains) > 0
