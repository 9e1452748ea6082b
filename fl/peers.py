"""Peers: clients without a server, each with a state of its own, a graph of links, and its own time.

Each peer is a client behind the Flower grid: it is sent its own state, trains from it, and answers with its change. The
states of all peers lie stacked ``(n, d)`` with whoever drives the clock, so that mixing them is one matrix product.
What a link carries is counted from the message that the peers would exchange, serialised, and its time comes from the
links' own latency, bandwidth and queues (`fl.topology.links`).

In real time (`fl.wall`) the same peers live on other hosts, and what they send each other is relayed: each hands its
change to the driver and is sent its own new state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.messages import PeerRequest, Request, TrainReply, payload_bytes
from fl.state import ServerState, Update
from fl.topology.links import Links
from fl.validation import Reason, Rejection

if TYPE_CHECKING:
    from fl.network import Network
    from fl.schedules.base import World
    from fl.topology.base import Graph, Topology


@dataclass(frozen=True, eq=False)
class PeerJob:
    """Training of one peer: its job number ``job``, from ``start`` ``(d,)``, with the groups of the round ``phase``."""

    peer: int
    job: int
    start: np.ndarray
    lr: float
    phase: int


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of a job: an accepted update with its reply, or why there is none."""

    job: PeerJob
    outcome: TrainReply | Rejection
    update: Update | None

    def lay(self, row: np.ndarray) -> None:
        """Put the update into ``row`` ``(d,)``, in place; what did not train is left as it is."""
        if self.update is not None:
            row[slice(None) if self.update.columns is None else self.update.columns] = self.update.vector


@dataclass
class Peers:
    """The peers of one run.

    ``states`` ``(n, d)``, float32 as the server's; ``ready`` ``(n,)`` the tick at which each is free; ``traffic``
    ``(n, n)`` int64 the bytes from row to column so far; ``hostile`` those whose models don't count."""

    topology: Topology
    seed: int
    states: np.ndarray
    ready: np.ndarray
    traffic: np.ndarray
    hostile: frozenset[int] = frozenset()
    _sizes: dict[tuple, int] = field(default_factory=dict)
    _updates: np.ndarray | None = None
    _known: tuple[np.ndarray, np.ndarray, float] | None = None  # states, their mean and consensus distance
    _links: Links | None = None
    _before: dict[str, Any] = field(default_factory=dict)  # what the links' queues held in the checkpoint

    @classmethod
    def of(cls, server: ServerState, topology: Topology, seed: int, number: int, hostile: frozenset[int]) -> Peers:
        """``number`` peers that all begin with the state of ``server``."""
        states = np.repeat(server.vector[None], number, axis=0)
        zeros = np.zeros((number, number), np.int64)
        return cls(topology, seed, states, np.zeros(number, np.int64), zeros, hostile)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def honest(self) -> np.ndarray:
        """The peers that are not hostile, ascending."""
        return np.array([p for p in range(len(self)) if p not in self.hostile], np.int64)

    def updates(self) -> np.ndarray:
        """``(n, d)`` zeros for a round's updates; the same memory each time, as fresh memory costs more than a sum."""
        if self._updates is None or self._updates.shape != self.states.shape:
            self._updates = np.empty_like(self.states)
        self._updates[:] = 0
        return self._updates

    def graph(self, round: int) -> Graph:
        """Who hears whom in ``round``."""
        return self.topology.graph(len(self), self.seed, round)

    def mean(self) -> np.ndarray:
        """``xbar`` ``(d,)`` float64: the mean of the honest peers' states."""
        return self._summary()[0]

    def consensus(self) -> float:
        """``sqrt(mean_i ||x_i - xbar||^2)`` over the honest peers."""
        return self._summary()[1]

    def _summary(self) -> tuple[np.ndarray, float]:
        if self._known is None or self._known[0] is not self.states:
            honest = self.states[self.honest] if self.hostile else self.states
            self._known = (self.states, *mean_and_consensus(honest))
        return self._known[1:]

    def train(self, world: World, jobs: Sequence[PeerJob], until: int | None = None) -> list[Trained]:
        """The jobs, each of another peer, done in one exchange; what came of them in their order.

        Where time is real, who has not answered by the tick ``until`` is late.
        """
        server, out = world.server, []
        requests = [
            world.train_request(j.peer, j.job, j.lr, server.replace(vector=j.start), phase=j.phase) for j in jobs
        ]
        for job, outcome in zip(jobs, ask_all(world, requests, until), strict=True):
            update = world.update(outcome, server, 0, 0, job.phase) if isinstance(outcome, TrainReply) else None
            out.append(Trained(job, outcome, update))
        return out

    def size(self, layout: str, arrays: Mapping[str, tuple[str, int]]) -> int:
        """Bytes of one message between peers that carries ``arrays`` (type and length of each)."""
        key = tuple(arrays.items())
        if key not in self._sizes:
            made = {name: np.zeros(length, dtype) for name, (dtype, length) in arrays.items()}
            request = PeerRequest(1, 1, 1, np.zeros(0, np.float32), layout, {}, made)
            self._sizes[key] = payload_bytes(request.to_record())
        return self._sizes[key]

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint, undone by `restore`."""
        return {"peers/states": self.states, "peers/ready": self.ready, "peers/traffic": self.traffic.copy()}

    def state(self) -> dict[str, Any]:
        """The plain values beside `arrays`."""
        return self._before if self._links is None else self._links.state()

    def queues(self, network: Network) -> Links:
        """The links, with what is still on them."""
        if self._links is None:
            self._links = Links(self.topology, network, self.seed, len(self))
            if self._before:
                self._links.restore(self._before)
        return self._links

    def restore(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any] | None = None) -> None:
        """Undo `arrays` and `state`."""
        self._before, self._links = dict(state or {}), None
        self.states = np.array(arrays["peers/states"])
        self.ready, self.traffic = np.array(arrays["peers/ready"]), np.array(arrays["peers/traffic"])

    def links(self) -> list[list[int]]:
        """``[from, to, bytes]`` of every link that has carried something."""
        src, dst = np.nonzero(self.traffic)
        return [[int(a), int(b), int(self.traffic[a, b])] for a, b in zip(src, dst)]


def ask_all(world: World, requests: Sequence[Request], until: int | None = None) -> list[TrainReply | Rejection]:
    """`World.query` that waits, where time is real, to the tick ``until``: who has not answered by then is late."""
    asked = {r.client: r for r in requests}
    if len(asked) < len(requests):
        raise ValueError("one request to a client at a time")
    silent = Rejection(Reason.LATE, "no reply before the round was over")
    answers: dict[int, TrainReply | Rejection] = {}
    for client, reply in world.ask(requests, until)[0]:
        answers.setdefault(client, world.validator.check(reply, asked[client]))
    return [answers.get(r.client, silent) for r in requests]


def mean_and_consensus(states: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean ``(d,)`` float64 of ``states`` ``(n, d)``, and their root mean squared distance to it."""
    mean = np.zeros(states.shape[1])
    for row in states:  # row by row: the sum stays in the cache, and each state is read once
        mean += row
    mean /= len(states)
    centre, total = mean.astype(states.dtype), 0.0
    gap = np.empty_like(centre)
    for row in states:
        np.subtract(row, centre, out=gap)
        total += float(np.dot(gap, gap))
    return mean, float(np.sqrt(total / len(states)))
