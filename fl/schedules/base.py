"""What every schedule works with: the clients behind a Flower grid, virtual time, and the rules that make an update.

A schedule is a generator of events (plain dictionaries, as in metrics.jsonl, without wall-clock fields). It yields at
every change, so that whoever drives it can record, evaluate, checkpoint, or stop.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from aggregators.base import Aggregator, ServerOptimizer
from aggregators.staleness import Auto, Constant, Staleness, Treatment
from clients.behaviours.base import Behaviour
from clients.behaviours.none import Honest
from clients.local.training import LocalTraining
from fl.clock import Clock, seconds, ticks
from fl.config import setting
from fl.downlink import Downlink
from fl.errors import ConfigError
from fl.fleet import Fleet
from fl.messages import (
    EvaluateRequest,
    MalformedMessage,
    PeerRequest,
    Request,
    TrainReply,
    TrainRequest,
    payload_bytes,
)
from fl.network import Network
from fl.sampling import Sampling
from fl.secure import Codecs, Plain, SecureRound
from fl.shares import SharedRound
from fl.state import ServerState, Update
from fl.validation import Reason, Rejection, Validator
from fl.wall import Heard, WallFleet
from privacy.base import Guard
from privacy.secure_aggregation.settings import SecAggPlus
from privacy.secure_aggregation.shares import ProofCodec, SecretShares

if TYPE_CHECKING:
    from fl.experiment import Experiment, Settings
    from fl.peers import Peers
    from fl.transport.base import Address

Parts = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays and plain values, as `fl.checkpoint.save` takes them
Event = dict[str, Any]
MESSAGE_TYPE = {
    "train": "train",
    "evaluate": "evaluate",
    "statistic": "query",
    "secure": "query",
    "gradient": "query",
    "peer": "query",
}  # Flower's types of messages


class PeerPart(Protocol):
    """What nodes do beside training under a schedule without a server."""

    def answer(self, requests: Sequence[PeerRequest]) -> list[TrainReply | MalformedMessage]:
        """A reply to each request, or why it can't be answered. The same request twice gets the same reply."""

    def arrays(self, client: int | None = None) -> dict[str, np.ndarray]:
        """What the peers keep (None: all of them), as named arrays, for a checkpoint."""

    def restore(self, arrays: Mapping[str, np.ndarray], client: int | None = None) -> None:
        """Undo `arrays`; other arrays are ignored."""


@dataclass
class World:
    """The parts of one run that a schedule needs.

    A checkpoint keeps ``server``, ``clock`` and what ``keep`` gives, which the schedule sets where it has more to keep;
    a run that goes on finds that in ``kept``.
    """

    grid: Grid
    nodes: Sequence[int]  # node id of each client
    seed: int
    per_round: int
    server: ServerState
    aggregator: Aggregator
    optimizer: ServerOptimizer
    sampling: Sampling
    network: Network
    local: LocalTraining
    validator: Validator
    downlink: Downlink
    guard: Guard = field(default_factory=Guard)
    secure: SecAggPlus | SecretShares | None = None
    codecs: Codecs | None = None  # of secure aggregation
    measure_error: bool = False  # compare each new version's weight change with the mean of the clients'
    clock: Clock = field(default_factory=Clock)
    sizes: Sequence[int] = ()  # training examples of each client
    treatment: Treatment = field(default_factory=Treatment)
    keep: Callable[[], Parts] | None = None
    kept: Parts | None = None
    root: Callable[[ServerState, int, float], Update] | None = None  # the server's own update, of (state, round, lr)
    peers: Peers | None = None  # of a schedule without a server
    attack: Behaviour = field(default_factory=Honest)  # what hostile peers send each other
    apart: bool = False  # whether clients' books are kept where they train, and mirrored here
    direct: bool = False  # whether peers' models go from node to node (`fl.schedules.direct`)
    limit_s: float | None = None  # in real time: after this what is asked beside training is not waited for any more
    due: Callable[[int], bool] = lambda round: True  # whether an evaluation of the state after a round is due
    book: Callable[[], Mapping[int, Address]] = dict  # where clients' nodes listen for each other (`fl.transport`)
    fleet: Fleet = field(init=False)

    def __post_init__(self) -> None:
        self.fleet = self.network.fleet(self.seed, self.number)

    @property
    def number(self) -> int:
        return len(self.nodes)

    @property
    def max_update_norm(self) -> float:
        return np.inf if self.validator.max_norm is None else self.validator.max_norm

    @property
    def wall(self) -> WallFleet | None:
        """The fleet where time is real (``network=wall_clock``), else None."""
        return self.fleet if isinstance(self.fleet, WallFleet) else None

    def now(self) -> int:
        """The present tick. Real time has gone on by itself."""
        if self.wall is not None:
            self.clock.advance(self.wall.now(self.clock))
        return self.clock.now

    def pass_to(self, tick: int) -> None:
        """Let the clock come to ``tick``."""
        if self.wall is not None:
            self.wall.sleep(self.clock, tick)
        self.clock.advance(tick)

    def exchange(self, server: ServerState, round: int, asked: Sequence[int]) -> Plain:
        """How the updates of ``round`` reach the server; takes the time that has to be spent before training.

        Raises `fl.errors.RunStopped` where secure aggregation has too few clients.
        """
        if self.secure is None or not asked:
            return Plain(asked)
        assert self.codecs is not None
        codec = self.codecs(round)
        if isinstance(self.secure, SecretShares):
            assert isinstance(codec, ProofCodec)
            return SharedRound(self, self.secure, codec, server, round, asked)
        made = SecureRound(self, self.secure, codec, server, round)
        made.open(asked)
        return made

    def train_request(
        self,
        client: int,
        round: int,
        lr: float,
        server: ServerState,
        arrays: Mapping[str, np.ndarray] | None = None,
        phase: int | None = None,
    ) -> TrainRequest:
        """The request to train ``server``'s state in ``round``, with what ``client`` does not hold of it.

        What trains is that of the round ``phase``, where the jobs of a client are numbered by themselves.
        """
        state, header = self.downlink.request(server, client, server.space.trains(phase or round))
        header = {"lr": lr, **header}
        every = {**self.guard.broadcast(server), **(arrays or {})}
        return TrainRequest(client, round, server.version, state, server.layout.hash, header, every)

    def evaluate_request(self, client: int, server: ServerState) -> EvaluateRequest:
        """The request to evaluate ``server``'s state, or among peers the client's own, on the client's own test set."""
        if self.peers is not None:
            server = server.replace(vector=self.peers.states[client])
        state, header = self.downlink.request(server, client, None)
        return EvaluateRequest(client, server.round, server.version, state, server.layout.hash, header)

    def update(
        self, reply: TrainReply, server: ServerState, sent: int, arrived: int, phase: int | None = None
    ) -> Update:
        """The accepted ``reply`` to a request made from ``server``, as aggregation rules see it; times are ticks."""
        space, groups = server.space, server.space.trains(phase or reply.round)
        columns = space.columns(groups, reply.client)
        # Under secure aggregation the update is masked, and not here.
        vector = reply.update if len(reply.update) == 0 else space.lift(reply.update, groups, reply.client)
        return Update(
            reply.client, reply.round, reply.version, vector, reply.examples, sent, arrived, reply.loss, reply.steps,
            reply.tokens, columns=None if len(columns) == space.layout.size else columns, start=server.vector,
        )  # fmt: skip

    def accept(self, old: ServerState, new: ServerState) -> ServerState:
        """``new`` with its increment folded into the base, known to the downlink as what follows ``old``."""
        folded = new.folded()
        self.downlink.note(old, folded, new.increment)
        return folded

    def message(self, request: Request) -> Message:
        """The Flower message that carries ``request`` to its client."""
        if self.apart and isinstance(request, TrainRequest):
            self.guard.mirror(
                request.client, request.round, _fingerprint(request, self.guard.root), self.sizes[request.client]
            )
        # What nobody waits for any more shall not be worked on by a node that comes back.
        ttl = None if self.wall is None else self.wall.network.timeout_s
        node, kind = self.nodes[request.client], MESSAGE_TYPE[request.kind]
        return Message(request.to_record(), node, kind, ttl=ttl, group_id=str(request.round))

    def doubt(self, client: int, reply: Message) -> None:
        """Take ``client`` for one that holds nothing if ``reply`` is an error: where it trains, it may have lost it."""
        if self.apart and reply.has_error():
            self.downlink.known.pop(client, None)

    def ask(
        self, requests: Sequence[Request], until: int | None = None, heard: Heard = lambda client, reply: False
    ) -> tuple[list[tuple[int, Message]], dict[int, int]]:
        """Send the requests and wait for the replies: (client, reply) as they came, and the bytes sent to each client.

        ``heard`` is given each of them as it comes. Where time is real, waiting ends at the tick ``until``, or when
        ``heard`` says that it is enough (`fl.wall.WallFleet.ask`).

        A network may deliver a reply twice; both are returned, and `fl.validation.Validator` counts the first.
        Waiting is polling with `push_messages` and `pull_messages`, which works on every Flower grid. All of an
        in-process grid's replies are there at the first pull.
        """
        messages = [self.message(r) for r in requests]
        sent = {r.client: payload_bytes(m.content) for r, m in zip(requests, messages, strict=True)}
        if self.wall is not None:
            if until is None and self.limit_s is not None:
                until = self.now() + ticks(self.limit_s)
            to = {r.client: m for r, m in zip(requests, messages, strict=True)}
            return self.wall.ask(self.grid, self.clock, to, until, heard), sent
        clients = dict(zip(self.grid.push_messages(messages), (r.client for r in requests), strict=True))
        replies: list[tuple[int, Message]] = []
        waiting, pause_s = set(clients), 0.01
        while waiting:
            for reply in self.grid.pull_messages(sorted(waiting)):
                answered = reply.metadata.reply_to_message_id
                if answered in clients:
                    replies.append((clients[answered], reply))
                    heard(clients[answered], reply)
                    waiting.discard(answered)
            if waiting:
                time.sleep(pause_s)
                pause_s = min(1.0, pause_s * 1.5)
        return replies, sent

    def query(self, requests: Sequence[Request]) -> list[TrainReply | Rejection]:
        """What the clients answer to ``requests``, one of each, in their order, checked."""
        asked = {r.client: r for r in requests}
        if len(asked) < len(requests):
            raise ValueError("one request to a client at a time")
        silent = Rejection(Reason.ERROR, "no reply")
        answers: dict[int, TrainReply | Rejection] = {}
        for client, reply in self.ask(requests)[0]:
            answers.setdefault(client, self.validator.check(reply, asked[client]))
        return [answers.get(r.client, silent) for r in requests]


def _fingerprint(request: TrainRequest, root: str) -> str:
    """Differs for requests of different content, or under another ``root`` of noise, whatever a node names them by."""
    content = hashlib.sha256(request.state.tobytes())
    content.update(repr((root, request.version, sorted(request.extra.items()))).encode())
    return content.hexdigest()[:32]


def outcome_fields(outcomes: Collection[TrainReply | Rejection], unheard: Counter[str] | None = None) -> Event:
    """The fields of a round's event that say what came of its jobs; ``unheard`` are further rejections, by reason."""
    good = [o for o in outcomes if isinstance(o, TrainReply)]
    rejected = Counter(o.reason.value for o in outcomes if isinstance(o, Rejection)) + (unheard or Counter())
    losses = [o.loss for o in good if o.loss is not None]
    return {
        "sampled": len(outcomes),
        "accepted": len(good),
        "rejected": dict(sorted(rejected.items())),
        "client_steps": sum(o.steps for o in good),
        "tokens": sum(o.tokens for o in good),
        "loss": float(np.mean(losses)) if losses else None,
    }


def demand(where: str) -> Callable[..., None]:
    """A check of settings: ``need(key, value, right, allowed, way_out="")`` raises `ConfigError` unless ``right``.

    ``where`` ends the sentence that says what is allowed.
    """

    def need(key: str, value: Any, right: bool, allowed: str, way_out: str = "") -> None:
        if not right:
            shown = value if isinstance(value, int | float | str | None) else type(value).__name__
            raise ConfigError(key, shown, f"{allowed} {where}", way_out)

    return need


def client_event(
    *, round: int, version: int, client: int, time: int, staleness: int, bytes_down: int, bytes_up: int,
    reply: TrainReply | Rejection | None, taken: TrainReply | Rejection, phases: tuple[int, int | None, int | None],
) -> Event:  # fmt: skip
    """The event of one client's job that ended at tick ``time``.

    ``reply`` is what the client answered, ``taken`` what the schedule made of it; ``phases`` are the ticks at which the
    request left, work began and work was done (None: not known).
    """
    good = reply if isinstance(reply, TrainReply) else None
    sent, began, done = (None if tick is None else seconds(tick) for tick in phases)
    return {
        "event": "client",
        "round": round,
        "version": version,
        "client": client,
        "virtual_s": seconds(time),
        "staleness": staleness,
        "bytes_down": bytes_down,
        "bytes_up": bytes_up,
        "examples": good.examples if good else None,
        "steps": good.steps if good else None,
        "tokens": good.tokens if good else None,
        "loss": good.loss if good else None,
        "accepted": isinstance(taken, TrainReply),
        "reason": None if isinstance(taken, TrainReply) else taken.reason.value,
        "sent_s": sent,
        "began_s": began,
        "done_s": done,
    }


@dataclass(frozen=True)
class Schedule(ABC):
    """The ``schedule=`` group. ``rounds`` is how often the server's state changes (or may change)."""

    rounds: int = setting(10, ge=1, help="rounds of training")
    max_update_norm: float = setting(1e4, gt=0, help="an update of larger L2 norm is rejected")

    # Whether every update of a round is from a client that the round asked, and no client has two in it: what counting
    # on the sampling, on sums of a round, or on stages around its training needs.
    in_rounds: ClassVar[bool] = False
    # Whether there is no server: every client is a peer with a state of its own. ``graph`` is then who hears whom under
    # ``topology=auto``; ``crafts`` says that its peers mix by `fl.hearing`: by robust rules too, and hostile ones may
    # send others than their models.
    decentral: ClassVar[bool] = False
    graph: ClassVar[str] = "ring"
    crafts: ClassVar[bool] = False
    staleness: ClassVar[Staleness] = Constant()  # the schedule's own, under ``aggregator.staleness=auto``

    def check(self, settings: Settings) -> None:  # noqa: B027  (most go with everything)
        """Raise `ConfigError`, before anything loads, for settings that this schedule can't go with."""

    def rule(self, chosen: Staleness) -> Staleness:
        """The rule for stale updates: ``chosen``, or the schedule's own."""
        return self.staleness if isinstance(chosen, Auto) else chosen

    def part(self, experiment: Experiment) -> PeerPart | None:
        """What the nodes do beside training under this schedule."""
        return None

    def expects(self, request: Request) -> Mapping[str, tuple[str, int]]:
        """The arrays in the reply to a `PeerRequest`: their types, and their lengths (-1: any)."""
        return {}

    def participations(self) -> int | None:
        """How many jobs one client can be asked for in the whole run, at most; None: there is no bound."""
        return None

    @abstractmethod
    def run(self, world: World) -> Iterator[Event]:
        """Go on from ``world.server.round`` until ``rounds``; sets ``world.server`` before it yields a round event.

        Ends early, with an event ``stop`` that says why, where the guard lets no further round begin.

        Raises `fl.errors.RunStopped` where it can't go on.
        """
