"""PEFT's default: ``A ~ U(-1/sqrt(k), 1/sqrt(k))``, ``B = 0``.

Kaiming-uniform with a = sqrt(5): the bound is ``sqrt(6 / ((1 + a^2) k))``. Each row of A has norm about 1/sqrt(3).
Hu et al., LoRA (arXiv 2106.09685); the bound is that of their code and of PEFT's ``init_lora_weights=True``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from clients.adapters.initial.base import Initialisation, Site, Start


@dataclass(frozen=True)
class Kaiming(Initialisation):
    """A Kaiming-uniform, B zero. Drawn in float32, so that the same generator gives PEFT's own numbers."""

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        a = nn.init.kaiming_uniform_(torch.empty(site.rank, k), a=math.sqrt(5), generator=site.generator)
        return Start.of(site.weight, a, torch.zeros(d, site.rank))
