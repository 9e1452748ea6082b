"""Equivocation: a hostile peer tells every receiver something else.

``v_i = x_i + scale * (x_i - mu)`` to the peer with model ``x_i``, where ``mu`` is the mean of the models that the
hostile see: it pulls each receiver away from consensus, from a point that is as near to the receiver as ``scale``
says. Rules that trust what is near their own model are what it is aimed at; published codes send one vector to all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Colluding, average
from fl.config import setting
from fl.errors import ShoalError


@dataclass(frozen=True)
class Equivocation(Colluding):
    """Outward from the honest mean, by ``scale`` times the receiver's own distance to it."""

    peers_only: ClassVar[bool] = True

    scale: float = setting(1.0, gt=0, help="how far outward, in distances of the receiver from the mean")

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        if facts.receiver is None:
            raise ShoalError(
                "attack=equivocation tells each receiver something else, and a server is the only one here. Use a "
                "schedule without a server, or attack=ipm."
            )
        receiver = facts.receiver.astype(np.float64)
        return receiver + self.scale * (receiver - average(seen))
