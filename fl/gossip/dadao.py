"""DADAO: accelerated optimisation without server, rounds or inner loops (Nabli and Oyallon, arXiv 2208.00779).

n peers minimise ``(1/n) sum_i f_i`` of L-smooth and mu-strongly convex f_i. Peer i holds x, x~, y, y~, z, z~ ``(d,)``,
which flow between events by a linear law::

    dx = eta (x~ - x)        dy = alpha (y~ - y)                  dz = alpha (z~ - z)
    dx~ = eta (x - x~)       dy~ = -theta (y + z + nu x~)         dz~ = alpha~ (z - z~)

Each peer takes a gradient at the events of a Poisson clock of rate 1 (that is the unit of time)::

    r = grad f_i(x_i) - nu x_i - y~_i;    x_i -= gamma r,   x~_i -= gamma~ r,   y~_i += (delta + delta~) r

and each edge is used at the events of one of rate ``lambda_ij`` (`fl.gossip.rates`), with one vector each way::

    m = (y_i + z_i) - (y_j + z_j);    z_i -= beta m,  z_j += beta m,   z~_i -= beta~ m,  z~_j += beta~ m

Constants are the authors' code's (AdelNabli/DADAO, ``optimizers.py``): with ``nu = mu / 2`` and ``s = sqrt(nu / L)``,
``eta = s/8, alpha = s/4, alpha~ = s/8, theta = 1/(2s), gamma = 1/(4L), gamma~ = 1/(4 sqrt(nu L)), delta = s/4,
delta~ = 1, beta = 1/2, beta~ = 2 chi1 / s``. The error falls at least like ``exp(-t sqrt(mu/L) / (8 sqrt 2))`` if
``chi1 chi2 <= 1/2``; below that rate of communication the iteration diverges.

The flow is solved exactly and applied when a peer is next touched: x and z decay towards a mean, and (y, y~) is a
damped oscillation (its roots are complex for every mu <= L) driven by the two decays. No eigenvectors: zero is a
repeated root of the whole system.
"""

from __future__ import annotations

import math

import numpy as np

from fl.errors import ConfigError
from fl.gossip.rates import Rates

X, XT, Y, YT, Z, ZT = range(6)  # the rows of a peer's state


class Constants:
    """The method's constants for L = ``smoothness`` and mu = ``convexity``. Raises `ConfigError` unless 0 < mu <= L."""

    def __init__(self, smoothness: float, convexity: float):
        if not 0 < convexity <= smoothness < math.inf:
            allowed = f"finite and at least the strong convexity, which is {convexity:g} and has to be above 0"
            raise ConfigError("schedule.smoothness", smoothness, allowed)
        self.nu = convexity / 2
        self.s = math.sqrt(self.nu / smoothness)
        self.eta, self.alpha, self.alpha_t, self.theta = self.s / 8, self.s / 4, self.s / 8, 1 / (2 * self.s)
        self.gamma, self.gamma_t = 1 / (4 * smoothness), 1 / (4 * math.sqrt(self.nu * smoothness))
        self.delta = self.s / 4 + 1  # delta + delta~
        self.beta = 0.5

    def beta_t(self, chi1: float) -> float:
        return 2 * chi1 / self.s


class Flow:
    """The exact flow between events: ``exp(dt M)`` of a peer's stack ``(6, d)``."""

    def __init__(self, of: Constants):
        alpha, theta, nu = of.alpha, of.theta, of.nu
        self.decay_x, self.decay_z = 2 * of.eta, alpha + of.alpha_t
        self.share = alpha / self.decay_z
        self.damping, self.omega = alpha / 2, math.sqrt(alpha * theta - alpha**2 / 4)
        # z + nu x~, which drives (y, y~), is limit + exp(-decay_z t) of_z + exp(-decay_x t) of_x.
        limit = np.array([nu / 2, nu / 2, 0, 0, 1 - self.share, self.share])
        of_z = np.array([0, 0, 0, 0, self.share, -self.share])
        of_x = np.array([-nu / 2, nu / 2, 0, 0, 0, 0])

        def answer(rate: float, drive: np.ndarray) -> np.ndarray:  # the part of (y, y~) that goes like exp(-rate t)
            first = -theta / (theta - rate + rate**2 / alpha)
            return np.stack([first * drive, first * (1 - rate / alpha) * drive])

        self.rest, self.by_z, self.by_x = (
            -np.stack([limit, limit]),
            answer(self.decay_z, of_z),
            answer(self.decay_x, of_x),
        )
        start = np.zeros((2, 6))
        start[0, Y] = start[1, YT] = 1.0
        # With A = [[-alpha, alpha], [-theta, 0]]:
        # exp(t A) = exp(-damping t) (cos(omega t) I + sin(omega t) / omega (A + damping I))
        self.even = start - self.rest - self.by_z - self.by_x
        self.odd = np.array([[-alpha / 2, alpha], [-theta, alpha / 2]]) @ self.even / self.omega

    def matrix(self, dt: float) -> np.ndarray:
        """``(6, 6)``: what ``dt`` units of time do to the stack of x, x~, y, y~, z, z~."""
        of_x, of_z, free = (math.exp(-rate * dt) for rate in (self.decay_x, self.decay_z, self.damping))
        cos, sin = free * math.cos(self.omega * dt), free * math.sin(self.omega * dt)
        made = np.zeros((6, 6))
        made[Y : YT + 1] = self.rest + of_z * self.by_z + of_x * self.by_x + cos * self.even + sin * self.odd
        apart, z, zt = (1 - of_x) / 2, self.share * (1 - of_z), (1 - self.share) * (1 - of_z)
        made[X, X] = made[XT, XT] = 1 - apart
        made[X, XT] = made[XT, X] = apart
        made[Z, Z], made[Z, ZT] = 1 - z, z
        made[ZT, Z], made[ZT, ZT] = zt, 1 - zt
        return made


class Dadao:
    """The states ``(n, 6, d)`` float64 of all peers, each as of its own newest event.

    ``start`` ``(n, d)`` is where x begins. Raises `ConfigError` where ``rates`` break ``chi1 chi2 <= 1/2``.
    """

    def __init__(self, start: np.ndarray, smoothness: float, convexity: float, rates: Rates):
        if rates.chi1 * rates.chi2 > 0.5 * (1 + 1e-9):
            allowed = (
                f"communication {rates.needed:.4g} times as frequent or more: below chi1 chi2 = 1/2 DADAO diverges"
            )
            raise ConfigError("schedule.rate_factor", f"chi1 chi2 = {rates.chi1 * rates.chi2:.4g}", allowed)
        self.constants, self.rates = Constants(smoothness, convexity), rates
        self.flow, self.beta_t = Flow(self.constants), self.constants.beta_t(rates.chi1)
        self.states = np.zeros((len(start), 6, start.shape[1]))
        self.states[:, X] = self.states[:, XT] = start
        self.times = np.zeros(len(start))  # of each peer's newest event, in units of time

    def advance(self, peer: int, time: float) -> np.ndarray:
        """The state ``(6, d)`` of ``peer``, a view, brought to ``time``."""
        state = self.states[peer]
        dt = time - float(self.times[peer])
        if dt > 0:
            state[:] = self.flow.matrix(dt) @ state
            self.times[peer] = time
        return state

    def point(self, peer: int, time: float) -> np.ndarray:
        """Where x of ``peer`` will be at ``time`` ``(d,)``, whatever it communicates until then.

        Only a gradient event moves x and x~, beside their flow. So this is known as soon as the one before is over.
        """
        state, dt = self.states[peer], time - float(self.times[peer])
        apart = (1 - math.exp(-self.flow.decay_x * dt)) / 2
        return (1 - apart) * state[X] + apart * state[XT]

    def step(self, peer: int, time: float, gradient: np.ndarray) -> None:
        """The gradient event of ``peer`` at ``time`` with ``gradient`` ``(d,)``."""
        state, of = self.advance(peer, time), self.constants
        rest = gradient - of.nu * state[X] - state[YT]
        state[X] -= of.gamma * rest
        state[XT] -= of.gamma_t * rest
        state[YT] += of.delta * rest

    def exchange(self, i: int, j: int, time: float) -> None:
        """The use of the edge (``i``, ``j``) at ``time``: each sends ``y + z`` ``(d,)``."""
        one, other, of = self.advance(i, time), self.advance(j, time), self.constants
        apart = (one[Y] + one[Z]) - (other[Y] + other[Z])
        one[Z] -= of.beta * apart
        other[Z] += of.beta * apart
        one[ZT] -= self.beta_t * apart
        other[ZT] += self.beta_t * apart

    def at(self, time: float) -> np.ndarray:
        """All states ``(n, 6, d)`` at ``time``, a copy: nothing moves."""
        return np.stack([self.flow.matrix(time - t) @ s for t, s in zip(self.times, self.states, strict=True)])
