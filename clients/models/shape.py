"""A real architecture from its configuration alone, with random weights: to measure speed, not quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from clients.models.base import CAUSAL_LM, CLASSIFICATION, Base, ModelSpec, digest, frozen, label_count, with_dropout
from clients.models.pooled import PooledClassifier
from clients.models.pretrained import one_line
from clients.models.random_weights import from_config
from clients.models.tokenizers import byte_tokenizer
from fl.config import setting
from fl.errors import ConfigError

_BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 30522}
_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}
# Sizes of google-bert/bert-{base,large}-uncased, openai-community/gpt2 and meta-llama/Llama-3.{2-1B,1-8B}.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert-base": {**_BERT, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "bert-large": {
        **_BERT,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "gpt2": {"model_type": "gpt2"},
    "llama-1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}
_TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Shape(ModelSpec):
    """``architecture`` with ``config`` on top (any key of its transformers configuration), built on the device itself.

    An encoder gets mean pooling and a zero head. Text becomes bytes, so any data source runs.
    """

    architecture: str = setting("bert-base", choices=tuple(ARCHITECTURES), help="whose sizes to take")
    config: dict[str, Any] = setting({}, help="changes to its configuration, as {num_hidden_layers: 4}")

    @property
    def model_type(self) -> str:
        return ARCHITECTURES[self.architecture]["model_type"]

    @property
    def task(self) -> str:
        return CLASSIFICATION if self.model_type == "bert" else CAUSAL_LM

    @property
    def target_modules(self) -> list[str]:
        return list(_TARGETS[self.model_type])

    def tokenizer(self) -> Any:
        return byte_tokenizer(special="encoder" if self.task == CLASSIFICATION else "decoder")

    def weights_id(self) -> str:
        return digest("random", ARCHITECTURES[self.architecture])

    def load(
        self,
        num_labels: int | None,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        device: str | torch.device = "cpu",
    ) -> Base:
        tokenizer = self.tokenizer()
        config = with_dropout(self._configuration(tokenizer), self.dropout)
        options: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device}
        name = f"shoal/{self.architecture}-random"
        count = label_count(num_labels) if self.task == CLASSIFICATION else None
        try:
            if count is None:
                module = from_config(AutoModelForCausalLM, config, seed, **options)
                return frozen(self, module, tokenizer, None, name, seed, None)
            encoder = from_config(AutoModel, config, seed, add_pooling_layer=False, **options)
        except ValueError as error:
            raise ConfigError("model.config", self.config, one_line(error)) from error
        module = PooledClassifier(encoder, count, self.head_std, seed).to(device=device, dtype=dtype)
        return frozen(self, module, tokenizer, "classifier", name, seed, count)

    def _configuration(self, tokenizer: Any) -> Any:
        values = {**ARCHITECTURES[self.architecture], **self.config}
        if values["model_type"] != self.model_type:
            raise ConfigError("model.config.model_type", values["model_type"], f"only {self.model_type} here")
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values.setdefault(key, getattr(tokenizer, key, None))
        known = AutoConfig.for_model(self.model_type)
        for key in self.config:
            if not hasattr(known, key):
                raise ConfigError(f"model.config.{key}", self.config[key], f"{self.model_type} has no such setting")
        try:
            config = AutoConfig.for_model(**values)
        except Exception as error:
            # transformers validates its configurations with an exception class of its own for each kind of mistake.
            raise ConfigError("model.config", self.config, one_line(error)) from error
        if config.vocab_size < len(tokenizer):
            raise ConfigError("model.config.vocab_size", config.vocab_size, f"at least {len(tokenizer)}")
        return config
