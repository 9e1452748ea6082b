"""Tiny models of four families, not square where the family allows it, for comparing the cohort with plain PEFT."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from clients.models import Base
from fl.keys import seeded_globals

VOCABULARY = 61


def tiny(family: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Base, list[str]]:
    """A frozen tiny model and the names of modules to adapt. ``family``: bert, gpt2, llama, opt."""
    with seeded_globals(7, "tiny", family):
        module, task, head, targets = _BUILD[family](dropout)
    module = module.to(dtype).eval().requires_grad_(False)
    return Base(module=module, tokenizer=None, task=task, head=head, name=f"tiny-{family}", fingerprint=family), targets


def _bert(dropout: float) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3, max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
        classifier_dropout=dropout, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config), "classification", "classifier", ["query", "intermediate.dense"]


def _gpt2(dropout: float) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=32, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config), "causal_lm", None, ["c_attn"]


def _llama(dropout: float) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), "causal_lm", None, ["q_proj", "v_proj"]


def _opt(dropout: float) -> tuple[nn.Module, str, str | None, list[str]]:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=24, dropout=dropout, attention_dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config), "causal_lm", None, ["q_proj", "fc1"]


_BUILD = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "opt": _opt}

FAMILIES = tuple(_BUILD)


def batches(task: str, sizes: list[int], seed: int = 0) -> list[SimpleNamespace]:
    """One ragged batch a slot: ``sizes[s]`` samples of 3 to 9 tokens, padded to the slot's longest."""
    from clients.data.batch import Batch

    source = torch.Generator().manual_seed(seed)
    out = []
    for size in sizes:
        lengths = torch.randint(3, 10, (size,), generator=source)
        width = int(lengths.max())
        ids = torch.randint(2, VOCABULARY, (size, width), generator=source)
        mask = (torch.arange(width) < lengths[:, None]).long()
        ids = ids * mask
        labels = (
            torch.randint(0, 3, (size,), generator=source)
            if task == "classification"
            else torch.where(mask.bool(), ids, -100)
        )
        out.append(Batch(input_ids=ids, attention_mask=mask, labels=labels))
    return out  # type: ignore[return-value]
