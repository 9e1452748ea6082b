"""Clients of different ranks and scales in one cohort against a dense model for each, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.adapters.bra import BRA
from clients.adapters.ffa import FFA
from clients.adapters.lora import Factors, LoRA
from clients.adapters.rolora import RoLoRA
from clients.cohort import Cohort, CohortBatch
from clients.local.optimizers import AdamW
from fl.errors import ConfigError
from tests.oracles import low_rank_cohort as dense
from tests.oracles.cohorts import apart
from tests.oracles.models import FAMILIES, batches, tiny

LR = 1e-2
MIXED = LoRA(rank=[3, 1, 4, 2], alpha=[6.0, 5.0, 1.0, 8.0])


def laid(cohort: Cohort, server: np.ndarray, client: int, groups: tuple[str, ...]) -> Tensor:
    """The whole state ``(d,)`` that a client trains from: zeros beyond its rank, what trains in its own scale."""
    space = cohort.space
    whole = np.zeros_like(server)
    mine, trained = space.columns(None, client), space.columns(groups, client)
    whole[mine] = server[mine]
    whole[trained] = space.take(server, groups, client)
    return torch.from_numpy(whole)


def trained_together(
    cohort: Cohort, server: np.ndarray, clients: list[int], groups: tuple[str, ...], steps: list[list]
) -> Tensor:
    """The trained columns ``(S, n)`` of all ``clients`` after ``steps`` of AdamW, in one cohort."""
    columns = torch.from_numpy(cohort.space.columns(groups).copy())
    starts = torch.stack([laid(cohort, server, c, groups) for c in clients])
    optimizer = AdamW(weight_decay=0.01)
    with cohort.training(groups, starts[0], clients):
        params = starts[:, columns].clone()
        state = optimizer.init(params)
        lr = torch.full((len(clients), 1), LR, dtype=torch.float64)
        for number, data in enumerate(steps, 1):
            _, grads = cohort.gradients(params, CohortBatch.of(data))
            optimizer.step(params, grads, state, number, lr)
    return params


def same_as_alone(adapter: Factors, family: str, clients: list[int], groups: tuple[str, ...], steps: int = 4) -> None:
    cohort = dense.build(family, adapter)
    space, server = cohort.space, dense.vector(cohort)
    data = [batches(cohort.task, [3, 1, 2, 4][: len(clients)], seed=step) for step in range(steps)]
    found = trained_together(cohort, server, clients, groups, data)
    base = tiny(family, dtype=torch.float64)[0].module
    for slot, client in enumerate(clients):
        start, scale = dense.own(adapter, space, server, client), adapter.scalings[client % len(adapter.ranks)]
        alone = dense.train(base, space, start, groups, [d[slot] for d in data], LR, scale=scale)
        flat = torch.cat([alone[n].reshape(-1) for n in space.sublayout(groups).names])
        mine = np.searchsorted(space.columns(groups), space.columns(groups, client))
        # Adam divides by |g|: where a gradient is tiny, so is the divisor of its rounding.
        assert apart(found[slot, mine], flat) <= 1e-8
        began = torch.cat([start[n].reshape(-1) for n in alone])
        assert (flat - began).abs().max() > 0.5 * steps * LR
        beyond = np.setdiff1d(np.arange(found.shape[1]), mine)
        assert not found[slot, beyond].any()  # zeros stay zeros: neither factor has a gradient there


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_of_different_rank_and_alpha_train_as_models_of_that_rank(family):
    groups = ("A", "B", "head") if family == "bert" else ("A", "B")
    same_as_alone(MIXED, family, [0, 1, 2, 3], groups)


def test_rslora_and_alpha_alone_too():
    same_as_alone(dataclasses.replace(MIXED, rslora=True), "llama", [3, 0, 1], ("A", "B"))
    same_as_alone(LoRA(rank=[3, 3], alpha=[2.0, 9.0]), "llama", [0, 1, 1], ("A", "B"))


@pytest.mark.parametrize("client", [0, 1, 2])
def test_one_factor_trains_beside_a_shared_one_in_the_servers_scale(client):
    """Cohorts of one factor hold clients of one kind; a kind of another scale has a gain only where B or R trains."""
    others = [client, client + 3, client + 6]
    same_as_alone(FFA(rank=[2, 4, 3], alpha=[5.0, 3.0, 1.0]), "bert", others, ("B", "head"))
    same_as_alone(RoLoRA(rank=[2, 4, 3], alpha=[5.0, 3.0, 1.0]), "bert", others, ("A", "head"))
    same_as_alone(BRA(rank=[2, 4, 3], alpha=[5.0, 3.0, 1.0]), "gpt2", others, ("R",))


def test_a_sample_gradient_of_slots_with_gains_is_that_of_the_sample_alone():
    cohort = dense.build("bert", MIXED)
    space, server, clients = cohort.space, dense.vector(cohort), [1, 2, 0]
    data = batches(cohort.task, [3, 2, 1])
    groups = space.names
    base = tiny("bert", dtype=torch.float64)[0].module
    starts = torch.stack([laid(cohort, server, c, groups) for c in clients])
    with cohort.training(groups, starts[0], clients):
        assert set(cohort.gains) == {m.b for m in space.modules}
        _, together = cohort.gradients(starts, CohortBatch.of(data))
        _, grads = cohort.sample_gradients(starts, CohortBatch.of(data))
        _, fewer = cohort.sample_gradients(starts[:2], CohortBatch.of(data[:2]))  # a slot has ended
        assert set(cohort.gains) == {m.b for m in space.modules}
        _, again = cohort.gradients(starts, CohortBatch.of(data))
    assert torch.equal(together, again)
    assert apart(fewer, grads[:2]) <= 1e-12
    for slot, client in enumerate(clients):
        tensors, scale = dense.own(MIXED, space, server, client), MIXED.scalings[client]
        for row in range(len(data[slot])):
            alone = dense.gradients(base, space, tensors, groups, data[slot], scale=scale, rows=[row])
            flat = torch.cat([alone[n].reshape(-1) for n in space.layout.names])
            assert apart(grads[slot, row, space.columns(None, client).copy()], flat) <= 1e-9


def test_nothing_of_a_training_is_left_behind():
    cohort = dense.build("bert", MIXED)
    server = dense.vector(cohort)
    state, batch = torch.from_numpy(server)[None], CohortBatch.of(batches(cohort.task, [2]))
    before = cohort.losses(state, batch)
    with cohort.training(("B",), state[0], [1]):
        assert cohort.layout.size == len(cohort.space.columns(("B",))) and cohort.slots.shared and cohort.gains
        cohort.gradients(state[:, cohort.space.columns(("B",)).copy()], batch)
    assert cohort.layout == cohort.space.layout and not cohort.slots.shared and not cohort.gains
    with pytest.raises(ValueError, match="scalars"), cohort.training(("B",), state[0], [1]):
        cohort.gradients(state, batch)
    assert cohort.layout == cohort.space.layout and not cohort.slots.shared and not cohort.gains
    assert torch.equal(cohort.losses(state, batch), before)


def test_the_full_client_needs_no_gain():
    cohort = dense.build("bert", MIXED)
    start = torch.from_numpy(dense.vector(cohort))
    with cohort.training(cohort.space.names, start, [2, 6, None]):  # rank 4, the server's
        assert not cohort.gains
    with cohort.training(("A", "head"), start, [0, 1]):
        assert not cohort.gains


def test_a_layer_that_knows_no_gain_is_refused_not_trained_in_another_scale():
    cohort = dense.build("llama", LoRA(rank=[2, 3], alpha=5.0, target_modules=["embed_tokens", "q_proj"]))
    start = torch.from_numpy(dense.vector(cohort))
    with pytest.raises(ConfigError, match=r"adapter\.target_modules='.*embed_tokens'"):
        cohort.training(("B",), start, [0]).__enter__()
    assert cohort.layout == cohort.space.layout
    with cohort.training(("A",), start, [0]):  # A takes up no scale
        assert not cohort.gains
