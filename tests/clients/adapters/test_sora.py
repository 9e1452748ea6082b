"""SoRA's adapter: the gate between the factors, how it starts, what weight change it makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.adapters.initial.gaussian import Gaussian
from clients.adapters.initial.pissa import PiSSA
from clients.adapters.lora import LoRA
from clients.adapters.sora import SoRA
from clients.cohort import CohortBatch
from fl.errors import ConfigError
from tests.oracles.cohorts import apart, expect, states
from tests.oracles.models import FAMILIES, batches, tiny
from tests.oracles.variants import merged, out_in, spaced, trained_alone, weights

ADAPTER = SoRA(rank=3, alpha=5.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_weights_change_by_the_gated_product(family):
    """s B diag(g) A, with PEFT's own merge; GPT-2's Conv1D keeps its weight transposed."""
    cohort = spaced(family, ADAPTER)
    state = states(cohort, 1)[0]
    stated = {d.name.removeprefix("base_model.model."): d for d in cohort.space.delta(state.numpy())}
    frozen, changed = tiny(family, dtype=torch.float64)[0].module, merged(cohort, state)
    new = {n: w.detach() for n, w in weights(changed).items()}
    views = cohort.layout.views(state)
    assert len(stated) > 1
    for name, low in stated.items():
        full = f"base_model.model.{name}"
        a, b = views[f"{full}.lora_A.default.down.weight"], views[f"{full}.lora_B.default.weight"]
        product = 5 / 3 * b @ torch.diag(views[f"{full}.lora_A.default.core"]) @ a
        change = out_in(frozen, name, new[name] - weights(frozen)[name].detach())
        torch.testing.assert_close(change, product, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(low.left @ low.right, product, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_cohort_are_those_of_plain_peft(family):
    cohort = spaced(family, ADAPTER)
    at, both = states(cohort, 2), batches(cohort.task, [2, 3])
    losses, grads = cohort.gradients(at, CohortBatch.of(both))
    for slot, batch in enumerate(both):
        loss, grad = expect(cohort, at[slot], batch)
        assert losses[slot].item() == pytest.approx(loss, rel=1e-9)
        assert apart(grads[slot], grad) <= 1e-9
    gates = torch.from_numpy(cohort.space.columns(("gate",)).copy())
    assert grads[:, gates].ne(0).all()


def test_everything_trains_and_is_told_apart():
    space = spaced("bert", ADAPTER).space
    assert set(space.groups) == {"A", "B", "gate", "head"} and set(space.trains(1)) == set(space.groups)
    assert not space.constant and ADAPTER.form == "gated"
    assert len(space.columns(("gate",))) == 3 * len(space.modules) == 12


def test_gates_are_normal_each_its_own_and_the_same_for_all_clients_of_a_seed():
    def gates(seed: int, rank: int = 3) -> np.ndarray:
        cohort = spaced("llama", SoRA(rank=rank), seed=seed)
        return cohort.initial.numpy()[cohort.space.columns(("gate",))]

    assert np.array_equal(gates(1), gates(1)) and not np.array_equal(gates(1), gates(2))
    assert len(set(gates(1).tolist())) == 12
    many = gates(5, rank=500)
    assert len(many) == 2000 and abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.07


def test_the_factors_start_as_loras_and_the_change_at_zero():
    cohort, plain = spaced("llama", ADAPTER), spaced("llama", LoRA(rank=3, alpha=5.0))
    for group in ("A", "B"):
        mine, theirs = (c.initial[torch.from_numpy(c.space.columns((group,)).copy())] for c in (cohort, plain))
        assert torch.equal(mine, theirs)
    assert all(not (low.left @ low.right).any() for low in cohort.space.delta(cohort.initial.numpy()))


def test_clients_of_lower_rank_hold_the_leading_gates_in_their_own_scale():
    cohort = spaced("llama", SoRA(rank=[4, 2], alpha=[8.0, 2.0]))
    state, space = states(cohort, 1)[0].numpy(), cohort.space
    held = np.zeros_like(state)
    held[space.columns(None, 1)] = space.take(state, None, 1)
    module = space.modules[0]
    np.testing.assert_allclose(space.tensor(held, module.core)[:2], 2 * space.tensor(state, module.core)[:2])
    assert np.array_equal(space.tensor(held, module.b)[:, :2], space.tensor(state, module.b)[:, :2])
    assert not space.tensor(held, module.core)[2:].any()
    batch = CohortBatch.of(batches("causal_lm", [3]))
    at = torch.from_numpy(held)[None]
    with trained_alone(cohort, (1,)):
        mine = cohort.losses(at, batch)
    other = spaced("llama", SoRA(rank=2, alpha=2.0))
    theirs = other.losses(torch.from_numpy(held[space.columns(None, 1)])[None], batch)
    torch.testing.assert_close(mine, theirs)


def test_a_start_that_the_base_takes_back_is_refused():
    SoRA(init=Gaussian())
    with pytest.raises(ConfigError, match=r"adapter\.init='PiSSA'.*gate"):
        SoRA(init=PiSSA())
