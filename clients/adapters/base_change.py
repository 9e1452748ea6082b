"""A change of the frozen base weights that every client makes: where FedEx's residual and FLoRA's stack go.

A `Change` says what is added to each module's weight, as two factors ``left (out, p) @ right (p, in)``, or as one
matrix ``(out, in)`` once that takes fewer numbers. It is kept beside the base, never merged into it: the base may be in
bfloat16, which would round the change away, and it is shared by all runs of a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Piece:
    """``left @ right``, ``(out, p) @ (p, in)``; with ``right`` None, ``left`` is the matrix ``(out, in)`` itself."""

    left: np.ndarray
    right: np.ndarray | None

    @property
    def rank(self) -> int:
        """The number p of columns of the factors; -1 for a matrix."""
        return -1 if self.right is None else self.left.shape[1]

    def matrix(self) -> np.ndarray:
        return self.left if self.right is None else self.left @ self.right

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """``left`` and ``right``; those of a matrix are itself and an identity, on its smaller side."""
        if self.right is not None:
            return self.left, self.right
        d, k = self.left.shape
        return (self.left, np.eye(k)) if k <= d else (np.eye(d), self.left)

    @property
    def numbers(self) -> int:
        """Scalars that describe it."""
        return self.left.size + (0 if self.right is None else self.right.size)


Change = Mapping[str, Piece]  # by the module's name


def grow(total: Change, more: Change) -> dict[str, Piece]:
    """``total + more``. Deterministic, so that a server and a client that add the same pieces hold the same bits.

    Factors are put side by side, which is exact, until a matrix would take fewer numbers.
    """
    out = dict(total)
    for name, piece in more.items():
        old = out.get(name)
        out[name] = compact(piece if old is None else _add(old, piece))
    return out


def _add(old: Piece, piece: Piece) -> Piece:
    if old.right is None or piece.right is None:
        return Piece(old.matrix() + piece.matrix(), None)
    return Piece(np.concatenate([old.left, piece.left], axis=1), np.concatenate([old.right, piece.right], axis=0))


def compact(piece: Piece) -> Piece:
    """The same change in fewer numbers: as a matrix where its rank is above ``out in / (out + in)``."""
    if piece.right is not None and piece.numbers > piece.left.shape[0] * piece.right.shape[1]:
        return Piece(piece.matrix(), None)
    return piece


def numbers(change: Change) -> int:
    """Scalars that describe ``change``."""
    return sum(piece.numbers for piece in change.values())


def pack(change: Change, modules: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """One vector of all pieces, in the order of ``modules``, and their ranks (0: no change, -1: a matrix)."""
    if unknown := set(change) - set(modules):
        raise ValueError(f"a change of {sorted(unknown)[0]}, which is not adapted")
    ranks = [change[name].rank if name in change else 0 for name in modules]
    parts = []
    for name in modules:
        if name in change:
            piece = change[name]
            parts += (
                [piece.left.reshape(-1)] if piece.right is None else [piece.left.reshape(-1), piece.right.reshape(-1)]
            )
    return np.concatenate(parts) if parts else np.zeros(0, np.float32), ranks


def packed_size(ranks: Sequence[int], shapes: Sequence[tuple[int, int]]) -> int:
    """The length of the vector that `pack` makes for these ranks and modules' ``(out, in)``."""
    return sum(d * k if r < 0 else r * (d + k) for r, (d, k) in zip(ranks, shapes, strict=True))


def unpack(
    vector: np.ndarray, ranks: Sequence[int], modules: Sequence[str], shapes: Sequence[tuple[int, int]]
) -> dict[str, Piece]:
    """Undo `pack`; views of ``vector``. Raises ValueError if the length is another."""
    if len(vector) != packed_size(ranks, shapes):
        raise ValueError(f"{len(vector)} numbers can't be a change of ranks {list(ranks)[:8]}")
    out, at = {}, 0
    for rank, name, (d, k) in zip(ranks, modules, shapes, strict=True):
        if rank == 0:
            continue
        size = d * k if rank < 0 else rank * d
        left = vector[at : at + size].reshape(d, -1)
        at += size
        right = None
        if rank > 0:
            right = vector[at : at + rank * k].reshape(rank, k)
            at += rank * k
        out[name] = Piece(left, right)
    return out
