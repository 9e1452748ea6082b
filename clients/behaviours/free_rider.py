"""Free riders: clients that take the result and contribute nothing (Lin et al., arXiv 1911.12560).

They claim their examples but send no work: a zero update, or noise that looks like one. Among peers they send the model
that they had before the local step (plus the noise). The same paper's delta-weights attack, which sends the last change
of the global model, needs a memory of the previous state and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Crafted
from clients.behaviours.gaussian import noise
from fl.config import setting
from fl.errors import ShoalError


@dataclass(frozen=True)
class FreeRider(Crafted):
    """``N(0, std^2)`` in each coordinate; std = 0 is the zero update."""

    std: float = setting(0.0, ge=0, help="standard deviation of what is sent in place of an update; 0: zeros")

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        fake = noise(facts, own.shape, self.std)
        if not facts.states:
            return fake
        if facts.starts is None:
            raise ShoalError("A free rider among peers sends the model that it started from, which it was not given.")
        return facts.starts + fake
