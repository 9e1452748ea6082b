"""Inner-product manipulation, also called Fall of Empires: a multiple of the mean, turned round.

``v = -scale * mu`` (Xie et al., UAI 2019, arXiv 1903.03936). A small scale (0.1 to 0.5) hides near the origin and makes
the aggregate's inner product with the true mean negative for some rules; a large one breaks the plain mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Searching, average
from fl.config import setting


@dataclass(frozen=True)
class IPM(Searching):
    """Every hostile client sends the same ``-scale mu``; ``optimise`` searches ``(1 - t) mu``, t >= 0, instead."""

    scale: float = setting(0.5, gt=0, help="how many times the honest mean, turned round")

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        mean = average(seen)
        return self.searched(seen, -mean, facts) if self.optimise else -self.scale * mean
