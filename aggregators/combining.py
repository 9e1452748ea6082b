"""What rules that combine updates have in common, with a server or without: a robust rule in place of the mean.

    x' = x + combine(pre(u_1 .. u_n))

with ``combine`` one of `aggregators.robust` (Krum, medians, ...), ``pre`` what is done to the updates before (nearest
neighbour mixing, bucketing, clipping), and ``f`` how many of the updates may be hostile. ``space`` says where distances
and norms are measured: between the factors' updates as they are sent, or between the weight changes that they stand
for, ``D_i = s (B_i A_i - B_0 A_0)``, by inner products of factors. Coordinates of factors mean something only where all
clients share one factor (docs/robust.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from aggregators import robust
from aggregators.base import Aggregator, ServerOptimizer
from aggregators.factored import trained
from aggregators.robust.base import Auto, Mean, NoPre, Pre, Rule
from fl.config import setting
from fl.errors import ConfigError, RunStopped
from fl.state import ServerState, Update

ROOT = -1  # the "client" of an update that the server made itself (FLTrust)
_MEMORY = "combine/"  # names of what a rule remembers, in `ServerState.extra`


@dataclass(frozen=True)
class Combining(Aggregator):
    """An aggregation rule whose mean may be replaced by a robust rule."""

    combine: Rule = setting(Auto(), help="how updates become one: the mean, or a robust rule")
    pre: Pre = setting(NoPre(), help="what is done to the updates before")
    f: int = setting(0, ge=0, help="updates that may be hostile, which a robust rule withstands")
    space: str = setting(
        "factors", choices=["factors", "product"], help="where distances are measured: factors, or weight changes B A"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self.combine).__name__
        if self.space == "product" and not self.combine.weighs:
            allowed = f"factors: {name} acts on coordinates, and of a product B A there are d times k"
            raise ConfigError("aggregator.space", "product", allowed, "Use a rule of distances, such as krum.")
        if self.space == "product" and self.combine.stateful:
            allowed = f"factors: {name} remembers earlier updates, and products are known by inner products only"
            raise ConfigError("aggregator.space", "product", allowed, "Try aggregator.combine.start=zero.")

    @property
    def plain(self) -> bool:
        """Whether it is the weighted mean and nothing else."""
        return isinstance(self.combine, Auto | Mean) and isinstance(self.pre, NoPre)

    @property
    def linear(self) -> bool:
        return self.mean_only and self.plain

    def check(self, adapter, optimizer: ServerOptimizer) -> None:
        super().check(adapter, optimizer)
        if not self.plain and adapter.mixed_ranks:
            allowed = f"one rank for all clients with {type(self.combine).__name__}: it compares updates"
            raise ConfigError("adapter.rank", getattr(adapter, "rank", None), allowed, "Use aggregator.combine=mean.")
        if self.combine.stateful and adapter.form == "alternating":
            name = type(self.combine).__name__
            allowed = f"one that trains the same tensors in every round, with {name}: it remembers earlier updates"
            raise ConfigError("adapter", type(adapter).__name__, allowed)

    def check_round(self, number: int) -> None:
        """Raise `ConfigError` where ``number`` updates are too few for the rule to withstand ``f`` hostile ones."""
        if not self.plain:
            self.combine.check(number, self.f, self.pre)

    def shared(self, ordered: Sequence[Update]) -> np.ndarray:
        """The weights of ``ordered`` under the rule: those of `shares`, or equal ones where it knows no weights."""
        return self.shares(ordered) if self.combine.weighted else np.full(len(ordered), 1 / len(ordered))

    def combined(
        self, server: ServerState, ordered: Sequence[Update], key: tuple = ()
    ) -> tuple[np.ndarray | None, np.ndarray | None, dict[str, np.ndarray]]:
        """The combined update ``(n,)`` float64 (None in product space), the updates' coefficients in it ``(n,)`` (None
        for rules of coordinates), and the new `ServerState.extra`. ``ordered`` may hold the server's own update.

        Raises `RunStopped` where the updates are too few.
        """
        root = [u for u in ordered if u.client == ROOT]
        rest = [u for u in ordered if u.client != ROOT]
        try:
            self.check_round(len(rest))
        except ConfigError as error:
            raise RunStopped(
                f"{len(rest)} accepted updates are too few: {error} The state before this round is in the checkpoint."
            ) from error
        if len({id(u.columns) for u in rest}) > 1:
            raise RunStopped(
                "A robust rule compares updates of the same tensors; these clients trained different ones."
            )
        clients, weights = [u.client for u in rest], torch.from_numpy(self.shared(rest))
        memory = {n.removeprefix(_MEMORY): a for n, a in server.extra.items() if n.startswith(_MEMORY)}
        vector: np.ndarray | None = None
        coefficients: np.ndarray | None
        if self.space == "product":
            geometry = factored(server, [*rest, *root])
            coefficients, memory = robust.weigh(
                self.combine, self.pre, self.f, geometry, weights, clients=clients, memory=memory,
                root_index=len(rest) if root else None, seed_key=key,
            )  # fmt: skip
        else:
            rows = torch.from_numpy(np.stack([u.vector for u in rest]))
            own = torch.from_numpy(np.asarray(root[0].vector)) if root else None
            found = robust.combine(
                self.combine, self.pre, self.f, rows, weights, clients=clients, memory=memory, root=own, seed_key=key
            )
            vector, coefficients, memory = found.vector.cpu().numpy(), found.coefficients, found.memory
        kept = {n: a for n, a in server.extra.items() if not n.startswith(_MEMORY)}
        return vector, coefficients, kept | {_MEMORY + n: a for n, a in memory.items()}

    def step(self, rows: np.ndarray, weights: np.ndarray, peers: Sequence[int], key: tuple) -> np.ndarray:
        """A peer's step ``(d,)``, from the differences ``(n, d)`` of what it heard (its own zero row among them)."""
        found = robust.combine(
            self.combine, self.pre, self.f, torch.from_numpy(rows), torch.from_numpy(np.asarray(weights, np.float64)),
            clients=list(peers), memory={}, root=None, seed_key=key,
        )  # fmt: skip
        return found.vector.cpu().numpy()

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """What the rule makes of ``rows`` ``(n, d)``, all alike, ``(d,)``: what an attacker knows of it."""
        return self.step(rows, np.full(len(rows), 1 / len(rows)), range(len(rows)), ("defence",))


def factored(server: ServerState, updates: Sequence[Update]) -> robust.Factored:
    """The updates' weight changes ``D_i = s (B_i A_i - B_0 A_0)`` in factors, without cancellation, and what is no
    factor as it is.

        D_i = s [dB_i, B_0] [A_i; dA_i]

    (with a core R between them: its product with B). Of a module of which nothing trains there is nothing.
    """
    space = server.space
    lefts: list[list[torch.Tensor]] = []
    rights: list[list[torch.Tensor]] = []

    def change(update: Update, name: str) -> np.ndarray:
        whole = np.zeros(space.layout.size)
        whole[slice(None) if update.columns is None else update.columns] = update.vector
        return space.tensor(whole, name)

    x = server.vector.astype(np.float64)
    for module in space.modules:
        left, right = [], []
        a0, b0 = space.tensor(x, module.a), space.tensor(x, module.b)
        a0 = a0.reshape(len(a0), -1)
        if module.core is not None:
            core0 = space.tensor(x, module.core)
            b0 = b0 @ core0 if core0.ndim == 2 else b0 * core0
        for update in updates:
            db = change(update, module.b) if trained(space, update, module.b) else np.zeros_like(b0)
            da = np.zeros_like(a0)
            if trained(space, update, module.a):
                da = change(update, module.a).reshape(a0.shape)
            if module.core is not None:
                core = core0 + (change(update, module.core) if trained(space, update, module.core) else 0)
                whole = space.tensor(x, module.b) + db
                db = (whole @ core if core.ndim == 2 else whole * core) - b0
            left.append(torch.from_numpy(module.scale * np.concatenate([db, b0], axis=1)))
            right.append(torch.from_numpy(np.concatenate([a0 + da, da])))
        lefts.append(left)
        rights.append(right)
    plain = [n for n in space.layout.names if n not in space.of_tensor]
    rest = [np.concatenate([np.zeros(0), *(change(u, n).reshape(-1) for n in plain)]) for u in updates]
    return robust.Factored(lefts, rights, torch.from_numpy(np.stack(rest)))


def scaled(updates: Sequence[Update], coefficients: np.ndarray) -> tuple[list[Update], np.ndarray]:
    """Updates and shares that add up to one whose mean is ``sum_i c_i u_i``: the rest is an update of nothing."""
    rest = 1.0 - float(coefficients.sum())
    still = replace(updates[0], client=ROOT, vector=np.zeros_like(updates[0].vector), examples=0)
    return [*updates, still], np.append(coefficients, rest)
