"""Dropout whose masks come from keys, so that they don't depend on the cohort, the padding or the order of work.

Each sample has its own generator, keyed by (seed, client, step, position in the batch) and used by the dropout
layers in the order of the forward pass. Masks are drawn at the sample's own length and laid into the padded batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fl.keys import Part, torch_generator


@dataclass
class DropoutKeys:
    """The generators of one forward pass. Empty means that dropout is off (evaluation).

    ``samples``: one generator a row of the batch (None where the row is padding); ``lengths``: the tokens of each row;
    ``width``: the padded length T of the batch.
    """

    samples: list[torch.Generator | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    width: int = 0
    slots: int = 1
    first: int = 0
    rows: int | None = None

    @classmethod
    def of(
        cls,
        keys: Sequence[tuple[Part, ...] | None],
        counts: Sequence[int],
        offsets: Sequence[int],
        lengths: Tensor,
        width: int,
    ) -> DropoutKeys:
        """One generator for each real sample.

        ``keys[s]`` names slot s, ``counts[s]`` its real samples, ``offsets[s]`` the place of its first sample in its
        own batch; ``lengths`` ``(S, B)`` are tokens, ``width`` the padded length.
        """
        samples: list[torch.Generator | None] = []
        for key, count, offset in zip(keys, counts, offsets, strict=True):
            for j in range(lengths.shape[1]):
                real = key is not None and j < count
                samples.append(torch_generator(*key, "dropout", offset + j) if real and key is not None else None)
        return cls(samples, lengths.reshape(-1).tolist(), width, slots=len(keys))

    @contextlib.contextmanager
    def only(self, slot: int) -> Iterator[None]:
        """Inside the block the layers see the rows of one slot alone."""
        per = len(self.samples) // self.slots if self.samples else 0
        self.first, self.rows = slot * per, per
        try:
            yield
        finally:
            self.first, self.rows = 0, None


class HasDropout(Protocol):
    """Whatever holds the keys of the forward pass under way (`clients.stacked.Slots`)."""

    dropout: DropoutKeys


class KeyedDropout(nn.Module):
    """``y = x * mask / (1 - p)`` with mask ~ Bernoulli(1 - p) from `DropoutKeys`; the identity when it holds none."""

    def __init__(self, p: float, holder: HasDropout):
        super().__init__()
        self.p = p
        self.holder = [holder]

    def forward(self, x: Tensor) -> Tensor:
        keys = self.holder[0].dropout
        if self.p == 0 or not keys.samples:
            return x
        rows = len(keys.samples) if keys.rows is None else keys.rows
        if x.shape[0] != rows:
            raise ValueError(f"dropout over {x.shape[0]} rows; the batch has {rows}")
        sequence = x.dim() >= 3 and x.shape[1] == keys.width
        mask = torch.zeros_like(x)
        for row in range(rows):
            source = keys.samples[keys.first + row]
            if source is None:
                continue
            shape = (keys.lengths[keys.first + row], *x.shape[2:]) if sequence else tuple(x.shape[1:])
            keep = torch.rand(shape, generator=source) >= self.p
            if sequence:
                mask[row, : shape[0]] = keep.to(x)
            else:
                mask[row] = keep.to(x)
        return x * mask / (1 - self.p)


def install(model: nn.Module, holder: HasDropout) -> int:
    """Replace each ``nn.Dropout`` of ``model`` by a `KeyedDropout` reading ``holder``; returns how many have p > 0."""
    active = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(module, name, KeyedDropout(child.p, holder))
                active += child.p > 0
    return active
