import numpy as np
import pytest
from scipy import integrate, stats

from fl.errors import ShoalError
from privacy.audit.gaussians import _log_delta, gaussian_epsilon


def delta_by_quadrature(p, q, epsilon):
    """``integral of max(0, p - e^epsilon q)``, the definition."""
    reach = 12 * max(p[1], q[1])
    x = np.linspace(min(p[0], q[0]) - reach, max(p[0], q[0]) + reach, 2_000_001)
    gap = stats.norm.pdf(x, *p) - np.exp(epsilon) * stats.norm.pdf(x, *q)
    return integrate.trapezoid(np.maximum(gap, 0), x)


@pytest.mark.parametrize("delta", [1e-2, 1e-5])
@pytest.mark.parametrize(
    ("p", "q"),
    [
        ((1, 1), (0, 1)),
        ((0, 1), (0.3, 1)),
        ((1, 0.5), (0, 1)),
        ((1, 2), (0, 1)),
        ((0, 3), (0, 1)),
        ((-2, 1.0001), (0, 1)),
        ((0.5, 0.99999999), (0, 1)),
        ((2e-3, 1.1e-3), (0, 1e-3)),
    ],
)
def test_at_the_epsilon_the_hockey_stick_divergence_is_delta(p, q, delta):
    epsilon = gaussian_epsilon(*p, *q, delta)
    worst = max(delta_by_quadrature(p, q, epsilon), delta_by_quadrature(q, p, epsilon))
    assert worst == pytest.approx(delta, rel=2e-4)
    assert gaussian_epsilon(*q, *p, delta) == pytest.approx(epsilon, rel=1e-7)


@pytest.mark.parametrize(
    ("p", "q"), [((1, 1), (0, 1)), ((-1, 1), (0, 1)), ((-12, 0.5), (0, 1)), ((12, 0.5), (0, 1)), ((0, 1), (1, 0.5))]
)
@pytest.mark.parametrize("share", [0.16, 0.5, 1.0])  # 0.16: where the narrow one is the larger
def test_each_order_is_the_divergence_by_its_definition(p, q, share):
    """Each order by itself, deep tails included (the larger of the two would hide an error in the other)."""
    epsilon = share * gaussian_epsilon(*p, *q, 1e-3)
    for one, other in ((p, q), (q, p)):
        assert np.exp(_log_delta(one, other, epsilon)) == pytest.approx(
            delta_by_quadrature(one, other, epsilon), rel=1e-4, abs=1e-12
        )


def test_the_gaussian_mechanism():
    # Analytic Gaussian mechanism with noise equal to the sensitivity, from the closed form of Balle and Wang.
    epsilon = gaussian_epsilon(1, 1, 0, 1, 1e-5)
    closed = stats.norm.cdf(0.5 - epsilon) - np.exp(epsilon) * stats.norm.cdf(-0.5 - epsilon)
    assert closed == pytest.approx(1e-5, rel=1e-5)
    assert epsilon == pytest.approx(4.3772, abs=1e-4)
    assert gaussian_epsilon(100, 100, 0, 100, 1e-5) == pytest.approx(epsilon)  # scale does not matter


def test_what_is_the_same_has_epsilon_zero_and_what_is_far_a_large_one():
    assert gaussian_epsilon(3, 2, 3, 2, 1e-5) == 0.0
    assert gaussian_epsilon(1e-7, 1, 0, 1, 1e-5) == 0.0
    # L is N(mu^2 / 2, mu^2) with mu = 1000: P[L > epsilon] = delta at mu^2 / 2 + 4.26489 mu, and the second term of
    # delta, a share 1 / (mu + 4.3) of the density there, takes 1 off.
    assert gaussian_epsilon(1000, 1, 0, 1, 1e-5) == pytest.approx(504263.9, abs=0.1)


@pytest.mark.parametrize("numbers", [(0, 0, 1, 1, 1e-5), (0, 1, 1, 0, 1e-5), (0, 1, 1, 1, 0.0)])
def test_deviations_and_delta_are_above_zero(numbers):
    with pytest.raises(ShoalError, match="deviations above 0 and a delta in"):
        gaussian_epsilon(*numbers)
