"""Discrete noise for distributed differential privacy: each client adds a share of integer noise, and the server sees
only the sum modulo 2^b.

    client:  x = clip_C(update)    y = s H D x / sqrt(d)    r = randomised rounding of y, until |r|_2 <= Delta_2
             sends r + share mod 2^b,    Var(share) = (s z C)^2 / m
    server:  the sum mod 2^b, lifted to [-2^(b-1), 2^(b-1)), then D H / sqrt(d) and 1 / s

H is the Walsh-Hadamard matrix, D a diagonal of public random signs, s the scale, z the noise multiplier, m the smallest
cohort for which the noise is planned. Kairouz, Liu, Steinke, arXiv 2102.06387 (rounding, discrete Gaussian);
Agarwal, Kairouz, Liu, arXiv 2110.04995 (Skellam); Canonne, Kamath, Steinke, arXiv 2004.00010 (sampling).
"""

from __future__ import annotations

import dataclasses
import decimal
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from fl.config import check, setting
from fl.errors import ConfigError, RunStopped, ShoalError
from fl.keys import Part, generator
from privacy.accounting import Mechanism

BETA = math.exp(-0.5)  # a rounding is refused with at most this probability; the authors' choice
ROUNDINGS = 100  # all are refused with probability at most BETA^100 = 2e-22
WRAP = 2.0**-40  # the probability, in a round, that any coordinate of the sum wraps around
WINDOW = 2.0**-44  # covers the rounding of float64 in a comparison of a uniform number with exp(-x)
LARGE = 1e4  # variance from which the Skellam distribution is sampled by its own density

Exact = Callable[[int], Fraction]
Relation = Literal["add-remove", "replace-one"]


# ---------------------------------------------------------------- samplers


def discrete_gaussian(rng: np.random.Generator, sigma: float, size: int) -> np.ndarray:
    """``size`` integers (int64) with P(x) proportional to exp(-x^2 / (2 sigma^2)), exactly.

    Algorithm 3 of arXiv 2004.00010: discrete Laplace numbers y of the integer scale t = floor(sigma) + 1, kept with
    probability exp(-(|y| - sigma^2 / t)^2 / (2 sigma^2)). A comparison with exp(-x) is made in float64 and, where that
    does not settle it, in exact arithmetic with further random bits: the law is exact up to 2^-180 in each comparison,
    given a generator of independent bits. ``sigma`` is taken as the rational number that the float is.
    """
    _check_variance(sigma * abs(sigma))
    t = math.floor(sigma) + 1
    variance = Fraction(sigma) ** 2

    def accept(y: np.ndarray) -> np.ndarray:
        x = (np.abs(y) - sigma**2 / t) ** 2 / (2 * sigma**2)
        return _with_probability_exp(rng, x, lambda i: (abs(int(y[i])) - variance / t) ** 2 / (2 * variance))

    return _from_laplace(rng, t, size, accept)


def skellam(rng: np.random.Generator, variance: float, size: int) -> np.ndarray:
    """``size`` integers (int64), each the difference of two independent Poisson numbers of mean ``variance / 2``.

    P(x) = exp(-V) I_x(V). From V = 1e4 on they are drawn by rejection from discrete Laplace numbers, with the uniform
    expansion of I_x(V) (DLMF 10.41.3, to second order, relative error below 1e-12): NumPy's Poisson sampler compares
    logarithms of the size V log V, and is visibly wrong from V = 1e14 on.
    """
    _check_variance(variance)
    if variance < LARGE:
        return rng.poisson(variance / 2, size) - rng.poisson(variance / 2, size)
    t = math.floor(math.sqrt(variance)) + 1
    log_max = 2 * variance * math.sinh(0.5 / t) ** 2  # V (cosh(1/t) - 1), above |x| / t + log P(x) / P(0) for all x

    def accept(y: np.ndarray) -> np.ndarray:
        x = np.abs(y)
        return _with_probability_exp(rng, log_max - x / t - _skellam_log_ratio(x, variance))

    return _from_laplace(rng, t, size, accept)


def _skellam_log_ratio(x: np.ndarray, variance: float) -> np.ndarray:
    """log P(x) / P(0) of the Skellam distribution, for a large variance; never positive."""
    u = x / variance
    root = np.sqrt(1 + u * u)
    exponent = u * u / (1 + root) - u * np.arcsinh(u)  # sqrt(1 + u^2) - 1 - u asinh u, without its cancellation
    w, r = (u / root) ** 2, variance * root
    series = (3 - 5 * w) / (24 * r) + (81 - 462 * w + 385 * w * w) / (1152 * r * r)
    at_zero = 1 / (8 * variance) + 9 / (128 * variance**2)
    return variance * exponent - np.log(root) / 2 + np.log1p(series) - math.log1p(at_zero)


def _check_variance(variance: float) -> None:
    if not 0 < variance <= 2.0**64:  # beyond, offsets would not be exact in float64
        raise ShoalError(f"discrete noise of variance {variance} can't be drawn: 0 to 2^64 can. Lower the scale.")


def _from_laplace(rng: np.random.Generator, t: int, size: int, accept: Callable) -> np.ndarray:
    """``size`` of the discrete Laplace numbers of scale t that ``accept`` keeps (rejection in batches)."""
    parts: list[np.ndarray] = []
    missing = size
    while missing > 0:
        y = _discrete_laplace(rng, t, 2 * missing + 64)
        parts.append(y[accept(y)])
        missing -= parts[-1].size
    return np.concatenate([np.zeros(0, np.int64), *parts])[:size]


def _discrete_laplace(rng: np.random.Generator, t: int, proposals: int) -> np.ndarray:
    """Integers with P(y) proportional to exp(-|y| / t), fewer than ``proposals`` (algorithm 2 of arXiv 2004.00010)."""
    low = rng.integers(0, t, proposals)
    low = low[_with_probability_exp(rng, low / t, lambda i: Fraction(int(low[i]), t))]
    high = np.zeros(low.size, np.int64)  # of a geometric law: how often in a row an event of probability 1/e happens
    going = np.arange(low.size)
    while going.size:
        going = going[_with_probability_exp(rng, np.ones(going.size), lambda i: Fraction(1))]
        high[going] += 1
    size = low + t * high
    negative = rng.integers(0, 2, size.size, dtype=np.int8).astype(bool)
    return np.where(negative, -size, size)[~(negative & (size == 0))]  # else zero would count twice


def _with_probability_exp(rng: np.random.Generator, x: np.ndarray, exact: Exact | None = None) -> np.ndarray:
    """True with probability exp(-x), element by element; ``exact(i)`` is x[i] as a fraction."""
    uniform, probability = rng.random(x.size), np.exp(-x)
    happens = uniform < probability
    if exact is not None:
        for i in np.flatnonzero(np.abs(uniform - probability) < WINDOW).tolist():
            happens[i] = _below_exp(rng, float(uniform[i]), exact(i))
    return happens


def _below_exp(rng: np.random.Generator, uniform: float, x: Fraction) -> bool:
    """Whether ``uniform``, continued by 128 further random bits after its 53, is below exp(-x)."""
    continued = Fraction(uniform) + Fraction(int.from_bytes(rng.bytes(16), "little"), 2**181)
    with decimal.localcontext(prec=80):
        return continued < Fraction((-decimal.Decimal(x.numerator) / decimal.Decimal(x.denominator)).exp())


# ---------------------------------------------------------------- the two halves


@dataclass(frozen=True)
class DiscreteNoise:
    """The client's and the server's half of a sum with distributed discrete noise; settings checked when built.

    Sensitivity: a rounded vector r has an integer |r|^2 of at most ``squared_l2``, the floor of

        min( (sC + sqrt(d))^2,  (sC)^2 + d/4 + sqrt(2 ln(1/BETA)) (sC + sqrt(d)/2) )       (2102.06387, prop. 22)

    with d the ``padded`` length, and |r|_1 <= min(sqrt(d) |r|_2, |r|_2^2), which is ``l1``. A fresh rounding stays
    within it with probability at least 1 - BETA; after 100 that don't, all are rounded towards zero, which never
    enlarges. So the bound always holds; what rejecting costs is a small bias.

    Wrap-around spoils a sum, not privacy. With probability at least 1 - 2^-40 no coordinate wraps, as with n clients,
    V = (n/m) (s z C)^2 and L = ln(4 d 2^40)

        n (sC min(1, sqrt(2 L / d)) + 1) + sqrt(2 V L) + L / 3  <  2^(b-1)

    Data (rotated sum: Hoeffding over the signs, for updates chosen independently of them; min(1, .) -> 1 unrotated),
    rounding (below 1 each) and noise (both kinds are sub-gamma with variance V and scale 1/3).

    Raises `ConfigError` for a modulus too small for that, or ``min_cohort`` above ``clients``.
    """

    dim: int = setting(ge=1, help="length of an update")
    clip: float = setting(gt=0, help="C, the largest L2 norm of an update")
    noise_multiplier: float = setting(gt=0, help="z: the noise of the sum has standard deviation z C at min_cohort")
    scale: float = setting(gt=0, help="s, integer steps for each unit of an update")
    clients: int = setting(ge=1, help="n, the most clients in a sum")
    min_cohort: int = setting(ge=1, help="m, the fewest trusted clients in a sum; fewer and the round is refused")
    modulus_bits: int = setting(32, choices=(32, 64), help="b: sums are modulo 2^b")
    kind: Literal["skellam", "discrete_gaussian"] = setting("skellam", help="law of a client's share of noise")
    rotate: bool = setting(True, help="random rotation, padded to a power of two, so that no coordinate is large")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            check(getattr(self, field.name), hints[field.name], field.metadata, f"privacy.{field.name}")
        if self.min_cohort > self.clients:
            raise ConfigError("privacy.min_cohort", self.min_cohort, f"at most the {self.clients} clients of a sum")
        if self.scale * self.clip + math.sqrt(self.padded) >= 2.0**31:  # squared norms are exact in int64
            raise ConfigError("privacy.scale", self.scale, f"below 2^31 / clip = {2**31 / self.clip:.3g}")
        bits = math.floor(math.log2(self._largest())) + 2
        if bits > self.modulus_bits:
            way_out = "Choose privacy.modulus_bits=64." if bits <= 64 else "Lower privacy.scale."
            allowed = f"at least {bits} bits, or sums of {self.clients} clients may wrap around"
            raise ConfigError("privacy.modulus_bits", self.modulus_bits, allowed, way_out)

    @property
    def padded(self) -> int:
        """d: how many integers a client sends."""
        return 1 << (self.dim - 1).bit_length() if self.rotate else self.dim

    @property
    def squared_l2(self) -> int:
        """The largest squared L2 norm of a rounded vector, Delta_2^2, in integer steps."""
        norm, d = self.scale * self.clip, self.padded
        likely = norm**2 + d / 4 + math.sqrt(-2 * math.log(BETA)) * (norm + math.sqrt(d) / 2)
        return math.floor(min((norm + math.sqrt(d)) ** 2, likely))

    @property
    def l1(self) -> int:
        """The largest L1 norm of a rounded vector, Delta_1, in integer steps."""
        return min(math.isqrt(self.padded * self.squared_l2), self.squared_l2)

    @property
    def share_variance(self) -> float:
        """(s z C)^2 / m, in integer steps; for the discrete Gaussian the parameter sigma^2, slightly more than it."""
        return (self.scale * self.noise_multiplier * self.clip) ** 2 / self.min_cohort

    def encode(self, update: np.ndarray, rng: np.random.Generator, *public: Part) -> np.ndarray:
        """What a client hands to secure aggregation: ``padded`` integers modulo 2^b (uint32 or uint64).

        ``update`` has ``dim`` finite numbers; ``rng`` is the client's own secret generator, fresh for each sum;
        ``public`` is the key of the rotation's signs, which all clients of the sum and the server share. Raises
        `ShoalError` for another length or numbers that are not finite.
        """
        noise = self._share(rng)
        return (self._rounded(update, rng, *public) + noise).astype(self._ring)  # a cast of int64 is modulo 2^b

    def decode(self, total: np.ndarray, clients: int, *public: Part, colluding: int = 0) -> np.ndarray:
        """The noisy sum of the clipped updates (float64, ``dim``) from the ring sum ``total`` of ``clients`` clients.

        Raises `RunStopped` where fewer than ``min_cohort`` are left without the ``colluding`` ones (assumed to add no
        noise, or to tell the server theirs), and `ShoalError` for more clients than the modulus was checked for. What
        keeps a server that does not ask from such sums is the threshold of secure aggregation.
        """
        if clients - colluding < self.min_cohort:
            raise RunStopped(
                f"{clients} clients with {colluding} colluding are left, but the noise is planned for "
                f"privacy.min_cohort={self.min_cohort}: their sum would be less private than stated and is not opened. "
                "Lower min_cohort, which adds noise, or ask more clients."
            )
        if clients > self.clients or total.shape != (self.padded,) or total.dtype != self._ring:
            raise ShoalError(
                f"a sum of {clients} clients with shape {total.shape} of {total.dtype} can't be decoded: at most "
                f"{self.clients} clients and {self.padded} numbers of {np.dtype(self._ring)} were planned."
            )
        lifted = total.view(np.int32 if self.modulus_bits == 32 else np.int64).astype(np.float64)
        if self.rotate:
            lifted = _walsh_hadamard(lifted) * self._signs(*public)
        return lifted[: self.dim] / self.scale

    def release(self, steps: int = 1, relation: Relation = "add-remove") -> Mechanism:
        """What ``steps`` opened sums cost."""
        if self.kind == "skellam":
            variance = self.share_variance * self.min_cohort
            return SkellamRelease(variance, self.squared_l2, self.l1, steps=steps, relation=relation)
        return DistributedDiscreteGaussian(
            self.share_variance, self.min_cohort, self.squared_l2, self.l1, self.padded, steps=steps, relation=relation
        )

    @property
    def _ring(self) -> type:
        return np.uint32 if self.modulus_bits == 32 else np.uint64

    def _largest(self) -> float:
        """What no coordinate of a sum exceeds, but with probability WRAP; see the class."""
        tail = math.log(4 * self.padded / WRAP)  # half of WRAP for data, half for noise, both of two sides
        variance = self.clients * self.share_variance
        flat = min(1.0, math.sqrt(2 * tail / self.padded)) if self.rotate else 1.0
        data = self.clients * (self.scale * self.clip * flat + 1)
        return data + math.sqrt(2 * variance * tail) + tail / 3

    def _share(self, rng: np.random.Generator) -> np.ndarray:
        if self.kind == "skellam":
            return skellam(rng, self.share_variance, self.padded)
        return discrete_gaussian(rng, math.sqrt(self.share_variance), self.padded)

    def _rounded(self, update: np.ndarray, rng: np.random.Generator, *public: Part) -> np.ndarray:
        """The clipped, rotated, scaled and rounded update (int64), of squared L2 norm at most ``squared_l2``."""
        x = np.asarray(update, np.float64)
        if x.shape != (self.dim,) or not np.isfinite(x).all():
            raise ShoalError(f"an update of shape {x.shape} can't be encoded: {self.dim} finite numbers are needed.")
        largest = float(np.abs(x).max()) or 1.0
        x = x / largest  # so that squares neither overflow nor vanish
        norm = float(np.linalg.norm(x)) or 1.0
        y = x * (self.scale * min(largest, self.clip / norm))
        if self.rotate:
            y = _walsh_hadamard(np.pad(y, (0, self.padded - self.dim)) * self._signs(*public))
        floor = np.floor(y)
        for _ in range(ROUNDINGS):
            rounded = (floor + (rng.random(y.size) < y - floor)).astype(np.int64)
            if int(rounded @ rounded) <= self.squared_l2:
                return rounded
        return np.trunc(y).astype(np.int64)

    def _signs(self, *public: Part) -> np.ndarray:
        return 1.0 - 2.0 * generator(*public, "rotation").integers(0, 2, self.padded)


def _walsh_hadamard(x: np.ndarray) -> np.ndarray:
    """H x / sqrt(d) with the Walsh-Hadamard matrix of order d = x.size, a power of two; its own inverse."""
    half = 1
    while half < x.size:
        pairs = x.reshape(-1, 2, half)
        x = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1)
        half *= 2
    return x.reshape(-1) / math.sqrt(x.size)


# ---------------------------------------------------------------- what a release costs


@dataclass(frozen=True)
class DistributedDiscreteGaussian(Mechanism):
    """Sums with a discrete Gaussian share of parameter ``share_variance`` from each of ``shares`` clients.

    With V = shares share_variance, Delta_2 = sqrt(squared_l2), Delta_1 = l1 (both doubled under replace-one) and

        tau = sum_(k=1)^(shares-1) 4 artanh(q_k) / (1 - q_k^2),    q_k = exp(-2 pi^2 share_variance k / (k+1))
        rdp(a) = min( a Delta_2^2 / (2 V) + tau d,   a (Delta_2^2 / V + 2 tau Delta_1 / sqrt(V) + tau^2 d) / 2 )

    Theorem 1 of arXiv 2102.06387 has 10 q_k in the place of the summand; this one, which holds for every variance, is
    derived in docs/methods/distributed_dp.md. More shares are post-processing of these, so the cost holds for all
    cohorts of at least ``shares``. No amplification by sampling.
    """

    share_variance: float = setting(gt=0, help="sigma^2 of a share, in integer steps")
    shares: int = setting(ge=1, help="the fewest shares in a sum")
    squared_l2: int = setting(ge=0, help="largest squared L2 norm of a client's vector, in integer steps")
    l1: int = setting(ge=0, help="its largest L1 norm")
    dim: int = setting(ge=1, help="d, its length")
    steps: int = setting(1, ge=0, help="releases")
    relation: Relation = setting("add-remove", help="one client's vector becomes zero, or another one")

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        orders, moves = np.asarray(orders, np.float64), _moves(self.relation)
        if not self.steps:
            return np.zeros_like(orders)
        variance = self.shares * self.share_variance
        squared = moves**2 * self.squared_l2 / variance
        tau = self.tau()
        mixed = squared + 2 * tau * moves * self.l1 / math.sqrt(variance) + tau**2 * self.dim
        return self.steps * np.minimum(orders * squared / 2 + tau * self.dim, orders * mixed / 2)

    def tau(self) -> float:
        """The largest log ratio of the sum's pmf to the discrete Gaussian's, up to a constant: an upper bound."""
        k = np.arange(1, self.shares)
        log_q = -2 * np.pi**2 * self.share_variance * k / (k + 1)
        with np.errstate(divide="ignore"):  # where q rounds to 1, tau is infinite: no guarantee
            return float(np.sum(4 * np.arctanh(np.exp(log_q)) / -np.expm1(2 * log_q)))

    def describe(self) -> str:
        return f"{self.steps} sums with discrete Gaussian noise, {_parameters(self, self.shares * self.share_variance)}"


@dataclass(frozen=True)
class SkellamRelease(Mechanism):
    """Sums with Skellam noise of ``variance`` V in total; shares of Skellam noise add up to Skellam noise.

    For integer orders a (arXiv 2110.04995, as in the authors' code; Delta_1 and Delta_2 doubled under replace-one)

        rdp(a) = a Delta_2^2 / (2 V) + min( ((2a - 1) Delta_2^2 + 6 Delta_1) / (4 V^2),  3 Delta_1 / (2 V) )

    Between integers (a - 1) rdp(a) is interpolated linearly: a cumulant function is convex, and zero at a = 1. More
    variance is post-processing, so the cost holds for larger cohorts. No amplification by sampling.
    """

    variance: float = setting(gt=0, help="V, the fewest shares' variances together, in integer steps")
    squared_l2: int = setting(ge=0, help="largest squared L2 norm of a client's vector, in integer steps")
    l1: int = setting(ge=0, help="its largest L1 norm")
    steps: int = setting(1, ge=0, help="releases")
    relation: Relation = setting("add-remove", help="one client's vector becomes zero, or another one")

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        orders = np.asarray(orders, np.float64)
        low = np.floor(orders)
        part = orders - low
        cumulant = (1 - part) * (low - 1) * self._integer(low) + part * low * self._integer(low + 1)
        return self.steps * cumulant / (orders - 1)

    def _integer(self, a: np.ndarray) -> np.ndarray:
        moves, v = _moves(self.relation), self.variance
        squared, l1 = moves**2 * self.squared_l2, moves * self.l1
        return a * squared / (2 * v) + np.minimum(((2 * a - 1) * squared + 6 * l1) / (4 * v * v), 3 * l1 / (2 * v))

    def describe(self) -> str:
        return f"{self.steps} sums with Skellam noise, {_parameters(self, self.variance)}"


def _moves(relation: Relation) -> int:
    """How many rounded vectors neighbours' sums are apart: one becomes zero, or one goes and another comes."""
    return {"add-remove": 1, "replace-one": 2}[relation]


def _parameters(release: DistributedDiscreteGaussian | SkellamRelease, variance: float) -> str:
    effective = math.sqrt(variance / max(1, release.squared_l2))
    unit = "update replaced by zero" if release.relation == "add-remove" else "update replaced by another"
    return (
        f"standard deviation {math.sqrt(variance):.4g} steps at the smallest cohort, {effective:.4g} times the L2 "
        f"bound after rounding; no amplification; neighbours: one client's {unit} ({release.relation})"
    )
