"""B R A: ``W = W0 + s B R A`` with B ``(out, r)`` and A ``(r, in)`` frozen and common; only R ``(r, r)`` trains.

LoRA-XS (arXiv 2405.17604) takes B and A from the singular vectors of W0, LoRA-SB (arXiv 2411.19557) from those of an
estimate of the first full fine-tuning step; Fed-SB (arXiv 2502.15436) averages R, which is exact for common B and A.
The gradient of R is ``s B^T (dl/dW) A^T``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from clients.adapters.core import insert
from clients.adapters.initial.base import Initialisation
from clients.adapters.initial.lora_sb import LoRASB
from clients.adapters.initial.lora_xs import LoRAXS
from clients.adapters.lora import Factors
from fl.config import setting

if TYPE_CHECKING:
    from clients.models import Base


@dataclass(frozen=True)
class BRA(Factors):
    """``adapter=lora_xs`` and ``adapter=lora_sb``, which differ in how B, R and A start."""

    init: Initialisation = setting(LoRAXS(), help="how B, R and A start")

    phases = (("R",),)
    shape = "core"

    @property
    def name(self) -> str:
        """What people call it: by its start."""
        return {LoRAXS: "LoRA-XS", LoRASB: "LoRA-SB"}.get(type(self.init), f"B R A ({type(self.init).__name__})")

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        return insert(super().attach(base, targets, seed), matrix=True)
