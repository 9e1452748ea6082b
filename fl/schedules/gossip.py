"""Rounds without a server: every peer trains from its own state, exchanges with its neighbours, and mixes.

There is no common barrier: a peer begins a round when all that it waits for has arrived, so a slow one holds up its
neighbours first and the others through them. With ``t_i`` the tick at which peer i is free::

    done_i = t_i + its work,    t_i' = max(done_i, max_{j in N(i)} arrival of j's message of this round)

A peer that is away, is lost, or whose training failed is left out for the round: it keeps its state, and so does the
mean of all (`fl.mixing`). The state that is evaluated and saved is the mean of the honest peers' states; the peers'
own are evaluated beside it (``evaluation.peers``).

In real time (`fl.wall`) all begin a round together, when the last one is over: it is over when all have answered, or
after ``deadline_s``, without those that are late. The peers' models are with the server then, so what they send each
other takes no further time; or they never come there (`fl.schedules.direct`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from aggregators.combining import Combining
from aggregators.fedavg import FedAvg
from aggregators.robust.trust import FoolsGold
from aggregators.staleness import Constant
from clients.behaviours.none import Honest
from fl.clock import ticks
from fl.config import setting
from fl.errors import ConfigError, RunStopped
from fl.messages import TrainReply
from fl.mixing import Mixing
from fl.network import WallClock
from fl.peers import PeerJob, Peers, Trained
from fl.sampling import Fixed
from fl.schedules.base import Event, Parts, Schedule, World, client_event, demand
from fl.schedules.direct import Direct, check_direct, is_direct
from fl.schedules.peer_events import check_heard, gather, heard, planned, round_event
from fl.validation import Reason, Rejection

Arrays = dict[str, np.ndarray]


@dataclass
class Round:
    """One round as its schedule sees it: who hears whom, what came of training, and what is sent and heard.

    ``updates`` ``(n, d)`` are the peers' changes, zero for the ``lost``, in memory that the next round uses again;
    ``done`` ``(n,)`` ticks.
    """

    world: World
    peers: Peers
    number: int
    lr: float
    mixing: Mixing
    updates: np.ndarray
    done: np.ndarray
    sent: np.ndarray  # bytes (n, 2): up, down
    rejected: Counter[str] = field(default_factory=Counter)
    short: int = 0  # peers that heard too few for the robust rule, and kept their models

    @property
    def columns(self) -> np.ndarray:
        """The columns ``(m,)`` that travel."""
        return self.world.server.space.moving

    def refuse(self, norm: float) -> None:
        """Count a message that is not heard, of a model at distance ``norm``."""
        self.rejected[(Reason.TOO_LARGE if np.isfinite(norm) else Reason.NOT_FINITE).value] += 1

    def hostile(self, attack: Any) -> list[int]:
        """The peers that send others than their models in this round, and are heard."""
        if not attack.crafts or self.number < attack.from_round:
            return []
        return sorted(self.peers.hostile - self.mixing.lost)


@dataclass(frozen=True)
class Gossip(Schedule):
    """What the schedules share that go in rounds over a graph; ``rounds`` is how often each peer mixes."""

    until_s: float | None = setting(None, gt=0, help="virtual seconds after which the run ends; null: after rounds")
    deadline_s: float | None = setting(
        None, gt=0, help="seconds after which a round goes on without the late, in real time; null: none"
    )

    decentral = True
    travels: ClassVar[bool] = False  # whether its models can go from node to node, past the server
    pushes: ClassVar[bool] = False  # whether it goes over directed graphs whose peers push: columns add up to one
    symmetric: ClassVar[bool] = False  # whether what it remembers asks for symmetric weights that don't change

    def participations(self) -> int | None:
        return self.rounds

    def check(self, settings: Any) -> None:
        check_peers(self, settings)
        if self.deadline_s is not None and not isinstance(settings.network, WallClock):
            allowed = "null on a virtual clock, where every peer waits for its own neighbours alone"
            raise ConfigError("schedule.deadline_s", self.deadline_s, allowed, "Use network=wall_clock.")
        if is_direct(settings):
            check_direct(self, settings)

    @abstractmethod
    def payload(self, size: int) -> Mapping[str, tuple[str, int]]:
        """The arrays of one message to a neighbour (type and length), of peers whose models have ``size`` numbers."""

    @abstractmethod
    def mix(self, round: Round, memory: Arrays) -> None:
        """Set ``round.peers.states`` (new arrays) and ``memory`` after an exchange with the neighbours."""

    def mean(self, peers: Peers, memory: Arrays) -> np.ndarray:
        """The mean that stands for all peers, ``(d,)``."""
        return peers.mean()

    def check_directed(self, peers: Peers) -> None:
        """Raise `ConfigError` for a graph whose weights are no average of what is heard, or don't keep the mean."""
        graph, name = peers.graph(1), type(self).__name__
        if not self.pushes and not graph.doubly_stochastic:
            allowed = f"a graph whose weights add up to one in rows and columns under {name}"
            raise ConfigError("topology", peers.topology.name, allowed, "Use schedule=push_sum for directed graphs.")
        if self.symmetric and (graph.directed or peers.topology.varies):
            allowed = f"an undirected graph that stays the same under {name}: what it remembers belongs to its links"
            raise ConfigError("topology", peers.topology.name, allowed, "Use schedule=dpsgd or push_sum.")

    def check_graph(self, world: World, peers: Peers) -> None:
        """Raise `ConfigError` for a graph that this schedule can't go over."""
        assert isinstance(world.aggregator, Combining)
        self.check_directed(peers)
        smallest = min(len(peers.graph(1).neighbours(p)) for p in range(len(peers)))
        check_neighbourhoods(world.aggregator, smallest, smallest)

    def run(self, world: World) -> Iterator[Event]:
        peers = world.peers
        assert peers is not None
        memory: Arrays = {}
        if world.kept is not None:
            peers.restore(*world.kept)
            memory |= {n.removeprefix("gossip/"): a for n, a in world.kept[0].items() if n.startswith("gossip/")}

        def keep() -> Parts:
            return peers.arrays() | {f"gossip/{n}": a for n, a in memory.items()}, peers.state()

        world.keep = keep
        self.check_graph(world, peers)
        if world.wall is not None:
            world.wall.check_resumed(world.guard, world.apart)
        direct = Direct(self, world, peers) if world.direct else None
        end = None if self.until_s is None else ticks(self.until_s)
        while world.server.round < self.rounds and (end is None or world.now() < end):
            reason = world.guard.stopped()
            if reason is not None:
                stop = {"event": "stop", "round": world.server.round, "virtual_s": world.clock.now_s, "reason": reason}
                yield stop
                break
            number = world.server.round + 1
            yield from self._round(world, peers, memory, number) if direct is None else direct.round(number)
        yield {"event": "links", "round": world.server.round, "links": peers.links()}

    def _round(self, world: World, peers: Peers, memory: Arrays, number: int) -> Iterator[Event]:
        n, lr = len(peers), world.local.lr_at(number, self.rounds)
        began, present = gather(world, peers, number)
        until = None if self.deadline_s is None else int(began.max()) + ticks(self.deadline_s)
        jobs = [PeerJob(p, number, peers.states[p], lr, number) for p in present]
        trained = peers.train(world, jobs, until)
        world.validator.forget(number)
        done, outcomes = planned(world, trained, began) if world.wall is None else heard(world, trained, began, until)
        fit = [t for t in trained if isinstance(outcomes[t.job.peer], TrainReply)]
        if world.wall is not None:
            check_heard(number, outcomes.values())
        out = frozenset(range(n)) - {t.job.peer for t in fit}
        graph = peers.graph(number)
        updates = peers.updates()
        for t in fit:
            t.lay(updates[t.job.peer])
        mixing, sent = Mixing(graph, out, self.pushes), np.zeros((n, 2), np.int64)
        round = Round(world, peers, number, lr, mixing, updates, done, sent)
        peers.ready = done.copy()
        before = world.server.vector.astype(np.float64)
        self.mix(round, memory)
        away = [p for p in range(n) if p not in set(present)]
        peers.ready[away] = np.maximum(peers.ready[away], peers.ready[present].max())  # time goes on for them too
        still = np.ones(updates.shape[1], bool)
        still[round.columns] = False
        if still.any():  # what never trains is the same everywhere, and no average may round it
            peers.states[:, still] = world.server.vector[still]
        mean = self.mean(peers, memory)
        mean[still] = world.server.vector[still]
        if not np.isfinite(mean).all():
            raise RunStopped(
                f"The peers' models are no longer finite after round {number}: the steps grew without bound. Lower "
                "local.lr, or use a robust rule (aggregator.combine) where some are hostile."
            )
        world.clock.advance(max(int(peers.ready.max()), world.clock.now))
        new = world.server.replace(
            vector=mean.astype(world.server.vector.dtype), version=world.server.version + 1, round=number
        )
        world.server = new
        for t in trained:
            yield _client_event(round, t, outcomes[t.job.peer], int(began[t.job.peer]))
        moved, size = float(np.linalg.norm(mean - before)), int(round.sent[:, 0].sum())
        yield {
            **round_event(world, outcomes.values(), round.rejected, size),
            "update_norm": moved,
            "consensus": peers.consensus(),
            "heard_too_few": round.short,
        }


def exchange(round: Round, payload: Mapping[str, tuple[str, int]]) -> dict[tuple[int, int], int]:
    """Send one message of ``payload`` over every link of the round: counts the bytes, and returns the ticks at which
    they arrive, by (from, to)."""
    peers = round.peers
    edges = [(int(j), i) for i in range(len(peers)) for j in round.mixing.heard(i)]
    size = peers.size(round.world.server.layout.hash, payload)
    arrived = peers.queues(round.world.network).send([(src, dst, int(round.done[src]), size) for src, dst in edges])
    src, dst = np.array([e[0] for e in edges], np.int64), np.array([e[1] for e in edges], np.int64)
    np.add.at(peers.traffic, (src, dst), size)
    n = len(peers)
    round.sent += size * np.stack([np.bincount(src, minlength=n), np.bincount(dst, minlength=n)], axis=1)
    return arrived


def wait_for_all(round: Round, arrived: Mapping[tuple[int, int], int]) -> None:
    """Every peer waits for all the messages that are on their way to it."""
    for (_, dst), when in arrived.items():
        round.peers.ready[dst] = max(round.peers.ready[dst], when)


def check_peers(schedule: Schedule, settings: Any) -> None:
    """Raise `ConfigError` for what peers have no place for."""
    need = demand(f"under {type(schedule).__name__}")
    s, rule, attack, way_out = settings, settings.aggregator, settings.attack, "Use schedule=dpsgd or monna."
    need("aggregator", rule, type(rule) is FedAvg, "fedavg: a peer mixes models itself (aggregator.combine)")
    if not rule.plain:
        need("aggregator.combine", rule.combine, schedule.crafts, "auto: no robust form is known", way_out)
        need("aggregator.space", rule.space, rule.space == "factors", "factors")
        alone = not rule.combine.root and not isinstance(rule.combine, FoolsGold)
        need("aggregator.combine", rule.combine, alone, "a rule without a server's own data or memory")
    need("aggregator.staleness", rule.staleness, type(schedule.rule(rule.staleness)) is Constant, "auto")
    need("server_optimizer", s.server_optimizer, s.server_optimizer.plain, "sgd with lr 1: there is no server")
    need("secure_aggregation", s.secure_aggregation, not s.secure_aggregation.active, "none: there is no sum")
    need("adapter.rank", getattr(s.adapter, "rank", None), not s.adapter.mixed_ranks, "one rank for all peers")
    timed = isinstance(schedule, Gossip) or not isinstance(s.network, WallClock)
    planned = "a model of time: its jobs, clocks and exchanges are planned"
    need("network", s.network, timed, planned, "Use schedule=dpsgd, or another one that goes in rounds.")
    for name in ("latency_s", "mbps"):
        value = getattr(s.topology, name)
        free = value is None or not isinstance(s.network, WallClock)
        need(f"topology.{name}", value, free, "null in real time, where messages take the time they take")
    few, leave = s.clients.per_round, s.network.on_leave
    need("clients.per_round", few, few in (None, s.clients.number), "null: all take part")
    plain = isinstance(s.sampling, Fixed) and not s.sampling.over_selection
    need("sampling", s.sampling, plain, "fixed with over_selection=0: all peers take part in every round")
    need("aggregator.weights", rule.weights, isinstance(rule.weights, str), "a word: the graph's weights decide")
    need("network.on_leave", leave, leave == "finish", "finish")
    error = s.evaluation.aggregation_error
    need("evaluation.aggregation_error", error, not error, "false")
    if not isinstance(attack, Honest) and attack.crafts:
        need("attack", attack, schedule.crafts, "none, or one on data", way_out)
    start = s.adapter.initialisation
    alone = start is None or getattr(start, "source", "") in ("", "public", "base")
    need("adapter/init", start, alone, "one from the base or from public data")


def check_steady(schedule: Schedule, settings: Any) -> None:
    """Raise `ConfigError` for an adapter whose tensors train in turn, where gradients are remembered over rounds."""
    if settings.adapter.form == "alternating":
        allowed = f"one that trains the same tensors in every round under {type(schedule).__name__}"
        raise ConfigError("adapter", type(settings.adapter).__name__, allowed, "Use schedule=dpsgd.")


def check_neighbourhoods(rule: Combining, heard: int, smallest: int) -> None:
    """Raise `ConfigError` where ``heard`` others are too few for a robust rule.

    ``smallest`` is how many neighbours the peer has that has fewest."""
    if rule.plain:
        return
    try:
        rule.check_round(heard + 1)
    except ConfigError as error:
        raise ConfigError(
            error.key, error.value, f"{error.allowed}; a peer with {smallest} neighbours combines {heard + 1} models",
            "Use a denser topology (topology=complete) or a smaller aggregator.f.",
        ) from error  # fmt: skip


def _client_event(round: Round, trained: Trained, outcome: TrainReply | Rejection, began: int) -> Event:
    peer, done = trained.job.peer, int(round.done[trained.job.peer])
    return client_event(
        round=round.number, version=round.world.server.version - 1, client=peer, time=int(round.peers.ready[peer]),
        staleness=0, bytes_down=int(round.sent[peer, 1]), bytes_up=int(round.sent[peer, 0]), reply=trained.outcome,
        taken=outcome, phases=(began, None, None) if round.world.wall is not None else (began, began, done),
    )  # fmt: skip
