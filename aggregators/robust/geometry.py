"""Inner products of updates, as accurate as their differences: of plain rows, and of products B A in factors.

Squared distances by ``||x||^2 + ||y||^2 - 2 <x, y>`` lose as many digits as the norms exceed the distances, squared: of
float32 weights that differ by a thousandth of their size nothing is left. So inner products are taken about a point
near the updates, of differences, in float64. The mean is no such point: one update at 1e9 carries it away. A row of the
majority is: the one with the least median distance to the others (`aggregators.robust.base.medoid`). It is looked for
on some of the columns, and once more if the whole rows show that it was the wrong one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from aggregators.robust.base import medoid, squared_distances, typical
from fl.errors import RunStopped

_BLOCK = 524_288  # numbers of all rows that are worked on at a time
_SUMMED = 4_096  # columns whose products are added up in float32: more would lose digits
_SAMPLE = 1_024  # columns on which a centre is looked for
_PASSES = 4
# The squared distance of the majority from the centre, in terms of its own: more costs more than 4 of 16 digits.
_NEAR = 1e4
# Squared distances in terms of squared norms: where none is smaller, products in float32 leave some 5 digits of each.
_APART = 1e-2
_SAME = 1e-12


class Geometry(ABC):
    """Points whose inner products are known: those given, and the origin as the last one."""

    number: int  # of points that were given

    @cached_property
    @abstractmethod
    def gram(self) -> Tensor:
        """``<p_i - c, p_j - c>`` ``(N, N)`` float64 on the CPU, with N = number + 1, about some point c."""

    @cached_property
    @abstractmethod
    def norms(self) -> np.ndarray:
        """``||p_i||^2`` ``(number,)`` float64."""


def _apart(gram: Tensor, first: list[int]) -> bool:
    """Whether no two points that differ are much nearer to each other than to the centre."""
    seen = sorted(set(first))
    own = gram[seen][:, seen].numpy()
    norms = np.diag(own)
    return bool((squared_distances(own) >= _APART * (norms[:, None] + norms) * (1 - np.eye(len(seen)))).all())


def _finite(gram: Tensor) -> Tensor:
    if not bool(torch.isfinite(gram).all()):
        raise RunStopped(
            "An update has no finite norm (NaN, infinite, or too large for its square), so no rule can compare it with "
            "others. Refuse such updates before they are combined."
        )
    return gram


class Dense(Geometry):
    """Rows ``(n, d)`` of float32, float64 or bfloat16 on any device, and ``extra`` vectors ``(d,)`` after them."""

    def __init__(self, rows: Tensor, extra: Sequence[Tensor] = ()):
        self.rows, self.extra = rows, list(extra)
        self.number = len(rows) + len(self.extra)

    @cached_property
    def gram(self) -> Tensor:
        step = max(1, self.rows.shape[1] // _SAMPLE)
        some = Dense(self.rows[:, ::step].contiguous(), [vector[::step] for vector in self.extra])
        look, centre = some._settled(0, list(range(self.number + 1)))
        if step == 1:
            return look
        first = self._first(look)
        if self.rows.dtype != torch.float64 and _apart(look, first):
            gram = self._about(centre, first, torch.float32)
            if bool(torch.isfinite(gram).all()) and _apart(gram, first):
                return gram
        return self._settled(centre, first)[0]

    @cached_property
    def norms(self) -> np.ndarray:
        out = self.rows.new_zeros(len(self.rows), dtype=torch.float64)
        for part in blocks(self.rows):
            out += self.rows[:, part].to(torch.float64, copy=True).square_().sum(dim=1)
        extra = [vector.to(torch.float64).square().sum().cpu() for vector in self.extra]
        return _finite(torch.cat([out.cpu(), torch.tensor(extra, dtype=torch.float64)])).numpy()

    def _point(self, index: int) -> Tensor:
        if index == self.number:
            return torch.zeros_like(self.rows[0])
        return self.rows[index] if index < len(self.rows) else self.extra[index - len(self.rows)]

    def _first(self, look: Tensor) -> list[int]:
        """For each point and the origin the first that is equal to it, of those that some columns leave possible."""
        norms = look.diagonal().numpy()
        close = squared_distances(look.numpy()) <= _SAME * (norms[:, None] + norms)
        first = list(range(self.number + 1))
        for i, j in np.argwhere(np.triu(close, 1)).tolist():
            if first[j] == j and first[i] == i and bool((self._point(i) == self._point(j)).all()):
                first[j] = i
        return first

    def _settled(self, centre: int, first: list[int]) -> tuple[Tensor, int]:
        """The inner products about a row of the majority, looked for from row ``centre`` on, and that row."""
        n = len(self.rows)
        for _ in range(_PASSES):
            gram = _finite(self._about(centre, first, torch.float64))
            squared = squared_distances(gram[:n, :n].numpy())
            best = medoid(squared)
            if gram[best, best] <= _NEAR * typical(squared)[best]:
                break
            centre = best
        return gram, best

    def _about(self, centre: int, first: list[int], dtype: torch.dtype) -> Tensor:
        """``<p_i - p_c, p_j - p_c>`` of all points and the origin, c = ``centre``; equal ones are looked at once.

        Products in ``dtype``, of differences that are rounded once; blocks are added up in float64.
        """
        n, device = len(self.rows), self.rows.device
        seen = sorted(set(first))
        own = torch.tensor([i for i in seen if i < n], device=device)
        every = len(own) == n
        rest = [(k, i) for k, i in enumerate(seen) if i >= n]
        gram = torch.zeros((len(seen), len(seen)), dtype=torch.float64, device=device)
        for part in blocks(self.rows, _SUMMED):
            block = self.rows[:, part]
            points = torch.empty((len(seen), block.shape[1]), dtype=dtype, device=device)
            points[: len(own)] = block if every else block.index_select(0, own)
            points[: len(own)] -= block[centre]
            for k, i in rest:
                points[k] = (0 if i == self.number else self.extra[i - n][part].to(torch.float64)) - block[centre]
            gram += points @ points.T
        where = torch.tensor([seen.index(i) for i in first])
        return gram.cpu()[where][:, where]

    def combination(self, coefficients: Tensor) -> Tensor:
        """``sum_i a_i p_i`` ``(d,)`` float64, of ``coefficients`` ``(N,)``; a point with none is not looked at."""
        n = len(self.rows)
        chosen = coefficients[:n].nonzero().flatten()
        out = self.rows.new_empty(self.rows.shape[1], dtype=torch.float64)
        scale = coefficients[chosen].to(self.rows.device)
        chosen = chosen.to(self.rows.device)
        for part in blocks(self.rows):
            block = self.rows[:, part]
            block = block if len(chosen) == n else block.index_select(0, chosen)
            torch.mv(block.to(torch.float64).T, scale, out=out[part])
        for value, vector in zip(coefficients[n : self.number].tolist(), self.extra, strict=True):
            if value:
                out += value * vector.to(torch.float64)
        return out


class Factored(Geometry):
    """Weight changes in factors: ``D_i`` has, for each module, ``left_i @ right_i``, and a ``dense`` rest of its own.

    ``lefts[module][i]`` is ``(out, r_i)`` and ``rights[module][i]`` ``(r_i, in)``; ``dense`` ``(n, h)`` or None. Then

        <D_i, D_j> = sum_modules sum((left_i' left_j) * (right_i right_j')) + <dense_i, dense_j>

    about the origin, in float64: a squared distance is known to 1e-16 times the square of (norm / distance). Nothing of
    size out x in is made.
    """

    def __init__(
        self, lefts: Sequence[Sequence[Tensor]], rights: Sequence[Sequence[Tensor]], dense: Tensor | None = None
    ):
        self.lefts, self.rights, self.dense = lefts, rights, dense
        self.number = len(lefts[0]) if lefts else len(dense) if dense is not None else 0

    @cached_property
    def gram(self) -> Tensor:
        n = self.number
        gram = torch.zeros((n + 1, n + 1), dtype=torch.float64)
        for left, right in zip(self.lefts, self.rights, strict=True):
            ends = np.cumsum([0, *(x.shape[1] for x in left)]).tolist()
            owner = torch.repeat_interleave(torch.arange(n), torch.tensor([x.shape[1] for x in left]))
            across = torch.cat([x.to(torch.float64) for x in left], dim=1)  # (out, sum r)
            down = torch.cat([x.to(torch.float64) for x in right])  # (sum r, in)
            owner = owner.to(across.device)
            for i in range(n):
                own = slice(ends[i], ends[i + 1])
                both = (across[:, own].T @ across).mul_(down[own] @ down.T)  # (r_i, sum r)
                row = torch.zeros(n, dtype=torch.float64, device=both.device)
                gram[i, :n] += row.index_add_(0, owner, both.sum(dim=0)).cpu()
        if self.dense is not None:
            dense = self.dense.to(torch.float64)
            gram[:n, :n] += (dense @ dense.T).cpu()
        return _finite(gram)

    @cached_property
    def norms(self) -> np.ndarray:
        return self.gram.diagonal()[: self.number].numpy()


def blocks(rows: Tensor, most: int = _BLOCK) -> Iterator[slice]:
    """Ranges of the columns of ``rows`` ``(n, d)``, of ``most`` at most, and so few that a block stays in a cache."""
    width = min(most, max(1_024, _BLOCK // max(1, len(rows))))
    for start in range(0, rows.shape[1], width):
        yield slice(start, min(rows.shape[1], start + width))
