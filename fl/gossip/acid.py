"""A2CiD2 and AD-PSGD: asynchronous steps on models of one's own, and means of pairs.

A2CiD2 (Nabli et al., arXiv 2306.08289): peer i holds x and x~ ``(d,)``, equal at the start. Between events they mix,

    dx = eta (x~ - x),    dx~ = eta (x - x~)

a local step g is taken by both, ``x -= g, x~ -= g``, and a pair that meets does, with ``m = x_i - x_j``,

    x_i -= m / 2,   x_j += m / 2,   x~_i -= beta~ m,   x~_j += beta~ m

with ``eta = 1 / (2 sqrt(chi1 chi2))`` and ``beta~ = 1/2 sqrt(chi1 / chi2)`` of the edges' rates (`fl.gossip.rates`), a
unit of time being the mean time of a local step. On a graph where ``chi1`` is much above ``chi2`` (a ring) this mixes
like ``sqrt(chi1 chi2)`` in place of ``chi1``. With ``eta = 0, beta~ = 1/2`` x~ is x, and what is left is AD-PSGD (Lian
et al., arXiv 1710.06952): plain means of pairs.

Steps leave the mean of x, and meetings leave both means, as they are.
"""

from __future__ import annotations

import math

import numpy as np

from fl.gossip.rates import Rates


class Acid:
    """The states ``(n, 2, d)`` float32, x and x~ of all peers, each as of its own newest event.

    ``start`` ``(n, d)`` is where both begin. Without ``rates`` there is no momentum: `eta` 0 and `beta_t` 1/2.
    """

    def __init__(self, start: np.ndarray, rates: Rates | None):
        self.eta, self.beta_t = 0.0, 0.5
        if rates is not None:
            self.eta = 1 / (2 * math.sqrt(rates.chi1 * rates.chi2))
            self.beta_t = math.sqrt(rates.chi1 / rates.chi2) / 2
        self.states = np.repeat(start[:, None].astype(np.float32), 2, axis=1)
        self.times = np.zeros(len(start))  # of each peer's newest event, in units of time

    def advance(self, peer: int, time: float) -> np.ndarray:
        """The state ``(2, d)`` of ``peer``, a view, brought to ``time``."""
        state, dt = self.states[peer], time - float(self.times[peer])
        if dt > 0:
            self.times[peer] = time
            if self.eta:
                moved = _crossed(self.eta, dt) * (state[1] - state[0])
                state[0] += moved
                state[1] -= moved
        return state

    def step(self, peer: int, time: float, update: np.ndarray) -> None:
        """``peer`` adds ``update`` ``(d,)``, its model's change, to both of its models at ``time``."""
        state = self.advance(peer, time)
        state += update.astype(np.float32, copy=False)

    def apart(self, i: int, j: int, time: float) -> np.ndarray:
        """``m = x_i - x_j`` ``(d,)`` at ``time``: what both know once each has the other's model."""
        return self.advance(i, time)[0] - self.advance(j, time)[0]

    def meet(self, i: int, j: int, time: float, apart: np.ndarray) -> None:
        """``i`` and ``j`` use ``apart`` ``(d,)``, which they found when their exchange began."""
        for peer, sign in ((i, -1.0), (j, 1.0)):
            state = self.advance(peer, time)
            state[0] += np.float32(0.5 * sign) * apart
            state[1] += np.float32(self.beta_t * sign) * apart

    def at(self, time: float) -> np.ndarray:
        """Models x of all peers ``(n, d)`` at ``time``, a copy: nothing moves."""
        if not self.eta:
            return self.states[:, 0].copy()
        part = np.array([_crossed(self.eta, time - t) for t in self.times], dtype=np.float32)[:, None]
        return self.states[:, 0] + part * (self.states[:, 1] - self.states[:, 0])


def _crossed(eta: float, dt: float) -> np.float32:
    """The part of the way to x~ that x goes in ``dt``: ``(1 - exp(-2 eta dt)) / 2``."""
    return np.float32(-math.expm1(-2 * eta * dt) / 2)
