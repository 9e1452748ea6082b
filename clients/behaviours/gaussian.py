"""Gaussian: hostile clients send noise, ``N(0, std^2 I)`` or their own vector plus such noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Crafted
from fl.config import setting
from fl.keys import generator


@dataclass(frozen=True)
class Gaussian(Crafted):
    """Draws are each client's own, from (seed, client, round): hostile clients do not send the same noise."""

    std: float = setting(1.0, gt=0, help="standard deviation of the noise in each coordinate")
    centre: str = setting("zero", choices=["zero", "own"], help="what the noise is about: zero, or the client's own")

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        return noise(facts, own.shape, self.std) + (own if self.centre == "own" else 0.0)


def noise(facts: Facts, shape: tuple[int, ...], std: float) -> np.ndarray:
    """``(f, d)`` float64: a row of ``N(0, std^2)`` for each hostile client, from its own key."""
    rows = [generator(facts.seed, "attack", c, facts.round, "noise").normal(0, std, shape[1]) for c in facts.hostile]
    return np.stack(rows)
