"""RoLoRA: B and A in turn, each exactly as the other stays."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.rolora import RoLoRA
from clients.cohort import CohortBatch
from tests.oracles import low_rank_cohort as dense
from tests.oracles.cohorts import apart
from tests.oracles.models import FAMILIES, batches, tiny

ADAPTER = RoLoRA(rank=3, alpha=5.0)


def test_odd_rounds_train_b_and_even_ones_a():
    space = dense.build("bert", ADAPTER).space
    assert [space.trains(r) for r in range(1, 5)] == [("B", "head"), ("A", "head")] * 2
    assert ADAPTER.form == "alternating" and space.constant


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("round", [1, 2])
def test_the_factor_of_the_round_has_the_gradient_of_a_dense_model(family, round):
    cohort = dense.build(family, ADAPTER)
    groups = cohort.space.trains(round)
    start = torch.from_numpy(dense.vector(cohort))
    columns = torch.from_numpy(cohort.space.columns(groups).copy())
    mine = start[columns] + torch.tensor([[0.0], [0.1]], dtype=torch.float64)
    data = batches(cohort.task, [3, 2])
    with cohort.training(groups, start, [0, 1]):
        losses, grads = cohort.gradients(mine, CohortBatch.of(data))
    base = tiny(family, dtype=torch.float64)[0].module
    for slot in range(2):
        whole = start.clone()
        whole[columns] = mine[slot]
        tensors = cohort.space.layout.views(whole)
        alone = dense.gradients(base, cohort.space, tensors, groups, data[slot])
        assert apart(grads[slot], torch.cat([alone[n].reshape(-1) for n in alone])) <= 1e-9
        assert losses[slot].item() == pytest.approx(dense.loss(base, cohort.space, tensors, data[slot]).item())


def test_at_the_start_a_has_no_gradient_and_b_has():
    cohort = dense.build("llama", ADAPTER)
    start, data = cohort.initial.double(), CohortBatch.of(batches(cohort.task, [3]))
    found = {}
    for group in ("A", "B"):
        columns = torch.from_numpy(cohort.space.columns((group,)).copy())
        with cohort.training((group,), start):
            found[group] = cohort.gradients(start[None, columns], data)[1].norm().item()
    assert found["A"] == 0 and found["B"] > 1e-3
