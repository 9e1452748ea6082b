"""FedProx: the gradient of its objective, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.local.optimizers import SGD
from clients.local.proximal import FedProx
from clients.local.training import LocalTraining, Work
from clients.worker import Worker
from tests.oracles.models import token_set
from tests.oracles.quadratic import Quadratic

DATA = token_set("classification", 40)


def works() -> list[Work]:
    rng = np.random.default_rng(0)
    return [
        Work(c, 1, rng.normal(size=5).astype(np.float32), [rng.choice(40, 4) for _ in range(6 - c)], 0.2)
        for c in range(3)
    ]


def fit(local: LocalTraining, jobs: list[Work] | None = None) -> list[np.ndarray]:
    return [f.state for f in Worker(Quadratic(), {"train": DATA}, local, seed=0).fit(jobs or works())]


@pytest.mark.parametrize("mu", [0.01, 1.0, 30.0])
def test_the_direction_is_the_gradient_of_the_proximal_objective(mu):
    source = torch.Generator().manual_seed(0)
    theta, start, weight = (torch.randn(3, 7, generator=source, dtype=torch.float64) for _ in range(3))
    theta.requires_grad_()
    loss = (torch.sin(theta) * weight).sum()
    (plain,) = torch.autograd.grad(loss, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(loss + mu / 2 * ((theta - start) ** 2).sum(), theta)
    found = FedProx(steps=1, mu=mu).direction(theta.detach(), plain.clone(), start, None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_mu_zero_is_plain_training():
    for mine, plain in zip(fit(FedProx(steps=1, mu=0.0)), fit(LocalTraining(steps=1)), strict=True):
        assert np.array_equal(mine, plain)


def test_the_pull_is_towards_each_slots_own_start_and_grows_with_mu():
    reached = [fit(FedProx(steps=1, mu=mu, optimizer=SGD())) for mu in (0.0, 0.5, 3.0)]
    for slot, job in enumerate(works()):
        far, nearer, nearest = (np.linalg.norm(states[slot] - job.start) for states in reached)
        assert far > nearer > nearest > 0


def test_the_pull_counts_towards_the_clipped_gradient():
    """As in torch, where the proximal term is part of the loss."""
    job = Work(0, 1, np.zeros(5, dtype=np.float32), [np.arange(4)] * 3, 1.0)
    (state,) = fit(FedProx(steps=1, mu=5.0, optimizer=SGD(), clip_norm=0.1), [job])
    assert 0 < np.linalg.norm(state) <= 0.3 + 1e-4
