"""Accountants against golden values, against Opacus and dp-accounting, and against exact divergences."""

from __future__ import annotations

import math
import sys
import warnings
from itertools import combinations, pairwise

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.special import log_ndtr, logsumexp, ndtr

from fl.errors import ConfigError, ShoalError
from privacy.accounting import (
    ACCOUNTANTS,
    ORDERS,
    FixedSizeGaussian,
    SampledGaussian,
    TreeGaussian,
    ZeroConcentrated,
    calibrate,
    epsilon,
    named,
    steps_left,
)

RUN = SampledGaussian(1.1, 0.02, 1000)
DELTA = 1e-5


def exact_gaussian_delta(eps: float, mu: float) -> float:
    """delta(eps) of N(mu, 1) against N(0, 1): Balle and Wang 2018, theorem 8."""
    return float(ndtr(mu / 2 - eps / mu) - np.exp(eps + log_ndtr(-mu / 2 - eps / mu)))


def test_golden_epsilons():
    assert epsilon([RUN], DELTA) == pytest.approx(3.5876, abs=1e-4)
    assert epsilon([RUN], DELTA, "prv") == pytest.approx(3.260, abs=1e-3)
    assert epsilon([FixedSizeGaussian(2.2, 0.02, 1000)], DELTA) == pytest.approx(6.99, abs=2e-3)
    # 551 with Opacus' orders; the exact value is 534.9.
    assert 534.9 < epsilon([SampledGaussian(1.1, 1.0, 1000)], DELTA) < 551


def test_golden_pld():
    pytest.importorskip("dp_accounting")
    assert epsilon([RUN], DELTA, "pld") == pytest.approx(3.250, abs=1e-3)
    z = calibrate(lambda z: [SampledGaussian(z, 0.02, 1000)], 8, DELTA, "pld")
    assert 0.7339 <= z <= 0.7339 * 1.001
    both = [SampledGaussian(2.0, 0.1, 10), SampledGaussian(4.0, 1.0, 3)]
    assert epsilon(both, DELTA, "pld") < epsilon(both, DELTA, "prv") < epsilon(both, DELTA)


@pytest.mark.parametrize(("accountant", "golden"), [("rdp", 0.7678), ("prv", 0.7346)])
def test_calibration_is_golden_and_never_exceeds_the_target(accountant, golden):
    def make(z):
        return [SampledGaussian(z, 0.02, 1000)]

    z = calibrate(make, 8.0, DELTA, accountant)
    assert z == pytest.approx(golden, rel=1.1e-3)
    assert epsilon(make(z), DELTA, accountant) <= 8.0 < epsilon(make(z / 1.002), DELTA, accountant)


def test_small_data_two_epochs():
    # 40 examples in batches of 8 over 2 epochs, target 3 at delta 1e-2.
    z = calibrate(lambda z: [SampledGaussian(z, 0.2, 10)], 3.0, 1e-2)
    assert z == pytest.approx(0.952, abs=1e-3)
    assert epsilon([SampledGaussian(0.952, 0.2, 10)], 1e-2) == pytest.approx(2.995, abs=2e-3)


@pytest.mark.parametrize(("groups", "golden"), [(1, 2.78), (4, 17.6), pytest.param(12, 89.7, marks=pytest.mark.slow)])
def test_noise_of_each_group_counted_as_the_total(groups, golden):
    """J groups with noise z C_j each, counted as z = 1, have multiplier 1/sqrt(J) in truth."""
    assert epsilon([SampledGaussian(groups**-0.5, 0.02, 500)], DELTA, "prv") == pytest.approx(golden, rel=2e-3)


def test_costs_beyond_the_grids_are_the_rdp_bound():
    heavy = [SampledGaussian(24**-0.5, 0.02, 500)]  # 231 by prv
    assert epsilon(heavy, DELTA, "prv") == epsilon(heavy, DELTA) > 231


@pytest.mark.parametrize(
    ("noise", "claimed", "true"), [(0.523, 1.004, 2.05), pytest.param(0.436, 3.01, 4.80, marks=pytest.mark.slow)]
)
def test_a_delta_of_one_in_the_number_of_batches(noise, claimed, true):
    """Fed-SB's code on SNLI, 3 clients: its epsilon at delta 1.7e-4 against the epsilon at 1/n."""
    n = 549_367 // 3
    run = [SampledGaussian(noise, 32 / n, 6 * (n // 32))]
    assert epsilon(run, 1.7e-4, "prv") == pytest.approx(claimed, abs=0.01)
    assert epsilon(run, 1 / n, "prv") == pytest.approx(true, abs=0.01)


@pytest.mark.parametrize(
    ("z", "q"), [(1.1, 0.02), (0.5, 0.2), (4.0, 0.5), (0.3, 0.9), (1.0, 0.999), (0.2, 0.001), (20.0, 0.01)]
)
def test_sampled_gaussian_is_opacus(z, q):
    orders = np.array([1.01, 1.1, 1.5, 2, 2.5, 3.3, 7.7, 10.9, 12, 33, 63, 256, 1024])
    twin = [compute_rdp(q=q, noise_multiplier=z, steps=7, orders=float(a)) for a in orders]
    # Opacus' series for fractional orders stops at terms of exp(-30); times 7 / (1.01 - 1) that is 1e-10.
    np.testing.assert_allclose(SampledGaussian(z, q, 7).rdp(orders), twin, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("z", "q"), [(2.2, 0.02), (2.0, 0.5), (8.0, 0.1), (40.0, 0.01), (1.0, 0.3), (0.5, 0.001)])
def test_fixed_size_is_dp_accounting(z, q):
    events = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    orders = ORDERS[ORDERS <= 256]  # above, dp-accounting takes a looser term
    twin = rdp.RdpAccountant(orders, events.NeighboringRelation.REPLACE_ONE)
    event = events.SampledWithoutReplacementDpEvent(10_000, int(10_000 * q), events.GaussianDpEvent(z / 2))
    twin.compose(event, 3)
    np.testing.assert_allclose(FixedSizeGaussian(z, q, 3).rdp(orders), twin._rdp, rtol=1e-11)
    at_512 = FixedSizeGaussian(z, q, 3).rdp(np.array([512.0]))
    assert at_512 <= 3 * rdp.rdp_privacy_accountant._compute_rdp_sample_wor_gaussian_scalar(q, z / 2, 512) * (1 + 1e-9)


@pytest.mark.parametrize(("z", "q"), [(0.7, 0.3), (1.5, 0.05), (6.0, 0.5)])
def test_fixed_size_bounds_the_true_divergence(z, q):
    """A record +C replaced by -C: mixtures of N(0) and N(+-1/z), by quadrature."""
    x = np.linspace(-40, 40, 80_001)

    def log_density(sign: int, rate: float) -> np.ndarray:
        moved = -((x - sign / z) ** 2) / 2
        return np.logaddexp(math.log1p(-rate) - x**2 / 2, math.log(rate) + moved) if rate < 1 else moved

    def divergence(alpha: float, rate: float) -> float:
        p, r = log_density(1, rate), log_density(-1, rate)
        return float(logsumexp(alpha * p - (alpha - 1) * r) + math.log(1e-3 / math.sqrt(2 * math.pi))) / (alpha - 1)

    orders = np.array([1.5, 2, 4, 8.5])
    bound = FixedSizeGaussian(z, q).rdp(orders)
    assert np.all(bound >= [divergence(a, q) for a in orders])
    whole = FixedSizeGaussian(z, 1.0).rdp(orders)
    np.testing.assert_allclose(whole, [divergence(a, 1.0) for a in orders], rtol=1e-9)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize("z", [0.5, 2.0, 10.0, 100.0])
def test_bounds_hold_for_the_exact_gaussian(accountant, z):
    eps = epsilon([SampledGaussian(z, 1.0, 10)], DELTA, accountant)
    assert exact_gaussian_delta(eps, math.sqrt(10) / z) <= DELTA
    # and not by much: what is left of it at a tenth less (and less prv's error of 0.01)
    assert exact_gaussian_delta(0.85 * eps - 0.01, math.sqrt(10) / z) > DELTA


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_more_steps_or_data_cost_more_and_noise_costs_less(accountant):
    def cost(z, q, steps):
        return epsilon([SampledGaussian(z, q, steps)], DELTA, accountant)

    base = cost(1.5, 0.05, 100)
    assert cost(1.5, 0.05, 101) > base
    assert cost(1.5, 0.0505, 100) > base
    assert cost(1.515, 0.05, 100) < base
    assert epsilon([SampledGaussian(1.5, 0.05, 100)], 2 * DELTA, accountant) < base


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_ledger_does_not_depend_on_where_the_run_was_interrupted(accountant):
    other = SampledGaussian(2.0, 0.1, 10)
    whole = epsilon([RUN, other], DELTA, accountant)
    assert epsilon([RUN.of(300), other, RUN.of(700)], DELTA, accountant) == whole
    assert whole > epsilon([RUN], DELTA, accountant)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_nothing_costs_nothing(accountant):
    assert epsilon([], DELTA, accountant) == 0
    assert epsilon([RUN.of(0)], DELTA, accountant) == 0


def test_almost_nothing_costs_almost_nothing():
    assert epsilon([SampledGaussian(1e6, 0.01, 10)], DELTA) == 0
    assert 0 < epsilon([SampledGaussian(100.0, 0.1, 10)], DELTA) < 0.01


def test_renyi_costs_of_different_mechanisms_add():
    many = [RUN, ZeroConcentrated(0.05, 3), TreeGaussian(20.0, 64, 4)]
    rdp = sum(m.rdp(ORDERS) for m in many)
    by_hand = np.min(rdp + np.log1p(-1 / ORDERS) - np.log(DELTA * ORDERS) / (ORDERS - 1))
    assert epsilon(many, DELTA) == pytest.approx(float(by_hand), rel=1e-12)


def test_concentrated_is_gaussian():
    np.testing.assert_allclose(
        ZeroConcentrated(1 / (2 * 1.7**2), 5).rdp(ORDERS), SampledGaussian(1.7, 1.0, 5).rdp(ORDERS)
    )


def test_no_accountant_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mechanism in (RUN, SampledGaussian(30.0, 1.0), SampledGaussian(1.0, 1.0, 5), SampledGaussian(50.0, 0.5)):
            for accountant in ("rdp", "prv"):
                assert epsilon([mechanism], DELTA, accountant) > 0
        assert FixedSizeGaussian(0.05, 0.5).rdp(ORDERS).min() > 0
        assert np.isfinite(SampledGaussian(0.05, 0.5).rdp(ORDERS)).all()


def tree_twin(leaves: int, participations: int, separation: int) -> int:
    """Largest sum of squared counts over all whole dyadic blocks, by trying every pattern."""
    best = 0
    for number in range(1, participations + 1):
        for rounds in combinations(range(leaves), number):
            if all(b - a >= separation for a, b in pairwise(rounds)):
                blocks = [(j << h, (j + 1) << h) for h in range(leaves.bit_length()) for j in range(leaves >> h)]
                best = max(best, sum(sum(a <= r < b for r in rounds) ** 2 for a, b in blocks))
    return best


def test_tree_sensitivity_against_every_pattern():
    ratios = []
    for leaves in range(1, 11):
        for separation in range(1, leaves + 1):
            for participations in range(1, leaves + 1):
                bound = TreeGaussian(1.0, leaves, participations, separation).sensitivity() ** 2
                true = tree_twin(leaves, participations, separation)
                assert bound >= true - 1e-9
                if participations == 1 or separation == 1:
                    assert bound == pytest.approx(true)
                ratios.append(bound / true)
    assert max(ratios) == pytest.approx(1.4)
    assert np.mean(np.isclose(ratios, 1)) > 0.75


def test_tree_costs():
    assert TreeGaussian(2.0, 1).rdp(ORDERS) == pytest.approx(SampledGaussian(2.0).rdp(ORDERS))
    once = TreeGaussian(2.0, 1000)  # blocks of 1, 2, 4, .. 512 rounds
    assert once.sensitivity() == pytest.approx(math.sqrt(10))
    assert TreeGaussian(2.0, 1024, 5, 200).sensitivity() == pytest.approx(math.sqrt(87))
    assert epsilon([once.of(3)], DELTA) == pytest.approx(epsilon([SampledGaussian(2.0, 1.0, 30)], DELTA))
    assert "3 binary trees over 1000 rounds" in once.of(3).describe()


def test_steps_left_is_the_last_step_within_the_target():
    step, spent = SampledGaussian(1.1, 0.02), [RUN, ZeroConcentrated(0.01)]
    n = steps_left(step, spent, 5.0, DELTA)
    assert epsilon([*spent, step.of(n)], DELTA) <= 5.0 < epsilon([*spent, step.of(n + 1)], DELTA)
    assert steps_left(step, spent, 5.0, DELTA, limit=10) == 10
    assert steps_left(step, [*spent, step.of(n)], 5.0, DELTA) == 0
    assert steps_left(step, spent, 1.0, DELTA) == 0
    assert steps_left(step, [*spent, step.of(n - 7)], 5.0, DELTA) == 7


def test_steps_left_by_prv():
    step = SampledGaussian(1.1, 0.02)
    n = steps_left(step, [], 2.0, DELTA, "prv")
    assert epsilon([step.of(n)], DELTA, "prv") <= 2.0 < epsilon([step.of(n + 1)], DELTA, "prv")
    assert n > steps_left(step, [], 2.0, DELTA)
    assert steps_left(step, [step.of(n)], 2.0, DELTA, "prv") == 0


def test_calibration_says_when_the_budget_is_used_up():
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=2\.0 .*a million these releases still cost 3\.58"):
        calibrate(lambda z: [RUN, SampledGaussian(z)], 2.0, DELTA)
    beside = calibrate(lambda z: [RUN.of(100), SampledGaussian(z)], 2.0, DELTA)
    assert epsilon([RUN.of(100), SampledGaussian(beside)], DELTA) <= 2.0
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=0"):
        calibrate(lambda z: [SampledGaussian(z)], 0, DELTA)


def test_relations_do_not_mix():
    with pytest.raises(ShoalError, match="add-remove, replace-one"):
        epsilon([RUN, FixedSizeGaussian(1.1, 0.02)], DELTA)
    replaced = ZeroConcentrated(0.1, 1, "replace-one")
    assert epsilon([replaced, FixedSizeGaussian(1.1, 0.02)], DELTA) > epsilon([replaced], DELTA)


@pytest.mark.parametrize("accountant", ["prv", "pld"])
@pytest.mark.parametrize("other", [ZeroConcentrated(0.1), TreeGaussian(1.0, 8)])
def test_prv_and_pld_cover_sampled_gaussians_alone(accountant, other):
    with pytest.raises(ConfigError, match=f"{accountant} covers Gaussian noise with Poisson sampling alone") as raised:
        epsilon([RUN, other], DELTA, accountant)
    assert raised.value.key == "privacy.accountant"
    with pytest.raises(ConfigError, match="without replacement"):
        epsilon([FixedSizeGaussian(1.1, 0.02)], DELTA, accountant)


def test_pld_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal-fl\[pld\]'"):
        epsilon([RUN], DELTA, "pld")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_delta_is_a_probability(delta):
    with pytest.raises(ConfigError, match=r"privacy\.delta"):
        epsilon([RUN], delta)


@pytest.mark.parametrize(
    ("cls", "settings", "key"),
    [
        (SampledGaussian, {"noise_multiplier": 0.0}, "noise_multiplier"),
        (SampledGaussian, {"noise_multiplier": math.inf}, "noise_multiplier"),
        (SampledGaussian, {"noise_multiplier": 1.0, "sampling_rate": 0.0}, "sampling_rate"),
        (SampledGaussian, {"noise_multiplier": 1.0, "sampling_rate": 1.5}, "sampling_rate"),
        (SampledGaussian, {"noise_multiplier": 1.0, "steps": -1}, "steps"),
        (FixedSizeGaussian, {"noise_multiplier": -1.0}, "noise_multiplier"),
        (FixedSizeGaussian, {"noise_multiplier": 1.0, "sampling_rate": 0.0}, "sampling_rate"),
        (ZeroConcentrated, {"rho": -0.1}, "rho"),
        (ZeroConcentrated, {"rho": 0.1, "relation": "both"}, "relation"),
        (TreeGaussian, {"noise_multiplier": 1.0, "leaves": 0}, "leaves"),
        (TreeGaussian, {"noise_multiplier": 1.0, "leaves": 4, "min_separation": 0}, "min_separation"),
    ],
)
def test_mechanisms_check_what_they_are_given(cls, settings, key):
    with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{key}="):
        cls(**settings)


def test_accountants_have_names():
    assert [named(a) for a in ACCOUNTANTS] == ["RDP", "PRV (Opacus)", "PLD (dp-accounting)"]
    with pytest.raises(ConfigError, match=r"privacy\.accountant='gdp'"):
        epsilon([RUN], DELTA, "gdp")
