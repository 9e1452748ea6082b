"""Mimic: all hostile clients repeat one honest client, so that it outweighs the others (Karimireddy et al., ICLR 2022).

Nothing sent is out of the ordinary, and rules that drop far rows drop honest diversity instead (arXiv 2006.09365).
The original follows the direction of largest honest variance, learnt over warm-up rounds, and then keeps to one
client. Here nothing is remembered: who is repeated follows from the seed, or from the round's updates alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Colluding, average
from fl.config import setting
from fl.keys import key_int


@dataclass(frozen=True)
class Mimic(Colluding):
    """``target=fixed`` ranks all clients once by the seed and repeats the first of the ranking that is seen in the
    round: the same client whenever it takes part. ``target=extreme`` repeats the update that lies furthest from the
    mean along the direction of largest variance of the round's updates.
    """

    target: str = setting(
        "fixed", choices=["fixed", "extreme"], help="whom they repeat: one client for the run, or the round's extreme"
    )

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        clients = facts.honest if self.knowledge == "omniscient" else facts.hostile
        if self.target == "fixed":
            row = min(range(len(seen)), key=lambda i: key_int(facts.seed, "attack", "mimic", clients[i]))
        else:
            row = extreme(seen)
        return seen[row].astype(np.float64)


def extreme(rows: np.ndarray) -> int:
    """The row with the largest projection on the first principal direction; the first of equal ones."""
    centred = rows - average(rows)
    # The projections on the first right singular vector are the first left one times its singular value.
    vectors = np.linalg.eigh(centred @ centred.T)[1]
    sizes = np.abs(vectors[:, -1])
    return int(np.flatnonzero(sizes >= sizes.max() * (1 - 1e-9))[0])
