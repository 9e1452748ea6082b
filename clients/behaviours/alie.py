"""A Little Is Enough: a shift of the mean that hides in the honest spread (Baruch et al., NeurIPS 2019, 1902.06156).

Of n vectors, f hostile::

    v = mu - z * sd,    z = Phi^-1((n - f - h) / (n - f)),    h = floor(n / 2 + 1) - f

``mu`` and ``sd`` (with n - 1) are over what the hostile clients see. h is how many honest vectors they need on their
side for a majority: z is the largest shift at which as many honest ones are expected to lie still further out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Searching, average, deviation
from fl.config import setting
from fl.errors import ConfigError, ShoalError


@dataclass(frozen=True)
class ALIE(Searching):
    """Every hostile client sends the same ``mu - z sd``."""

    z: float | None = setting(None, help="the shift in standard deviations; null: the largest that hides")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimise and self.z is not None:
            raise ConfigError("attack.z", self.z, "null with attack.optimise=true, which searches for it")

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        spread = deviation(seen)
        if self.optimise:
            return self.searched(seen, -spread, facts)
        number = len(facts.hostile) + len(facts.honest)
        return average(seen) - (hidden_shift(number, len(own)) if self.z is None else self.z) * spread


def hidden_shift(number: int, hostile: int) -> float:
    """``z`` of ``hostile`` among ``number`` vectors. Raises `ShoalError` where they need no honest one, or all."""
    honest = number - hostile
    helpers = math.floor(number / 2 + 1) - hostile
    if not 0 < honest - helpers < honest:
        raise ShoalError(
            f"ALIE has no shift of its own for {hostile} hostile of {number} updates: it needs at least 3, and fewer "
            "hostile ones than half. Set attack.z."
        )
    return NormalDist().inv_cdf((honest - helpers) / honest)
