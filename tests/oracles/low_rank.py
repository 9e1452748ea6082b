"""Slow twin of `aggregators.factored` and the rules for low-rank updates: dense matrices, one client at a time.

Here too: adapters, server states and updates to try them on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clients.adapters.base_change import Change
from clients.adapters.space import HEAD, Module, Space
from clients.layout import Layout
from fl.keys import generator
from fl.state import ServerState, Update

SIZES = ((7, 11), (9, 6))  # (out, in): not square, one wide and one tall
PHASES = {
    "lora": (("A", "B"),),
    "b": (("B",),),
    "alternating": (("B",), ("A",)),
    "core": (("R",),),
}
Dense = dict[str, np.ndarray]


def space_of(
    form: str = "lora",
    ranks: Sequence[int] = (3,),
    alphas: Sequence[float] = (5.0,),
    sizes: Sequence[tuple[int, int]] = SIZES,
    head: bool = True,
    fixed: int | None = None,
) -> Space:
    """The space of an adapter of ``form``; clients are dealt ``ranks`` and ``alphas``, but not at module ``fixed``."""
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    groups: list[str] = []
    modules = []
    scales = tuple(a / r for a, r in zip(alphas, ranks, strict=True))
    full = max(ranks)
    mixed = len(set(zip(ranks, scales, strict=True))) > 1
    for i, (d, k) in enumerate(sizes):
        tensors = {"A": (full, k), "B": (d, full)} | ({"R": (full, full)} if form == "core" else {})
        for group, shape in tensors.items():
            names.append(f"layer{i}.{group}")
            shapes.append(shape)
            groups.append(group)
        core = f"layer{i}.R" if form == "core" else None
        scale = scales[list(ranks).index(full)]
        modules.append(Module(f"layer{i}", f"layer{i}.A", f"layer{i}.B", scale, full, core, i != fixed))
    if head:
        names += ["head.weight", "head.bias"]
        shapes += [(3, 4), (3,)]
        groups += [HEAD, HEAD]
    phases = tuple((*phase, *((HEAD,) if head else ())) for phase in PHASES[form])
    layout = Layout(tuple(names), tuple(shapes))
    return Space(layout, tuple(groups), phases, tuple(modules), tuple(ranks) if mixed else (), scales if mixed else ())


def server_of(space: Space, seed: int = 0, dtype: type = np.float64, version: int = 4) -> ServerState:
    vector = generator(seed, "server").normal(size=space.layout.size)
    return ServerState(vector.astype(dtype), space, version=version)


def updates_of(
    server: ServerState, number: int, seed: int = 0, round: int = 1, examples: Sequence[int] | None = None
) -> list[Update]:
    """An update of each of ``number`` clients, of what trains in ``round``."""
    space = server.space
    updates = []
    for client in range(number):
        columns = space.columns(space.trains(round), client)
        rng = generator(seed, "update", client)
        vector = rng.normal(size=len(columns)).astype(server.vector.dtype)
        count = int(rng.integers(1, 50)) if examples is None else examples[client]
        updates.append(Update(client, round, server.version, vector, count, columns=columns))
    return updates


def client_state(server: ServerState, update: Update) -> np.ndarray:
    """``y_i`` ``(d,)``: what the client owns of its start, plus its update; zeros beyond its rank."""
    start = server.vector if update.start is None else update.start
    y = np.zeros(server.layout.size)
    own = server.space.columns(None, update.client)
    y[own] = start[own]
    columns = range(server.layout.size) if update.columns is None else update.columns
    for column, value in zip(columns, update.vector, strict=True):
        y[column] += value
    return y


def dense(space: Space, vector: np.ndarray) -> Dense:
    """The weight change of each module as a matrix, from the definition."""
    at = dict(
        zip(space.layout.names, np.split(vector.astype(np.float64), np.cumsum(space.layout.sizes)[:-1]), strict=True)
    )
    shapes = dict(zip(space.layout.names, space.layout.shapes, strict=True))
    tensors = {name: flat.reshape(shapes[name]) for name, flat in at.items()}
    out = {}
    for m in space.modules:
        inner = np.eye(m.rank) if m.core is None else tensors[m.core]
        out[m.name] = m.scale * tensors[m.b] @ inner @ tensors[m.a]
    return out


def mean_delta(server: ServerState, updates: Sequence[Update], shares: Sequence[float]) -> Dense:
    """``D* = sum_i p_i delta_i``."""
    total = {m.name: np.zeros(server.space.sizes(m)) for m in server.space.modules}
    for update, share in zip(updates, shares, strict=True):
        for name, change in dense(server.space, client_state(server, update)).items():
            total[name] = total[name] + share * change
    return total


def mean_state(server: ServerState, updates: Sequence[Update], shares: Sequence[float]) -> np.ndarray:
    """``sum_i p_i y_i`` ``(d,)``: the clients' states, padded with zeros."""
    return sum(p * client_state(server, u) for p, u in zip(shares, updates, strict=True))  # type: ignore[return-value]


def change_of(change: Change, space: Space) -> Dense:
    zeros = {m.name: np.zeros(space.sizes(m)) for m in space.modules}
    return zeros | {name: piece.matrix().astype(np.float64) for name, piece in change.items()}


def total(state: ServerState) -> Dense:
    """``increment + delta(vector)``."""
    change = change_of(state.increment, state.space)
    return {name: change[name] + delta for name, delta in dense(state.space, state.vector).items()}


def error(server: ServerState, updates: Sequence[Update], shares: Sequence[float], new: ServerState) -> Dense:
    """``increment + delta(new) - D*``."""
    target = mean_delta(server, updates, shares)
    return {name: matrix - target[name] for name, matrix in total(new).items()}


def covariance(server: ServerState, updates: Sequence[Update], shares: Sequence[float]) -> Dense:
    """``s sum_i p_i (B_i - B)(A_i - A)`` with A and B the means of the padded factors: the error of FedIT, negated."""
    space = server.space
    mean = mean_state(server, updates, shares)
    out = {m.name: np.zeros(space.sizes(m)) for m in space.modules}
    for update, share in zip(updates, shares, strict=True):
        y = client_state(server, update)
        for m in space.modules:
            b = space.tensor(y, m.b) - space.tensor(mean, m.b)
            a = space.tensor(y, m.a) - space.tensor(mean, m.a)
            out[m.name] += share * m.scale * b @ a
    return out


def tail(matrix: np.ndarray, rank: int) -> float:
    """The Frobenius distance of ``matrix`` from the matrices of ``rank``."""
    return float(np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()))


def norm(matrices: Dense) -> float:
    """The Frobenius norm over all modules together."""
    return float(np.sqrt(sum((m**2).sum() for m in matrices.values())))
