"""LoRA-XS: the frozen factors are W0's truncated SVD, R is small noise."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.lora_xs import LoRAXS
from fl.keys import torch_generator

WEIGHT = torch.randn(9, 14, generator=torch_generator("xs"), dtype=torch.float64)


def start(std: float = 1e-5, rank: int = 4, scale: float = 1.7, weight: torch.Tensor = WEIGHT):
    return LoRAXS(std=std).start(Site(weight, None, rank, scale, torch_generator("xs", 1)))


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_b_a_is_the_best_approximation_of_the_weight_whatever_the_scale(scale):
    made = start(scale=scale)
    error = torch.linalg.svdvals(WEIGHT - made.b @ made.a)
    torch.testing.assert_close(error[:5], torch.linalg.svdvals(WEIGHT)[4:], rtol=0, atol=1e-13)
    torch.testing.assert_close(made.b.T @ made.b, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(made.a.norm(dim=1), torch.linalg.svdvals(WEIGHT)[:4], rtol=0, atol=1e-13)
    assert made.base is None


@pytest.mark.parametrize("std", [1e-5, 0.5])
def test_r_is_gaussian_noise_of_the_stated_deviation(std):
    wide = torch.randn(80, 90, generator=torch_generator("wide"), dtype=torch.float64)
    core = start(std, rank=80, weight=wide).core
    assert core.std().item() == pytest.approx(std, rel=0.05)
    assert abs(core.mean().item()) < 0.05 * std
    assert not start(std=0.0).core.any()
