"""What every base model offers, and what one that is loaded looks like."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fl.config import setting
from fl.errors import ConfigError

CLASSIFICATION = "classification"
CAUSAL_LM = "causal_lm"


@dataclass
class Base:
    """A loaded base model: frozen, in eval mode, with ``module(input_ids=, attention_mask=).logits``.

    ``head`` is the dotted name of the module that clients train beside their adapters (None for a causal language
    model), ``name`` is what an adapter's configuration calls its base model, and ``fingerprint`` names the weights.
    """

    module: nn.Module
    tokenizer: Any
    task: str
    head: str | None
    name: str
    fingerprint: str


@dataclass(frozen=True)
class ModelSpec(ABC):
    """The settings of a base model, and how to load it."""

    dropout: float = setting(0.0, ge=0, lt=1, help="hidden dropout; attention probabilities are never dropped")
    prefix_cache: str = setting(
        "auto", choices=["auto", "always", "never"], help="compute the layers below the first adapter once"
    )
    head_std: float = setting(
        0.0, ge=0, help="standard deviation of the weights of a new linear head; 0: it starts at zero"
    )

    @property
    @abstractmethod
    def task(self) -> str:
        """``classification`` or ``causal_lm``."""

    @property
    def zero_head(self) -> bool:
        """Whether a new head starts at zero, and so passes no gradient on until it has been trained."""
        return self.task == CLASSIFICATION and self.head_std == 0

    @property
    @abstractmethod
    def target_modules(self) -> list[str]:
        """The modules that an adapter changes unless told otherwise, in PEFT's form (the ends of dotted names)."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, with a padding token."""

    @abstractmethod
    def weights_id(self) -> str:
        """A text that names the weights' content (a hash, or the settings they are drawn from)."""

    @abstractmethod
    def load(
        self,
        num_labels: int | None,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        device: str | torch.device = "cpu",
    ) -> Base:
        """The model with a head of ``num_labels`` outputs (ignored by a causal language model).

        ``seed`` names the key of whatever is not in a checkpoint; ``attention`` is ``sdpa`` or ``eager``. Raises
        `ShoalError` where weights can't be had, `ConfigError` where a setting doesn't suit the model.
        """

    def fingerprint(self) -> str:
        """16 hex digits that name the settings and the weights' content, not the folder they lie in."""
        settings = {name: value for name, value in asdict(self).items() if name != "prefix_cache"}
        return digest(type(self).__name__, settings, self.weights_id())


def digest(*parts: Any) -> str:
    """16 hex digits of the SHA-256 of ``parts`` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def frozen(
    spec: ModelSpec, module: nn.Module, tokenizer: Any, head: str | None, name: str, seed: int, num_labels: int | None
) -> Base:
    """``module`` as a `Base`: no gradients, eval mode, no key-value cache in its forward pass."""
    module.requires_grad_(False)
    module.eval()
    config: Any = module.config
    if getattr(config, "use_cache", None):
        config.use_cache = False
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return Base(module, tokenizer, spec.task, head, name, digest(spec.fingerprint(), seed, num_labels))


def label_count(num_labels: int | None) -> int:
    """``num_labels``, checked: a classifier needs at least two."""
    if num_labels is None or num_labels < 2:
        raise ConfigError(
            "data",
            f"{num_labels} labels",
            "a classification model needs data with at least 2 labels",
            "Choose data with labels, or a causal language model (model=smollm2, tiny-decoder).",
        )
    return num_labels


def with_dropout(config: Any, probability: float) -> Any:
    """Set every hidden dropout in a transformers ``config`` to ``probability``, and that of attention to 0.

    Architectures name them differently (``hidden_dropout_prob``, ``resid_pdrop``, ``dropout`` ...), always with
    "drop" in the name and "att" only for attention probabilities. Dropping whole layers is switched off. Raises
    `ConfigError` where ``probability`` is above 0 and the architecture has no hidden dropout.
    """
    hidden = 0
    for name, value in config.to_dict().items():
        if "drop" not in name or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        whole = "att" in name or "layerdrop" in name or "path" in name
        hidden += not whole
        setattr(config, name, 0.0 if whole else probability)
    if probability > 0 and not hidden:
        raise ConfigError(
            "model.dropout",
            probability,
            f"a {config.model_type} model has no hidden dropout, so only 0 makes sense",
            "Adapters have a dropout of their own.",
        )
    return config
