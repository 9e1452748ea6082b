"""A tokenised set of samples in flat arrays, which may lie on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from clients.data.batch import Batch

IGNORED = -100
_ARRAYS = ("tokens", "offsets", "labels", "groups", "prompt_lengths")
_NAMES = ("label_names", "group_names", "task", "pad_id", "fingerprint")


@dataclass(eq=False)
class TokenData:
    """n samples: sample i is ``tokens[offsets[i]:offsets[i + 1]]``.

    ``tokens`` (all,) int32, ``offsets`` (n + 1,) int64. ``labels`` (n,) int64 indexes ``label_names``; a causal
    language model doesn't train on them, but partitions may use them. ``groups`` (n,) int64 indexes
    ``group_names``, -1 where a sample belongs to none. ``prompt_lengths`` (n,) int64 counts a causal sample's leading
    tokens that carry no loss. ``fingerprint`` is the key of the content.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    groups: np.ndarray | None
    label_names: list[str]
    group_names: list[str]
    task: str
    pad_id: int
    fingerprint: str
    prompt_lengths: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, (n,) int64."""
        return np.diff(self.offsets)

    def batch(self, indices: np.ndarray) -> Batch:
        """The samples ``indices`` (m,) in that order, padded to the longest of them."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        positions = np.arange(lengths.max(initial=0))  # (T,)
        mask = positions < lengths[:, None]  # (m, T)
        flat = np.where(mask, self.offsets[indices][:, None] + positions, 0)
        ids = np.where(mask, self.tokens[flat], self.pad_id).astype(np.int64)
        if self.task == "causal_lm":
            counted = mask
            if self.prompt_lengths is not None:
                counted = mask & (positions >= self.prompt_lengths[indices][:, None])
            labels = np.where(counted, ids, IGNORED)
        elif self.labels is not None:
            labels = self.labels[indices]
        else:
            raise ValueError("a classification set needs labels")
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(labels))

    def select(self, indices: np.ndarray, fingerprint: str) -> TokenData:
        """The samples ``indices`` as a set of its own, in memory."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return TokenData(
            tokens=np.asarray(self.tokens)[np.repeat(self.offsets[indices], lengths) + inside],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[indices],
            groups=None if self.groups is None else self.groups[indices],
            label_names=self.label_names,
            group_names=self.group_names,
            task=self.task,
            pad_id=self.pad_id,
            fingerprint=fingerprint,
            prompt_lengths=None if self.prompt_lengths is None else self.prompt_lengths[indices],
        )

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files and the names as JSON into ``folder``, which is made."""
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is not None:
                np.save(folder / f"{name}.npy", array)
        about = {name: getattr(self, name) for name in _NAMES}
        about["arrays"] = [name for name in _ARRAYS if getattr(self, name) is not None]
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> TokenData:
        """The set saved in ``folder``, with its tokens mapped rather than read.

        Raises OSError, EOFError, ValueError or KeyError where files are missing or cut short.
        """
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        arrays: dict[str, np.ndarray | None] = dict.fromkeys(_ARRAYS)
        # np.load refuses pickled content unless told otherwise.
        for name in about.pop("arrays"):
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r" if name == "tokens" else None)
        return cls(**arrays, **about)  # type: ignore[arg-type]
