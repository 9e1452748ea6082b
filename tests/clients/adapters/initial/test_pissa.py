"""PiSSA against PEFT's, and against the definition."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.pissa import PiSSA
from fl.keys import torch_generator
from tests.oracles import initial as peft

WEIGHT = torch.randn(peft.OUT, peft.IN, generator=torch_generator("pissa"), dtype=torch.float64)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("alpha", [3.0, 7.5])
def test_it_is_peft_s(conv, alpha):
    made = peft.plain(WEIGHT, 3, alpha, "pissa", conv)
    start = PiSSA().start(Site(WEIGHT, None, 3, alpha / 3, torch_generator()))
    sign = (start.a * made.a).sum(1).sign()
    torch.testing.assert_close(start.a, sign[:, None] * made.a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.b, sign * made.b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.base[0] @ start.base[1], made.base, rtol=1e-4, atol=1e-5)


def test_what_is_left_of_the_base_is_the_tail_of_its_spectrum():
    start = PiSSA().start(Site(WEIGHT, None, 3, 2.5, torch_generator()))
    left = torch.linalg.svdvals(WEIGHT + start.base[0] @ start.base[1])
    torch.testing.assert_close(left[:4], torch.linalg.svdvals(WEIGHT)[3:], rtol=0, atol=1e-13)
    assert left[4:].max() < 1e-13
    # The factors share the singular values evenly.
    torch.testing.assert_close(start.a.norm(dim=1), start.b.norm(dim=0), rtol=1e-12, atol=0)
