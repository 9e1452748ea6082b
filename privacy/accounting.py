"""Accountants: what noisy releases cost together, as (epsilon, delta)-differential privacy.

A `Mechanism` is a number of releases of one kind; a ledger is a list of them, and `epsilon` is the cost of the list.

    rdp   Renyi differential privacy (Mironov 2017, arXiv 1702.07476): the epsilons at each order alpha add up, and
          epsilon = min over alpha of  rdp(alpha) + log((alpha - 1)/alpha) - (log delta + log alpha)/(alpha - 1)
          (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, proposition 12); 0 where delta^2 >= 1 - exp(-rdp(alpha))
          for some alpha (the bound of Bretagnolle and Huber of the total variation).
    prv   privacy loss random variables composed by FFT (Gopi et al. 2021, arXiv 2106.02848; Opacus): the upper end of
          its error interval, 0.01 above the estimate. Gaussians with Poisson sampling only.
    pld   privacy loss distributions, rounded up (dp-accounting, an optional package). Gaussians with Poisson sampling
          only.

Each number is an upper bound of the true epsilon. `calibrate` finds the noise for a target, `steps_left` is the filter
that stops in time. A Renyi filter also holds where the noise is chosen from earlier releases (Feldman and Zrnic 2021,
arXiv 2008.11193); prv and pld are for noise that is fixed beforehand.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.special import gammaln, logsumexp

from fl.config import check, setting
from fl.errors import ConfigError, ShoalError

ACCOUNTANTS = ("rdp", "prv", "pld")
RELATIONS = ("add-remove", "replace-one")

# Opacus' orders, and: closer to 1 for costs of a hundred and more, larger ones for costs far below 1.
ORDERS = np.array(
    sorted({*RDPAccountant.DEFAULT_ALPHAS, *(1 + x / 100 for x in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 25, 35))})
    + [72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024],
    dtype=float,
)

# Above this cost, by rdp, the grids of prv and pld take minutes and gigabytes; the rdp bound is reported instead.
_GRID_LIMIT = 150.0


class Mechanism(ABC):
    """A number of releases of one kind; a frozen dataclass with a field ``steps``, the number of releases (>= 0).

    Its fields are checked against their `setting` bounds; raises `ConfigError`. ``steps`` continue each other:
    a + b steps cost as much as a steps followed by b more, so that a ledger may merge them.
    """

    steps: int

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, field.name)
            check(value, hints[field.name], field.metadata, f"{type(self).__name__}.{field.name}")

    @property
    def relation(self) -> str:
        """One of `RELATIONS`: whether neighbours have one record (or client) more or less, or another one instead."""
        return "add-remove"

    @abstractmethod
    def rdp(self, orders: np.ndarray) -> np.ndarray:
        """The Renyi epsilon of all steps at each of ``orders`` (> 1); inf where it is not known."""

    def epsilon(self, delta: float) -> float:
        """Epsilon of this mechanism alone where there is a tighter way than by its `rdp`; inf: there is none."""
        return math.inf

    def reduced(self) -> Mechanism:
        """The simplest mechanism of the same cost (prv and pld know only `SampledGaussian`)."""
        return self

    def of(self, steps: int) -> Self:
        """The same mechanism with another number of steps; none costs nothing."""
        return dataclasses.replace(typing.cast(Any, self), steps=steps)

    @abstractmethod
    def describe(self) -> str:
        """One clause for a privacy statement."""


@dataclass(frozen=True)
class SampledGaussian(Mechanism):
    """Sum of the records of a Poisson sample plus N(0, (z C)^2 I), C the largest norm of a record; add-remove.

    ``rdp(alpha) = log E ((1 - q) + q L)^alpha / (alpha - 1)``, L the likelihood ratio of N(1, z^2) and N(0, z^2) under
    the second: Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), section 3.3. At rate 1 it is ``alpha / (2 z^2)``.
    """

    noise_multiplier: float = setting(gt=0, help="z: standard deviation of the noise, in units of the clip norm C")
    sampling_rate: float = setting(1.0, gt=0, le=1, help="probability that a record takes part in a step")
    steps: int = setting(1, ge=0, help="releases")

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        orders = np.asarray(orders, dtype=float)
        if self.sampling_rate == 1:
            return self.steps * orders / (2 * self.noise_multiplier**2)
        logs = _poisson_log_moments(self.sampling_rate, self.noise_multiplier, tuple(orders))
        return self.steps * np.maximum(logs, 0) / (orders - 1)

    def describe(self) -> str:
        sampling = f"Poisson sampling at rate {self.sampling_rate:.4g}" if self.sampling_rate < 1 else "no sampling"
        return (
            f"{self.steps} steps of the Gaussian mechanism ({sampling}, noise multiplier {self.noise_multiplier:.4g})"
        )


@lru_cache(maxsize=256)
def _poisson_log_moments(q: float, z: float, orders: tuple[float, ...]) -> np.ndarray:
    """log E ((1 - q) + q L)^alpha: at whole orders the binomial sum, between them the trapezoid sum.

    In y = x/z the integrand is positive, has Gaussian tails around 0 and alpha/z, and is analytic for |Im y| < pi z, so
    the trapezoid sum at this spacing is exact to rounding (error exp(-8 pi^2)).
    """
    out = np.empty(len(orders))
    alphas = np.array(orders)
    whole = alphas % 1 == 0
    for i in np.flatnonzero(whole):
        k = np.arange(alphas[i] + 1)
        choose = gammaln(alphas[i] + 1) - gammaln(k + 1) - gammaln(alphas[i] - k + 1)
        terms = choose + k * math.log(q) + (alphas[i] - k) * math.log1p(-q) + k * (k - 1) / (2 * z**2)
        out[i] = logsumexp(terms)
    if not whole.all():
        spacing = min(0.1, z / 4)
        y = np.arange(-13, alphas[~whole].max() / z + 13, spacing)
        mixture = np.logaddexp(math.log1p(-q), math.log(q) + y / z - 1 / (2 * z**2))
        log_phi = math.log(spacing) - (y**2 + math.log(2 * math.pi)) / 2
        out[~whole] = logsumexp(alphas[~whole, None] * mixture + log_phi, axis=1)
    return out


@dataclass(frozen=True)
class FixedSizeGaussian(Mechanism):
    """Sum of a fixed number of records, drawn without replacement, plus N(0, (z C)^2 I); replace-one.

    Replacing a record moves a sum of records of norm at most C by up to 2 C, so the Gaussian inside has multiplier z/2
    (dp-accounting's multiplier is this half). Renyi epsilon at rate q = m/n: Wang, Balle, Kasiviswanathan 2019 (arXiv
    1808.00087), theorem 27; between whole orders by the convexity of (alpha - 1) rdp(alpha) (corollary 10). At rate 1,
    where nothing is sampled, ``2 alpha / z^2``.
    """

    noise_multiplier: float = setting(gt=0, help="z: standard deviation of the noise, in units of the clip norm C")
    sampling_rate: float = setting(1.0, gt=0, le=1, help="part of the records that a step takes")
    steps: int = setting(1, ge=0, help="releases")

    @property
    def relation(self) -> str:
        return "replace-one"

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        orders = np.asarray(orders, dtype=float)
        if self.sampling_rate == 1:
            return self.steps * 2 * orders / self.noise_multiplier**2
        whole = np.union1d(np.floor(orders), np.ceil(orders)).astype(int)
        logs = _fixed_size_log_moments(self.sampling_rate, self.noise_multiplier / 2, tuple(whole))
        return self.steps * np.interp(orders, whole, logs) / (orders - 1)

    def describe(self) -> str:
        sampling = (
            f"a part of {self.sampling_rate:.4g} drawn without replacement" if self.sampling_rate < 1 else "no sampling"
        )
        return (
            f"{self.steps} steps of the Gaussian mechanism ({sampling}, noise multiplier {self.noise_multiplier:.4g})"
        )


@lru_cache(maxsize=256)
def _fixed_size_log_moments(q: float, z: float, alphas: tuple[int, ...]) -> np.ndarray:
    """(alpha - 1) rdp(alpha) of theorem 27 for a Gaussian with noise ``z`` per sensitivity, at whole orders.

    log(1 + sum over j = 2..alpha of C(alpha, j) q^j t_j), where with L as for `SampledGaussian`
    t_2 = min(4 (E L^2 - 1), 2 E L^2), t_j = min(4 sqrt(B(2 floor(j/2)) B(2 ceil(j/2))), 2 E L^j), B(j) = E (L - 1)^j.
    B is the trapezoid sum of a positive entire function with Gaussian tails, and exact to rounding at this spacing;
    above order 256 the second term alone is taken, which is the larger one.
    """
    j = np.arange(2, max(*alphas, 3) + 1)
    log_t = math.log(2) + j * (j - 1) / (2 * z**2)
    even = np.arange(2, min(j[-1] + 1, 256) + 1, 2)
    y = np.arange(-40, even[-1] / z + 40, 0.1)
    u = y / z - 1 / (2 * z**2)
    log_gap = np.where(u > 30, u, np.log(np.abs(np.expm1(np.minimum(u, 30))) + 1e-300))
    log_phi = math.log(0.1) - (y**2 + math.log(2 * math.pi)) / 2
    log_b = np.array([logsumexp(e * log_gap + log_phi) for e in even])
    tight = j[j <= even[-1]]
    bound = math.log(4) + (log_b[tight // 2 - 1] + log_b[(tight + 1) // 2 - 1]) / 2
    log_t[: len(tight)] = np.minimum(log_t[: len(tight)], bound)
    terms = log_t + j * math.log(q) - gammaln(j + 1)
    sums = [
        logsumexp(terms[: a - 1] - gammaln(a - j[: a - 1] + 1)) + gammaln(a + 1) if a > 1 else -math.inf for a in alphas
    ]
    return np.logaddexp(0.0, sums)


@dataclass(frozen=True)
class ZeroConcentrated(Mechanism):
    """Releases that are each rho-zCDP (Bun and Steinke 2016, arXiv 1605.02065): ``rdp(alpha) = rho alpha``."""

    rho: float = setting(ge=0, help="zero-concentrated privacy cost of a release")
    steps: int = setting(1, ge=0, help="releases")
    relation: str = setting("add-remove", choices=RELATIONS, help="neighbours between which rho holds")

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        return self.steps * self.rho * np.asarray(orders, dtype=float)

    def describe(self) -> str:
        return f"{self.steps} releases of {self.rho:.4g}-zCDP"


@dataclass(frozen=True)
class TreeGaussian(Mechanism):
    """All nodes of a binary tree over ``leaves`` rounds, each with N(0, (z C)^2 I) of its own: DP-FTRL.

    Kairouz et al. 2021, arXiv 2103.00039. A node is the sum of the rounds below it; the nodes are the whole dyadic
    blocks within ``leaves``. A client takes part at most ``participations`` times, ``min_separation`` rounds or more
    from one time to the next, with an update of norm at most C; without the client those updates are zero, and the
    others' rounds stay where they are. With c_v its participations below node v, all nodes together move by at most
    ``C sqrt(sum of c_v^2)``, so

        rdp(alpha) = alpha/(2 z^2) sum over levels h of S_h,   S_h = max of sum c_v^2 over the level's blocks

    A block of 2^h rounds holds at most m = ceil(2^h/min_separation) of them, and a sum of squares with a given total
    is largest when as many blocks as possible are full: S_h = floor(k/m) m^2 + (k mod m)^2. Each level's maximum is
    taken by itself: exact for one participation and for ``min_separation`` 1, an upper bound otherwise. No sampling is
    assumed. A step is a tree; a restart begins another, in which the limits hold anew.
    """

    noise_multiplier: float = setting(gt=0, help="z: standard deviation of a node's noise, in units of the clip norm C")
    leaves: int = setting(ge=1, help="rounds that one tree covers")
    participations: int = setting(1, ge=1, help="most rounds of a tree in which one client takes part")
    min_separation: int = setting(1, ge=1, help="fewest rounds from one participation to the next")
    steps: int = setting(1, ge=0, help="trees")

    def sensitivity(self) -> float:
        """Bound of the L2 norm by which one client moves all nodes of a tree, in units of C."""
        k = min(self.participations, -(-self.leaves // self.min_separation))
        total = 0
        for h in range(self.leaves.bit_length()):
            blocks, most = self.leaves >> h, -(-(1 << h) // self.min_separation)
            full, rest = divmod(min(k, blocks * most), most)
            total += full * most**2 + rest**2
        return math.sqrt(total)

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        return self.steps * np.asarray(orders, dtype=float) * (self.sensitivity() / self.noise_multiplier) ** 2 / 2

    def describe(self) -> str:
        return (
            f"{self.steps} binary trees over {self.leaves} rounds (noise multiplier {self.noise_multiplier:.4g} at a "
            f"node, at most {self.participations} rounds of a client, {self.min_separation} or more apart)"
        )


def named(accountant: str) -> str:
    """The accountant and where its numbers come from, for a privacy statement."""
    return {"rdp": "RDP", "prv": "PRV (Opacus)", "pld": "PLD (dp-accounting)"}[accountant]


def epsilon(mechanisms: Sequence[Mechanism], delta: float, accountant: str = "rdp") -> float:
    """An upper bound of the epsilon of all ``mechanisms`` together at ``delta``; 0 for nothing, inf for the unknown.

    Raises `ConfigError` for a ``delta`` outside (0, 1) and for an accountant that is unknown or does not cover the
    mechanisms, `ShoalError` for mechanisms under different neighbour relations.
    """
    if not 0 < delta < 1:
        raise ConfigError("privacy.delta", delta, "a number > 0 and < 1")
    if accountant not in ACCOUNTANTS:
        raise ConfigError("privacy.accountant", accountant, f"one of {', '.join(ACCOUNTANTS)}")
    relations = {m.relation for m in mechanisms}
    if len(relations) > 1:
        raise ShoalError(
            f"Costs under different neighbour relations ({', '.join(sorted(relations))}) do not add up: "
            "state both, or use mechanisms of one relation."
        )
    ledger = _merged(mechanisms)
    if accountant != "rdp":
        return _numerical(ledger, delta, accountant)
    if len(ledger) == 1 and math.isfinite(alone := ledger[0].epsilon(delta)):
        return alone
    return _from_rdp(ledger, delta)


def _merged(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """The list with like mechanisms as one, so that its cost does not depend on where a run was interrupted."""
    steps: dict[Mechanism, int] = {}
    for mechanism in mechanisms:
        kind = mechanism.reduced().of(0)
        steps[kind] = steps.get(kind, 0) + mechanism.steps
    return [kind.of(n) for kind, n in steps.items() if n > 0]


def _from_rdp(ledger: Sequence[Mechanism], delta: float) -> float:
    if not ledger:
        return 0.0
    rdp = np.sum([m.rdp(ORDERS) for m in ledger], axis=0)
    if np.any(-np.expm1(-rdp) <= delta**2):
        return 0.0
    bounds = rdp + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(float(bounds.min()), 0.0)


def _numerical(ledger: Sequence[Mechanism], delta: float, accountant: str) -> float:
    """prv or pld, or the rdp bound where the cost is so high that their grids do not fit."""
    gaussians = [m for m in ledger if isinstance(m, SampledGaussian)]
    for mechanism in ledger:
        if not isinstance(mechanism, SampledGaussian):
            raise ConfigError(
                "privacy.accountant",
                accountant,
                f"{accountant} covers Gaussian noise with Poisson sampling alone, not {mechanism.describe()}",
                "Use privacy.accountant=rdp.",
            )
    if accountant == "pld":
        _dp_accounting()
    bound = _from_rdp(ledger, delta)
    if not 0 < bound <= _GRID_LIMIT:
        return bound
    return (_prv if accountant == "prv" else _pld)(gaussians, delta)


def _prv(gaussians: Sequence[SampledGaussian], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(m.noise_multiplier, m.sampling_rate, m.steps) for m in gaussians]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # on orders at the grid's end, and on log(1 - q) at rate 1
        return max(float(accountant.get_epsilon(delta)), 0.0)


def _dp_accounting() -> tuple[Any, Any]:
    try:
        return importlib.import_module("dp_accounting"), importlib.import_module("dp_accounting.pld")
    except ImportError as error:
        raise ConfigError(
            "privacy.accountant", "pld", f"it needs the package dp-accounting ({error})", "pip install 'shoal-fl[pld]'"
        ) from error


def _pld(gaussians: Sequence[SampledGaussian], delta: float) -> float:
    events, pld = _dp_accounting()
    accountant = pld.PLDAccountant()
    for m in gaussians:
        event = events.GaussianDpEvent(m.noise_multiplier)
        if m.sampling_rate < 1:
            event = events.PoissonSampledDpEvent(m.sampling_rate, event)
        accountant.compose(event, m.steps)
    return float(accountant.get_epsilon(delta))


def calibrate(
    make: Callable[[float], Sequence[Mechanism]], target_epsilon: float, delta: float, accountant: str = "rdp"
) -> float:
    """The smallest noise multiplier z, to 1 in 1,000, with ``epsilon(make(z)) <= target_epsilon``; never above it.

    ``make(z)`` lists all releases of the run; those with other noise may be among them. z is at least 0.01. Raises
    `ConfigError` when no noise reaches the target, since what is fixed in ``make`` has used it up, say.
    """
    if not target_epsilon > 0:
        raise ConfigError("privacy.epsilon", target_epsilon, "a number > 0")

    def within(z: float) -> bool:
        return epsilon(make(z), delta, accountant) <= target_epsilon

    # prv and pld are slow far from the target, and rdp is never far from them.
    high = 1.0 if accountant == "rdp" else calibrate(make, target_epsilon, delta, "rdp")
    growth = 2.0 if accountant == "rdp" else 1.05
    while not within(high):
        high *= growth
        if high > 1e6:
            raise ConfigError(
                "privacy.epsilon",
                target_epsilon,
                "with a noise multiplier of a million these releases still cost "
                f"{epsilon(make(1e6), delta, accountant):.4g} at delta={delta:g}",
                "Set a larger privacy.epsilon, or leave out what does not depend on this noise.",
            )
    low = high / growth
    while low > 0.01 and within(low):
        low, high = low / growth, low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def steps_left(
    mechanism: Mechanism,
    spent: Sequence[Mechanism],
    target_epsilon: float,
    delta: float,
    accountant: str = "rdp",
    limit: int = 1_000_000,
) -> int:
    """The most steps n, up to ``limit``, with ``epsilon([*spent, mechanism.of(n)]) <= target_epsilon``.

    0 when no further step fits, or when ``spent`` is over the target already.
    """

    def within(steps: int) -> bool:
        return epsilon([*spent, mechanism.of(steps)], delta, accountant) <= target_epsilon

    low = 0 if accountant == "rdp" else steps_left(mechanism, spent, target_epsilon, delta, "rdp", limit)
    if low and not within(low):
        low, high = 0, low
    else:
        high = low + 1
        while high <= limit and within(high):
            low, high = high, min(2 * high, limit) if high < limit else limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
