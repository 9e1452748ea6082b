"""Tiny models of four families, not square where the family allows it, and tiny data for them."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

from clients.data.batch import Batch
from clients.data.tokens import TokenData
from clients.models import Base
from fl.keys import seeded_globals

VOCABULARY = 61


def tiny(
    family: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, layers: int = 2
) -> tuple[Base, list[str]]:
    """A frozen tiny model and the names of modules to adapt. ``family``: bert, gpt2, llama, opt."""
    with seeded_globals(7, "tiny", family):
        module, task, head, targets = _BUILD[family](dropout, layers)
    module = module.to(dtype).eval().requires_grad_(False)
    return Base(module=module, tokenizer=None, task=task, head=head, name=f"tiny-{family}", fingerprint=family), targets


def _bert(dropout: float, layers: int) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_labels=3, max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
        classifier_dropout=dropout, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config), "classification", "classifier", ["query", "intermediate.dense"]


def _gpt2(dropout: float, layers: int) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=layers, n_head=4, n_positions=32, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config), "causal_lm", None, ["c_attn"]


def _llama(dropout: float, layers: int) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):  # its float32 inside would hide errors below 1e-7
                setattr(module, name, nn.RMSNorm(24, eps=child.variance_epsilon))
    return model, "causal_lm", None, ["q_proj", "v_proj"]


def _opt(dropout: float, layers: int) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=24, ffn_dim=40, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=24, dropout=dropout, attention_dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config), "causal_lm", None, ["q_proj", "fc1"]


_BUILD = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "opt": _opt}

FAMILIES = tuple(_BUILD)


def batches(task: str, sizes: list[int], seed: int = 0) -> list[Batch]:
    """One ragged batch a slot: ``sizes[s]`` samples of 3 to 9 tokens, padded to the slot's longest."""
    data = token_set(task, sum(sizes), seed)
    starts = np.cumsum([0, *sizes])
    return [data.batch(np.arange(low, high)) for low, high in itertools.pairwise(starts)]


def token_set(task: str, number: int, seed: int = 0, shortest: int = 3, longest: int = 9) -> TokenData:
    """``number`` samples of random tokens, of lengths from ``shortest`` to ``longest``; 3 labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, number)
    return TokenData(
        tokens=rng.integers(2, VOCABULARY, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=rng.integers(0, 3, number) if task == "classification" else None,
        groups=None, label_names=["a", "b", "c"] if task == "classification" else [], group_names=[],
        task=task, pad_id=0, fingerprint=f"tiny-{task}-{number}-{seed}",
    )  # fmt: skip
