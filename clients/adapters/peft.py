"""Any method of the PEFT library that adapts layers, by its name there: VeRA, MiSS, IA3, LoKr, RandLoRA, OFT ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clients.adapters.base import Adapter
from fl.config import setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.models import Base

# These have targets of their own (normalisation layers, the embeddings); the model's list for LoRA is not meant.
OWN_TARGETS = ("LN_TUNING", "TRAINABLE_TOKENS")
# These are made from singular vectors of the base's weights, whose signs and order rounding to bfloat16 changes: what
# was trained beside a bfloat16 base would mean something else beside the float32 one that the adapter is saved for.
FACTOR_BASE = ("ADAMSS", "FROD", "PSOFT", "TINYLORA")
# Initialisations of LoRA that leave the base as it is; runs of one process share it.
UNCHANGED_BASE = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Peft(Adapter):
    """``method`` is PEFT's name (``LORA``, ``VERA``, ``MISS`` ..., any case); ``options`` go to its configuration.

    ``rank`` is passed as ``r`` unless ``options`` names it; a method that has no ``r`` refuses it.
    """

    method: str = setting("VERA", help="PEFT's name of the method")
    rank: int | None = setting(None, ge=1, help="rank, for the methods that have one")
    options: dict[str, Any] = setting({}, help="further fields of the method's PEFT configuration")

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        coarse = next(base.module.parameters()).dtype in (torch.bfloat16, torch.float16)
        if coarse and self.method.upper() in FACTOR_BASE:
            raise ConfigError(
                "engine.dtype", "bfloat16", f"float32, since {self.method} factors the base's weights", "Or use auto."
            )
        return super().attach(base, targets, seed)

    def config(self, targets: list[str]) -> Any:
        import dataclasses

        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

        known = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        name = self.method.upper()
        if name not in known:
            raise ConfigError("adapter.method", self.method, f"one of {', '.join(sorted(known))}")
        cls = known[PeftType(name).value]
        fields = {f.name for f in dataclasses.fields(cls)}
        options = dict(self.options)
        for key in options:
            if key not in fields:
                raise ConfigError(
                    f"adapter.options.{key}", options[key], f"{cls.__name__} has {', '.join(sorted(fields))}"
                )
        if self.rank is not None:
            if "r" not in fields:
                raise ConfigError("adapter.rank", self.rank, f"null: {cls.__name__} has no rank r", "See its options.")
            options.setdefault("r", self.rank)
        if "target_modules" in fields and (self.target_modules or name not in OWN_TARGETS):
            options.setdefault("target_modules", list(targets))
            if "feedforward_modules" in fields:
                # IA3 scales the input of feed-forward targets and the output of the others.
                options.setdefault("feedforward_modules", [])
        initial = options.get("init_lora_weights", True)
        if initial not in UNCHANGED_BASE:
            raise ConfigError(
                "adapter.options.init_lora_weights",
                initial,
                "one of true, false, gaussian, orthogonal: the others change the base's own weights or need data",
            )
        try:
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise ConfigError("adapter.options", options, f"{cls.__name__} refuses it ({error})") from error
