"""LoRA: ``W = W0 + s B A`` with ``s = alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.

Hu et al., LoRA (arXiv 2106.09685), eq. 3; Kalajdzievski, rsLoRA (arXiv 2312.03732); Liu et al., DoRA (arXiv
2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clients.adapters.base import Adapter, LowRank
from fl.config import setting


@dataclass(frozen=True)
class LoRA(Adapter):
    """A ``(rank, in)`` and B ``(out, rank)`` beside each target; A starts Kaiming-uniform, B at zero."""

    rank: int = setting(8, ge=1, help="rank of the update")
    alpha: float = setting(16.0, gt=0, help="scale: the update is multiplied by alpha/rank")
    dropout: float = setting(0.0, ge=0, lt=1, help="dropout on the adapter's input")
    rslora: bool = setting(False, help="scale by alpha/sqrt(rank)")
    dora: bool = setting(False, help="also train the magnitude of each column (DoRA)")
    layers: list[int] | None = setting(None, help="indices of the layers to adapt; null: all")

    def config(self, targets: list[str]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            target_modules=list(targets),
            layers_to_transform=self.layers,
        )

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[LowRank]:
        """``s B A`` of each module, as ``left = s B`` and ``right = A``; with DoRA it is not of this form."""
        if self.dora:
            raise TypeError("DoRA rescales the whole weight; its change is not a product of two factors")
        for name, a in state.items():
            if ".lora_A." in name:
                module = name.split(".lora_A.")[0]
                yield LowRank(module, self.scaling * state[name.replace(".lora_A.", ".lora_B.")], a)
