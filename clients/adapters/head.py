"""The classification head alone: the network below it stays as it is, and its features are those of the base.

With the mean cross-entropy of ``softmax(W h + b)`` of frozen features h, what trains is a convex problem, which the
methods for convex objectives need (``schedule=dadao``). It is linear probing, and the smallest state that there is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from clients.adapters.base import Adapter
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.models import Base


@dataclass(frozen=True)
class Head(Adapter):
    """Nothing but the head trains. Saved as a PEFT adapter that adapts no module and brings a head of its own."""

    def __post_init__(self) -> None:
        if self.target_modules is not None:
            raise ConfigError("adapter.target_modules", self.target_modules, "null: no module is adapted")
        if not self.train_head:
            raise ConfigError("adapter.train_head", False, "true: nothing else trains")

    def config(self, targets: list[str]) -> Any:
        from peft import LoraConfig
        from peft.utils.constants import DUMMY_TARGET_MODULES

        # PEFT's own name for no target at all, under which it saves and loads like any other adapter.
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES)

    def attach(self, base: Base, targets: list[str], seed: int) -> nn.Module:
        from peft import get_peft_model

        if base.head is None:
            raise ConfigError("adapter", "head", "for classifiers: a causal language model has no head of its own")
        config = self.config(targets)
        config.modules_to_save = [base.head]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base.module, config)
        # PEFT sets the name from the model's own configuration; the base knows better.
        model.peft_config["default"].base_model_name_or_path = base.name
        return model.eval()
