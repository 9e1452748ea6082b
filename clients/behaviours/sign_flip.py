"""Sign flip: each hostile client sends its own vector turned round, ``-scale * g``.

All of them sending ``-scale`` times the honest mean is inner-product manipulation (`clients.behaviours.ipm`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Crafted
from fl.config import setting


@dataclass(frozen=True)
class SignFlip(Crafted):
    """Its own update times ``-scale``; among peers, its own model times ``-scale``."""

    scale: float = setting(1.0, gt=0, help="how many times its length the turned vector has")

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        return -self.scale * own.astype(np.float64)
