"""OLoRA against PEFT's, and against the definition."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.olora import OLoRA
from fl.keys import torch_generator
from tests.oracles import initial as peft

WEIGHT = torch.randn(peft.OUT, peft.IN, generator=torch_generator("olora"), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [3.0, 7.5])
def test_it_is_peft_s(alpha):
    made = peft.plain(WEIGHT, 3, alpha, "olora")
    start = OLoRA().start(Site(WEIGHT, None, 3, alpha / 3, torch_generator()))
    sign = (start.a * made.a).sum(1).sign()
    torch.testing.assert_close(start.a, sign[:, None] * made.a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.b, sign * made.b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.base[0] @ start.base[1], made.base, rtol=1e-4, atol=1e-5)


def test_peft_s_factors_of_a_transposed_weight_do_not_fit_the_layer():
    """Which is why they are no oracle there."""
    made = peft.plain(WEIGHT, 3, 3.0, "olora", conv=True)
    assert made.a.shape == (3, peft.OUT) and made.b.shape == (peft.IN, 3)


def test_b_is_orthonormal_and_the_first_columns_leave_the_base():
    start = OLoRA().start(Site(WEIGHT, None, 3, 2.5, torch_generator()))
    torch.testing.assert_close(start.b.T @ start.b, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close((start.b @ start.a)[:, :3], WEIGHT[:, :3], rtol=0, atol=1e-13)
    assert (start.a.diagonal() > 0).all()
