"""Algebra of weight changes in factored form: what the rules for low-rank updates share.

Client i ends in ``y_i``: its own columns of what it started from, plus its update. Its weight change is
``delta_i = s B_i A_i`` (or ``s B R_i A``) with zeros beyond its rank. What a rule is held to is

    increment + delta(new) = D* = sum_i p_i delta_i

with ``increment`` what it adds to the base. A sum of products is kept as two stacks, ``sum_i L_i R_i = [L_1 .. L_N]
[R_1; ..; R_N]``: with thin QR of both, everything that is asked of it (norm, singular values, best approximation) is a
matter of a small matrix ``core``, since ``L R = Q_L (T_L T_R^T) Q_R^T`` and the Q have orthonormal columns. Unlike the
traces of Gram matrices, this loses no digits where the terms cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from aggregators.base import Aggregator, ServerOptimizer, in_client_order, move
from aggregators.mean import combined, weighted_mean
from clients.adapters.initial.factors import qr as signed_qr
from clients.adapters.space import Module, Space
from fl.state import ServerState, Update

# Stacks of a higher rank than this are not measured: QR of them would take longer than a round.
MAX_STACK = 1024


def heard(rule: Aggregator, updates: Sequence[Update]) -> tuple[list[Update], np.ndarray]:
    """The updates that have a weight under ``rule``, in the order of the clients, and their weights ``p``."""
    ordered = in_client_order(updates)
    return weighty(ordered, rule.shares(ordered))


def weighty(updates: Sequence[Update], shares: np.ndarray) -> tuple[list[Update], np.ndarray]:
    """The updates that have a weight, and their weights: the others would only make stacks longer."""
    kept = [i for i, share in enumerate(shares) if share > 0]
    return [updates[i] for i in kept], shares[kept]


def span(space: Space, update: Update, name: str) -> slice:
    """Where the entries of the tensor ``name`` are in the update; empty where it was not trained."""
    low, high = space.spans[name]
    if update.columns is None:
        return slice(low, high)
    found = np.searchsorted(update.columns, (low, high))
    return slice(int(found[0]), int(found[1]))


def trained(space: Space, update: Update, name: str) -> bool:
    """Whether the update has entries of the tensor ``name``."""
    part = span(space, update, name)
    return part.stop > part.start


def end(server: ServerState, update: Update, name: str) -> np.ndarray:
    """The client's own block of the tensor ``name`` of ``y_i``, as float64."""
    space = server.space
    source = server.vector if update.start is None else update.start
    block = space.tensor(source, name)[space.block(name, update.client)]
    part = span(space, update, name)
    if part.stop == part.start:
        return block.astype(np.float64)
    return np.add(block, update.vector[part].reshape(block.shape), dtype=np.float64)


def factors(server: ServerState, update: Update, module: Module) -> tuple[np.ndarray, np.ndarray]:
    """``(left, right)`` float64, ``(out, r_i)`` and ``(r_i, in)``: the client's weight change ``delta_i``."""
    left = module.scale * end(server, update, module.b)
    if module.core is not None:
        core = end(server, update, module.core)
        left = product(left, core) if core.ndim == 2 else left * core
    right = end(server, update, module.a)
    return left, right.reshape(len(right), -1)


def stacks(
    server: ServerState,
    module: Module,
    updates: Sequence[Update],
    shares: np.ndarray,
    dtype: type | np.dtype = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """``D*`` of ``module`` as ``left (out, p) @ right (p, in)``: the clients' factors, with ``p_i`` on the right.

    ``p = sum_i r_i``. Computed in float64 and rounded once to ``dtype``.
    """
    ranks = [server.space.rank(module, u.client) for u in updates]
    d, k = server.space.sizes(module)
    left, right = np.empty((d, sum(ranks)), dtype), np.empty((sum(ranks), k), dtype)
    at = 0
    for update, share, rank in zip(updates, shares, ranks, strict=True):
        own, at = slice(at, at + rank), at + rank
        left[:, own], a = factors(server, update, module)
        np.multiply(a, share, out=right[own], casting="same_kind")
    return left, right


def mean_step(
    server: ServerState, updates: Sequence[Update], shares: np.ndarray, stale: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """From the server's vector to the mean of the clients' zero-padded states: ``(n,)`` float64 and its columns.

    With equal ranks it is the mean of the updates, as in `FedAvg`. A client of a lower rank counts as one with zeros
    beyond it, which keeps ``delta(new) = D*`` wherever ``delta`` is linear in what trains; so a rank that few of the
    clients own shrinks towards zero. Updates are added to the server's present vector; with ``stale``, to the vector
    that each client started from.

    A rank that no client owns gets a zero product by one zero factor, never two: where B and A are both zero, both
    gradients are, and the rank would be lost for good.
    """
    space, x = server.space, server.vector
    same = len({id(u.columns) for u in updates}) == 1
    if not same:  # `combined` wants columns of all or of none
        updates = [u if u.columns is not None else replace(u, columns=space.columns(None, u.client)) for u in updates]
    mean, columns = combined(updates, shares)
    late = [(p, u.start) for p, u in zip(shares, updates, strict=True) if u.start is not None and u.start is not x]
    low = [m for m in space.modules if min(space.rank(m, u.client) for u in updates) < m.rank]
    if not low and not (stale and late):
        return mean, None if columns is None or len(columns) == len(x) else columns
    step = np.zeros(space.layout.size)
    moved = np.zeros(space.layout.size, bool)
    every = slice(None) if columns is None else columns
    step[every], moved[every] = mean, True
    for module in space.modules if stale and late else ():
        for name in filter(None, (module.a, module.b, module.core)):
            mine = space.tensor(step, name)
            for update, share in zip(updates, shares, strict=True):
                if update.start is not None and trained(space, update, name):
                    own = space.block(name, update.client)
                    gap = space.tensor(update.start, name)[own].astype(np.float64) - space.tensor(x, name)[own]
                    mine[own] += share * gap
    for module in low:
        moving = [n for n in (module.a, module.b, module.core) if n and any(trained(space, u, n) for u in updates)]
        _pad(server, module, moving, updates, shares, step)
        for name in moving:
            moved[slice(*space.spans[name])] = True
    return step[moved], None if moved.all() else np.flatnonzero(moved)


def _pad(
    server: ServerState,
    module: Module,
    moving: Sequence[str],
    updates: Sequence[Update],
    shares: np.ndarray,
    step: np.ndarray,
) -> None:
    """Take from ``step``, in place, what clients of a low rank miss of the ``moving`` tensors of ``module``."""
    space, x = server.space, server.vector
    ranks = np.array([space.rank(module, u.client) for u in updates])
    index = np.arange(module.rank)
    owners = (ranks[:, None] > index).sum(axis=0)  # (r,)
    missing = np.where(owners == 0, 1.0, np.where(ranks[:, None] > index, 0.0, shares[:, None]).sum(axis=0))  # (r,)
    for name in moving:
        value, change = space.tensor(x, name), space.tensor(step, name)
        if name == module.core:
            change -= (np.maximum.outer(missing, missing) if value.ndim == 2 else missing) * value
            continue
        axis = 0 if name == module.a else 1
        lacks = missing
        if module.core is None:
            other = module.b if name == module.a else module.a
            zero = ~np.moveaxis(space.tensor(x, other), 1 - axis, 0).reshape(module.rank, -1).any(axis=1)  # (r,)
            # B goes to zero where both train; where one trains, it does unless the other is zero already.
            stays = (owners == 0) & (axis == 0 if other in moving else zero)
            lacks = np.where(stays, 0.0, missing)
        change -= np.expand_dims(lacks, tuple(i for i in range(value.ndim) if i != axis)) * value


def advance(
    server: ServerState, step: np.ndarray, columns: np.ndarray | None, optimizer: ServerOptimizer | None
) -> ServerState:
    """The next version, after one step of the optimiser along ``step`` in ``columns``, as `mean_step` gives them."""
    label = "" if columns is None else f"{columns[0]}+{len(columns)}/"
    return move(server.replace(increment={}), step, optimizer, columns, label)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` in float64, like all linear algebra here on torch's threads.

    A run keeps torch to one thread in its parent process; NumPy's library has threads of its own, which beside busy
    workers make a small factorisation hundreds of times slower.
    """
    return (_tensor(a) @ _tensor(b)).numpy()


def _tensor(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(matrix.astype(np.float64, copy=False))


def qr(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thin QR in float64, with a diagonal of R that is not negative."""
    q, r = signed_qr(_tensor(matrix))
    return q.numpy(), r.numpy()


def svd(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(U, S, V^T)`` of ``left (out, p) @ right (p, in)``, cut to ``rank``: its best approximation of that rank.

    At most ``min(rank, p, in)`` of them. The rows of ``V^T`` are orthonormal, also where ``S`` is zero, and in the row
    space of ``right`` where its rows are independent; the largest entry of each is positive, which fixes the signs.
    """
    q_left, t_left = qr(left)
    q_right, t_right = qr(right.T)
    core = _tensor(product(t_left, t_right.T))
    u, s, vt = (t.numpy() for t in torch.linalg.svd(core, full_matrices=len(t_left) < len(t_right)))
    rank = min(rank, len(vt))
    vt = product(vt[:rank], q_right.T)
    real = min(rank, len(s))  # fewer where out is less than p and the rank
    wide, values = np.zeros((len(left), rank)), np.zeros(rank)
    wide[:, :real], values[:real] = product(q_left, u[:, :real]), s[:real]
    largest = np.abs(vt).argmax(axis=1)
    signs = np.where(vt[np.arange(rank), largest] < 0, -1.0, 1.0)
    return wide * signs, values, vt * signs[:, None]


def head_step(server: ServerState, updates: Sequence[Update], shares: np.ndarray, vector: np.ndarray) -> None:
    """Move what is no factor (a head) by the mean of the updates: in ``vector`` ``(d,)`` float64, in place."""
    space = server.space
    for name in space.layout.names:
        if name not in space.of_tensor and all(trained(space, u, name) for u in updates):
            parts = [u.vector[span(space, u, name)] for u in updates]
            vector[slice(*space.spans[name])] += weighted_mean(parts, shares)


def relative_error(
    server: ServerState, updates: Sequence[Update], shares: np.ndarray, new: ServerState
) -> float | None:
    """``||increment + delta(new) - D*||_F / ||D*||_F``, over all modules together, in float64.

    ``new`` is what a rule made of ``updates`` with weights ``shares``, its increment not yet folded. None where the
    factors of a module add up to more than `MAX_STACK` ranks; infinite where only ``D*`` is zero.
    """
    updates, shares = weighty(updates, shares)
    error = size = 0.0
    for module, change in zip(new.space.modules, new.space.delta(new.vector), strict=True):
        left, right = stacks(server, module, updates, shares)
        terms = [(change.left, change.right.reshape(len(change.right), -1))]
        if module.name in new.increment:
            terms.append(new.increment[module.name].factors())
        if sum(a.shape[1] for a, _ in terms) + left.shape[1] > MAX_STACK:
            return None
        # One QR of both sides: the error is the core of all columns, D* that of the last ones.
        _, t_left = qr(np.concatenate([*(a for a, _ in terms), -left], axis=1))
        _, t_right = qr(np.concatenate([*(b for _, b in terms), right]).T)
        first = t_left.shape[1] - left.shape[1]
        error += float(np.linalg.norm(product(t_left, t_right.T))) ** 2
        size += float(np.linalg.norm(product(t_left[:, first:], t_right[:, first:].T))) ** 2
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(np.sqrt(error / size))
