"""The cohort on a GPU: the same numbers as on the CPU, and many slots at once. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch
from tests.oracles.models import FAMILIES, batches, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def build(family: str, adapter, device: str) -> Cohort:
    base, targets = tiny(family)
    base.module.to(device)
    return Cohort(adapter.attach(base, targets, seed=1), base.task, device)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [LoRA(rank=3), Peft(method="ia3")], ids=["lora", "ia3"])
def test_gradients_on_a_gpu_are_those_of_the_cpu(family, adapter):
    cpu, gpu = build(family, adapter, "cpu"), build(family, adapter, "cuda")
    source = torch.Generator().manual_seed(3)
    states = cpu.initial + 0.1 * torch.randn(32, cpu.layout.size, generator=source)
    data = batches(cpu.task, [1 + i % 4 for i in range(32)])
    losses, grads = cpu.gradients(states, CohortBatch.of(data))
    there_losses, there = gpu.gradients(states.cuda(), CohortBatch.of(data, device="cuda"))
    torch.testing.assert_close(there_losses.cpu(), losses, rtol=1e-4, atol=1e-5)
    assert (there.cpu() - grads).norm() <= 1e-3 * grads.norm()
