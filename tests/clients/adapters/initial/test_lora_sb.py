"""LoRA-SB: begins at the best rank-r approximation of the first full step, and stays in its subspace."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.lora_sb import LoRASB
from fl.keys import torch_generator

SHAPE, RANK, ETA0 = (9, 14), 4, 0.03


def draw(key: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator("sb", key), dtype=torch.float64)


WEIGHT, GRADIENT = draw(0), draw(1)


def start(scale: float, gradient: torch.Tensor = GRADIENT, rank: int = RANK):
    return LoRASB(eta0=ETA0).start(Site(WEIGHT, gradient, rank, scale, torch_generator()))


@pytest.mark.parametrize("scale", [0.25, 1.0, 16.0])
def test_the_start_is_the_best_approximation_of_the_first_step(scale):
    made = start(scale)
    step = -ETA0 * GRADIENT.sign()
    values = torch.linalg.svdvals(step)
    change = scale * made.b @ made.core @ made.a
    assert torch.linalg.matrix_rank(change) == RANK
    torch.testing.assert_close(torch.linalg.svdvals(step - change)[: 9 - RANK], values[RANK:], rtol=0, atol=1e-13)
    assert made.base is None


def test_the_whole_rank_gives_the_first_step_itself():
    made = start(2.0, rank=9)
    torch.testing.assert_close(2.0 * made.b @ made.core @ made.a, -ETA0 * GRADIENT.sign(), rtol=0, atol=1e-13)


def test_the_frozen_factors_are_orthonormal_and_the_core_is_diagonal():
    made = start(2.0)
    eye = torch.eye(RANK, dtype=torch.float64)
    torch.testing.assert_close(made.b.T @ made.b, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(made.a @ made.a.T, eye, rtol=0, atol=1e-13)
    assert torch.equal(made.core, torch.diag(made.core.diagonal())) and (made.core.diagonal() > 0).all()


def test_signs_do_not_depend_on_the_machine():
    made = start(1.0)
    assert (made.b.gather(0, made.b.abs().argmax(0, keepdim=True)) > 0).all()


def test_one_sgd_step_on_the_core_moves_the_weight_by_the_projected_gradient():
    scale, eta = 1.7, 0.1
    made = start(scale)
    inputs, target = draw(2, (20, 14)), draw(3, (20, 9))

    def weight(core: torch.Tensor) -> torch.Tensor:
        return WEIGHT + scale * made.b @ core @ made.a

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (inputs @ w.T - target).square().mean()

    core = made.core.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(weight(core)), core)
    full = weight(made.core).requires_grad_()
    (g,) = torch.autograd.grad(loss(full), full)
    moved = weight(made.core - eta * found) - weight(made.core)
    expected = -eta * scale**2 * made.b @ made.b.T @ g @ made.a.T @ made.a
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-15)
    assert moved.norm() > 1e-3


def test_a_module_without_a_gradient_begins_at_its_weight():
    made = start(2.0, torch.zeros(SHAPE, dtype=torch.float64))
    assert not made.core.any()
    torch.testing.assert_close(made.b.T @ made.b, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-13)
