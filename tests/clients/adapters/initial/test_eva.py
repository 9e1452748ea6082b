"""EVA against PEFT's incremental PCA, and against the singular vectors of all inputs."""

from __future__ import annotations

import torch

from clients.adapters.initial.base import Site
from clients.adapters.initial.eva import EVA
from fl.keys import torch_generator
from tests.oracles import initial as peft


def draw(key: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator("eva", key), dtype=torch.float64)


WEIGHT = draw(0, peft.OUT, peft.IN)
SPREAD = torch.linspace(0.3, 3, peft.IN, dtype=torch.float64)
INPUTS = draw(1, 60, peft.IN) * SPREAD + 1.5


def start(inputs: torch.Tensor, rank: int = 5):
    return EVA().start(Site(WEIGHT, inputs.T @ inputs, rank, 2.0, torch_generator()))


def test_it_is_peft_s_on_inputs_of_mean_zero():
    """PEFT takes the mean away; of inputs that have none the directions are the same."""
    centred = INPUTS - INPUTS.mean(0)
    made, mine = peft.eva(WEIGHT, centred, 5, 10.0), start(centred)
    sign = (mine.a * made.a).sum(1).sign()
    torch.testing.assert_close(mine.a, sign[:, None] * made.a, rtol=0, atol=1e-4)
    assert not mine.b.any() and not made.b.any() and not made.base.any()


def test_a_mean_is_a_direction_here_and_not_in_peft():
    made, mine = peft.eva(WEIGHT, INPUTS, 5, 10.0), start(INPUTS)
    mean = INPUTS.mean(0) / INPUTS.mean(0).norm()
    assert (mine.a @ mean).norm() > (made.a @ mean).norm() + 0.02


def test_a_holds_the_leading_singular_vectors_of_all_inputs():
    mine = start(INPUTS)
    vectors = torch.linalg.svd(INPUTS)[2][:5]
    torch.testing.assert_close((mine.a @ vectors.T).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (mine.a.gather(1, mine.a.abs().argmax(1, keepdim=True)) > 0).all()


def test_clients_together_begin_where_one_holder_of_all_the_data_would():
    parts = INPUTS.split([10, 35, 15])
    federated = EVA().start(Site(WEIGHT, sum(p.T @ p for p in parts), 5, 2.0, torch_generator()))
    torch.testing.assert_close(federated.a, start(INPUTS).a, rtol=0, atol=1e-10)


def test_noise_that_makes_eigenvalues_negative_does_not_put_them_first():
    moment = torch.diag(torch.tensor([-9.0, 1, 5, -2, 4, 0, 0, 0, 0, 3], dtype=torch.float64))
    a = EVA().start(Site(WEIGHT, moment, 3, 2.0, torch_generator())).a
    assert a.argmax(1).tolist() == [2, 4, 9] and a.sum() == 3
