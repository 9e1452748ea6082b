"""The bound for momentum, against every pattern of participation, against simulation, and at its exact ends."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.special import log_ndtr, logsumexp, ndtr

from fl.errors import ConfigError
from fl.keys import generator
from privacy.accounting import ORDERS, SampledGaussian, calibrate, epsilon, steps_left
from privacy.momentum import Momentum, _log_ceiling, _log_moment_table

DELTA = 1e-5


def gaussian_delta(energy: np.ndarray, sigma: float, eps: float) -> np.ndarray:
    """delta(eps) of N(mu, 1) against N(0, 1), mu^2 = energy/sigma^2; 0 for no energy."""
    mu = np.sqrt(np.maximum(energy, 1e-30)) / sigma
    return ndtr(mu / 2 - eps / mu) - np.exp(eps + log_ndtr(-mu / 2 - eps / mu))


def energies(drawn: np.ndarray, beta: float) -> np.ndarray:
    """||A s||^2 for rows s of ``drawn`` (patterns, T), with A written out as a matrix."""
    lag = np.arange(drawn.shape[1])[:, None] - np.arange(drawn.shape[1])
    matrix = np.where(lag >= 0, (1 - beta) * beta ** np.maximum(lag, 0.0), 0.0)
    return ((drawn @ matrix.T) ** 2).sum(axis=1)


def every_pattern(steps: int, p: float) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.array(list(product([0.0, 1.0], repeat=steps)))
    count = drawn.sum(axis=1)
    return drawn, p**count * (1 - p) ** (steps - count)


@pytest.mark.parametrize("beta", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("p", [0.05, 0.6])
def test_moments_against_every_pattern(beta, p):
    drawn, weight = every_pattern(12, p)
    energy = energies(drawn, beta)
    tilts, table = _log_moment_table(beta, p, 16)
    exact = logsumexp(tilts[:, None] * energy, b=weight, axis=1)
    assert np.all(table[12] >= exact - 1e-12 * np.maximum(exact, 1))
    np.testing.assert_allclose(table[12], exact, rtol=0.01, atol=1e-6)
    assert table[0] == pytest.approx(0)


@pytest.mark.parametrize(
    ("beta", "p", "sigma"), [(0.5, 0.1, 0.3), (0.9, 0.3, 0.2), (0.9, 0.05, 1.0), (0.98, 0.5, 0.05)]
)
def test_delta_and_renyi_against_every_pattern(beta, p, sigma):
    drawn, weight = every_pattern(12, p)
    energy = energies(drawn, beta)
    momentum = Momentum(sigma, p, beta, 12)

    def exact(eps: float) -> float:
        return float(gaussian_delta(energy, sigma, eps) @ weight)

    eps = momentum.epsilon(DELTA)
    assert exact(eps) <= DELTA < exact(0.98 * eps)
    for at in (eps, eps / 2, 0.1):
        assert exact(at) <= momentum.delta(at) <= 1.4 * exact(at)
        assert exact(at) <= momentum._delta_by_moments(at) <= 20 * exact(at)
    orders = np.array([1.1, 2.0, 4.5, 10.0])
    exponents = orders[:, None] * (orders[:, None] - 1) / (2 * sigma**2) * energy
    moments = logsumexp(exponents, b=weight, axis=1) / (orders - 1)
    bound = momentum.rdp(orders)
    assert np.all(bound >= moments * (1 - 1e-9))
    np.testing.assert_allclose(bound, moments, rtol=0.03)


def test_bounds_a_single_step_exactly_known():
    """One step is a Gaussian of multiplier sigma/(1 - beta) on a Poisson sample, whose delta has a closed form."""
    sigma, p, beta = 0.4, 0.2, 0.6
    momentum = Momentum(sigma, p, beta, 1)
    for eps in (0.1, 0.5, 1.5):
        amplified = math.log1p((math.exp(eps) - 1) / p)
        exact = p * float(gaussian_delta(np.array((1 - beta) ** 2), sigma, amplified))
        assert exact <= momentum.delta(eps)


@pytest.mark.parametrize(
    ("beta", "sigma", "card"),
    [(0.9, 2.0, 5.51), (0.99, 0.6, 17.1), (0.99, 1.0, 8.68), (0.99, 2.0, 3.72), (0.99, 4.0, 1.67)]
    + [pytest.param(0.9, *row, marks=pytest.mark.slow) for row in ((0.6, 26.6), (1.0, 13.2), (4.0, 2.45))],
)
def test_against_simulation(simulated, beta, sigma, card):
    """A thousand steps at rate 0.05, beside the values of 20,000 patterns that the method's notes have."""
    bound = epsilon([Momentum(sigma, 0.05, beta, 1000)], DELTA)
    assert 0.995 * card < bound < 1.035 * card
    assert gaussian_delta(simulated[beta], sigma, 0.97 * bound).mean() > DELTA / 2
    assert gaussian_delta(simulated[beta], sigma, bound).mean() < 1.5 * DELTA


@pytest.fixture(scope="module")
def simulated() -> dict[float, np.ndarray]:
    """Energies of 100,000 simulated patterns of 1,000 steps, by the recursion of the momentum itself."""
    out = {}
    for beta in (0.9, 0.99):
        rng, m, energy = generator(7, "momentum"), np.zeros(100_000), np.zeros(100_000)
        for _ in range(1000):
            m = beta * m + (1 - beta) * (rng.random(len(m)) < 0.05)
            energy += m**2
        out[beta] = energy
    return out


def test_without_momentum_it_is_the_sampled_gaussian():
    plain, momentum = SampledGaussian(1.1, 0.02, 1000), Momentum(1.1, 0.02, 0.0, 1000)
    assert np.array_equal(momentum.rdp(ORDERS), plain.rdp(ORDERS))
    for accountant in ("rdp", "prv"):
        assert epsilon([momentum], DELTA, accountant) == epsilon([plain], DELTA, accountant)
    with pytest.raises(ConfigError, match=r"privacy\.accountant"):
        epsilon([Momentum(1.1, 0.02, 0.9, 1000)], DELTA, "prv")


@pytest.mark.parametrize(("beta", "steps"), [(0.9, 60), (0.99, 300)])
def test_a_record_in_every_step_is_one_gaussian(beta, steps):
    momentum = Momentum(3.0, 1.0, beta, steps)
    energy = float(energies(np.ones((1, steps)), beta)[0])
    assert momentum.largest_energy() == pytest.approx(energy)
    eps = epsilon([momentum], DELTA)
    assert float(gaussian_delta(np.array(energy), 3.0, eps)) <= DELTA
    assert float(gaussian_delta(np.array(energy), 3.0, 0.99 * eps)) > DELTA
    np.testing.assert_allclose(momentum.rdp(ORDERS), ORDERS * energy / 18, rtol=1e-6)


def test_more_steps_or_data_cost_more_and_noise_and_momentum_cost_less():
    def cost(sigma=2.0, p=0.05, beta=0.9, steps=60):
        return epsilon([Momentum(sigma, p, beta, steps)], DELTA)

    base = cost()
    assert cost(steps=62) > base
    assert cost(p=0.051) > base
    assert cost(sigma=2.04) < base
    assert cost(beta=0.91) < base


def test_a_run_in_pieces_costs_what_the_whole_costs():
    whole = Momentum(2.0, 0.05, 0.9, 120)
    pieces = [whole.of(50), whole.of(70)]
    assert epsilon(pieces, DELTA) == epsilon([whole], DELTA)
    # The pieces' own moments leave out what the first carries into the second.
    assert np.all(whole.rdp(ORDERS) > sum(piece.rdp(ORDERS) for piece in pieces))


def test_beside_other_releases_the_renyi_costs_add():
    momentum, start = Momentum(2.0, 0.05, 0.9, 120), SampledGaussian(6.0)
    both = epsilon([start, momentum], DELTA)
    rdp = momentum.rdp(ORDERS) + start.rdp(ORDERS)
    by_hand = np.min(rdp + np.log1p(-1 / ORDERS) - np.log(DELTA * ORDERS) / (ORDERS - 1))
    assert both == pytest.approx(float(by_hand), rel=1e-12)
    assert both > epsilon([momentum], DELTA)


def test_calibration_and_filter():
    sigma = calibrate(lambda z: [Momentum(z, 0.1, 0.9, 60)], 3.0, DELTA)
    assert epsilon([Momentum(sigma, 0.1, 0.9, 60)], DELTA) <= 3.0
    assert epsilon([Momentum(sigma / 1.003, 0.1, 0.9, 60)], DELTA) > 3.0
    left = steps_left(Momentum(sigma, 0.1, 0.9), [Momentum(sigma, 0.1, 0.9, 20)], 3.0, DELTA)
    assert 40 <= left <= 41


def test_growth_that_has_become_even_is_continued_from_above():
    """A long table stops its recursion early; a shorter one, where it can't matter, goes on to its end."""
    beta, p, steps = 0.5, 0.05, 3000
    tilts, long = _log_moment_table(beta, p, 1 << 12)
    chosen = np.searchsorted(tilts, [0.05, 0.5, 2.0, 10.0])
    m, value = np.linspace(0, 1, 401), np.zeros((4, 401))
    for _ in range(steps):  # in the energy of each step itself, on another grid; convex too, so also from above
        out, drawn = beta * m, beta * m + 1 - beta
        at = [tilts[chosen, None] * x**2 + np.stack([np.interp(x, m, row) for row in value]) for x in (out, drawn)]
        value = np.logaddexp(math.log1p(-p) + at[0], math.log(p) + at[1])
    np.testing.assert_allclose(long[steps][chosen], value[:, 0], rtol=2e-3)
    assert np.all(np.diff(long[:, 1:], axis=0) > 0)


@pytest.mark.parametrize("eps", [0.0, 0.3, 3.0, 40.0])
def test_ceiling_is_the_largest_quotient(eps):
    tilts = np.geomspace(1e-3, 1e4, 30)
    x = np.geomspace(1e-7, 1e5, 200_001)
    with np.errstate(divide="ignore"):
        quotients = np.log(np.maximum(gaussian_delta(x, 1.0, eps), 0)) - tilts[:, None] * x
    largest = quotients.max(axis=1)
    seen = largest > -25  # beyond, the twin's own difference of probabilities has too few digits
    ceiling = _log_ceiling(tilts, eps)
    assert seen.sum() > 5
    assert np.all(ceiling[seen] >= largest[seen] - 1e-6)
    np.testing.assert_allclose(ceiling[seen], largest[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "key"),
    [((0.0, 0.1, 0.9), "noise_multiplier"), ((1.0, 0.0, 0.9), "sampling_rate"), ((1.0, 0.1, 1.0), "beta")],
)
def test_settings_are_checked(settings, key):
    with pytest.raises(ConfigError, match=rf"Momentum\.{key}="):
        Momentum(*settings)


def test_it_says_what_it_is():
    assert (
        Momentum(1.0, 0.1, 0.9, 50)
        .describe()
        .startswith("50 releases of a momentum of 0.9 (Poisson sampling at rate 0.1")
    )
