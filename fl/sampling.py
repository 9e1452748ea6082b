"""Who is asked to train in a round (the ``sampling=`` group).

Each round draws one uniform number for every client from the key ``(seed, "sampling", round)``, and the rules below
differ only in how they use it. So a client's luck does not depend on who else is available, a larger over-selection
asks a superset of the clients that a smaller one asks, and a resumed run draws the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl.config import setting
from fl.keys import generator


@dataclass(frozen=True)
class Sampling(ABC):
    """What the rules share. ``counted``: as many clients are asked as there is room for."""

    counted: ClassVar[bool] = True
    over_selection: float = setting(
        0.0, ge=0, le=100, help="ask ceil(k(1+x)) clients and keep the first k that answer; 0 waits for all asked"
    )

    @abstractmethod
    def sample(self, seed: int, round: int, candidates: Sequence[int], number: int, per_round: int) -> list[int]:
        """The clients to ask in ``round``, in ascending order: about ``per_round`` of ``candidates``.

        ``candidates`` are those available when the round starts, of ``number`` clients (0 to number - 1) in all.
        """

    def quota(self, per_round: int) -> int | None:
        """How many answers close the round; None waits for everyone asked (or a deadline)."""
        return per_round if self.over_selection else None

    def needed(self, number: int, per_round: int) -> int:
        """How many clients must be available before a round starts; with fewer, wait for more."""
        return 1

    def asked(self, per_round: int) -> int:
        """ceil(per_round (1 + over_selection)); the product is rounded to 1e-9, so that 10 x 1.1 is 11."""
        return per_round + math.ceil(round(per_round * self.over_selection, 9))

    def _luckiest(self, seed: int, round: int, candidates: Sequence[int], number: int, count: int) -> list[int]:
        luck = _draw(seed, round, number)
        return sorted(sorted(set(candidates), key=lambda client: (luck[client], client))[:count])


@dataclass(frozen=True)
class Fixed(Sampling):
    """``clients.per_round`` clients, uniformly without replacement; the round waits until that many are available."""

    def sample(self, seed: int, round: int, candidates: Sequence[int], number: int, per_round: int) -> list[int]:
        return self._luckiest(seed, round, candidates, number, self.asked(per_round))

    def needed(self, number: int, per_round: int) -> int:
        return min(per_round, number)


@dataclass(frozen=True)
class Available(Sampling):
    """Whoever is available, up to ``clients.per_round``, chosen uniformly if there are more; one is enough to start."""

    def sample(self, seed: int, round: int, candidates: Sequence[int], number: int, per_round: int) -> list[int]:
        return self._luckiest(seed, round, candidates, number, self.asked(per_round))


@dataclass(frozen=True)
class Poisson(Sampling):
    """Each available client by itself, with probability `rate`; the cohort's size varies and may be zero.

    This is the sampling that privacy amplification assumes: with `over_selection` the first answers are kept, which
    depends on speed, so it no longer is.
    """

    counted = False

    def sample(self, seed: int, round: int, candidates: Sequence[int], number: int, per_round: int) -> list[int]:
        luck, rate = _draw(seed, round, number), self.rate(number, per_round)
        return sorted(client for client in set(candidates) if luck[client] < rate)

    def rate(self, number: int, per_round: int) -> float:
        """The probability of each client in each round: per_round (1 + over_selection) / number, at most 1."""
        return min(1.0, per_round * (1 + self.over_selection) / number)

    def needed(self, number: int, per_round: int) -> int:
        return 0


def _draw(seed: int, round: int, number: int) -> np.ndarray:
    """One uniform number in [0, 1) for each client: (number,)."""
    return generator(seed, "sampling", round).random(number)
