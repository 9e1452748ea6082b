"""A cohort whose losses are quadratic, so that local training can be followed by hand and bit by bit."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from clients.adapters.space import Space
from clients.cohort import CohortBatch
from clients.layout import Layout
from tests.oracles.models import VOCABULARY


class Quadratic:
    """``l(theta; x) = |theta - c_x|^2 / 2``, with a centre ``c_x`` for each first token x. Stands for a `Cohort`."""

    def __init__(self, size: int = 5):
        self.device, self.has_dropout, self.task = torch.device("cpu"), False, "classification"
        self.centres = torch.randn(VOCABULARY, size, generator=torch.Generator().manual_seed(5))
        self.accumulated: list[int] = []
        self.space = Space(Layout(("theta",), ((size,),)))

    def training(self, groups, start, clients):
        return contextlib.nullcontext()

    def gradients(self, states: Tensor, batch: CohortBatch, accumulate: int = 1) -> tuple[Tensor, Tensor]:
        self.accumulated.append(accumulate)
        gap = states[:, None] - self.centres[batch.input_ids[:, :, 0]]  # (S, B, d)
        weights = batch.weights.to(states)
        return ((gap**2).sum(-1) / 2 * weights).sum(1).double(), (gap * weights[..., None]).sum(1)
