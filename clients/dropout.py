"""Dropout whose masks come from keys, so that they don't depend on the cohort, the padding or the order of work.

Each sample has its own generator, keyed by (seed, client, round, step, position in the batch) and used by the dropout
layers in the order of the forward pass. Masks are drawn at the sample's own length and laid into the padded batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fl.keys import Part, torch_generator


@dataclass
class DropoutKeys:
    """The generators of one forward pass. Empty means that dropout is off (evaluation).

    ``samples``: one generator a row of the batch (None for padding, or in a slot without dropout); ``lengths``: the
    tokens of each row; ``width``: the padded length T of the batch.
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


def drop(x: Tensor, p: float, keys: DropoutKeys) -> Tensor:
    """``x * mask / (1 - p)`` with mask ~ Bernoulli(1 - p) from ``keys``; ``x`` itself when p is 0 or there are none.

    ``x`` is ``(rows, tokens, hidden)``, ``(rows * tokens, hidden)`` or ``(rows, hidden)``. Raises ValueError for any
    other shape: attention probabilities, say, are never dropped here.
    """
    if p == 0 or not keys.samples:
        return x
    rows = len(keys.samples) if keys.rows is None else keys.rows
    if x.dim() == 2 and x.shape[0] == rows * keys.width and keys.width > 1:
        return drop(x.reshape(rows, keys.width, -1), p, keys).reshape(x.shape)
    tokens = x.dim() == 3 and x.shape[1] == keys.width
    if x.shape[0] != rows or not (tokens or x.dim() == 2):
        raise ValueError(f"dropout of a tensor {tuple(x.shape)} in a batch of {rows} samples and {keys.width} tokens")
    mask = torch.zeros_like(x)
    for row in range(rows):
        source = keys.samples[keys.first + row]
        if source is None:
            mask[row] = 1 - p
            continue
        # Only the sample's own tokens draw from its generator, so that padding changes no mask.
        mine = mask[row, : keys.lengths[keys.first + row]] if tokens else mask[row]
        mine.copy_(torch.rand(mine.shape, generator=source) >= p)
    return x * mask / (1 - p)


class KeyedDropout(nn.Module):
    """``nn.Dropout`` with the masks of `drop`; the identity when ``holder`` has no keys."""

    def __init__(self, p: float, holder: HasDropout):
        super().__init__()
        self.p = p
        self.holder = [holder]

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p, self.holder[0].dropout)


class FunctionalDropout(TorchFunctionMode):
    """Inside this context ``F.dropout``, which OPT and others call themselves, takes its masks from ``holder`` too.

    Its ``training`` flag is passed over, since the model is always in eval mode. ``found`` tells whether any call had
    p > 0.
    """

    def __init__(self, holder: HasDropout):
        super().__init__()
        self.holder, self.found = holder, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.dropout:
            return func(*args, **kwargs)
        p = float(kwargs["p"])
        self.found |= p > 0
        return drop(args[0], p, self.holder.dropout)


def install(model: nn.Module, holder: HasDropout) -> int:
    """Replace each ``nn.Dropout`` of ``model`` by a `KeyedDropout` reading ``holder``; returns how many have p > 0."""
    active = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(module, name, KeyedDropout(child.p, holder))
                active += child.p > 0
    return active
