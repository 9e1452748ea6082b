"""The cost of a rounded momentum with discrete noise, against exact Renyi divergences and every participation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from fl.errors import ConfigError
from privacy.accounting import ORDERS, epsilon
from privacy.momentum import Momentum, RoundedMomentum
from tests.privacy.test_momentum import every_pattern

SOME = np.array([1.1, 1.5, 2.0, 4.5, 8.0, 20.0])


def momenta(drawn: np.ndarray, beta: float) -> np.ndarray:
    """m_t for rows of ``drawn`` ``(patterns, T)``."""
    out, m = np.zeros_like(drawn), np.zeros(len(drawn))
    for t in range(drawn.shape[1]):
        m = beta * m + (1 - beta) * drawn[:, t]
        out[:, t] = m
    return out


def log_discrete_gaussian(points: np.ndarray, mean: float, sigma: float) -> np.ndarray:
    everywhere = np.arange(-400, 401)
    norm = logsumexp(-((everywhere - mean) ** 2) / (2 * sigma**2))
    return -((points - mean) ** 2) / (2 * sigma**2) - norm


def exact(shifts: np.ndarray, weight: np.ndarray, sigma: float, orders: np.ndarray, reach: int) -> np.ndarray:
    """The larger of D_a(P|Q) and D_a(Q|P): P mixes discrete Gaussians around ``shifts`` ``(patterns, T)``, Q is 0's."""
    points = np.arange(-reach, reach + 1)
    axis = [{v: log_discrete_gaussian(points, v, sigma) for v in {0.0, *column}} for column in shifts.T]

    def whole(row: np.ndarray) -> np.ndarray:
        first, *others = (axis[t][v] for t, v in enumerate(row))
        for other in others:
            first = np.add.outer(first, other)
        return first

    p = logsumexp(np.stack([whole(row) for row in shifts]), axis=0, b=weight.reshape(-1, *[1] * shifts.shape[1]))
    q = whole(np.zeros(shifts.shape[1]))
    both = [[logsumexp(a * x + (1 - a) * y) / (a - 1) for a in orders] for x, y in ((p, q), (q, p))]
    return np.max(both, axis=0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("p", [0.1, 0.7, 1.0])
@pytest.mark.parametrize(("step", "sigma"), [(1.6, 1.0), (3.0, 4.0), (0.7, 0.8)])
def test_it_bounds_the_divergence_of_what_is_really_released(beta, p, step, sigma):
    """One number that is rounded: exactly, by all patterns of two steps, both ways, wherever the momentum stands.

    ``step`` is R/b in integer steps, so that a move by ``step m`` is one of up to ``step m + 1`` when it is rounded.
    """
    drawn, weight = every_pattern(2, p)
    orders = np.array([1.1, 1.5, 2.0, 4.5, 8.0])
    bound = RoundedMomentum(sigma / step, p, beta, 1 / step, 2).rdp(orders)
    found = []
    for base in (0.0, 0.3, 0.49, -0.49):
        shifts = np.rint(base + step * momenta(drawn, beta)) - np.rint(base)
        found.append(exact(shifts, weight, sigma, orders, 80))
    assert np.all(bound >= np.max(found, axis=0))
    assert np.max(found) > 0.01 * np.max(bound)  # it is of that size


def test_a_whole_shift_costs_what_a_gaussian_does():
    """At whole orders the bound for one integer shift is an equality, so the noise is counted in the right unit."""
    for sigma, shift in ((0.8, 1), (2.0, 3)):
        found = exact(np.array([[float(shift)]]), np.ones(1), sigma, np.array([2.0, 4.0]), 60)
        np.testing.assert_allclose(found, np.array([2.0, 4.0]) * shift**2 / (2 * sigma**2), rtol=1e-9)
        bound = RoundedMomentum(sigma / shift, 1.0, 0.0, 0.0, 1).rdp(np.array([2.0, 4.0]))
        np.testing.assert_allclose(bound, found, rtol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rounding", [0.003, 0.1, 2.0])
def test_moves_against_every_pattern(beta, rounding):
    """The mean over all patterns of exp(l sum (m_t + e)^2), e from the first participation on."""
    p, sigma = 0.3, 0.6
    drawn, weight = every_pattern(10, p)
    m = momenta(drawn, beta)
    energy = ((m + rounding * (np.cumsum(drawn, axis=1) > 0)) ** 2).sum(axis=1)
    exponents = SOME[:, None] * (SOME[:, None] - 1) / (2 * sigma**2) * energy
    true = logsumexp(exponents, b=weight, axis=1) / (SOME - 1)
    bound = RoundedMomentum(sigma, p, beta, rounding, 10).rdp(SOME)
    assert np.all(bound >= true * (1 - 1e-9))
    if rounding < 0.01:  # where it is small it costs little
        np.testing.assert_allclose(bound, true, rtol=0.04)


def test_the_split_between_move_and_rounding_is_nearly_the_best():
    """Where every move is 1 + e, the best eta is e, and the grid of eta loses less than 5 %."""
    for e in (1e-3, 0.02, 0.3, 1.0, 5.0):
        bound = RoundedMomentum(2.0, 1.0, 0.0, e, 50).rdp(SOME)
        true = SOME * 50 * (1 + e) ** 2 / 8
        assert np.all(bound >= true * (1 - 1e-12))
        assert np.all(bound <= 1.05 * true)


@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_without_rounding_it_is_the_bound_of_the_momentum(beta):
    rounded, exactly = RoundedMomentum(1.3, 0.05, beta, 0.0, 60), Momentum(1.3, 0.05, beta, 60)
    np.testing.assert_array_equal(rounded.rdp(ORDERS), exactly.rdp(ORDERS))


def test_without_momentum_the_moves_are_binomial_and_not_amplified():
    p, sigma, steps = 0.2, 0.7, 8
    drawn, weight = every_pattern(steps, p)
    exponents = SOME[:, None] * (SOME[:, None] - 1) / (2 * sigma**2) * drawn.sum(axis=1)
    true = logsumexp(exponents, b=weight, axis=1) / (SOME - 1)
    np.testing.assert_allclose(RoundedMomentum(sigma, p, 0.0, 0.0, steps).rdp(SOME), true, rtol=1e-12)
    near = RoundedMomentum(sigma, p, 1e-4, 0.0, steps).rdp(SOME)
    np.testing.assert_allclose(near, true, rtol=0.01)
    assert np.all(np.isfinite(RoundedMomentum(1e-2, p, 0.0, 0.1, 5).rdp(ORDERS)))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_more_of_anything_but_noise_costs_more(beta):
    def cost(sigma=2.0, p=0.05, rounding=0.01, steps=40):
        return RoundedMomentum(sigma, p, beta, rounding, steps).rdp(ORDERS)

    base = cost()
    for other in (cost(steps=41), cost(p=0.051), cost(rounding=0.02), cost(sigma=1.9)):
        assert np.all(other > base)
    assert np.all(cost(rounding=0.0) < base)
    assert not cost(steps=0).any()


def test_a_run_in_pieces_is_one_mechanism_and_only_rdp_knows_it():
    whole = RoundedMomentum(2.0, 0.05, 0.9, 0.01, 100)
    assert epsilon([whole.of(30), whole.of(70)], 1e-5) == epsilon([whole], 1e-5)
    assert epsilon([whole], 1e-5) > epsilon([Momentum(2.0, 0.05, 0.9, 100)], 1e-5)
    for accountant in ("prv", "pld"):
        with pytest.raises(ConfigError, match=r"privacy\.accountant"):
            epsilon([whole], 1e-5, accountant)
