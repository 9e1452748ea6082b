"""Texts to tokens, once: truncated, cut into pieces, joined in pairs, or a prompt with its response."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clients.data.tokens import TokenData
from clients.models.base import CAUSAL_LM
from clients.models.pretrained import quiet
from fl.errors import ShoalError

ROWS_AT_ONCE = 2000
_log = logging.getLogger(__name__)


@dataclass
class Examples:
    """n texts as a source gives them.

    ``second`` is the other text of a pair, or the response to the prompt ``texts`` where ``is_prompt``. ``labels``
    and ``groups`` are as in `TokenData`.
    """

    texts: list[str]
    second: list[str] | None = None
    is_prompt: bool = False
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    label_names: list[str] = field(default_factory=list)
    group_names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> Examples:
        """The examples ``indices``, in that order."""
        return Examples(
            [self.texts[i] for i in indices],
            None if self.second is None else [self.second[i] for i in indices],
            self.is_prompt,
            None if self.labels is None else self.labels[indices],
            None if self.groups is None else self.groups[indices],
            self.label_names,
            self.group_names,
        )


def tokenizer_id(tokenizer: Any) -> str:
    """16 hex digits that name a tokenizer: its rules, vocabulary and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Calls with truncation or padding leave their settings behind.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    rules["special"] = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]


def tokenise(
    examples: Examples, tokenizer: Any, *, task: str, max_length: int, chunk: bool, fingerprint: str
) -> TokenData:
    """Tokens of ``examples``, at most ``max_length`` a sample.

    A classifier gets the tokenizer's special tokens, a causal language model the text alone (a response ends with the
    end token). ``chunk`` cuts a text into pieces of ``max_length`` instead of truncating it; each piece is a sample.
    What is left with nothing to learn is dropped: no token, or for a causal model none after the first, or no token
    of the response. Raises `ShoalError` if that is everything.
    """
    pieces: list[np.ndarray] = []
    owners: list[int] = []
    prompts: list[int] = []
    with quiet():
        for row, ids, prompt in _encoded(examples, tokenizer, task, None if chunk else max_length):
            for start in range(0, len(ids), max_length):
                piece = ids[start : start + max_length]
                if len(piece) < (2 if task == CAUSAL_LM else 1) or len(piece) <= prompt:
                    continue
                pieces.append(piece)
                owners.append(row)
                prompts.append(prompt)
    if not pieces:
        raise ShoalError(
            f"none of the {len(examples)} texts has anything to learn within max_length={max_length} tokens; "
            "raise data.max_length, or look at the text columns."
        )
    rows = np.asarray(owners, dtype=np.int64)
    if lost := len(examples) - len(np.unique(rows)):
        _log.warning("left out %d of %d texts: nothing to learn within %d tokens", lost, len(examples), max_length)
    return TokenData(
        tokens=np.concatenate(pieces),
        offsets=np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64),
        labels=None if examples.labels is None else examples.labels[rows],
        groups=None if examples.groups is None else examples.groups[rows],
        label_names=examples.label_names,
        group_names=examples.group_names,
        task=task,
        pad_id=int(tokenizer.pad_token_id),
        fingerprint=fingerprint,
        prompt_lengths=np.asarray(prompts, dtype=np.int64) if examples.is_prompt else None,
    )


def _encoded(
    examples: Examples, tokenizer: Any, task: str, max_length: int | None
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(row, int32 tokens, length of the prompt) of each example, truncated to ``max_length`` if given."""
    special = task != CAUSAL_LM
    for start in range(0, len(examples), ROWS_AT_ONCE):
        texts = examples.texts[start : start + ROWS_AT_ONCE]
        second = examples.second[start : start + ROWS_AT_ONCE] if examples.second else None
        if examples.is_prompt and second is not None:
            before, after = _ids(tokenizer, texts), _ids(tokenizer, second)
            end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            for i, (prompt, response) in enumerate(zip(before, after, strict=True)):
                ids = np.asarray([*prompt, *response, *end][:max_length], dtype=np.int32)
                yield start + i, ids, len(prompt)
            continue
        cut = {"truncation": True, "max_length": max_length} if max_length else {}
        encoded = tokenizer(texts, second, add_special_tokens=special, **cut)["input_ids"]
        for i, ids in enumerate(encoded):
            yield start + i, np.asarray(ids, dtype=np.int32), 0


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
