"""Worlds for tests of the asynchronous schedules: clients that are functions, behind a grid that counts pushes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from aggregators.fedavg import FedAvg
from aggregators.server_optimizers import SGD
from clients.adapters.space import Space
from clients.layout import Layout
from clients.local.training import LocalTraining
from fl.downlink import Downlink
from fl.engine.flower import ensure_identity
from fl.messages import TrainReply, TrainRequest
from fl.network import Instant, Linear, Network, Uniform
from fl.sampling import Fixed
from fl.schedules.base import Schedule, World
from fl.state import ServerState
from fl.validation import Rejection, Validator

STEPS = 5
BARE: dict[str, Any] = {"latency_s": 0.0, "down_mbps": None, "up_mbps": None}
F80 = Linear(seconds_per_step=2e-4, spread=0.8, **BARE)  # the slowest client's job takes 1000 ticks
EQUAL = Uniform(seconds_per_step=2e-4, **BARE)
Update = Callable[[int, np.ndarray], np.ndarray]  # (client, start (d,)) -> update (d,)


@dataclass
class Clients:
    """A Flower grid whose clients answer with ``update``; ``faults`` (client, job) -> what they answer instead.

    With ``exact`` their numbers are float64: the wire's are float32, so these go past it (see `ExactWorld`).
    """

    number: int
    update: Update
    exact: bool = False
    faults: Mapping[tuple[int, int], Any] = field(default_factory=dict)
    fault: Callable[[TrainRequest], Any] = lambda request: None
    sizes: Sequence[int] = ()
    pushes: list[list[tuple[int, int]]] = field(default_factory=list)  # (client, job) of each push
    requests: list[TrainRequest] = field(default_factory=list)
    starts: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    updates: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _waiting: list[Message] = field(default_factory=list)

    def push_messages(self, messages):
        requests = [TrainRequest.from_record(m.content) for m in messages]
        self.requests += requests
        self.pushes.append([(r.client, r.round) for r in requests])
        ids = [f"m{r.client}-{r.round}" for r in requests]
        for request, name in zip(requests, ids, strict=True):
            self._waiting += [self._message(said, name) for said in self._answers(request)]
        return ids

    def pull_messages(self, ids):
        ready, self._waiting = self._waiting, []
        return ready

    @property
    def jobs(self) -> list[tuple[int, int]]:
        return [job for push in self.pushes for job in push]

    def _answers(self, request: TrainRequest) -> list[TrainReply | Error]:
        job = (request.client, request.round)
        start = self.starts[job] if self.exact else request.state
        update = self.update(request.client, start)
        if self.exact:
            self.updates[job] = update
        sent = update.astype(np.float32)
        reply = TrainReply(*job, request.version, request.layout, sent, self.sizes[request.client], STEPS, 7, 0.5)
        said = self.faults.get(job) or self.fault(request)
        if callable(said):
            return said(reply)
        return [reply if said is None else said]

    @staticmethod
    def _message(said: TrainReply | Error, answered: str) -> Message:
        metadata = Metadata(1, f"r{answered}", 1, 0, answered, "", 0.0, 60.0, "train")
        return (
            make_message(metadata, error=said) if isinstance(said, Error) else make_message(metadata, said.to_record())
        )


class Exact(Validator):
    """Puts back the digits that an update lost on the wire."""

    clients: Clients

    def check(self, reply, request, *, late=False):
        checked = super().check(reply, request, late=late)
        if isinstance(checked, Rejection):
            return checked
        return replace(checked, update=self.clients.updates[checked.client, checked.round])


class ExactWorld(World):
    """Tells clients their start to the last digit."""

    def train_request(self, client, round, lr, server, arrays=None, phase=None):
        self.grid.starts[client, round] = server.vector
        return super().train_request(client, round, lr, server, arrays, phase)


def world(
    update: Update,
    number: int = 10,
    size: int = 5,
    network: Network | None = None,
    exact: bool = False,
    sizes: Sequence[int] | None = None,
    seed: int = 3,
    **more: Any,
) -> World:
    """A run of ``number`` clients from a state of ``size`` zeros; ``sizes`` are the clients' examples.

    Further arguments are fields of the world, or of `Clients`.
    """
    ensure_identity(1)
    layout = Layout(("x",), ((size,),))
    space = more.pop("space", Space(layout))
    kept = {name: more.pop(name) for name in ("faults", "fault") if name in more}
    examples = list(sizes or [10] * number)
    clients = Clients(number, update, exact, sizes=examples, **kept)
    validator = (Exact if exact else Validator)(layout.hash, lambda r: size, 1e4, 10**6)
    if isinstance(validator, Exact):
        validator.clients = clients
    given: dict[str, Any] = {
        "per_round": number, "aggregator": FedAvg(), "optimizer": SGD(), "sampling": Fixed(),
        "local": LocalTraining(steps=STEPS, lr=0.1),
    }  # fmt: skip
    state = ServerState(np.zeros(size, np.float64 if exact else np.float32), space)
    return (ExactWorld if exact else World)(
        grid=clients, nodes=[50 + c for c in range(number)], seed=seed, server=state, network=network or Instant(),
        validator=validator, downlink=Downlink(space, False), sizes=examples, **(given | more),
    )  # fmt: skip


@dataclass
class Played:
    """What a run did: its events, and the state after each server step."""

    arrivals: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    stop: str | None = None


def play(schedule: Schedule, w: World) -> Played:
    played = Played()
    for event in schedule.run(w):
        if event["event"] == "client":
            played.arrivals.append(event)
        elif event["event"] == "stop":
            played.stop = event["reason"]
        else:
            played.steps.append(event)
            played.states.append(w.server.vector)
    return played
