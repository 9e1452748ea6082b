"""Cohorts over tiny models with any adapter, and what plain PEFT says about them."""

from __future__ import annotations

import torch
from torch import Tensor

from clients.adapters.base import Adapter
from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort
from clients.data.batch import Batch
from tests.oracles import peft_loop
from tests.oracles.models import tiny

# The ten adapters that are tested on every family.
ADAPTERS: dict[str, Adapter] = {
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


def build(family: str, adapter: Adapter | str = "lora", dtype: torch.dtype = torch.float64, **model) -> Cohort:
    """A cohort over ``tiny(family, **model)`` in ``dtype``, its adapter too where that is float64."""
    chosen = ADAPTERS[adapter] if isinstance(adapter, str) else adapter
    # PSOFT alone refuses to be made in float64.
    narrow = isinstance(chosen, Peft) and chosen.method.upper() == "PSOFT" and dtype == torch.float64
    base, targets = tiny(family, dtype=torch.float32 if narrow else dtype, **model)
    attached = chosen.attach(base, targets, seed=1)
    return Cohort(attached.double() if dtype == torch.float64 else attached, base.task)


def states(cohort: Cohort, slots: int, seed: int = 3) -> Tensor:
    """Different states for the slots, around the initial one: nothing is at a special point such as B = 0."""
    noise = torch.randn(slots, cohort.layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cohort.initial.double() + 0.1 * noise


def expect(cohort: Cohort, state: Tensor, batch: Batch, rows: list[int] | None = None) -> tuple[float, Tensor]:
    """Loss and gradient of the samples ``rows`` (all of them if None) by the plain PEFT model, one at a time."""
    model = cohort.unstacked(state)
    try:
        return peft_loop.gradient(model, cohort.layout, state, batch, rows or list(range(len(batch))))
    finally:
        cohort.restack()


def apart(mine: Tensor, theirs: Tensor) -> float:
    """Relative distance ``|mine - theirs| / |theirs|``."""
    return float((mine - theirs).norm() / theirs.norm())
