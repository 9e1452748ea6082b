"""LoRA: ``W = W0 + s B A`` with ``s = alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.

Hu et al., LoRA (arXiv 2106.09685), eq. 3; Kalajdzievski, rsLoRA (arXiv 2312.03732); Liu et al., DoRA (arXiv
2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clients.adapters.base import Adapter, LowRank
from fl.config import setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.models import Base


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

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        model = super().attach(base, targets, seed)
        adapted = [n for n, p in model.named_parameters() if p.requires_grad]
        for layer in self.layers or []:
            if not any(f".{layer}." in name for name in adapted):
                raise ConfigError("adapter.layers", self.layers, f"the model has no layer {layer} with such modules")
        return model

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[LowRank]:
        """``s B A`` of each module, as ``left = s B`` and ``right = A``; with DoRA it is not of this form."""
        if self.dora:
            raise TypeError("DoRA rescales the whole weight; its change is not a product of two factors")
        for name, a in state.items():
            # An embedding's factors are named apart; as a linear map of one-hot tokens its change is B A as well.
            for kind in (".lora_A.", ".lora_embedding_A."):
                if kind in name:
                    b = state[name.replace(kind, kind.replace("A", "B"))]
                    yield LowRank(name.split(kind)[0], self.scaling * b, a)
