"""S2FT: dense slices of the weights train, some output channels here and some input channels there (arXiv 2412.06289).

With E_S ``(n, rank)`` the columns S of the identity, a module of ``rows`` and one of ``columns`` change by

    rows       E_S A      A (rank, in) from zero:  the output channels S
    columns    B E_S^T    B (out, rank) from zero: the input channels S

These are LoRA's factors with ``s = 1``, one frozen and one-hot, the other the slice itself: its gradient is the slice
of the whole weight's gradient. The change is linear in what trains, so the mean of the clients' slices is exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from clients.adapters.base import Adapter, check_layers, fits, is_head
from clients.adapters.space import HEAD, Module, Space
from clients.layout import Layout
from fl.config import setting
from fl.errors import ConfigError
from fl.keys import generator

if TYPE_CHECKING:
    from clients.models import Base

SLICE, SELECTION = "slice", "selection"


@dataclass(frozen=True)
class S2FT(Adapter):
    """``rank`` channels of each module train. ``rows`` and ``columns`` both null: rows of the model's default modules.

    The channels are drawn from the key (seed, "s2ft", layer, number of channels), the same for all clients. So modules
    of one layer with as many channels take the same ones: those that go out of a feed-forward block's first map are
    those that go into its second, and those that go out of the values' map go into attention's last one (unless heads
    share values).
    """

    rank: int = setting(8, ge=1, help="channels of each module that train")
    rows: list[str] | None = setting(None, help="modules whose output channels train, by the ends of their names")
    columns: list[str] | None = setting(None, help="modules whose input channels train, by the ends of their names")
    layers: list[int] | None = setting(None, help="indices of the layers to adapt; null: all")

    def __post_init__(self) -> None:
        if self.target_modules and (self.rows or self.columns):
            allowed = "null where adapter.rows or adapter.columns say it"
            raise ConfigError("adapter.target_modules", self.target_modules, allowed)

    @property
    def form(self) -> str:
        return "slice"

    def sides(self, targets: list[str]) -> tuple[list[str], list[str]]:
        """Ends of the names of the modules whose rows, and whose columns, train."""
        rows, columns = list(self.rows or []), list(self.columns or [])
        return (rows, columns) if rows or columns else (list(targets), [])

    def config(self, targets: list[str]) -> Any:
        from peft import LoraConfig

        rows, columns = self.sides(targets)
        return LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=[*rows, *columns], layers_to_transform=self.layers
        )

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        from peft.tuners.lora.layer import Linear as LoraLinear

        model = super().attach(base, targets, seed)
        rows, columns = self.sides(self.target_modules or targets)
        unused = {*rows, *columns}
        for name, module in _adapted(model):
            if not isinstance(module, LoraLinear):
                raise ConfigError("adapter.target_modules", name, "linear layers alone")
            ends = [[end for end in side if fits(name, end)] for side in (rows, columns)]
            if all(ends):
                raise ConfigError("adapter.columns", ends[1], f"no module that is in adapter.rows too, as {name} is")
            unused -= {*ends[0], *ends[1]}
            self._start(name, module, bool(ends[0]), seed)
        if unused:
            key = "adapter.columns" if unused & set(columns) else "adapter.rows"
            raise ConfigError(key, sorted(unused), "ends of names of the model's modules; there are none such")
        check_layers(self.layers, (name for name, _ in _adapted(model)))
        return model

    def _start(self, name: str, module: nn.Module, rows: bool, seed: int) -> None:
        """Set the factors of the adapted ``module``: the slice to zero, the other to the drawn channels."""
        a: nn.Parameter = module.lora_A["default"].weight  # type: ignore[index, union-attr]
        b: nn.Parameter = module.lora_B["default"].weight  # type: ignore[index, union-attr]
        channels = b.shape[0] if rows else a.shape[1]
        if self.rank > channels:
            raise ConfigError("adapter.rank", self.rank, f"at most the {channels} channels of {name}")
        chosen = torch.eye(channels)[:, torch.from_numpy(self.selection(name, channels, seed))]
        with torch.no_grad():
            a.copy_(torch.zeros_like(a) if rows else chosen.T)
            b.copy_(chosen if rows else torch.zeros_like(b))

    def selection(self, name: str, channels: int, seed: int) -> np.ndarray:
        """The channels S ``(rank,)`` of the module ``name``, rising."""
        found = re.match(r".*?\.\d+\.", name)  # the layer: up to the first number in the name
        draws = generator(seed, "s2ft", found.group() if found else name, channels)
        return np.sort(draws.choice(channels, self.rank, replace=False))

    def space(self, model: nn.Module) -> Space:
        layout = Layout.of({n: p for n, p in model.named_parameters() if p.requires_grad})
        groups = dict.fromkeys(layout.names, "other") | {n: HEAD for n in layout.names if is_head(n)}
        modules = []
        for name, _ in _adapted(model):
            a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
            columns = any(fits(name, end) for end in self.columns or [])
            groups[a], groups[b] = (SELECTION, SLICE) if columns else (SLICE, SELECTION)
            modules.append(Module(name, a, b, 1.0, self.rank))
        trained = tuple(g for g in dict.fromkeys(groups.values()) if g != SELECTION)
        return Space(layout, tuple(groups.values()), (trained,), tuple(modules))


def _adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, nn.Module]] = list(model.named_modules())
    return [(name, module) for name, module in found if isinstance(module, BaseTunerLayer)]
