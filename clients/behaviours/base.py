"""The seam between honest work and a client that misbehaves: what it would have replied, and what it replies instead.

A behaviour never touches messages: it changes the plain fields of a reply, after the honest work is done, or says that
none leaves the client. So it needs no Flower and works the same on any engine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fl.config import setting
from fl.errors import ConfigError
from fl.keys import Part, generator


@dataclass(frozen=True, eq=False)
class ReplyFields:
    """What a client says: who it is, what it was asked for, and what came of it.

    ``update`` is ``(d,)`` float32 (its adapter after training minus the one it started from), ``layout`` the hash of
    `clients.layout.Layout`, ``version`` the server version it started from, ``loss`` the mean training loss.
    """

    client: int
    round: int
    version: int
    layout: str
    update: np.ndarray
    examples: int
    steps: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class Behaviour(ABC):
    """What affected clients do. The settings are fields; nothing is remembered."""

    from_round: int = setting(1, ge=0, help="the first round in which the affected clients misbehave")

    @abstractmethod
    def affected(self, number: int, *key: Part) -> frozenset[int]:
        """Which of the clients 0 to ``number - 1`` misbehave; the same for the same ``key`` (the run's seed)."""

    @abstractmethod
    def apply(self, reply: ReplyFields, *key: Part, known: Sequence[ReplyFields] = ()) -> ReplyFields | None:
        """What leaves the client instead of ``reply``; None if it stays silent.

        ``reply`` is left as it is. Draws come from ``key`` (seed, client, round). ``known`` are the honest replies
        that a colluding client has seen; a behaviour that acts alone ignores them. May raise, as a client may.
        """

    def act(self, reply: ReplyFields, affected: frozenset[int], *key: Part) -> ReplyFields | None:
        """`apply` if the client is among ``affected`` and ``from_round`` has come, else the honest reply."""
        if reply.client not in affected or reply.round < self.from_round:
            return reply
        return self.apply(reply, *key)


@dataclass(frozen=True)
class SomeClients(Behaviour):
    """A behaviour of named clients, or of a fraction of them drawn once a run."""

    clients: list[int] | None = setting(None, help="the affected clients by number; null draws a fraction of them")
    fraction: float = setting(0.1, ge=0, le=1, help="the share of clients affected, where none are named")

    def affected(self, number: int, *key: Part) -> frozenset[int]:
        """The named clients, or ``fraction * number`` drawn ones: rounded to whole clients, at least one if > 0.

        Raises `ConfigError` for a client that does not exist.
        """
        if self.clients is not None:
            for client in self.clients:
                if not 0 <= client < number:
                    raise ConfigError("attack.clients", client, f"clients are numbered 0 to {number - 1}")
            return frozenset(self.clients)
        if self.fraction == 0:
            return frozenset()
        count = max(1, math.floor(self.fraction * number + 0.5))
        return frozenset(generator(*key, "affected clients").choice(number, size=count, replace=False).tolist())
