"""An encoder and a decoder with random weights and tens of thousands of parameters, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from clients.models.base import CAUSAL_LM, CLASSIFICATION, Base, ModelSpec, frozen, label_count, with_dropout
from clients.models.pooled import PooledClassifier
from clients.models.random_weights import from_config
from clients.models.tokenizers import word_tokenizer
from fl.config import setting


@dataclass(frozen=True)
class TinyEncoder(ModelSpec):
    """A random BERT, mean pooling and a zero head; its words are those of ``data=tiny``.

    The adapted ``intermediate.dense`` is 32 -> 48, so that a transposed matrix can't go unseen.
    """

    layers: int = setting(2, ge=1, help="transformer layers")
    task = CLASSIFICATION

    @property
    def target_modules(self) -> list[str]:
        return ["query", "value", "intermediate.dense"]

    def tokenizer(self) -> Any:
        return word_tokenizer(special="encoder")

    def weights_id(self) -> str:
        return "random"

    def load(
        self,
        num_labels: int | None,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        device: str | torch.device = "cpu",
    ) -> Base:
        count, tokenizer = label_count(num_labels), self.tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
        )
        # Drawn on the CPU in float32, so that a seed means the same weights on every device and in every dtype.
        encoder = from_config(
            AutoModel,
            with_dropout(config, self.dropout),
            seed,
            dtype=torch.float32,
            attention=attention,
            add_pooling_layer=False,
        )
        # Positions would else drown the words in a mean over a few random vectors.
        embeddings: Any = encoder.embeddings
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.data.mul_(0.1)
        module = PooledClassifier(encoder, count, self.head_std, seed).to(device=device, dtype=dtype)
        return frozen(self, module, tokenizer, "classifier", "shoal/tiny-encoder", seed, count)


@dataclass(frozen=True)
class TinyDecoder(ModelSpec):
    """A random Llama with grouped attention; its words are those of ``data=tiny``.

    Hidden size 32, 4 query heads of 12 over 2 key-value heads: ``q_proj`` is 32 -> 48 and ``v_proj`` 32 -> 24.
    """

    layers: int = setting(2, ge=1, help="transformer layers")
    task = CAUSAL_LM

    @property
    def target_modules(self) -> list[str]:
        return ["q_proj", "v_proj"]

    def tokenizer(self) -> Any:
        return word_tokenizer(special="decoder")

    def weights_id(self) -> str:
        return "random"

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
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        config = with_dropout(config, self.dropout)
        module = from_config(AutoModelForCausalLM, config, seed, dtype=dtype, attention=attention).to(device)
        return frozen(self, module, tokenizer, None, "shoal/tiny-decoder", seed, None)
