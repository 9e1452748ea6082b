"""Poisoned samples: copies of clients' samples with other labels, answers or tokens, beside the clean ones.

Copies are appended to the training set, so the clean samples keep their numbers, and which of the two a client trains
on is a matter of indices (`Poison.examples`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from clients.data.tokens import TokenData
from fl.errors import ConfigError

TRIGGER_LENGTH = 2
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Poison:
    """``train`` is the training set with copies appended; client c trains on ``copies[c]`` ``(m,)`` instead of
    ``sources[c]`` ``(m,)``, rising, from ``from_round`` on.

    ``triggered`` are the central test samples with the trigger, of those whose true label is not ``target``, labelled
    ``target``: the accuracy on them is the attack's success. None: there is no trigger.
    """

    train: TokenData
    from_round: int
    sources: Mapping[int, np.ndarray] = field(default_factory=dict)
    copies: Mapping[int, np.ndarray] = field(default_factory=dict)
    triggered: TokenData | None = None
    target: int | None = None

    def examples(self, client: int, round: int, examples: np.ndarray) -> np.ndarray:
        """``examples`` ``(k,)`` of ``client``, each with a poisoned copy replaced by it; the array itself if none."""
        sources = self.sources.get(client, _NONE)
        if round < self.from_round or not len(sources):
            return examples
        places = np.minimum(np.searchsorted(sources, examples), len(sources) - 1)
        return np.where(sources[places] == examples, self.copies[client][places], examples)


@dataclass(frozen=True, eq=False)
class Copy:
    """A poisoned copy of the sample ``source``. What is None is the source's own."""

    source: int
    tokens: np.ndarray | None = None
    label: int | None = None
    prompt_length: int | None = None


def poisoned(train: TokenData, copies: Mapping[int, Sequence[Copy]], from_round: int) -> Poison:
    """``train`` with each client's ``copies`` appended. ``train`` is left as it is."""
    sources = {c: np.array(sorted(copy.source for copy in made), np.int64) for c, made in copies.items()}
    every = [copy for made in copies.values() for copy in sorted(made, key=lambda copy: copy.source)]
    numbers, low = {}, len(train)
    for client, made in copies.items():
        numbers[client] = np.arange(low, low + len(made))
        low += len(made)
    return Poison(_extended(train, every), from_round, sources, numbers)


def _extended(data: TokenData, copies: Sequence[Copy]) -> TokenData:
    if not copies:
        return data
    rows = np.array([copy.source for copy in copies])
    more = data.select(rows, "")
    tokens = [tokens_of(data, c.source) if c.tokens is None else c.tokens.astype(np.int32) for c in copies]
    if more.labels is not None:
        more.labels = np.array([old if c.label is None else c.label for old, c in zip(more.labels, copies)], np.int64)
    if more.prompt_lengths is not None:
        lengths = [old if c.prompt_length is None else c.prompt_length for old, c in zip(more.prompt_lengths, copies)]
        more.prompt_lengths = np.array(lengths, np.int64)
    digest = hashlib.sha256(data.fingerprint.encode())
    for array in (rows, *tokens, more.labels, more.prompt_lengths):
        digest.update(b"none" if array is None else np.asarray(array, np.int64).tobytes() + b";")
    ends = data.offsets[-1] + np.cumsum([len(t) for t in tokens])
    return replace(
        data,
        tokens=np.concatenate([np.asarray(data.tokens), *tokens]),
        offsets=np.concatenate([data.offsets, ends]).astype(np.int64),
        labels=_joined(data.labels, more.labels),
        groups=_joined(data.groups, more.groups),
        prompt_lengths=_joined(data.prompt_lengths, more.prompt_lengths),
        fingerprint=digest.hexdigest(),
    )


def _joined(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def tokens_of(data: TokenData, sample: int) -> np.ndarray:
    """The tokens ``(T,)`` of one sample."""
    return np.asarray(data.tokens[data.offsets[sample] : data.offsets[sample + 1]])


def triggered(test: TokenData, trigger: np.ndarray, target: int, longest: int) -> TokenData:
    """The samples of ``test`` whose label is not ``target``, with the trigger, labelled ``target``."""
    assert test.labels is not None
    rows = np.flatnonzero(test.labels != target)
    copies = [Copy(int(row), inserted(tokens_of(test, int(row)), trigger, longest), target) for row in rows]
    whole = _extended(test, copies)
    return whole.select(np.arange(len(test), len(whole)), f"{whole.fingerprint} triggered")


def inserted(tokens: np.ndarray, trigger: np.ndarray, longest: int) -> np.ndarray:
    """``tokens`` ``(T,)`` with ``trigger`` after the first; what would make it longer than ``longest`` is left out
    before the last one, so that a sample still begins and ends as the tokenizer has it.
    """
    spare = max(len(tokens) + len(trigger) - longest, 0)
    middle, last = tokens[1:-1], tokens[1:][-1:]
    return np.concatenate([tokens[:1], trigger, middle[: max(len(middle) - spare, 0)], last]).astype(np.int32)


def rare_tokens(train: TokenData, number: int = TRIGGER_LENGTH) -> np.ndarray:
    """``(number,)``: the token ids that occur least in ``train``, of those that do (so that the model has them).

    Of equally rare ones the lowest. Raises `ConfigError` where there are too few.
    """
    ids, counts = np.unique(np.asarray(train.tokens), return_counts=True)
    ids, counts = ids[ids != train.pad_id], counts[ids != train.pad_id]
    if len(ids) < number:
        allowed = f"token ids: the training set has {len(ids)} different ones, too few to choose from"
        raise ConfigError("attack.trigger", None, allowed)
    return np.sort(ids[np.lexsort((ids, counts))[:number]])
