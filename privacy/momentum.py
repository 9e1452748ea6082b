"""The cost of releasing a momentum with noise, where a record takes part in random steps (DP-BREM).

A client keeps ``phi_t = beta phi_{t-1} + (1 - beta) g_t`` with phi_0 = 0, where g_t is the sum of the clipped gradients
of a Poisson sample (rate p) over the public batch size b. A step releases a sum of clipped phi_t with noise of standard
deviation sigma R/b. A record of norm at most R that takes part in the steps s, in {0, 1}^T, moves release t by at most

    (R/b) m_t,    m_t = beta m_{t-1} + (1 - beta) s_t,    m_0 = 0.

Given s, all releases together are a Gaussian mechanism with mu^2 = E/sigma^2, E = sum of m_t^2. By joint convexity,
delta and the Renyi moments are at most their means over s:

    delta(eps) <= mean of F(E/sigma^2; eps),    F(x; eps) = Phi(d) - exp(eps) Phi(d - sqrt(x)),
                                                d = -eps/sqrt(x) + sqrt(x)/2
    rdp(alpha) <= log M(alpha (alpha - 1)/(2 sigma^2)) / (alpha - 1),    M(l) = mean of exp(l E)

The mean of F is bounded twice, and the smaller bound counts: by c(l) M(l) for any l > 0, where c(l) is the maximum over
x of F(x; eps) exp(-l sigma^2 x), and, for runs that are not too long, by the distribution of E on a grid. All rounding
of grids is upwards. Derivation: docs/methods/momentum_accounting.md. DP-BREM is Gu et al., arXiv 2306.12608; the
theorem of that paper is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import sparse
from scipy.special import erfcx, log_ndtr

from fl.config import setting
from privacy.accounting import Mechanism, SampledGaussian

_CELLS = 512  # of the grid over energies
SPLITS = np.geomspace(1e-4, 10, 26)  # of eta, see `RoundedMomentum`
_WORK = 1.1e8  # points times steps up to which the distribution of the energy is computed: about 3 s


@dataclass(frozen=True)
class Momentum(Mechanism):
    """Noisy releases of a momentum of Poisson-sampled gradients; add-remove.

    Assumes that the momentum starts at zero, that batches are divided by a public constant, and one ``beta``, rate and
    noise for the whole run; where the clip norm R_t varies, R is its maximum, since the momentum remembers older ones.
    All steps of a run are one mechanism, as the momentum carries a record from one to the next. A step without a
    release (the client was not chosen) may be counted as one. With ``beta`` 0 it is `SampledGaussian`.
    """

    noise_multiplier: float = setting(gt=0, help="sigma: standard deviation of the noise, in units of R/b")
    sampling_rate: float = setting(gt=0, le=1, help="probability that a record takes part in a step")
    beta: float = setting(ge=0, lt=1, help="momentum")
    steps: int = setting(1, ge=0, help="steps of the momentum, each of them released")

    def reduced(self) -> Mechanism:
        if self.beta == 0:
            return SampledGaussian(self.noise_multiplier, self.sampling_rate, self.steps)
        return self

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        if self.beta == 0:
            return self.reduced().rdp(orders)
        orders = np.asarray(orders, dtype=float)
        tilts, logs = self._log_moments()
        tilt = orders * (orders - 1) / (2 * self.noise_multiplier**2)
        # log M is convex in l, and its slope is at most the largest energy.
        beyond = np.maximum(tilt - tilts[-1], 0) * self.largest_energy()
        return (np.interp(tilt, tilts, logs) + beyond) / (orders - 1)

    def delta(self, epsilon: float) -> float:
        """The bound of delta at ``epsilon`` > 0 for these releases alone (``beta`` > 0); at most 1."""
        return min(self._delta_by_moments(epsilon), self._delta_by_energy(epsilon, epsilon))

    def epsilon(self, delta: float) -> float:
        if self.beta == 0:
            return math.inf
        high = 1.0
        while self._delta_by_moments(high) > delta:
            high *= 2
            if high > 1e4:
                return math.inf
        high = _smallest(self._delta_by_moments, delta, 0.0, high)
        return _smallest(lambda e: self._delta_by_energy(e, high / 3), delta, high / 3, high)

    def _delta_by_moments(self, epsilon: float) -> float:
        """min over l of c(l) M(l)."""
        tilts, logs = self._log_moments()
        bounds = _log_ceiling(tilts[1:] * self.noise_multiplier**2, epsilon) + logs[1:]
        return math.exp(min(0.0, float(bounds.min())))

    def _delta_by_energy(self, epsilon: float, least: float) -> float:
        """Mean of F over the rounded distribution of E, for all ``epsilon`` >= ``least``; 1 where it is too large."""
        kappa = (1 / 8 + 1 / (8 * least**2)) / self.noise_multiplier**2
        most = 1 << max(self.steps - 1, 0).bit_length()
        if _size(self.beta) * most > _WORK:
            return 1.0
        # A larger kappa is valid too; so one table serves a search over the noise.
        energy, mass = _energy_table(self.beta, self.sampling_rate, most, 2.0 ** math.ceil(math.log2(kappa)))
        log_phi, log_ratio = _log_ratio(np.maximum(energy, 1e-30) / self.noise_multiplier**2, epsilon)
        return float(mass[self.steps, :-1] @ np.exp(np.minimum(log_phi + log_ratio, 0.0)) + mass[self.steps, -1])

    def largest_energy(self) -> float:
        """E of a record that takes part in every step: sum over t of (1 - beta^t)^2."""
        return float(np.sum((1 - self.beta ** np.arange(1, self.steps + 1)) ** 2))

    def _log_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Tilts l and upper bounds of log M(l) after all steps."""
        # One table serves all numbers of steps up to the next power of two: the filter asks for many.
        tilts, table = _log_moment_table(self.beta, self.sampling_rate, 1 << max(self.steps - 1, 0).bit_length())
        return tilts, table[self.steps]

    def describe(self) -> str:
        return (
            f"{self.steps} releases of a momentum of {self.beta:.4g} (Poisson sampling at rate "
            f"{self.sampling_rate:.4g}, noise multiplier {self.noise_multiplier:.4g}; a bound over the steps that a "
            "record takes part in, without amplification by sampling within a step)"
        )


@dataclass(frozen=True)
class RoundedMomentum(Mechanism):
    """Releases of a rounded momentum with discrete Gaussian noise; ``rounding`` is its largest error, in units of R/b.

    With e = ``rounding`` the release t moves by at most ``m_t + e`` from the first participation on, and

        sum_t (m_t + e)^2 <= (1 + eta) sum_t m_t^2 + (1 + 1/eta) e^2 T        for every eta > 0,

    so ``rdp(a) <= min over eta of rdp_M(a; sigma^2/(1 + eta)) + a (1 + 1/eta) e^2 T / (2 sigma^2)`` with M the exact
    momentum's. Its Renyi bound holds for the discrete Gaussian too: for an integer shift v, D_a <= a |v|^2/(2 sigma^2)
    (Canonne, Kamath and Steinke, arXiv 2004.00010, proposition 5). The tighter bound by delta is the continuous
    Gaussian's and is not used; neither is amplification by sampling where ``beta`` is 0. Derivation:
    docs/methods/dp_brem_plus.md.
    """

    noise_multiplier: float = setting(gt=0, help="sigma: standard deviation of the noise, in units of R/b")
    sampling_rate: float = setting(gt=0, le=1, help="probability that a record takes part in a step")
    beta: float = setting(ge=0, lt=1, help="momentum")
    rounding: float = setting(0.0, ge=0, help="e: what rounding adds to a move, in units of R/b")
    steps: int = setting(1, ge=0, help="steps of the momentum, each of them released")

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        orders = np.asarray(orders, dtype=float)
        if not self.steps:
            return np.zeros_like(orders)
        if not self.rounding:
            return self._exact(orders, 0.0)
        extra = orders * self.rounding**2 * self.steps / (2 * self.noise_multiplier**2)
        return np.min([self._exact(orders, eta) + (1 + 1 / eta) * extra for eta in SPLITS], axis=0)

    def _exact(self, orders: np.ndarray, eta: float) -> np.ndarray:
        """rdp_M at sigma^2/(1 + eta)."""
        noise, p = self.noise_multiplier / math.sqrt(1 + eta), self.sampling_rate
        if self.beta:
            return Momentum(noise, p, self.beta, self.steps).rdp(orders)
        # `Momentum` would take 0 for a sampled continuous Gaussian. Here E is the number of steps drawn: binomial.
        with np.errstate(divide="ignore"):
            log_mean = np.logaddexp(np.log1p(-p), math.log(p) + orders * (orders - 1) / (2 * noise**2))
        return self.steps * log_mean / (orders - 1)

    def describe(self) -> str:
        return (
            f"{self.steps} releases of a rounded momentum of {self.beta:.4g} with discrete Gaussian noise (Poisson "
            f"sampling at rate {self.sampling_rate:.4g}, noise multiplier {self.noise_multiplier:.4g}, rounding "
            f"{self.rounding:.3g} of one example's move; no amplification by sampling within a step)"
        )


@lru_cache(maxsize=8)
def _log_moment_table(beta: float, p: float, most: int, cells: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Tilts l ``(k,)`` and upper bounds ``(most + 1, k)`` of log M(l) after 0..``most`` steps.

    With n steps left, this one included, G_n = 1 + beta^2 + ... + beta^(2(n-1)) is the energy of a momentum of 1 that
    only decays. A participation adds the momentum's new energy less its old one, G_n times (beta m + 1 - beta)^2 -
    (beta m)^2 = (1 - beta)(1 - beta + 2 beta m). So V_n(m), the log of the mean of exp(l times all that is added), is

        V_n(m) = log( (1 - p) exp V_{n-1}(beta m)
                      + p exp( l G_n (1 - beta)(1 - beta + 2 beta m) + V_{n-1}(beta m + 1 - beta) ) ),    V_0 = 0

    and log M(l) = V_T(0). V_n is a log of a sum of exponentials of affine functions of m, hence convex: interpolated
    linearly on a grid over [0, 1] it is an upper bound, and the recursion keeps upper bounds. It also commutes with
    adding a constant, so growth that is nearly even over the grid is continued at its maximum.
    """
    tilts = np.concatenate([[0.0], np.geomspace(1e-3, 100 * (1 + beta) / (1 - beta), 160)])
    m = np.linspace(0, 1, cells + 1)
    decayed, renewed = beta * m, beta * m + 1 - beta
    with np.errstate(divide="ignore"):
        log_out, log_in = np.log1p(-p), math.log(p)
    added = tilts[:, None] * (1 - beta) * (1 - beta + 2 * beta * m)  # (k, cells + 1)
    value, table = np.zeros((len(tilts), len(m))), np.zeros((most + 1, len(tilts)))
    for n in range(1, most + 1):
        decay = beta ** (2 * n)
        new = np.logaddexp(
            log_out + _interpolate(value, decayed * cells),
            log_in + added * ((1 - decay) / (1 - beta**2)) + _interpolate(value, renewed * cells),
        )
        growth = new - value
        value, table[n] = new, new[:, 0]
        fastest = growth.max(axis=1)
        if decay < 1e-17 and np.all((fastest - growth.min(axis=1)) * (most - n) <= 1e-4 * (1 + table[n])):
            table[n + 1 :] = table[n] + fastest * np.arange(1, most - n + 1)[:, None]
            break
    return tilts, table


def _interpolate(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation of the rows of ``values`` ``(k, cells + 1)`` at positions ``at`` in cells."""
    left = np.minimum(at.astype(int), values.shape[1] - 2)
    part = at - left
    return values[:, left] * (1 - part) + values[:, left + 1] * part


def _momenta(beta: float) -> np.ndarray:
    """0, and a grid from about 0.001 to 1 in steps of 3 %, or of beta, on which a decay by beta leads to a point."""
    parts = max(1, round(math.log(beta) / math.log(0.97)))
    lowest = math.ceil(parts * math.log(0.001) / math.log(beta))
    return np.concatenate([[0.0], beta ** (np.arange(lowest, -1, -1) / parts)])


def _size(beta: float) -> int:
    return _CELLS * len(_momenta(beta))


@lru_cache(maxsize=8)
def _energy_table(beta: float, p: float, most: int, kappa: float) -> tuple[np.ndarray, np.ndarray]:
    """Energies ``(n,)`` and masses ``(most + 1, n + 1)`` after 0..``most`` steps; the last mass is at infinity.

    The mean of f under these masses is at least the mean of f(E), for every f that increases with
    ``f'' + kappa f' >= 0``. States (m, E) move on a grid. A value between two points is split over them as for linear
    interpolation in -exp(-k x), an upper bound of a function with ``f'' + k f' >= 0``: k = kappa in E, and in m
    k = kappa 2 beta/(1 - beta), as later energy is convex in m with a slope of at most that over kappa.
    """
    m = _momenta(beta)
    tilts, logs = _log_moment_table(beta, p, most)
    largest = min(float(np.min((logs[most, 1:] - math.log(1e-12)) / tilts[1:])), float(most))  # Markov's inequality
    width = largest / (_CELLS - 1)
    at = np.arange(len(m))[:, None] * _CELLS + np.arange(_CELLS)
    beyond = len(m) * _CELLS
    moves = sparse.csr_matrix((beyond + 1, beyond))
    for probability, to in ((1 - p, beta * m), (p, beta * m + 1 - beta)):
        above = np.clip(np.searchsorted(m, to * (1 - 1e-12)), 1, len(m) - 1)
        share = np.clip(_split(to - m[above - 1], m[above] - m[above - 1], kappa * 2 * beta / (1 - beta)), 0, 1)
        cells, rest = np.divmod(to**2, width)
        carry = _split(rest, width, kappa)
        for row, in_row in ((above - 1, 1 - share), (above, share)):
            for cell, in_cell in ((cells, 1 - carry), (cells + 1, carry)):
                column = cell.astype(int)[:, None] + np.arange(_CELLS)
                target = np.where(column < _CELLS, row[:, None] * _CELLS + column, beyond)
                weight = np.broadcast_to((probability * in_row * in_cell)[:, None], at.shape)
                moves += sparse.csr_matrix((weight.ravel(), (target.ravel(), at.ravel())), moves.shape)
    moves.eliminate_zeros()
    state, mass = np.zeros(beyond), np.zeros((most + 1, _CELLS + 1))
    state[0] = mass[0, 0] = 1.0
    for step in range(1, most + 1):
        new = moves @ state
        state = new[:-1]
        mass[step] = np.append(state.reshape(len(m), _CELLS).sum(axis=0), mass[step - 1, -1] + new[-1])
    return np.arange(_CELLS) * width, mass


def _split(x: np.ndarray, width: np.ndarray | float, k: float) -> np.ndarray:
    """The upper point's weight at ``x`` in a cell of ``width`` for interpolation that is linear in -exp(-k x)."""
    return np.expm1(-k * x) / np.expm1(-k * width)


def _smallest(bound: Callable[[float], float], delta: float, low: float, high: float) -> float:
    """The smallest epsilon, to 1 in 10,000, with ``bound(epsilon) <= delta``; ``high`` where it is the only one."""
    while high - low > 1e-4 * high and high > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if bound(middle) <= delta else (middle, high)
    return high


def _log_ceiling(tilts: np.ndarray, epsilon: float) -> np.ndarray:
    """log of max over x > 0 of F(x; epsilon) exp(-tilt x), for each tilt > 0.

    log F is concave in x, with slope phi(d)/(2 sqrt(x) F), so bisection encloses the maximum between neighbouring
    floats; the result takes F at the upper one and the tilt at the lower one.
    """
    low, high = np.full(len(tilts), -60.0), np.full(len(tilts), 60.0)  # log x
    for _ in range(64):
        middle = (low + high) / 2
        _, log_ratio = _log_ratio(np.exp(middle), epsilon)
        rising = -math.log(2) - middle / 2 - log_ratio > np.log(tilts)
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    log_phi, log_ratio = _log_ratio(np.exp(high), epsilon)
    return np.minimum(log_phi + log_ratio - tilts * np.exp(low), 0.0)


def _log_ratio(x: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """log phi(d), and log F(x; epsilon)/phi(d) without cancellation: e^epsilon phi(d - sqrt(x)) equals phi(d)."""
    root = np.sqrt(x)
    d = -epsilon / root + root / 2
    log_phi = -(d**2 + math.log(2 * math.pi)) / 2
    y = -np.minimum(d, 0) / math.sqrt(2)
    with np.errstate(divide="ignore"):  # far from the maximum the difference may round to 0
        small = np.log((erfcx(y) - erfcx(y + root / math.sqrt(2))) / 2) + math.log(2 * math.pi) / 2
    behind = np.minimum(epsilon + log_ndtr(d - root) - log_ndtr(d), -1e-300)
    return log_phi, np.where(d > 0, log_ndtr(d) + np.log(-np.expm1(behind)) - log_phi, small)
