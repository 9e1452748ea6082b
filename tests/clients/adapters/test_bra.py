"""B R A: the gradient of R by the formula and by autograd on plain layers; the gate; what trains and what is merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clients.adapters.bra import BRA
from clients.adapters.core import Core, insert
from clients.adapters.initial.kaiming import Kaiming
from clients.adapters.initial.lora_sb import LoRASB
from clients.adapters.lora import Factors
from clients.cohort import CohortBatch
from clients.stacked import StackedLinear, StackedLoRA
from fl.errors import ConfigError
from tests.oracles import low_rank_cohort as dense
from tests.oracles.cohorts import apart
from tests.oracles.models import FAMILIES, batches, tiny

ADAPTER = BRA(rank=3, alpha=5.0)


@dataclass(frozen=True)
class Gated(Factors):
    """A, B and a gate between them, all of which train."""

    phases = (("A", "R", "B"),)
    shape = "gated"

    def attach(self, base, targets, seed):
        return insert(super().attach(base, targets, seed), matrix=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [ADAPTER, Gated(rank=3, alpha=5.0)], ids=lambda a: type(a).__name__)
def test_all_gradients_are_those_of_a_dense_model(family, adapter):
    """Of the core alone, beside shared factors, and of all three tensors together."""
    cohort = dense.build(family, adapter)
    assert all(isinstance(layer, StackedLoRA | StackedLinear) for _, _, layer in cohort.swaps)
    space = cohort.space
    start = torch.from_numpy(dense.vector(cohort))
    data = batches(cohort.task, [3, 1, 2])
    base = tiny(family, dtype=torch.float64)[0].module
    for groups in (("R",), space.names, ("A", "R"), ("B",)):
        columns = torch.from_numpy(space.columns(groups).copy())
        shift = torch.tensor([[0.0], [0.1], [-0.05]], dtype=torch.float64)
        with cohort.training(groups, start, [0, 1, 2]):
            losses, grads = cohort.gradients(start[columns] + shift, CohortBatch.of(data))
        for slot in range(3):
            whole = start.clone()
            whole[columns] += shift[slot]
            tensors = space.layout.views(whole)
            alone = dense.gradients(base, space, tensors, groups, data[slot])
            assert apart(grads[slot], torch.cat([alone[n].reshape(-1) for n in alone])) <= 1e-9
            assert losses[slot].item() == pytest.approx(dense.loss(base, space, tensors, data[slot]).item(), rel=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_r_is_s_bt_g_at(family):
    """g is the gradient with respect to the weight itself, by autograd on the plain layer."""
    cohort = dense.build(family, ADAPTER)
    space, start = cohort.space, torch.from_numpy(dense.vector(cohort))
    (data,) = batches(cohort.task, [3])
    columns = torch.from_numpy(space.columns(("R",)).copy())
    with cohort.training(("R",), start):
        _, grads = cohort.gradients(start[None, columns], CohortBatch.of([data]))
    cores = space.sublayout(("R",)).views(grads[0])
    tensors = space.layout.views(start)
    zero = {m.name: torch.zeros(space.sizes(m), dtype=torch.float64, requires_grad=True) for m in space.modules}
    base = tiny(family, dtype=torch.float64)[0].module
    dense.loss(base, space, tensors, data, more=zero).backward()
    for module in space.modules:
        g, b, a = zero[module.name].grad, tensors[module.b], tensors[module.a]
        assert g.shape == (b.shape[0], a.shape[1])
        torch.testing.assert_close(cores[module.core], module.scale * b.T @ g @ a.T, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [ADAPTER, Gated(rank=3, alpha=5.0)], ids=lambda a: type(a).__name__)
def test_the_stated_change_is_that_of_the_merged_weights(family, adapter):
    cohort = dense.build(family, adapter)
    state = dense.vector(cohort)
    frozen = tiny(family, dtype=torch.float64)[0].module
    stated = {low.name.removeprefix(dense.PREFIX): low for low in cohort.space.delta(state)}
    merged = cohort.unstacked(torch.from_numpy(state)).merge_and_unload()
    assert stated
    for name, low in stated.items():
        layer = merged.get_submodule(name)
        assert isinstance(layer, nn.Linear | Conv1D)
        change = (layer.weight - frozen.get_submodule(name).weight).detach()
        change = change.T if isinstance(layer, Conv1D) else change
        np.testing.assert_allclose(low.left @ low.right, change.numpy(), rtol=1e-9, atol=1e-12)
        assert change.norm() > 1e-4


def test_a_core_maps_as_its_weight_does():
    down = nn.Linear(5, 3, bias=False).double()
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    core = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    for middle, matrix in ((core, core), (core[0], torch.diag(core[0]))):
        layer = Core(down, middle)
        expected = x @ down.weight.T @ matrix.T
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(x @ layer.weight.T, expected)


def test_a_fresh_core_changes_nothing_of_the_layer_around_it():
    """The identity, or a gate of ones, in the factors' own precision."""
    for adapter, start in ((ADAPTER, torch.eye(3)), (Gated(rank=3), torch.ones(3))):
        cohort = dense.build("bert", adapter)
        views = cohort.layout.views(cohort.initial)
        assert all(torch.equal(views[m.core], start) for m in cohort.space.modules)
        bfloat = dense.build("bert", adapter, torch.bfloat16)
        assert all(m.core.dtype == torch.float32 for m in bfloat.model.modules() if isinstance(m, Core))


def test_r_squared_numbers_a_module_and_the_head_train():
    space = dense.build("bert", ADAPTER).space
    assert len(space.modules) == 4 and space.trainable == 4 * 9 + (24 * 3 + 3)
    assert space.trains(1) == ("R", "head") and space.constant and ADAPTER.form == "core"


def test_only_starts_of_b_r_a_are_taken():
    with pytest.raises(ConfigError, match=r"adapter\.init='Kaiming'.*without an R"):
        BRA(init=Kaiming())
    with pytest.raises(ConfigError, match=r"adapter\.init='LoRASB'.*for adapters B R A"):
        Gated(init=LoRASB())
