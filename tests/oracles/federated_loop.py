"""The slow twin of a whole run: FedAvg with a plain PEFT model and torch.optim, one client after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clients.data.tokens import TokenData
from clients.layout import Layout
from tests.oracles.peft_loop import load, sample_loss

# (client, round) -> the examples of each of its steps.
Batches = Callable[[int, int], Sequence[np.ndarray]]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def train(
    model: nn.Module, layout: Layout, start: Tensor, data: TokenData, batches: Sequence[np.ndarray], make: MakeOptimizer
) -> Tensor:
    """The state ``(d,)`` of one client after its steps from ``start``."""
    load(model, layout, start)
    named = dict(model.named_parameters())
    parameters = [named[n] for n in layout.names]
    optimizer = make(parameters)
    for examples in batches:
        batch = data.batch(examples)
        optimizer.zero_grad()
        torch.stack([sample_loss(model, batch, row) for row in range(len(batch))]).mean().backward()
        optimizer.step()
    return layout.flatten({n: named[n].detach() for n in layout.names}).clone()


def fedavg(
    model: nn.Module,
    layout: Layout,
    start: Tensor,
    data: TokenData,
    weights: Sequence[float],
    rounds: int,
    batches: Batches,
    make: MakeOptimizer,
) -> Tensor:
    """The server's state after ``rounds`` rounds in which all clients train and are averaged by ``weights``."""
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    state = start
    for round in range(1, rounds + 1):
        trained = [train(model, layout, state, data, batches(c, round), make) for c in range(len(weights))]
        state = (share[:, None] * torch.stack(trained).double()).sum(0).to(start.dtype)
    return state
