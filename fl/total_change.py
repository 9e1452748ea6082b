"""The total weight change of a server's state, as the factors of one plain LoRA adapter.

    Delta = D + s B A,      or D + s B R A, D + s B diag(g) A

with D what the rules have added to the base (`clients.adapters.base_change`). The factors side by side are
``L R = [L_1 L_2] [R_1; R_2]``. With thin QR of both stacks, ``L R = Q_L (T_L T_R^T) Q_R^T``, and the singular values of
``Delta`` are those of the small matrix in the middle (`aggregators.factored.svd`); only a D that is a matrix already is
taken apart whole.

    Delta = U S V^T,        left = U_q sqrt(S_q),   right = sqrt(S_q) V_q^T

has the squared error ``sum_{i > q} S_i^2``, the least that any change of rank q has (Eckart and Young, 1936).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from aggregators.factored import svd
from clients.adapters.base import Adapter
from clients.adapters.base_change import Piece
from clients.adapters.space import HEAD, LowRank
from clients.models import Base
from fl.config import setting
from fl.state import ServerState

# Factors are saved in float32, whose rounding changes the whole by about as much.
ROUNDING = 2.0**-24


@dataclass(frozen=True, eq=False)
class Total:
    """The change of every module in float32, and what was left out of it.

    ``needed`` is the largest rank of a module without a limit, ``relative_error`` the Frobenius norm of what was left
    out of all modules over that of the whole change.
    """

    changes: tuple[LowRank, ...]
    needed: int
    relative_error: float

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(change.left.shape[1] for change in self.changes)

    @property
    def truncated(self) -> bool:
        return self.rank < self.needed


def reloads(server: ServerState) -> bool:
    """Whether PEFT's own form of the adapter says all: nothing is added to the base, and no core is between factors."""
    return not server.base and all(module.core is None for module in server.space.modules)


def total(server: ServerState, rank: int | None = None) -> Total:
    """The best approximation of each module's total change of at most ``rank`` (None: no limit).

    Without a limit the rank is the exact one: singular values go only where all that are left out of a module are, in
    Frobenius norm, below float32's rounding of it. A change of zero keeps rank 1.
    """
    changes, needed, lost, size = [], 1, 0.0, 0.0
    for name, piece in _sums(server):
        u, s, vt = _svd(piece)
        tails = np.sqrt(np.cumsum(s[::-1] ** 2)[::-1])  # (m,): the norm of S_i, S_{i+1}, ...
        exact = max(1, int(np.count_nonzero(tails > ROUNDING * tails[0])))
        kept = exact if rank is None else min(exact, rank)
        needed = max(needed, exact)
        lost += float((s[kept:] ** 2).sum())
        size += float((s**2).sum())
        root = np.sqrt(s[:kept])
        changes.append(_rounded(name, u[:, :kept] * root, root[:, None] * vt[:kept]))
    return Total(tuple(changes), needed, float(np.sqrt(lost / size)) if size else 0.0)


def stacked(server: ServerState) -> Total:
    """The total change as it stands, without a decomposition: for merging. A matrix is its product with an identity."""
    changes = [_rounded(name, *piece.factors()) for name, piece in _sums(server)]
    return Total(tuple(changes), max(c.left.shape[1] for c in changes), 0.0)


def _sums(server: ServerState) -> Iterator[tuple[str, Piece]]:
    """Name and total change of each module, in float64; factors stay factors."""
    for change in server.space.delta(server.vector):
        left, right = change.left.reshape(len(change.left), -1), change.right.reshape(len(change.right), -1)
        old = server.base.get(change.name)
        if old is None:
            yield change.name, Piece(left, right)
        elif old.right is None:
            yield change.name, Piece(old.left + left @ right, None)
        else:
            yield change.name, Piece(np.concatenate([old.left, left], axis=1), np.concatenate([old.right, right]))


def _svd(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``U (out, m), S (m,), V^T (m, in)``, m at most the smallest of out, in and the columns of the factors."""
    if piece.right is None:
        u, s, vt = np.linalg.svd(piece.left, full_matrices=False)
        return u, s, vt
    return svd(piece.left, piece.right, min(*piece.left.shape, piece.right.shape[1]))


def _rounded(name: str, left: np.ndarray, right: np.ndarray) -> LowRank:
    return LowRank(name, left.astype(np.float32), right.astype(np.float32))


@dataclass(frozen=True)
class ScaleOne(Adapter):
    """Plain LoRA of scale exactly 1 (alpha = rank) and no dropout, with its own rank at each module."""

    ranks: dict[str, int] = setting({}, help="rank of each adapted module, by its full name")
    regular: bool = setting(False, help="give the modules as one regular expression, which matches full names alone")

    def config(self, targets: list[str]) -> Any:
        from peft import LoraConfig

        largest = max(self.ranks.values())
        # PEFT reads a key as a regular expression for the end of a name; the leading ^ makes it the whole name.
        own = {f"^{re.escape(name)}": rank for name, rank in self.ranks.items() if rank < largest}
        return LoraConfig(
            r=largest,
            lora_alpha=largest,
            target_modules="|".join(map(re.escape, targets)) if self.regular else list(targets),
            rank_pattern=own,
            alpha_pattern=dict(own),
        )


PREFIX = "base_model.model."  # before the base's own names in those of a PEFT model


def attach(base: Base, changes: Sequence[LowRank], server: ServerState, train_head: bool) -> nn.Module:
    """``base`` with ``changes`` as a plain LoRA adapter, and with the head of ``server``, as a ``PeftModel``.

    Raises ValueError where the state has tensors that are neither factors nor of the head: they would be lost.
    """
    space = server.space
    heads = [n for n, group in zip(space.layout.names, space.groups, strict=True) if group == HEAD]
    if unknown := set(space.layout.names) - set(space.of_tensor) - set(heads):
        raise ValueError(f"the tensor {sorted(unknown)[0]} is no factor of a weight change")
    ranks = {change.name.removeprefix(PREFIX): change.left.shape[1] for change in changes}
    # A list of names is read as ends of names: fine unless another module's name ends in one of them.
    ends = tuple(f".{name}" for name in ranks)
    regular = any(name.endswith(ends) for name, _ in base.module.named_modules() if name not in ranks)
    model = ScaleOne(list(ranks), train_head, ranks, regular).attach(base, [], 0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for change in changes:
            layer: Any = model.get_submodule(change.name)
            if "default" in layer.lora_A:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            else:
                a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            a.copy_(torch.from_numpy(change.right).reshape(a.shape))
            b.copy_(torch.from_numpy(change.left).reshape(b.shape))
        for name in heads:
            parameters[name].copy_(torch.tensor(space.tensor(server.vector, name)))
    return model
