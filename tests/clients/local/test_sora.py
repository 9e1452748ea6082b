"""The proximal step on SoRA's gates: what it minimises, what it leaves alone, and that it makes gates zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.adapters.lora import LoRA
from clients.adapters.sora import SoRA
from clients.cohort import CohortBatch
from clients.local.optimizers import SGD
from clients.local.sora import SoRATraining, soft_threshold
from clients.local.training import LocalTraining, Work
from fl.errors import ConfigError
from tests.oracles.cohorts import states
from tests.oracles.models import batches
from tests.oracles.variants import spaced, trained_alone, work


def test_the_step_minimises_the_proximal_objective():
    """Against a search on a grid; gates between xi and 2 xi are shortened, not dropped."""
    eta, weight = 0.3, 0.5
    gates = torch.tensor([-1.0, -0.29, -0.16, -0.14, 0.0, 0.1, 0.151, 0.25, 2.0], dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    cost = (grid - gates[:, None]) ** 2 / (2 * eta) + weight * grid.abs()
    torch.testing.assert_close(soft_threshold(gates, eta * weight), grid[cost.argmin(1)], rtol=0, atol=1.1e-4)
    assert soft_threshold(gates, eta * weight).ne(0).sum() == 6


def test_only_gates_move_each_slots_by_its_own_rate():
    cohort = spaced("bert", SoRA(rank=4))
    before = states(cohort, 2)
    after, lr = before.clone(), torch.tensor([[0.1], [0.4]], dtype=torch.float64)
    with trained_alone(cohort, (0, 1)):
        SoRATraining(steps=1, l1=2.0).after_step(after, lr, cohort)
    old, new = cohort.layout.views(before), cohort.layout.views(after)
    gates = [n for n, g in zip(cohort.layout.names, cohort.space.groups, strict=True) if g == "gate"]
    assert len(gates) == 4
    for name in cohort.layout.names:
        if name in gates:
            torch.testing.assert_close(new[name], old[name].sign() * (old[name].abs() - 2 * lr).clamp(min=0))
            assert not torch.equal(new[name], old[name])
        else:
            assert torch.equal(new[name], old[name])


def trained(l1: float | None, steps: int = 30) -> np.ndarray:
    """The gates after local training of two clients."""
    cohort = spaced("llama", SoRA(rank=4))
    both, start = batches("causal_lm", [2, 3]), cohort.initial.numpy()
    settings = {"steps": steps, "optimizer": SGD()}
    local = LocalTraining(**settings) if l1 is None else SoRATraining(**settings, l1=l1)
    works = [Work(c, 1, start, work(c, 2, steps=steps).batches, 0.05) for c in range(2)]
    with trained_alone(cohort, (0, 1)):
        fits = local.fit(cohort, works, lambda on, _: CohortBatch.of([both[s] for s in on]))
    columns = cohort.space.columns(("gate",))
    return np.stack([f.state[columns] for f in fits])


def test_the_penalty_makes_gates_exactly_zero_the_more_the_larger_it_is():
    none, some, all_gone = (int((trained(l1) == 0).sum()) for l1 in (0.0, 0.4, 5.0))
    assert none == 0 < some < 32 == all_gone
    assert np.array_equal(trained(0.0), trained(None))


def test_what_has_gone_at_all_clients_has_gone_in_their_mean():
    gates = trained(0.4)
    assert np.array_equal((gates == 0).all(0), gates.mean(0) == 0)


def test_it_needs_gates():
    SoRATraining(steps=1).check(SoRA())
    with pytest.raises(ConfigError, match=r"local='sora'.*adapter=sora"):
        SoRATraining(steps=1).check(LoRA())
