"""CorDA against PEFT's, and what its two modes keep of the weight."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.corda import CorDA
from fl.errors import ShoalError
from fl.keys import torch_generator
from tests.oracles import initial as peft


def draw(key: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator("corda", key), dtype=torch.float64)


WEIGHT = draw(0, peft.OUT, peft.IN)
INPUTS = draw(1, 60, peft.IN) * torch.linspace(0.3, 3, peft.IN, dtype=torch.float64)


def start(mode: str, scale: float = 2.5, moment: torch.Tensor | None = None, **more):
    moment = INPUTS.T @ INPUTS if moment is None else moment
    return CorDA(mode=mode, **more).start(Site(WEIGHT, moment, 3, scale, torch_generator()))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("conv", [False, True])
def test_product_and_base_are_peft_s(mode, conv):
    made, mine = peft.corda(WEIGHT, INPUTS, 3, 7.5, mode, conv), start(mode)
    torch.testing.assert_close(mine.b @ mine.a, made.b @ made.a, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine.base[0] @ mine.base[1], made.base, rtol=1e-3, atol=1e-4)
    # One factor for all: PEFT measures inputs by their largest entry, Shoal by their mean square.
    ratio = mine.b.norm() / made.b.norm()
    torch.testing.assert_close(mine.b.abs(), ratio * made.b.abs(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine.a.abs(), made.a.abs() / ratio, rtol=1e-3, atol=1e-3)


def outputs(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """Mean square of the outputs for inputs of this second moment."""
    return float((weight @ moment @ weight.T).trace())


def test_ipm_adapts_what_the_sample_uses_and_kpm_what_it_does_not():
    moment = INPUTS.T @ INPUTS
    used = {mode: outputs(2.5 * start(mode).b @ start(mode).a, moment) for mode in ("ipm", "kpm")}
    assert used["ipm"] > 10 * used["kpm"]


def test_with_little_damping_the_kept_base_is_the_best_approximation_for_the_moment():
    """Of W0 C, as the paper states it."""
    moment = INPUTS.T @ INPUTS / 60
    made = start("ipm", moment=moment, damping=1e-12)
    left = (WEIGHT + made.base[0] @ made.base[1]) @ moment
    torch.testing.assert_close(
        torch.linalg.svdvals(left)[:4], torch.linalg.svdvals(WEIGHT @ moment)[3:], rtol=1e-8, atol=0
    )


def test_a_noisy_moment_is_projected_before_it_is_used():
    moment = INPUTS.T @ INPUTS
    values, vectors = torch.linalg.eigh(moment)
    values[:3] = torch.tensor([-500.0, -3, -1])
    noisy = (vectors * values) @ vectors.T
    projected = (vectors * values.clamp(min=0)) @ vectors.T
    one, two = start("ipm", moment=noisy), start("ipm", moment=projected)
    torch.testing.assert_close(one.b @ one.a, two.b @ two.a, rtol=0, atol=1e-10)
    for nothing in (torch.zeros_like(moment), -moment):
        with pytest.raises(ShoalError, match="zero or negative"):
            start("ipm", moment=nothing)
