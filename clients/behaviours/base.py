"""The seam between honest work and a client that misbehaves: what it would have sent, and what it sends instead.

A behaviour never touches messages: it changes the plain fields of replies, after the honest work is done, or says that
none leaves a client; or it changes the samples that a client trains on. So it needs no Flower and works the same on any
engine, under a server and among peers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fl.config import setting
from fl.errors import ConfigError
from fl.keys import Part, generator

if TYPE_CHECKING:  # both bring torch along, which no behaviour needs
    from clients.adapters.space import Space
    from clients.data.poison import Poison
    from clients.data.tokens import TokenData

RobustRule = Callable[[np.ndarray], np.ndarray]  # the defender's: rows (n, d) to one (d,)


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


@dataclass(frozen=True, eq=False)
class Scene:
    """Where replies are made: the run's ``seed`` and ``number`` of clients, the adapter's ``space``, the rate ``lr``.

    ``starts`` and ``columns`` are by client: the state that it started from in the columns that it trained ``(m,)``,
    and these columns (None: all). ``rule`` is what the server does with updates, for attacks that search against it.
    """

    seed: int
    number: int
    space: Space | None = None
    lr: float | None = None
    starts: Mapping[int, np.ndarray] = field(default_factory=dict)
    columns: Mapping[int, np.ndarray | None] = field(default_factory=dict)
    rule: RobustRule | None = None


@dataclass(frozen=True, eq=False)
class Facts:
    """What `Behaviour.craft` is told beside the vectors.

    - ``seed``, ``round``: draws come from them and the client;
    - ``hostile``, ``honest``: the clients of the rows of ``own`` and ``honest``;
    - ``states``: whether vectors are whole models after the local step (among peers), or updates (under a server);
    - ``starts`` ``(f, d)``: the models of the ``hostile`` before the local step;
    - ``receiver`` ``(d,)``: the model of the peer that the vectors are for, where each may get its own;
    - ``rule``: the defender's; ``space``, ``columns``: what the entries of a vector are (None: the whole layout).
    """

    seed: int
    round: int
    hostile: Sequence[int]
    honest: Sequence[int] = ()
    states: bool = False
    starts: np.ndarray | None = None
    receiver: np.ndarray | None = None
    rule: RobustRule | None = None
    space: Space | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True)
class Behaviour(ABC):
    """What affected clients do. The settings are fields; nothing is remembered."""

    crafts: ClassVar[bool] = False  # changes vectors by `craft`, so among peers it acts on what they send each other
    peers_only: ClassVar[bool] = False  # makes no sense where there is one receiver
    poisons: ClassVar[bool] = False  # changes the samples that affected clients train on

    from_round: int = setting(1, ge=0, help="the first round in which the affected clients misbehave")

    @property
    def colludes(self) -> bool:
        """Whether it needs the replies of others, so a schedule in which those of a round come together."""
        return False

    @property
    def needs_rule(self) -> bool:
        """Whether it searches against the defender's rule (`Scene.rule`)."""
        return False

    @abstractmethod
    def affected(self, number: int, *key: Part) -> frozenset[int]:
        """Which of the clients 0 to ``number - 1`` misbehave; the same for the same ``key`` (the run's seed)."""

    def check(self, settings: Any) -> None:
        """Raise `ConfigError` where the run's ``settings`` (`fl.experiment.Settings`) rule this behaviour out."""
        name, schedule = type(self).__name__, settings.schedule
        if self.colludes and not (schedule.in_rounds or schedule.decentral):
            allowed = f"one that acts alone under {type(schedule).__name__}, where replies do not come in rounds"
            raise ConfigError("attack", name, allowed, "Use schedule=synchronous, or attack=sign_flip or gaussian.")
        # Among peers the driver crafts what all send each other; under a server a node sees its own clients only.
        if self.colludes and settings.engine.remote and not (schedule.decentral and self.crafts):
            engine = type(settings.engine).__name__
            allowed = f"one that acts alone with engine={engine}, where clients do not see each other's replies"
            raise ConfigError("attack", name, allowed, "Use engine=in_process, or attack=sign_flip or gaussian.")
        if self.peers_only and not schedule.decentral:
            allowed = f"one that sends everybody the same: under {type(schedule).__name__} the server alone is told"
            raise ConfigError("attack", name, allowed, "Use schedule=dpsgd or monna, or attack=ipm.")
        if self.needs_rule and not hasattr(settings.aggregator, "combine"):
            allowed = f"false: aggregator {type(settings.aggregator).__name__} is no rule on rows to search against"
            raise ConfigError("attack.optimise", True, allowed, "Use aggregator=fedavg.")

    def poison(
        self, train: TokenData, test: TokenData, parts: Sequence[np.ndarray], affected: frozenset[int], seed: int
    ) -> Poison | None:
        """What affected clients train on instead of their own ``train[parts[i]]``; None: their own. Changes nothing."""
        return None

    def replies(
        self, honest: Sequence[ReplyFields], affected: frozenset[int], scene: Scene
    ) -> list[ReplyFields | Exception | None]:
        """What leaves each client that replied ``honest``-ly, in their order, of all that came together.

        None: nothing leaves it. An error that a client raised stands in its reply's place.
        """
        return [self._caught(reply, affected, scene.seed) for reply in honest]

    def _caught(self, reply: ReplyFields, affected: frozenset[int], seed: int) -> ReplyFields | Exception | None:
        try:
            return self.act(reply, affected, seed, "attack", reply.client, reply.round)
        except Exception as error:
            return error

    def craft(self, honest: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        """``(f, d)``: what the hostile clients send instead of ``own`` ``(f, d)``, beside ``honest`` ``(h, d)``.

        Left as they are here: a behaviour that does not `crafts` acts on training or on whole replies.
        """
        return own

    def hostile(self, reply: ReplyFields, affected: frozenset[int]) -> bool:
        """Whether the client is among ``affected`` and ``from_round`` has come."""
        return reply.client in affected and reply.round >= self.from_round

    def apply(self, reply: ReplyFields, *key: Part) -> ReplyFields | None:
        """What leaves a client that acts alone instead of ``reply``; None if it stays silent.

        ``reply`` is left as it is. Draws come from ``key`` (seed, client, round). May raise, as a client may.
        """
        return reply

    def act(self, reply: ReplyFields, affected: frozenset[int], *key: Part) -> ReplyFields | None:
        """`apply` if the client is `hostile`, else the honest reply."""
        return self.apply(reply, *key) if self.hostile(reply, affected) else reply


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
