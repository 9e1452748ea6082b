"""Nodes for tests of peers that exchange by themselves: threads with a `PeerRounds` each, behind a Flower grid."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from aggregators.fedavg import FedAvg
from clients.adapters.space import Space
from clients.layout import Layout
from clients.local.training import LocalTraining
from fl.messages import MalformedMessage, PeerRequest, TrainReply
from fl.peer_rounds import PeerRounds
from fl.peers import Peers
from fl.schedules.dpsgd import DPSGD
from fl.topology.base import Topology
from fl.transport.base import PeerTransport
from fl.transport.mailbox import Mailbox
from fl.validation import Validator
from tests.fl.asynchronous_worlds import world

LAYOUT = Layout(("wide", "tall"), ((2, 5), (4, 1)))
D, LR = LAYOUT.size, 0.1
RNG = np.random.default_rng(0)
SCALES, CENTRES = RNG.uniform(0.5, 2.0, (64, D)), RNG.standard_normal((64, D))
Update = Callable[[int, np.ndarray], np.ndarray]


def gradient_step(client: int, x: np.ndarray) -> np.ndarray:
    """One step on ``1/2 sum_k s_k (x_k - c_k)^2``."""
    return (-LR * SCALES[client] * (x - CENTRES[client])).astype(x.dtype)


def part(
    transport: PeerTransport | None,
    update: Update = gradient_step,
    number: int = 64,
    dtype: str = "float64",
    rule: FedAvg | None = None,
    space: Space | None = None,
    bound: float = 1e4,
) -> PeerRounds:
    """A node's part whose peers train by ``update``; what raises is a training that failed."""
    space = space or Space(LAYOUT)

    def train(requests):
        return [one(r) for r in requests]

    def one(request):
        made = update(request.client, request.state)
        if not isinstance(made, np.ndarray):
            return made
        made = made[space.columns(space.trains(request.round))]
        return TrainReply(request.client, request.round, request.version, request.layout, made, 10, 5, 7, 0.5)

    return PeerRounds(train, space, rule or FedAvg(weights="uniform"), 3, bound, [10] * number, transport, dtype)


@dataclass
class Nodes:
    """A Flower grid: client c lives at ``parts[c % n]``; a node answers a cohort in a thread of its own.

    ``lose`` says which requests never arrive."""

    parts: Sequence[PeerRounds]
    lose: Callable[[int, PeerRequest], bool] = lambda node, request: False
    requests: list[PeerRequest] = field(default_factory=list)
    _here: dict[str, Message] = field(default_factory=dict)
    _number: int = 0

    def push_messages(self, messages):
        asked = [PeerRequest.from_record(m.content) for m in messages]
        self.requests += asked
        self._number += 1
        names = [f"m{self._number}-{r.client}" for r in asked]
        threads = []
        for node, own in enumerate(self.parts):
            mine = [(n, r) for n, r in zip(names, asked) if r.client % len(self.parts) == node]
            lost = [(n, r) for n, r in mine if self.lose(node, r)]
            for name, _ in lost:
                self._here[name] = message(Error(3, "gone"), name)
            there = [pair for pair in mine if pair not in lost]
            if there:
                threads.append(threading.Thread(target=self._answer, args=(own, there)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        return names

    def _answer(self, own: PeerRounds, asked: list[tuple[str, PeerRequest]]) -> None:
        for (name, _), said in zip(asked, own.answer([r for _, r in asked]), strict=True):
            wrong = isinstance(said, MalformedMessage)
            self._here[name] = message(Error(2, str(said)) if wrong else said, name)

    def pull_messages(self, ids):
        return [self._here.pop(i) for i in list(ids) if i in self._here]


def message(said: TrainReply | Error, answered: str) -> Message:
    metadata = Metadata(1, f"r{answered}", 1, 0, answered, "", 0.0, 60.0, "query")
    return make_message(metadata, error=said) if isinstance(said, Error) else make_message(metadata, said.to_record())


def direct_world(parts: Sequence[PeerRounds], topology: Topology, number: int, book=None, **more: Any):
    """A world whose peers live at ``parts``; ``book`` (client -> address), or none that matters."""
    space = parts[0].space
    more = {"local": LocalTraining(steps=1, lr=LR), "aggregator": parts[0].rule, "space": space} | more
    w = world(gradient_step, number, size=space.layout.size, **more)
    w.grid = Nodes(parts)
    w.validator = Validator(space.layout.hash, 0, 1e4, 10**6, arrays=DPSGD().expects)
    w.peers = Peers.of(w.server, topology, 3, number, frozenset())
    w.direct, w.book = True, lambda: book or dict.fromkeys(range(number), ("127.0.0.1", 1, "here"))
    return w


def stacked_world(topology: Topology, number: int, update: Update = gradient_step, **more: Any):
    """The same peers, stacked at the driver, in float64."""
    more = {"local": LocalTraining(steps=1, lr=LR), "aggregator": FedAvg(weights="uniform")} | more
    w = world(update, number, exact=True, size=D, space=Space(LAYOUT), **more)
    w.validator.layout = LAYOUT.hash
    w.peers = Peers.of(w.server, topology, 3, number, frozenset())
    return w


def states(parts: Sequence[PeerRounds], number: int) -> np.ndarray:
    """The peers' states ``(n, d)`` where they live."""
    return np.stack([parts[c % len(parts)].own[c].state for c in range(number)])


def mailboxes(number: int) -> list[Mailbox]:
    return [Mailbox()] * number
