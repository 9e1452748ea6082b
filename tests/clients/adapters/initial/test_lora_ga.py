"""LoRA-GA against PEFT's, and the authors' own rule."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.lora_ga import LoRAGA
from fl.keys import torch_generator
from tests.oracles import initial as peft


def draw(key: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator("ga", key), dtype=torch.float64)


WEIGHT, GRADIENT = draw(0, peft.OUT, peft.IN), draw(1, peft.OUT, peft.IN)
SCALES = ["stable", "weight_svd", "gd_scale", "unit"]
DIRECTIONS = {"ArBr": ([1, 3, 5], [0, 2, 4]), "A2rBr": ([3, 4, 5], [0, 1, 2]), "ArB2r": ([0, 1, 2], [3, 4, 5])}


def start(direction: str, scale: str, rule: str, s: float = 2.5, count: int = 20):
    init = LoRAGA(direction=direction, scale=scale, rule=rule, gamma=9)
    return init.start(Site(WEIGHT, 20 * GRADIENT, 3, s, torch_generator("ga", 2), count))


@pytest.mark.parametrize("direction", list(DIRECTIONS))
@pytest.mark.parametrize("scale", SCALES)
def test_it_is_peft_s(direction, scale):
    made, mine = peft.lora_ga(WEIGHT, GRADIENT, 3, 7.5, direction, scale), start(direction, scale, "peft")
    for theirs, ours in ((made.a, mine.a), (made.b.T, mine.b.T)):
        sign = (ours * theirs).sum(1).sign()
        torch.testing.assert_close(ours, sign[:, None] * theirs, rtol=1e-3, atol=1e-4)
    left, right = mine.base
    # PEFT chooses its signs by itself: what the base loses agrees up to the sign of each component.
    for i in range(3):
        one, two = torch.outer(left[:, i], right[i]), -2.5 * torch.outer(made.b[:, i], made.a[i])
        torch.testing.assert_close(one.abs(), two.abs(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.base, -2.5 * made.b @ made.a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_the_authors_treat_both_factors_alike_whatever_the_gradient_s_length(direction, scale):
    mine = start(direction, scale, "authors")
    u, _, vh = torch.linalg.svd(GRADIENT, full_matrices=False)
    values = torch.linalg.svdvals(WEIGHT)
    factor = {
        "stable": peft.OUT**0.25 / 3,
        "weight_svd": float((values[:3] / 2.5).sqrt().mean()),
        "gd_scale": 1 / 2.5,
        "unit": 1.0,
    }[scale]
    for_a, for_b = DIRECTIONS[direction]
    torch.testing.assert_close(mine.a.abs(), factor * vh[for_a].abs(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.b.abs(), factor * u[:, for_b].abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["peft", "authors"])
def test_random_vectors_are_from_the_first_2r(rule):
    mine = start("random", "unit", rule)
    u, _, vh = torch.linalg.svd(GRADIENT, full_matrices=False)
    a = (mine.a @ vh.T).abs().argmax(1).tolist()
    b = (mine.b.T @ u).abs().argmax(1).tolist()
    assert len(set(a)) == len(set(b)) == 3 and max(a + b) < 6
    assert a == b if rule == "peft" else not set(a) & set(b)


def test_along_its_vectors_the_first_step_follows_the_gradient():
    """An SGD step from B0, A0 moves W by about -eta s^2 (G A0^T A0 + B0 B0^T G): the part of G in 2r directions."""
    mine = start("ArB2r", "unit", "authors", s=1.0)
    moved = GRADIENT @ mine.a.T @ mine.a + mine.b @ mine.b.T @ GRADIENT
    u, s, vh = torch.linalg.svd(GRADIENT, full_matrices=False)
    torch.testing.assert_close(moved, (u[:, :6] * s[:6]) @ vh[:6], rtol=0, atol=1e-12)
