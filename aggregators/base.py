"""What every aggregation rule and every server optimiser offers, and the one step that they share.

A rule turns updates into one pseudo-gradient ``Delta`` ``(d,)`` (a direction of *increase* of the vector: new minus
start), and a server optimiser says how far to go along it. Rules that are only a function of the ``(n, d)`` updates
and their ``(n,)`` weights are written as a `Combine`, so that a peer without a server can use them too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fl.errors import RunStopped
from fl.state import ServerState, Update

# (n, d) updates (a matrix, or n rows that need not be copied into one), (n,) weights -> (d,) float64
Combine = Callable[[np.ndarray | Sequence[np.ndarray], np.ndarray | Sequence[float]], np.ndarray]
OptimizerState = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """How the server moves its vector along a pseudo-gradient. The settings are fields; what it remembers is passed."""

    @abstractmethod
    def step(
        self, vector: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The new vector and the new state, from the vector, the pseudo-gradient and the state, all float64 ``(d,)``.

        An empty ``state`` is the state before the first step. The arrays passed in are left as they are.
        """


@dataclass(frozen=True)
class Aggregator(ABC):
    """A rule that makes the next server state of the updates of some clients."""

    @abstractmethod
    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        """The state after ``updates``: ``version`` is one higher, ``round`` is left to the schedule.

        Without an ``optimizer`` the pseudo-gradient is added as it is.
        Pure, and independent of the order of ``updates`` bit for bit.
        Raises `fl.errors.RunStopped` where no update can be made (nothing to combine, no weight, not finite).
        """


def in_client_order(updates: Sequence[Update]) -> list[Update]:
    """``updates`` in an order that does not depend on when they arrived (a client heard twice: older start first).

    Floating-point sums depend on their order, so a sum over arrivals would not replay.
    """
    return sorted(updates, key=lambda u: (u.client, u.start_version, u.round, u.sent_ticks, u.arrived_ticks))


def move(server: ServerState, delta: np.ndarray, optimizer: ServerOptimizer | None = None) -> ServerState:
    """The state after one optimiser step along ``delta`` ``(d,)`` float64, rounded once to float32."""
    vector, memory = server.vector.astype(np.float64), server.optimizer
    vector, memory = (vector + delta, memory) if optimizer is None else optimizer.step(vector, delta, memory)
    with np.errstate(over="ignore"):
        rounded = vector.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise RunStopped(
            f"The server's adapter is no longer finite after version {server.version}: the steps grew without bound. "
            "Lower server_optimizer.lr or local.lr."
        )
    return server.replace(vector=rounded, optimizer=memory, version=server.version + 1)
