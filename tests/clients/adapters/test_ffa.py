"""FFA: only B trains, exactly as the B part of LoRA does; so with any group of any adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.adapters.ffa import FFA
from clients.adapters.initial.orthonormal import Orthonormal
from clients.adapters.initial.orthonormal_core import OrthonormalCore
from clients.adapters.space import Space
from clients.cohort import Cohort, CohortBatch
from clients.stacked import StackedLayer
from fl.errors import ConfigError
from tests.oracles import low_rank_cohort as dense
from tests.oracles.cohorts import apart, states
from tests.oracles.cohorts import build as build_any
from tests.oracles.models import FAMILIES, batches, tiny

RANK3 = FFA(rank=3, alpha=5.0)


def with_trained(cohort: Cohort, groups: tuple[str, ...], slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole states ``(S, d)`` that differ in the columns of ``groups`` alone, and those columns."""
    columns = torch.from_numpy(cohort.space.columns(groups).copy())
    start = states(cohort, 1, seed=5)[0]
    whole = start.repeat(slots, 1)
    whole[:, columns] = states(cohort, slots)[:, columns]
    return whole, columns


@pytest.mark.parametrize("family", FAMILIES)
def test_b_has_the_gradient_that_it_has_in_lora_and_that_of_a_dense_model(family):
    cohort = dense.build(family, RANK3)
    groups = cohort.space.trains(1)
    assert groups == cohort.space.trains(2) == (("B", "head") if family == "bert" else ("B",))
    whole, columns = with_trained(cohort, groups, 3)
    data = batches(cohort.task, [4, 1, 3])
    losses, full = cohort.gradients(whole, CohortBatch.of(data))
    with cohort.training(groups, whole[0], [0, 1, 2]):
        found, grads = cohort.gradients(whole[:, columns], CohortBatch.of(data))
        _, samples = cohort.sample_gradients(whole[:, columns], CohortBatch.of(data))
    assert grads.shape == (3, len(columns)) and len(columns) < cohort.layout.size
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
    assert apart(grads, full[:, columns]) <= 1e-12
    assert apart(samples[0].mean(0), grads[0]) <= 1e-10
    base = tiny(family, dtype=torch.float64)[0].module
    for slot in range(3):
        tensors = cohort.space.layout.views(whole[slot])
        alone = dense.gradients(base, cohort.space, tensors, groups, data[slot])
        assert apart(grads[slot], torch.cat([alone[n].reshape(-1) for n in alone])) <= 1e-9


@pytest.mark.parametrize("adapter", ["dora", "vera", "miss", "lokr", "loha", "randlora", "oft"])
@pytest.mark.parametrize("half", [0, 1])
def test_layers_under_vmap_or_in_a_loop_share_what_does_not_train(adapter, half):
    plain = build_any("bert", adapter)
    groups = tuple(
        "head" if "classifier" in n else ("even" if i % 2 == 0 else "odd") for i, n in enumerate(plain.layout.names)
    )
    plain.space = Space(plain.layout, groups)
    group = ("even", "odd")[half] if "odd" in groups else "even"
    whole, columns = with_trained(plain, (group, "head"), 3)
    data = CohortBatch.of(batches(plain.task, [4, 1, 3]))
    _, full = plain.gradients(whole, data)
    with plain.training((group, "head"), whole[0]):
        _, grads = plain.gradients(whole[:, columns], data)
    assert any(isinstance(layer, StackedLayer) for _, _, layer in plain.swaps)
    # RandLoRA and OFT compute parts in float32.
    assert apart(grads, full[:, columns]) <= 1e-9 and grads.abs().max() > 1e-4


@pytest.mark.parametrize("train", [("A", "B"), ("head",)])
def test_a_head_alone_or_factors_beside_a_shared_head(train):
    cohort = dense.build("bert", RANK3)
    whole, columns = with_trained(cohort, train, 2)
    data = CohortBatch.of(batches(cohort.task, [2, 3]))
    _, full = cohort.gradients(whole, data)
    with cohort.training(train, whole[0]):
        _, grads = cohort.gradients(whole[:, columns], data)
    assert apart(grads, full[:, columns]) <= 1e-12


def test_dropout_masks_are_those_of_lora():
    cohort = dense.build("bert", FFA(rank=3, dropout=0.4))
    whole, columns = with_trained(cohort, ("B", "head"), 2)
    data = CohortBatch.of(batches(cohort.task, [2, 3]), [(1, 0, 1, 0), (1, 1, 1, 0)])
    _, full = cohort.gradients(whole, data)
    with cohort.training(("B", "head"), whole[0]):
        _, grads = cohort.gradients(whole[:, columns], data)
        _, calm = cohort.gradients(whole[:, columns], CohortBatch.of(batches(cohort.task, [2, 3])))
    assert apart(grads, full[:, columns]) <= 1e-12 < 0.01 < apart(grads, calm)


def test_each_module_has_an_a_of_its_own_and_b_starts_at_zero():
    cohort = dense.build("bert", RANK3)
    space = cohort.space
    found = list(space.factors(cohort.initial.numpy()))
    assert all(a.any() and not b.any() for _, a, b, _ in found)
    alike = [a for m, a, _, _ in found if a.shape == found[0][1].shape]
    assert len(alike) > 1 and not any(np.array_equal(a, alike[0]) for a in alike[1:])


def test_an_initialisation_of_b_a_is_taken_and_one_of_b_r_a_refused():
    assert FFA(init=Orthonormal()).initialisation == Orthonormal() and FFA().initialisation is None
    with pytest.raises(ConfigError, match=r"adapter\.init='OrthonormalCore'"):
        FFA(init=OrthonormalCore())
