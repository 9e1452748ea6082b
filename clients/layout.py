"""How named tensors lie in one flat vector: the form in which a state travels, is optimised and is averaged.

S states of a cohort are one matrix ``(S, d)``; the tensors are views of its columns, in the order of the layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of a state, in order.

    ``size`` is d, the number of scalars; ``hash`` names the layout on the wire (16 hex digits of a SHA-256).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of ``tensors``, in their order."""
        return cls(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(s) for s in self.shapes)

    @cached_property
    def size(self) -> int:
        return sum(self.sizes)

    @cached_property
    def hash(self) -> str:
        text = ";".join(f"{n}:{','.join(map(str, s))}" for n, s in zip(self.names, self.shapes, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of ``flat`` ``(..., d)`` as named tensors ``(..., *shape)``."""
        if flat.shape[-1] != self.size:
            raise ValueError(f"the state has {flat.shape[-1]} scalars; this layout has {self.size}")
        parts = flat.split(list(self.sizes), dim=-1)
        return {
            n: p.unflatten(-1, s) if s else p.squeeze(-1)
            for n, s, p in zip(self.names, self.shapes, parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor], lead: int = 0) -> Tensor:
        """One tensor ``(*leading, d)`` from named tensors with ``lead`` leading axes; copies."""
        return torch.cat([tensors[n].reshape(*tensors[n].shape[:lead], -1) for n in self.names], dim=-1)

    def columns(self, names: Sequence[str]) -> Tensor:
        """Indices of the columns that hold the tensors ``names``."""
        wanted, start, out = set(names), 0, []
        for name, size in zip(self.names, self.sizes, strict=True):
            if name in wanted:
                out.append(torch.arange(start, start + size))
            start += size
        return torch.cat(out) if out else torch.zeros(0, dtype=torch.long)
