"""Any method of the PEFT library that adapts layers, by its name there: VeRA, MiSS, IA3, LoKr, RandLoRA, OFT ..."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clients.adapters.base import Adapter
from clients.adapters.initial.base import Initialisation
from clients.adapters.initial.corda import CorDA
from clients.adapters.initial.eva import EVA
from clients.adapters.initial.lora_ga import LoRAGA
from clients.adapters.initial.olora import OLoRA
from clients.adapters.initial.pissa import PiSSA
from clients.adapters.lora import LoRA
from clients.adapters.space import Space
from fl.config import build, setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.models import Base

# These have targets of their own (normalisation layers, the embeddings); the model's list for LoRA is not meant.
OWN_TARGETS = ("LN_TUNING", "TRAINABLE_TOKENS")
# These are made from singular vectors of the base's weights, whose signs and order rounding to bfloat16 changes: what
# was trained beside a bfloat16 base would mean something else beside the float32 one that the adapter is saved for.
FACTOR_BASE = ("ADAMSS", "FROD", "PSOFT", "TINYLORA")
# Initialisations of LoRA that PEFT makes: they need no data and leave the base, which runs share, as it is.
MADE_BY_PEFT = (True, False, "gaussian", "orthogonal")
# Those that the server makes once for all clients, by PEFT's names.
MADE_HERE: dict[str, type[Initialisation]] = {
    "eva": EVA,
    "corda": CorDA,
    "pissa": PiSSA,
    "olora": OLoRA,
    "lora_ga": LoRAGA,
}
# Of PEFT's settings of these: the name here of one that means the same; or the values that change nothing here, with
# the reason why there are no others.
_ANY: tuple[Any, ...] = ()
_MEANINGS: dict[str, dict[str, str | tuple[tuple[Any, ...], str]]] = {
    "eva_config": {
        "rho": ((1.0,), "1: every client has the same ranks, whatever the data"),
        "whiten": ((False,), "false"),
        "use_label_mask": ((False,), "false: every real token counts"),
        "adjust_scaling_factors": (_ANY, ""),
    },
    "corda_config": {
        "corda_method": "mode",
        "use_float16_for_covariance": ((False,), "false: sums are float64"),
        "verbose": (_ANY, ""),
        "prune_temporary_fields": (_ANY, ""),
    },
    "lora_ga_config": {"direction": "direction", "scale": "scale", "stable_gamma": "gamma"},
}
# With these settings alone LORA's change is s B A with the factors that train.
PLAIN_LORA = {
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "init", *_MEANINGS),
}


@dataclass(frozen=True)
class Peft(Adapter):
    """``method`` is PEFT's name (``LORA``, ``VERA``, ``MISS`` ..., any case); ``options`` go to its configuration.

    ``rank`` is passed as ``r`` unless ``options`` names it; a method that has no ``r`` refuses it.

    LORA with ``init_lora_weights`` eva, corda, pissa, olora or lora_ga starts by `clients.adapters.initial`: the server
    computes one start for all clients. ``options.init`` then holds the settings there are (``source``, ``examples``
    ...); PEFT's own ``eva_config``, ``corda_config`` and ``lora_ga_config`` are taken where they mean the same.
    """

    method: str = setting("VERA", help="PEFT's name of the method")
    rank: int | None = setting(None, ge=1, help="rank, for the methods that have one")
    options: dict[str, Any] = setting({}, help="further fields of the method's PEFT configuration")

    def __post_init__(self) -> None:
        if self.initialisation is None and "init" in self.options:
            allowed = f"with method LORA and init_lora_weights one of {', '.join(MADE_HERE)}"
            raise ConfigError("adapter.options.init", self.options["init"], allowed)

    @property
    def form(self) -> str:
        given = {key for key, value in self.options.items() if value and (key, value) != ("bias", "none")}
        return "lora" if self.method.upper() == "LORA" and given <= PLAIN_LORA else "other"

    @property
    def ranks(self) -> tuple[int, ...]:
        """One rank for all clients, where the method has one."""
        return tuple(r for r in (self.options.get("r", self.rank),) if r is not None)

    @property
    def rslora(self) -> bool:
        return bool(self.options.get("use_rslora", False))

    @property
    def initialisation(self) -> Initialisation | None:
        cls = MADE_HERE.get(str(self.options.get("init_lora_weights"))) if self.method.upper() == "LORA" else None
        if cls is None:
            return None
        values = dict(_mapping("init", self.options.get("init")))
        for part in _MEANINGS:
            given = _mapping(part, self.options.get(part))
            if given and part != f"{self.options['init_lora_weights']}_config":
                raise ConfigError(f"adapter.options.{part}", given, f"null with {cls.__name__}")
            values |= _translated(part, given)
        made: Initialisation = build(values, "adapter.options.init", cls)
        return made

    def space(self, model: nn.Module) -> Space:
        return LoRA().space(model) if self.form == "lora" else super().space(model)

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
        options = {key: value for key, value in self.options.items() if key != "init"}
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
        if name == "LORA" and self.initialisation is not None:
            options["init_lora_weights"] = True  # PEFT's own would see no data, or change the shared base
            options = {key: value for key, value in options.items() if key not in _MEANINGS}
        initial = options.get("init_lora_weights", True)
        if initial not in MADE_BY_PEFT:
            made = ", ".join(["true", "false", "gaussian", "orthogonal", *(MADE_HERE if name == "LORA" else [])])
            raise ConfigError("adapter.options.init_lora_weights", initial, f"one of {made}")
        try:
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise ConfigError("adapter.options", options, f"{cls.__name__} refuses it ({error})") from error


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    """``value`` of ``adapter.options.key``, a mapping or none."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"adapter.options.{key}", value, "a mapping")
    return value or {}


def _translated(part: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings ``given`` in ``adapter.options.part``, as settings of the initialisation here."""
    out = {}
    for key, value in given.items():
        meaning = _MEANINGS[part].get(key)
        name = f"adapter.options.{part}.{key}"
        if meaning is None:
            known = ", ".join(sorted(_MEANINGS[part]))
            raise ConfigError(name, value, f"no counterpart here; taken are {known}", "See adapter.options.init.")
        if isinstance(meaning, str):
            out[meaning] = value
        elif meaning[0] and value not in meaning[0]:
            raise ConfigError(name, value, meaning[1])
    return out
