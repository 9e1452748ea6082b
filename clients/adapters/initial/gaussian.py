"""PEFT's ``gaussian``: ``A ~ N(0, 1/r^2)``, that is, standard deviation 1/r; ``B = 0``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.adapters.initial.base import Initialisation, Site, Start


@dataclass(frozen=True)
class Gaussian(Initialisation):
    """A Gaussian of standard deviation 1/rank, B zero. Drawn in float32, as PEFT does."""

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        a = torch.empty(site.rank, k).normal_(std=1 / site.rank, generator=site.generator)
        return Start.of(site.weight, a, torch.zeros(d, site.rank))
