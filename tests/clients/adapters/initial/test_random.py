"""The initialisations that look at nothing: Kaiming-uniform, Gaussian, orthonormal."""

from __future__ import annotations

import math

import pytest
import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.gaussian import Gaussian
from clients.adapters.initial.kaiming import Kaiming
from clients.adapters.initial.orthonormal import Orthonormal
from clients.adapters.initial.orthonormal_core import OrthonormalCore
from fl.keys import key_int, seeded_globals, torch_generator
from tests.oracles import initial as peft

WEIGHT = torch.randn(peft.OUT, peft.IN, generator=torch_generator("random"), dtype=torch.float64)
KEY = ("random", 1)


@pytest.mark.parametrize(("mine", "theirs"), [(Kaiming(), True), (Gaussian(), "gaussian")], ids=["kaiming", "gaussian"])
def test_the_numbers_are_peft_s_own_from_the_same_generator(mine, theirs):
    start = mine.start(Site(WEIGHT, None, 3, 2.0, torch_generator(*KEY)))
    layer = torch.nn.Linear(peft.IN, 3, bias=False)
    with seeded_globals(*KEY):
        if theirs is True:
            torch.nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        else:
            torch.nn.init.normal_(layer.weight, std=1 / 3)
    assert torch.equal(start.a.float(), layer.weight.detach())
    assert key_int(*KEY) == torch_generator(*KEY).initial_seed()


@pytest.mark.parametrize(("mine", "theirs"), [(Kaiming(), True), (Gaussian(), "gaussian")], ids=["kaiming", "gaussian"])
def test_the_spread_is_that_of_peft_s_layer(mine, theirs):
    rank = 64
    a = mine.start(Site(WEIGHT, None, rank, 2.0, torch_generator(*KEY))).a
    with seeded_globals(*KEY):  # PEFT draws from the global generator
        made = peft.plain(WEIGHT, rank, 16, theirs)
    assert a.std().item() == pytest.approx(made.a.std().item(), rel=0.1)
    assert a.abs().max().item() == pytest.approx(made.a.abs().max().item(), rel=0.3)
    assert not made.b.any() and not made.base.any()


def test_orthonormal_rows():
    start = Orthonormal().start(Site(WEIGHT, None, 5, 2.0, torch_generator(*KEY)))
    torch.testing.assert_close(start.a @ start.a.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-13)
    assert not start.b.any()


def test_an_orthonormal_core_has_two_random_subspaces_and_begins_at_zero():
    start = OrthonormalCore().start(Site(WEIGHT, None, 5, 2.0, torch_generator(*KEY)))
    for gram in (start.a @ start.a.T, start.b.T @ start.b):
        torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-13)
    assert start.core is not None and not start.core.any()
    # Two draws: the entries of the one are not those of the other.
    assert not torch.isin(start.a.flatten(), start.b.flatten()).any()
    square = OrthonormalCore().start(Site(torch.eye(8, dtype=torch.float64), None, 3, 2.0, torch_generator(*KEY)))
    assert (square.a - square.b.T).norm() > 0.5
