"""PEFT's ``gaussian``: ``A ~ N(0, 1/r^2)``, that is, standard deviation 1/r; ``B = 0``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.adapters.initial.base import Initialisation, Start


@dataclass(frozen=True)
class Gaussian(Initialisation):
    """A Gaussian of standard deviation 1/rank, B zero. Drawn in float32, as PEFT does."""

    def start(
        self,
        weight: Tensor,
        statistic: Tensor | None,
        rank: int,
        scale: float,
        generator: torch.Generator,
        count: int = 1,
    ) -> Start:
        d, k = weight.shape
        a = torch.empty(rank, k).normal_(std=1 / rank, generator=generator)
        return Start.of(weight, a, torch.zeros(d, rank))
