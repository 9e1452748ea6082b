"""The exact epsilon between two normal distributions.

``delta(epsilon) = max over both orders of P[L > epsilon] - e^epsilon Q[L > epsilon]`` with ``L = log(p / q)``, which is
a quadratic in the outcome, so that ``{L > epsilon}`` is a half-line, an interval or the outside of one. With equal
deviations it is the analytic Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8).
"""

from __future__ import annotations

import numpy as np
from scipy import optimize
from scipy.special import log_ndtr

from fl.errors import ShoalError


def gaussian_epsilon(mean: float, deviation: float, other_mean: float, other_deviation: float, delta: float) -> float:
    """The smallest epsilon at which N(mean, deviation^2) and the other are (epsilon, delta)-indistinguishable.

    Deviations and ``delta`` are above 0; below, `ShoalError` (at delta 0 no epsilon is large enough).
    """
    if not (deviation > 0 and other_deviation > 0 and 0 < delta < 1):
        raise ShoalError(
            f"deviations {deviation:g} and {other_deviation:g} and delta={delta:g} are not allowed: the epsilon of two "
            "normal distributions needs deviations above 0 and a delta in (0, 1)."
        )
    p, q = (mean, deviation), (other_mean, other_deviation)

    def excess(epsilon: float) -> float:
        return max(_log_delta(p, q, epsilon), _log_delta(q, p, epsilon)) - np.log(delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    # Above the root delta underflows to log 0, which the bisection takes as a negative value.
    return float(optimize.bisect(lambda epsilon: max(excess(epsilon), -1e3), 0.0, high, xtol=1e-9 * max(1.0, high)))


def _log_delta(p: tuple[float, float], q: tuple[float, float], epsilon: float) -> float:
    """``log(P[L > epsilon] - e^epsilon Q[L > epsilon])``, -inf where the difference is not positive."""
    (m, s), (n, t) = p, q
    # L(x) - epsilon = a x^2 + b x + c with x measured from m in units of s: large offsets lose no digits.
    gap, ratio = (m - n) / s, s / t
    a = 0.5 * (ratio**2 - 1)
    b = ratio**2 * gap
    c = 0.5 * (ratio * gap) ** 2 - np.log(ratio) - epsilon
    roots = _roots(a, b, c)
    if roots is None:  # L is nowhere above epsilon: p can't exceed q everywhere
        return -np.inf
    mass = [_log_mass(roots, a, b, at, scale) for at, scale in ((0.0, 1.0), (-gap, 1 / ratio))]
    difference = epsilon + mass[1] - mass[0]
    return mass[0] + np.log1p(-np.exp(difference)) if difference < 0 else -np.inf


def _roots(a: float, b: float, c: float) -> tuple[float, float] | None:
    """The real roots in order, the one of a line twice; None if there are none."""
    if abs(a) < 1e-12:
        return None if b == 0 else (-c / b, -c / b)
    square = b * b - 4 * a * c
    if square <= 0:
        return None
    half = -0.5 * (b + np.copysign(np.sqrt(square), b))  # the form without cancellation
    first, second = half / a, c / half if half else half / a
    return min(first, second), max(first, second)


def _log_mass(roots: tuple[float, float], a: float, b: float, mean: float, deviation: float) -> float:
    """``log P[a x^2 + b x + c > 0]`` under N(mean, deviation^2), from the roots."""
    low, high = ((root - mean) / deviation for root in roots)
    if abs(a) < 1e-12:
        return float(log_ndtr(-low if b > 0 else low))
    if a > 0:
        return float(np.logaddexp(log_ndtr(low), log_ndtr(-high)))
    # The difference of two tails, taken on the side where both are small.
    upper, lower = (log_ndtr(high), log_ndtr(low)) if high <= 0 else (log_ndtr(-low), log_ndtr(-high))
    return float(upper + np.log1p(-np.exp(lower - upper))) if lower < upper else -np.inf
