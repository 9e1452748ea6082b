"""A node's peers in rounds whose models never pass the server: train, exchange with the neighbours, mix, report.

A request is for a stage. ``round`` asks a peer for one round of D-PSGD (`fl.schedules.dpsgd`); the requests for all
peers of a node come together and are one cohort, since peers wait for each other::

    state            where to begin, for a peer that has no state of this run
    arrays.hears     whom it hears, rising;    arrays.weights   W_ij of each of these, then its own
    arrays.tells     to whom it sends
    extra            run, lr, deadline_s (from now on), order, book (JSON: where those others live)

A peer whose training fails tells its neighbours that it takes no part, and keeps its state. Whom a peer has not heard
at the deadline it leaves out: that weight is its own. Each knows only whom it has heard itself, so where i has missed j
and j has heard i the mean of all is not kept. The reply has no model: ``missed``, the bytes sent and received by
neighbour, and how far the peer moved. ``state`` asks for a peer's state, for an evaluation or a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from aggregators.combining import Combining
from clients.adapters.space import Space
from fl.errors import ConfigError, ShoalError
from fl.messages import MalformedMessage, PeerRequest, Scalar, TrainReply, TrainRequest
from fl.transport.base import Address, Exchange, Heard, PeerTransport
from fl.transport.frames import size
from fl.validation import Reason, Rejection, Validator

if TYPE_CHECKING:
    from fl.experiment import Experiment
    from fl.node import Node

Outcome = TrainReply | Rejection
Train = Callable[[Sequence[TrainRequest]], list[Outcome]]
NOWHERE = (
    "engine.peers=direct needs nodes that listen for each other, and this one does not. Run `shoal node --listen "
    "HOST:PORT` there, or use engine.peers=relay."
)


@dataclass(eq=False)
class Own:
    """A peer's ``state`` ``(d,)`` after ``round`` of ``run``, and what it replied then."""

    run: bytes
    round: int
    state: np.ndarray
    reply: TrainReply | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """A request for a round, read."""

    request: PeerRequest
    run: bytes
    lr: float
    deadline_s: float
    parallel: bool
    hears: list[int]
    weights: np.ndarray
    tells: list[int]
    book: Mapping[int, Address]


@dataclass
class PeerRounds:
    """The peers of one node (a `fl.schedules.base.PeerPart`). ``bound`` is ``schedule.max_update_norm``; ``examples``
    are the clients' numbers of samples; ``transport`` None refuses to take part."""

    train: Train
    space: Space
    rule: Combining
    seed: int
    bound: float
    examples: Sequence[int]
    transport: PeerTransport | None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.own: dict[int, Own] = {}

    @classmethod
    def of(cls, experiment: Experiment, transport: PeerTransport | None) -> PeerRounds:
        """The part of ``experiment``'s node."""
        s, space, sizes = experiment.settings, experiment.trainer.worker.cohort.space, experiment.data.parts
        assert isinstance(s.aggregator, Combining)
        bound, most = s.schedule.max_update_norm, experiment.data.most

        def train(requests: Sequence[TrainRequest]) -> list[Outcome]:
            return trained(experiment.node, requests, bound, most)

        return cls(train, space, s.aggregator, s.seed, bound, [len(part) for part in sizes], transport)

    def answer(self, requests: Sequence[PeerRequest]) -> list[TrainReply | MalformedMessage]:
        """A reply to each request, or why there is none."""
        found: dict[int, TrainReply | MalformedMessage] = {}
        rounds: dict[tuple[bytes, int], dict[int, Asked]] = {}
        for place, request in enumerate(requests):
            try:
                if self.transport is None:
                    raise ShoalError(NOWHERE)
                if request.extra.get("stage") == "state":
                    found[place] = self._state(request)
                elif (again := self._again(request)) is not None:
                    found[place] = again
                else:
                    asked = self._read(request)
                    rounds.setdefault((asked.run, request.round), {})[place] = asked
            except (ShoalError, ValueError, TypeError, LookupError) as error:  # the server decides what is in a request
                found[place] = MalformedMessage("schema", str(error))
        for key in sorted(rounds):
            found |= dict(zip(rounds[key], self._round(list(rounds[key].values())), strict=True))
        return [found[place] for place in range(len(requests))]

    def _again(self, request: PeerRequest) -> TrainReply | None:
        """What was answered to the same request before. Raises `ShoalError` for a round that is over."""
        own = self.own.get(request.client)
        if own is None or own.run != _run(request) or request.round > own.round:
            return None
        if request.round == own.round and own.reply is not None:
            return own.reply
        raise ShoalError(f"peer {request.client} has done round {own.round}; the request is for round {request.round}")

    def _read(self, request: PeerRequest) -> Asked:
        extra, arrays, run, peer = request.extra, request.arrays, _run(request), request.client
        lr, deadline_s = extra.get("lr"), extra.get("deadline_s")
        hears, tells = (arrays.get(name, np.zeros(0, np.uint32)).tolist() for name in ("hears", "tells"))
        weights = arrays.get("weights", np.zeros(0))
        if not isinstance(lr, float) or not isinstance(deadline_s, float) or not 0 < deadline_s <= 1e9:
            raise ShoalError("a request for a round has a learning rate and a deadline")
        if len(weights) != len(hears) + 1:
            raise ShoalError("a request for a round has a weight for each that its peer hears, and its own")
        told = dict(json.loads(str(extra["book"])))
        book = {int(c): Address(str(host), int(port), str(name)) for c, (host, port, name) in told.items()}
        if homeless := {*hears, *tells} - book.keys():
            raise ShoalError(f"the address of client {min(homeless)} is missing")
        parallel = extra.get("order") == "parallel"
        own = self.own.get(peer)
        if own is None or own.run != run:
            if len(request.state) != self.space.layout.size:
                raise ShoalError(f"peer {peer} has no state to go on from, and none of its size was sent")
            self.own[peer] = Own(run, request.round - 1, request.state.astype(self.dtype))
        return Asked(request, run, lr, deadline_s, parallel, hears, weights, tells, book)

    def _round(self, asked: Sequence[Asked]) -> list[TrainReply | MalformedMessage]:
        """One round of the peers ``asked``, all of the same run and round."""
        transport, first, number = self.transport, asked[0], asked[0].request.round
        assert transport is not None
        columns = self.space.moving
        deadline, before = time.monotonic() + first.deadline_s, Counter(transport.counts)
        book = {client: address for a in asked for client, address in a.book.items()}
        mine = frozenset(a.request.client for a in asked)
        transport.begin(Exchange(first.run, number, mine, len(columns), deadline, book, self.dtype))
        outcomes = self.train([self._work(a) for a in asked])
        updates = [self._update(o) if isinstance(o, TrainReply) else None for o in outcomes]
        sent = []
        for a, update in zip(asked, updates, strict=True):
            model = None
            if update is not None:
                state = self.own[a.request.client].state
                model = (state if a.parallel else state + update)[columns]
            sent.append([transport.send(number, a.request.client, dst, model) for dst in a.tells])
        replies: list[TrainReply | MalformedMessage] = []
        for a, outcome, update, sizes in zip(asked, outcomes, updates, sent, strict=True):
            own = self.own[a.request.client]
            if update is None:
                assert isinstance(outcome, Rejection)
                own.round, own.reply = number, None
                replies.append(MalformedMessage("schema", f"{outcome.reason.value}: {outcome.detail}"))
                continue
            assert isinstance(outcome, TrainReply)
            heard = transport.receive(number, a.request.client, a.hears, deadline)
            own.state, told = self._mix(a, own.state, update, heard)
            own.round = number
            dropped = transport.counts - before
            before = Counter(transport.counts)
            own.reply = self._reply(a, outcome, sizes, heard, told, dropped)
            replies.append(own.reply)
        return replies

    def _work(self, a: Asked) -> TrainRequest:
        request, space = a.request, self.space
        header: dict[str, Scalar] = {
            "lr": a.lr,
            "train": ",".join(space.trains(request.round)),
            "sent": ",".join(space.names),
        }
        state = self.own[request.client].state
        return TrainRequest(request.client, request.round, request.version, state, request.layout, header)

    def _update(self, reply: TrainReply) -> np.ndarray:
        """What the peer's training changed, ``(d,)``."""
        groups = self.space.trains(reply.round)
        whole = np.zeros(self.space.layout.size, self.dtype)
        whole[self.space.columns(groups, reply.client)] = self.space.lift(reply.update, groups, reply.client)
        return whole

    def _mix(
        self, a: Asked, state: np.ndarray, update: np.ndarray, heard: Heard
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The peer's new state, and what there is to say of it."""
        columns, peer, told = self.space.moving, a.request.client, Counter[str]()
        own = (state if a.parallel else state + update)[columns]
        there, lost = dict[int, np.ndarray](), 0.0
        for j, weight in zip(a.hears, a.weights[:-1].tolist(), strict=True):
            model = heard.get(j)
            if model is None:
                lost += weight
                continue
            gap = float(np.linalg.norm((model - own).astype(np.float64)))
            if gap <= self.bound:
                there[j] = model
            else:  # its own model counts in its place
                there[j] = own
                told[(Reason.TOO_LARGE if np.isfinite(gap) else Reason.NOT_FINITE).value] += 1
        weights = dict(zip([*a.hears, peer], a.weights.tolist(), strict=True))
        weights[peer] += lost
        there[peer] = own
        if self.rule.plain:
            mixed = np.zeros_like(own)
            for j in sorted(there):  # in the order of `fl.mixing.Mixing.mean`
                mixed += own.dtype.type(weights[j]) * there[j]
        else:
            mixed = own
            others = [j for j in sorted(there) if j != peer]
            rows = np.stack([*(there[j] - own for j in others), np.zeros_like(own)])
            try:
                self.rule.check_round(len(rows))
                key = (self.seed, "mixing", a.request.round, peer)
                row = np.array([weights[j] for j in [*others, peer]])
                mixed = own + self.rule.step(rows, row, [*others, peer], key).astype(own.dtype)
            except ConfigError:
                told["short"] = 1
        new = state.copy()
        new[columns] = mixed
        if a.parallel:
            new += update
        return new, {**told, "moved": float(np.linalg.norm((new - state).astype(np.float64)))}

    def _reply(
        self, a: Asked, outcome: TrainReply, sizes: list[int], heard: Heard, told: Mapping[str, float], dropped: Counter
    ) -> TrainReply:
        request = a.request
        missed = [j for j in a.hears if heard.get(j) is None]
        got = [size(heard[j]) if j in heard else 0 for j in a.hears]
        arrays: dict[str, np.ndarray] = {
            "missed": np.array(missed, np.uint32),
            "sent": np.array(sizes, np.uint64),
            "received": np.array(got, np.uint64),
        }
        extra: dict[str, Any] = {**told, **{f"dropped.{reason}": n for reason, n in dropped.items()}}
        return TrainReply(
            request.client, request.round, request.version, request.layout, np.zeros(0, np.float32),
            self.examples[request.client], outcome.steps, outcome.tokens, outcome.loss, extra, arrays,
        )  # fmt: skip

    def _state(self, request: PeerRequest) -> TrainReply:
        own = self.own.get(request.client)
        if own is None or own.run != _run(request):
            raise ShoalError(f"peer {request.client} has no state of this run")
        return TrainReply(
            request.client, request.round, request.version, request.layout, np.zeros(0, np.float32), 1, 0, 0, None,
            {"at": own.round}, {"state": own.state.astype(np.float32)},
        )  # fmt: skip

    def arrays(self, client: int | None = None) -> dict[str, np.ndarray]:
        """The states of all peers, or of ``client``, as named arrays."""
        return {
            f"direct/{peer}/{own.run.hex()}/{own.round}": own.state
            for peer, own in self.own.items()
            if client in (None, peer)
        }

    def restore(self, arrays: Mapping[str, np.ndarray], client: int | None = None) -> None:
        """Undo `arrays`; others are ignored."""
        for peer in [*self.own] if client is None else [client]:
            self.own.pop(peer, None)
        for name, array in arrays.items():
            if name.startswith("direct/"):
                _, whose, run, number = name.split("/")
                self.own[int(whose)] = Own(bytes.fromhex(run), int(number), np.array(array))


def _run(request: PeerRequest) -> bytes:
    run = bytes.fromhex(str(request.extra.get("run", "")))
    if len(run) != 16:
        raise ShoalError(f"a run's name for peers is 16 bytes, not {len(run)}")
    return run


def trained(node: Node, requests: Sequence[TrainRequest], bound: float, most: int) -> list[Outcome]:
    """What comes of ``requests`` at ``node``, by the way that all training takes there, checked as a server does."""
    space = node.space

    def size(request: Any) -> int:
        return len(space.columns(space.trains(request.round), request.client))

    check = Validator(space.layout.hash, size, bound, most)
    messages: list[Message] = []
    for place, request in enumerate(requests):
        metadata = Metadata(0, f"p{place}", 0, 0, "", "", time.time(), 60.0, "train")
        messages.append(make_message(metadata, request.to_record()))
    replies = {reply.metadata.reply_to_message_id: reply for reply in node.train(messages)}
    silent = Rejection(Reason.ERROR, "its client says nothing")
    return [
        check.check(replies[f"p{place}"], request) if f"p{place}" in replies else silent
        for place, request in enumerate(requests)
    ]
