"""A tanh network in the place of a cohort, and federated training in which one client alone owns a class.

Small enough to follow by hand: ``f(x) = W2 tanh(W1 x + b1) + b2`` with 20 inputs, 64 hidden units and 10 classes, whose
inputs come as hidden states of one token. The oracle trains the same network with torch.optim.SGD.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from clients.cohort import CohortBatch
from clients.layout import Layout
from clients.unrolled import Samples

INPUTS, HIDDEN, CLASSES = 20, 64, 10
LAYOUT = Layout(("w1", "b1", "w2", "b2"), ((HIDDEN, INPUTS), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,)))


class TanhMLP:
    """Stands for a `Cohort`: S slots of the network, in float64."""

    task, device, layout = "classification", torch.device("cpu"), LAYOUT

    def logits(self, tensors: dict[str, Tensor], batch: CohortBatch) -> Tensor:
        assert batch.prefix is not None
        x = batch.prefix[:, :, 0]  # (S, m, 20)
        hidden = torch.tanh(x @ tensors["w1"].transpose(1, 2) + tensors["b1"][:, None])
        return hidden @ tensors["w2"].transpose(1, 2) + tensors["b2"][:, None]


def initial(seed: int) -> Tensor:
    """``(d,)`` float64: torch's usual start of linear layers, drawn from ``seed``."""
    rng = np.random.default_rng((seed, 1))
    parts = [rng.uniform(-1, 1, size) / np.sqrt(n) for size, n in zip(LAYOUT.sizes, (20, 20, 64, 64), strict=True)]
    return torch.from_numpy(np.concatenate(parts))


def first_samples(seed: int, number: int = 16) -> Samples:
    """``number`` samples of one slot: inputs from N(0, 0.3^2), logits of labels from N(0, 0.1^2)."""
    rng = np.random.default_rng((seed, 3))
    x, y = rng.normal(size=(1, number, 1, INPUTS)), rng.normal(size=(1, number, CLASSES))
    return Samples(torch.from_numpy(0.3 * x), torch.from_numpy(0.1 * y))


def trained(start: Tensor, x: Tensor, labels: Tensor, steps: int, lr: float, momentum: float = 0.0) -> Tensor:
    """``(d,)``: the change of ``start`` after full-batch steps of torch.optim.SGD on the samples."""
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
    nn.utils.vector_to_parameters(start.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - start


def owned_class(seed: int, clients: int = 10, each: int = 32, owned: int = 5) -> list[tuple[Tensor, Tensor]]:
    """The clients' samples: Gaussian clouds around ten centres; the last client has class ``owned``, and it alone."""
    rng = np.random.default_rng((seed, 2))
    centres = rng.normal(size=(CLASSES, INPUTS))
    others = [c for c in range(CLASSES) if c != owned]
    out = []
    for client in range(clients):
        labels = np.full(each, owned) if client == clients - 1 else rng.choice(others, each)
        x = centres[labels] + 0.5 * rng.normal(size=(each, INPUTS))
        out.append((torch.from_numpy(x), torch.from_numpy(labels)))
    return out


def history(start: Tensor, data: list[tuple[Tensor, Tensor]], rounds: int, steps: int, lr: float) -> list[Tensor]:
    """The server's states of ``rounds`` rounds of FedAvg among all clients but the last, which is slow."""
    states = [start]
    for _ in range(rounds):
        changes = [trained(states[-1], x, labels, steps, lr) for x, labels in data[:-1]]
        states.append(states[-1] + torch.stack(changes).mean(0))
    return states
