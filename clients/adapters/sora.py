"""SoRA: ``W = W0 + s B diag(g) A`` with a gate g ``(rank,)``; A, B and g train (Ding et al., arXiv 2311.11696).

A gate of zero switches its rank off. ``local=sora`` drives gates to zero; any other local algorithm trains them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from clients.adapters.core import Core, insert
from clients.adapters.lora import Factors
from fl.keys import torch_generator

if TYPE_CHECKING:
    from clients.models import Base


@dataclass(frozen=True)
class SoRA(Factors):
    """A starts Kaiming-uniform and B at zero, as LoRA's do, and the gates at N(0, 1), the same for all clients."""

    phases = (("A", "B", "gate"),)
    shape = "gated"

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        model = insert(super().attach(base, targets, seed), matrix=False)
        for name, module in model.named_modules():
            if isinstance(module, Core):
                draw = torch.randn(module.core.shape, generator=torch_generator(seed, "adapter", "gate", name))
                with torch.no_grad():
                    module.core.copy_(draw)
        return model

    def role(self, name: str) -> str:
        found = super().role(name)
        return "gate" if found == "R" else found
