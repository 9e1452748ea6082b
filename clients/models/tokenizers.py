"""Tokenizers that are made in memory: no files, no network."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clients.data.sentences import vocabulary

_ENCODER = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_DECODER = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def word_tokenizer(special: str) -> Any:
    """One token a word, lower-cased, over the words of ``data=tiny``; other words are unknown.

    ``special`` is ``encoder`` ([CLS] text [SEP], pairs joined by [SEP]) or ``decoder`` (text as it is).
    """
    names = _ENCODER if special == "encoder" else _DECODER
    words = {word: i for i, word in enumerate([*names.values(), *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=names["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(tokenizer, names)


def byte_tokenizer(special: str) -> Any:
    """One token a byte of UTF-8: 256 and the special ones, for architectures whose vocabulary is not at hand."""
    names = _ENCODER if special == "encoder" else _DECODER
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate([*names.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[], unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, names)


def _wrap(tokenizer: Tokenizer, names: dict[str, str]) -> Any:
    if "cls_token" in names:
        first, last = names["cls_token"], names["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B {last}",
            special_tokens=[(first, tokenizer.token_to_id(first)), (last, tokenizer.token_to_id(last))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)
