"""What every aggregation rule and every server optimiser offers, and the one step that they share.

A rule turns updates into one pseudo-gradient ``Delta`` ``(d,)`` (a direction of *increase* of the vector: new minus
start), and a server optimiser says how far to go along it. Rules that are only a function of the ``(n, d)`` updates
and their ``(n,)`` weights are written as a `Combine`, so that a peer without a server can use them too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from aggregators.staleness import Auto, Staleness
from fl.config import setting
from fl.errors import ConfigError, RunStopped
from fl.state import ServerState, Update

if TYPE_CHECKING:
    from clients.adapters.base import Adapter

# (n, d) updates (a matrix, or n rows that need not be copied into one), (n,) weights -> (d,) float64
Combine = Callable[[np.ndarray | Sequence[np.ndarray], np.ndarray | Sequence[float]], np.ndarray]
OptimizerState = Mapping[str, np.ndarray]

# The forms of adapter, in words.
FORMS = {
    "lora": "that trains A and B of B A",
    "b": "that trains B over a frozen A (ffa)",
    "alternating": "that trains A and B in turn (rolora)",
    "slice": "that trains one factor of each module (s2ft)",
    "core": "that trains R of B R A (lora_xs, lora_sb)",
    "gated": "that trains A, B and a gate (sora)",
    "other": "of another kind",
}


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """How the server moves its vector along a pseudo-gradient. The settings are fields; what it remembers is passed."""

    @property
    def plain(self) -> bool:
        """Whether it takes the mean update as it is."""
        return False

    @abstractmethod
    def step(
        self, vector: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The new vector and the new state, from the vector, the pseudo-gradient and the state, all float64 ``(d,)``.

        An empty ``state`` is the state before the first step. The arrays passed in are left as they are.
        """


@dataclass(frozen=True)
class Aggregator(ABC):
    """A rule that makes the next server state of the updates of some clients.

    ``takes`` are the forms of adapter (`clients.adapters.base.Adapter.form`) that it is defined for (empty: any),
    ``mixed`` the forms whose clients may have different ranks. ``optimizes`` says whether a server optimiser other
    than plain averaging means anything; ``stateful`` whether clients keep what they were sent (`fl.downlink`).
    `linear` says that the outcome depends on the updates' weighted mean alone, so that one update in place of them
    gives the same: what a server that only learns a (noisy) sum needs. ``mean_only`` is that by the rule's nature.
    """

    mean_only: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()
    mixed: ClassVar[tuple[str, ...]] = ()
    optimizes: ClassVar[bool] = True
    stateful: ClassVar[bool] = False

    weights: str | list[float] = setting(
        "examples",
        help="what a client counts for: examples (how many it has), uniform, or a list with a weight for each client",
    )
    staleness: Staleness = setting(Auto(), help="what becomes of updates that started from an old version")

    @property
    def linear(self) -> bool:
        """Whether the outcome depends on the updates' weighted mean alone."""
        return self.mean_only

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            if self.weights not in ("examples", "uniform"):
                allowed = "examples, uniform, or a list with a weight for each client"
                raise ConfigError("aggregator.weights", self.weights, allowed)
        elif not self.weights or min(self.weights) < 0 or max(self.weights) == 0:
            raise ConfigError("aggregator.weights", self.weights, "numbers >= 0 that are not all 0")

    def check(self, adapter: Adapter, optimizer: ServerOptimizer) -> None:
        """Raise `ConfigError`, before anything loads, unless this rule can act on ``adapter`` with ``optimizer``."""
        name, what = type(self).__name__, type(adapter).__name__
        if self.takes and adapter.form not in self.takes:
            forms = " or ".join(FORMS[form] for form in self.takes)
            raise ConfigError(
                "aggregator", name, f"it needs an adapter {forms}, which {what} is not", "See `shoal list adapters`."
            )
        if adapter.mixed_ranks and adapter.form not in self.mixed:
            raise ConfigError(
                "adapter.rank",
                getattr(adapter, "rank", None),
                f"one rank for all clients: {name} has no rule for mixed ranks of {what}",
                "Use aggregator=flora, flexlora or hetlora with adapter=lora, or fedsb with adapter=lora_sb.",
            )
        if not self.optimizes and not optimizer.plain:
            raise ConfigError(
                "server_optimizer",
                type(optimizer).__name__,
                f"sgd with lr 1 and no momentum: {name} sets the factors, so there is no direction to move along",
            )

    def check_clients(self, number: int) -> None:
        """Raise `ConfigError` where ``weights`` is a list that has not one weight for each of ``number`` clients."""
        if not isinstance(self.weights, str) and len(self.weights) != number:
            allowed = f"a weight for each of the {number} clients, not {len(self.weights)}"
            raise ConfigError("aggregator.weights", self.weights, allowed, "Or use examples or uniform.")

    def check_round(self, number: int) -> None:  # noqa: B027  (most rules take any number)
        """Raise `ConfigError` where ``number`` updates a round are too few for this rule."""

    def shares(self, updates: Sequence[Update]) -> np.ndarray:
        """``p`` ``(n,)`` float64, which adds up to 1: what each of ``updates`` counts for.

        Raises `RunStopped` where no client has any weight.
        """
        if len(updates) == 1:
            return np.ones(1)  # a sum that stands for many clients has no client's weight
        given = [u.weight for u in updates if u.weight is not None]
        own = self.counts([(u.client, u.examples) for u in updates])
        return normalised(given if len(given) == len(updates) else own)

    def counts(self, clients: Sequence[tuple[int, int]]) -> list[float]:
        """What clients (number, examples) count for by ``weights``, before it is made to add up to 1."""
        if isinstance(self.weights, str):
            return [float(examples) if self.weights == "examples" else 1.0 for _, examples in clients]
        return [self.weights[client] for client, _ in clients]

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


def normalised(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """``w / sum w`` as float64. Raises `RunStopped` unless the weights are finite, not negative and not all zero."""
    scale = np.asarray(weights, dtype=np.float64)
    if len(scale) == 0:
        raise RunStopped("There is no update to average: no client's reply was accepted.")
    total = scale.sum()
    if not (np.isfinite(total) and (scale >= 0).all() and total > 0):
        raise RunStopped(
            f"The weights of the {len(scale)} updates can't make a mean (smallest {scale.min():g}, sum {total:g}). "
            "Use aggregator.weights=uniform, or data of which every client holds some."
        )
    return scale / total


def move(
    server: ServerState,
    delta: np.ndarray,
    optimizer: ServerOptimizer | None = None,
    columns: np.ndarray | None = None,
    label: str = "",
) -> ServerState:
    """The state after one optimiser step along ``delta`` ``(n,)`` float64 in ``columns`` ``(n,)`` (None: all).

    Rounded once to the type of the vector. ``label`` names what the optimiser remembers of these columns.
    """
    vector = server.vector.astype(np.float64)
    part = vector if columns is None else vector[columns]
    memory = dict(server.optimizer)
    if optimizer is None:
        part = part + delta
    else:
        mine = {name.removeprefix(label): a for name, a in memory.items() if name.startswith(label)}
        part, mine = optimizer.step(part, delta, mine)
        memory |= {label + name: array for name, array in mine.items()}
    if columns is None:
        vector = part
    else:
        vector[columns] = part
    return finite(server, vector, optimizer=memory)


def finite(server: ServerState, vector: np.ndarray, **changes: Any) -> ServerState:
    """The next version with ``vector`` ``(d,)``, rounded to the server's type. Raises `RunStopped` if not finite."""
    with np.errstate(over="ignore"):
        rounded = vector.astype(server.vector.dtype)
    if not np.isfinite(rounded).all():
        raise RunStopped(
            f"The server's adapter is no longer finite after version {server.version}: the steps grew without bound. "
            "Lower server_optimizer.lr or local.lr."
        )
    return server.replace(vector=rounded, version=server.version + 1, **changes)
