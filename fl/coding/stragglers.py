"""Straggler models: which patterns of late workers a scheme is built for.

A pattern is ``(rounds, n)`` bool, True where a worker's answer is not used. A model is a condition on every window of W
consecutive rounds (of all rounds, where there are fewer), so a pattern can be checked a round at a time, from its last
W - 1 rounds. Krishnan et al., arXiv 2211.13802.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Model(ABC):
    """``W``: rounds of a window."""

    W: int

    @abstractmethod
    def fits(self, window: np.ndarray) -> bool:
        """Whether ``window`` ``(<= W, n)`` is allowed."""

    def admits(self, past: np.ndarray, now: np.ndarray) -> bool:
        """Whether the pattern ``past`` ``(rounds, n)``, which conforms, still does after a round ``now`` ``(n,)``."""
        return self.fits(np.concatenate([past[max(0, len(past) - self.W + 1) :], now[None]]))

    def conforms(self, pattern: np.ndarray) -> bool:
        """Whether every window of ``pattern`` is allowed."""
        return all(self.admits(pattern[:r], pattern[r]) for r in range(len(pattern)))

    def draw(self, n: int, rounds: int, rng: np.random.Generator, rate: float = 0.5, stay: float = 0.8) -> np.ndarray:
        """A random pattern that conforms: in each round, workers in random order straggle where that is allowed.

        One that did not straggle tries with probability ``rate``, one that did with ``stay``: so there are bursts.
        """
        pattern = np.zeros((rounds, n), dtype=bool)
        for r in range(rounds):
            chance = np.where(pattern[r - 1], stay, rate) if r else np.full(n, rate)
            for worker in rng.permutation(np.flatnonzero(rng.random(n) < chance)):
                pattern[r, worker] = True
                pattern[r, worker] = self.admits(pattern[:r], pattern[r])
        return pattern


@dataclass(frozen=True)
class Bursty(Model):
    """(B, W, lambda)-bursty: in any W rounds at most lambda distinct stragglers, each in a burst of at most B rounds.

    A burst is counted from a worker's first to its last straggling round of the window. (1, 1, s) is at most s
    stragglers a round.
    """

    B: int
    lam: int

    def fits(self, window: np.ndarray) -> bool:
        late = window[:, window.any(0)]
        span = len(late) - late.argmax(0) - late[::-1].argmax(0)
        return late.shape[1] <= self.lam and bool((span <= self.B).all())


@dataclass(frozen=True)
class Arbitrary(Model):
    """(N, W, lambda)-arbitrary: in any W rounds at most lambda distinct stragglers, each in at most N of them."""

    N: int
    lam: int

    def fits(self, window: np.ndarray) -> bool:
        return int(window.any(0).sum()) <= self.lam and bool((window.sum(0) <= self.N).all())


@dataclass(frozen=True)
class Either(Model):
    """In any W rounds one of ``models``, not always the same."""

    models: tuple[Model, ...]

    def fits(self, window: np.ndarray) -> bool:
        return any(model.conforms(window) for model in self.models)
