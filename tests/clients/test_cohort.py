"""The cohort against its slow twin: one client at a time with plain PEFT, one sample at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch
from clients.stacked import StackedLayer, StackedLoRA
from fl.errors import ConfigError
from tests.oracles import peft_loop
from tests.oracles.models import FAMILIES, batches, tiny

ADAPTERS = {
    "lora": LoRA(rank=3, alpha=5.0),
    "rslora": LoRA(rank=3, alpha=5.0, rslora=True),
    "dora": LoRA(rank=3, dora=True),
    "vera": Peft(method="vera", rank=5),
    "miss": Peft(method="miss", rank=4),
    "ia3": Peft(method="ia3"),
    "lokr": Peft(method="lokr", rank=2),
    "loha": Peft(method="loha", rank=2),
    "randlora": Peft(method="randlora", rank=3),
    "oft": Peft(method="oft", options={"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
}
# What PEFT itself refuses, with its reason; a change of PEFT that lifts one is noticed by the test below.
REFUSED = {("gpt2", adapter): "Conv1D" for adapter in ("miss", "lokr", "loha", "oft")}
PAIRS = [(f, a) for f in FAMILIES for a in ADAPTERS]


def build(family: str, adapter: str, dtype: torch.dtype = torch.float64, **model) -> Cohort:
    base, targets = tiny(family, dtype=dtype, **model)
    cohort = Cohort(ADAPTERS[adapter].attach(base, targets, seed=1), base.task)
    for stacked in cohort.swaps:
        stacked[2].hidden[-1].to(dtype)
    return cohort


def states(cohort: Cohort, slots: int) -> torch.Tensor:
    """Different states for the slots, around the initial one: nothing is at a special point such as B = 0."""
    noise = torch.randn(slots, cohort.layout.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return cohort.initial.double() + 0.1 * noise


def expect(cohort: Cohort, state: torch.Tensor, batch, rows: list[int]) -> tuple[float, torch.Tensor]:
    model = cohort.unstacked(state)
    try:
        return peft_loop.gradient(model, cohort.layout, state, batch, rows)
    finally:
        cohort.restack()


@pytest.mark.parametrize(("family", "adapter"), PAIRS)
def test_gradients_are_those_of_a_client_alone(family, adapter):
    if (family, adapter) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[family, adapter]):
            build(family, adapter)
        return
    cohort = build(family, adapter)
    mine, data = states(cohort, 3), batches(cohort.task, [4, 1, 3])
    losses, grads = cohort.gradients(mine, CohortBatch.of(data))
    for slot, batch in enumerate(data):
        loss, gradient = expect(cohort, mine[slot], batch, list(range(len(batch.labels))))
        assert losses[slot].item() == pytest.approx(loss, rel=1e-9)
        assert (grads[slot] - gradient).norm() <= 1e-9 * gradient.norm()
        assert gradient.norm() > 1e-4


@pytest.mark.parametrize(("family", "adapter"), [p for p in PAIRS if p not in REFUSED])
def test_sample_gradients_are_those_of_a_batch_of_one(family, adapter):
    cohort = build(family, adapter)
    mine, data = states(cohort, 2), batches(cohort.task, [3, 2])
    losses, grads = cohort.sample_gradients(mine, CohortBatch.of(data))
    for slot, batch in enumerate(data):
        for row in range(len(batch.labels)):
            loss, gradient = expect(cohort, mine[slot], batch, [row])
            assert losses[slot, row].item() == pytest.approx(loss, rel=1e-9)
            assert (grads[slot, row] - gradient).norm() <= 1e-9 * gradient.norm()
    assert grads[1, 2].abs().max() == 0  # the padding sample of the smaller slot
