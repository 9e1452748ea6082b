"""What every adapter is: settings, a PEFT model made from them, and what the tensors of its state are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from clients.adapters.initial.base import Initialisation
from clients.adapters.space import HEAD, Space
from clients.layout import Layout
from fl.config import setting
from fl.errors import ConfigError
from fl.keys import seeded_globals

if TYPE_CHECKING:
    from clients.models import Base


@dataclass(frozen=True)
class Adapter:
    """Base of all adapters. ``target_modules`` null takes the model's own default list."""

    target_modules: list[str] | None = setting(None, help="names of the modules to adapt; null: the model's default")
    train_head: bool = setting(True, help="whether a classifier's head trains and is averaged; false: it stays random")

    @property
    def form(self) -> str:
        """Which weight change it makes of what trains, a key of `aggregators.base.FORMS`."""
        return "other"

    @property
    def mixed_ranks(self) -> bool:
        """Whether clients have different ranks."""
        return False

    @property
    def initialisation(self) -> Initialisation | None:
        """How the server makes the start of the factors; None: they start as PEFT makes them."""
        return None

    def config(self, targets: list[str]) -> Any:
        """The ``peft.PeftConfig`` of these settings, for the modules ``targets``."""
        raise TypeError(f"{type(self).__name__} has no PEFT configuration")

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        """``base`` with the adapter, as a ``PeftModel``: adapter tensors and the head require gradients, all else is
        frozen.

        The initial tensors come from the key (seed, "adapter") alone. Raises `ConfigError` where PEFT refuses.
        """
        from peft import get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = self.config(self.target_modules or targets)
        name = str(config.peft_type.value)
        if config.is_prompt_learning:
            raise ConfigError("adapter", name, "a PEFT method that adapts layers, which prompt learning does not")
        if base.head is not None and self.train_head:
            if not hasattr(config, "modules_to_save"):
                raise ConfigError("adapter", name, "on a classifier: a PEFT method that can train a head beside it")
            config.modules_to_save = sorted({*(config.modules_to_save or []), base.head})
        config.base_model_name_or_path = base.name
        try:
            with seeded_globals(seed, "adapter"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(base.module, config)
        except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                "adapter",
                name,
                f"PEFT refuses it on this model ({reason})",
                "Choose other adapter.target_modules or another adapter.",
            ) from error
        if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise ConfigError("adapter", name, "a PEFT method that adapts layers of this model")
        # PEFT sets the name from the model's own configuration where it has one; the base knows better.
        model.peft_config["default"].base_model_name_or_path = base.name
        for part, parameter in model.named_parameters():
            if ".ranknum." in part:  # AdaLoRA's number of ranks, which PEFT lets train under bfloat16 but never saves
                parameter.requires_grad_(False)
        model.eval()
        return model

    def space(self, model: nn.Module) -> Space:
        """What the trainable tensors of ``model``, which `attach` made, are."""
        layout = Layout.of({n: p for n, p in model.named_parameters() if p.requires_grad})
        return Space(layout, tuple(HEAD if is_head(n) else "adapter" for n in layout.names))


def fits(name: str, end: str) -> bool:
    """Whether ``end`` is the end of the module's ``name``, in whole parts, as PEFT matches it."""
    return f".{name}".endswith(f".{end}")


def check_layers(layers: list[int] | None, names: Iterable[str]) -> None:
    """Raise `ConfigError` for one of ``layers`` that none of the adapted ``names`` lies in."""
    names = list(names)
    for layer in layers or []:
        if not any(f".{layer}." in name for name in names):
            raise ConfigError("adapter.layers", layers, f"the model has no layer {layer} with such modules")


def is_head(name: str) -> bool:
    """Whether the tensor ``name`` belongs to a module that PEFT trains whole."""
    return ".modules_to_save." in name
