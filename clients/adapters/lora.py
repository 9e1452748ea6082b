"""LoRA: ``W = W0 + s B A`` with ``s = alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.

Hu et al., LoRA (arXiv 2106.09685), eq. 3; Kalajdzievski, rsLoRA (arXiv 2312.03732); Liu et al., DoRA (arXiv
2402.09353). Here too: what all adapters over these two factors share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from clients.adapters.base import Adapter, check_layers, fits, is_head
from clients.adapters.initial.base import Initialisation
from clients.adapters.initial.kaiming import Kaiming
from clients.adapters.space import HEAD, Module, Space
from clients.layout import Layout
from fl.config import setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.models import Base

# What a tensor of a PEFT LoRA layer is, by a part of its name; the first that fits.
_ROLES = {
    ".lora_A.default.core": "R",
    ".lora_A.": "A",
    ".lora_embedding_A.": "A",
    ".lora_B.": "B",
    ".lora_embedding_B.": "B",
    ".lora_magnitude_vector.": "magnitude",
}


@dataclass(frozen=True)
class Factors(Adapter):
    """What all adapters over A ``(rank, in)`` and B ``(out, rank)`` have.

    ``rank`` and ``alpha`` may be lists: client i has entry ``i mod length``, and the leading block of the server's
    factors. ``rank_pattern`` and ``alpha_pattern`` set them for modules whose name ends so, for all clients alike.
    """

    rank: int | list[int] = setting(8, ge=1, help="rank of the update; a list is dealt out to the clients in turn")
    alpha: float | list[float] = setting(16.0, gt=0, help="scale: the update is multiplied by alpha/rank; or a list")
    dropout: float = setting(0.0, ge=0, lt=1, help="dropout on the adapter's input")
    rslora: bool = setting(False, help="scale by alpha/sqrt(rank)")
    layers: list[int] | None = setting(None, help="indices of the layers to adapt; null: all")
    rank_pattern: dict[str, int] = setting({}, help="ranks of single modules, by the end of their name")
    alpha_pattern: dict[str, float] = setting({}, help="alphas of single modules, by the end of their name")
    init: Initialisation = setting(Kaiming(), help="how the factors start")

    # Which groups train in turn, and the form that this gives the weight change (`aggregators.base.FORMS`).
    phases: ClassVar[tuple[tuple[str, ...], ...]] = (("A", "B"),)
    shape: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        for name, values in (("rank", self.ranks), ("alpha", self.alphas)):
            if not values or min(values) <= 0:
                raise ConfigError(f"adapter.{name}", getattr(self, name), "one positive number or a list of them")
        if isinstance(self.alpha, list) and len(self.alphas) != len(self.ranks):
            allowed = f"one number, or {len(self.ranks)} as there are ranks"
            raise ConfigError("adapter.alpha", self.alpha, allowed)
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, name).items():
                if value <= 0:
                    raise ConfigError(f"adapter.{name}.{key}", value, "a positive number")
        self.init.check(self.shape)
        if self.init.changes_base and self.mixed_ranks:
            allowed = "one that leaves the base as it is: with a lower rank the start would not be the base's weights"
            raise ConfigError("adapter.init", type(self.init).__name__, allowed, "Or one rank for all clients.")

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.rank) if isinstance(self.rank, list) else (self.rank,)

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(self.alpha) if isinstance(self.alpha, list) else (self.alpha,) * len(self.ranks)

    @property
    def scalings(self) -> tuple[float, ...]:
        return tuple(self.scaling(r, a) for r, a in zip(self.ranks, self.alphas, strict=True))

    def scaling(self, rank: int, alpha: float) -> float:
        """``s``: ``alpha / rank``, or ``alpha / sqrt(rank)``."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def full(self) -> int:
        """The client (of those that differ) whose rank is the server's."""
        return self.ranks.index(max(self.ranks))

    @property
    def form(self) -> str:
        return self.shape

    @property
    def mixed_ranks(self) -> bool:
        return len(set(zip(self.ranks, self.scalings, strict=True))) > 1

    @property
    def initialisation(self) -> Initialisation | None:
        return None if isinstance(self.init, Kaiming) else self.init

    def config(self, targets: list[str]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.ranks[self.full],
            lora_alpha=self.alphas[self.full],  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            target_modules=list(targets),
            layers_to_transform=self.layers,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
        )

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        model = super().attach(base, targets, seed)
        adapted = [n for n, p in model.named_parameters() if p.requires_grad]
        check_layers(self.layers, adapted)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                if not any(fits(n.partition(".lora_")[0], key) for n in adapted if ".lora_" in n):
                    raise ConfigError(
                        f"adapter.{name}.{key}", getattr(self, name)[key], "the end of an adapted module's name"
                    )
        return model

    def space(self, model: nn.Module) -> Space:
        layout = Layout.of({n: p for n, p in model.named_parameters() if p.requires_grad})
        groups = tuple(self.role(n) for n in layout.names)
        modules = tuple(self._modules(model, layout))
        head = (HEAD,) if HEAD in groups else ()
        phases = tuple((*phase, *head) for phase in self.phases)
        mixed = self.mixed_ranks
        return Space(layout, groups, phases, modules, self.ranks if mixed else (), self.scalings if mixed else ())

    def role(self, name: str) -> str:
        """The group of the tensor ``name``."""
        return HEAD if is_head(name) else next((role for part, role in _ROLES.items() if part in name), "other")

    def _modules(self, model: nn.Module, layout: Layout) -> Any:
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        for a in layout.names:
            if self.role(a) != "A" or is_head(a):
                continue
            kind = ".lora_embedding_A." if ".lora_embedding_A." in a else ".lora_A."
            name = a.partition(kind)[0]
            b = a.replace(kind, kind.replace("A", "B")).replace(".down.weight", ".weight")
            core = f"{name}.lora_A.default.core"
            own = any(fits(name, key) for key in (*self.rank_pattern, *self.alpha_pattern))
            scale = float(model.get_submodule(name).scaling["default"])  # type: ignore[index]
            yield Module(name, a, b, scale, shapes[a][0], core if core in shapes else None, not own)


@dataclass(frozen=True)
class LoRA(Factors):
    """A ``(rank, in)`` and B ``(out, rank)`` beside each target; both train. A starts Kaiming-uniform, B at zero."""

    dora: bool = setting(False, help="also train the magnitude of each column (DoRA)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dora and (self.mixed_ranks or self.initialisation is not None):
            raise ConfigError("adapter.dora", True, "false with mixed ranks or an initialisation other than kaiming")

    @property
    def form(self) -> str:
        return "other" if self.dora else "lora"  # DoRA rescales the whole weight: no product of two factors

    def config(self, targets: list[str]) -> Any:
        config = super().config(targets)
        config.use_dora = self.dora
        return config

    def space(self, model: nn.Module) -> Space:
        return Adapter.space(self, model) if self.dora else super().space(model)
