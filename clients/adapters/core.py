"""A core between the factors of a LoRA layer: ``s B R A`` (LoRA-XS, LoRA-SB), or a gate ``s B diag(g) A`` (SoRA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Core(nn.Module):
    """Stands where PEFT's LoRA layer has its A: maps ``x`` to ``R A x`` or ``g * A x``.

    ``down`` is A ``(r, in)``; ``core`` is R ``(r, r)`` or g ``(r,)``. ``weight`` is the product ``(r, in)``, so that
    PEFT merges the layer as it does any other.
    """

    def __init__(self, down: nn.Linear, core: Tensor):
        super().__init__()
        self.down = down
        self.core = nn.Parameter(core)

    @property
    def weight(self) -> Tensor:
        return self.core @ self.down.weight if self.core.dim() == 2 else self.core.unsqueeze(1) * self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        return low @ self.core.T if self.core.dim() == 2 else low * self.core


def insert(model: nn.Module, matrix: bool, adapter: str = "default") -> nn.Module:
    """Put a `Core` into each LoRA layer of the PEFT ``model``: the identity, or a gate of ones."""
    from peft.tuners.lora.layer import Linear as LoraLinear

    for module in model.modules():
        if isinstance(module, LoraLinear):
            down = module.lora_A[adapter]
            assert isinstance(down, nn.Linear)
            rank = down.out_features
            start = torch.eye(rank) if matrix else torch.ones(rank)
            module.lora_A[adapter] = Core(down, start.to(down.weight))
    return model
