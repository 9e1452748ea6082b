"""What happens at a node: its clients' messages become jobs, jobs become cohorts, results become replies.

Work is idempotent, since Flower may deliver a message twice: a job is a pure function of the request and of what the
client remembered before it, and the memory from before its newest job is kept until the next one comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from clients.adapters.base_change import Change
from clients.adapters.initial.base import DataDriven
from clients.adapters.space import Space
from clients.behaviours.base import Behaviour, ReplyFields, Scene
from clients.data.federated import FederatedData
from clients.local.training import Fit, LocalTraining, Memory, Work
from clients.trainer import Trainer
from fl.coding.workers import Workers
from fl.downlink import Holdings
from fl.errors import ShoalError
from fl.evaluation import numbers
from fl.messages import (
    BUDGET,
    EvaluateReply,
    EvaluateRequest,
    GradientRequest,
    MalformedMessage,
    PeerRequest,
    Request,
    SecureRequest,
    StatisticRequest,
    TrainReply,
    TrainRequest,
)
from fl.schedules.base import PeerPart
from fl.secure import SecureClients
from fl.shares import SharedClients
from fl.statistic import sums
from privacy.audit.log import log_of
from privacy.base import BudgetSpent, Guard

R = TypeVar("R", GradientRequest, PeerRequest)
MASKING = frozenset({"inbox", "session"})  # arrays of a training request that `fl.secure` alone reads


@dataclass
class Remembered:
    """A client's memory before and after its newest job, ``round``."""

    round: int
    before: Memory
    after: Memory


class Node:
    """Trains and evaluates the logical clients of one Flower node.

    ``space`` is the adapter's: a request for another layout is refused with an error reply. ``holdings`` are what its
    clients were sent, ``memories`` what they keep between their jobs; a checkpoint saves both (`arrays`, `restore`).
    """

    def __init__(
        self,
        trainer: Trainer,
        data: FederatedData,
        local: LocalTraining,
        behaviour: Behaviour,
        seed: int,
        space: Space,
        guard: Guard | None = None,
        initialisation: DataDriven | None = None,
        secure: SecureClients | SharedClients | None = None,
        part: PeerPart | None = None,
        rule: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.trainer, self.data, self.local, self.behaviour = trainer, data, local, behaviour
        self.seed, self.space, self.guard = seed, space, guard or Guard()
        self.secure, self.part, self.rule = secure, part, rule
        self.workers = Workers(trainer, data.parts, local.batch_size, seed)
        self.initialisation = initialisation
        self.holdings = Holdings(space)
        self.memories: dict[int, Remembered] = {}
        self.affected = behaviour.affected(len(data), seed)
        self.hosted: frozenset[int] | None = None  # the clients that live here; None: all
        self.sizes_hidden = False  # whether how many examples a client has shall not leave with its replies
        self._samples: dict[int, str] = {}  # see `_sampled`

    def train(self, messages: Sequence[Message]) -> list[Message]:
        """A reply to each message, an error among them where a job can't be done; none from a client that is silent."""
        replies: list[Message] = []
        works: list[Work] = []
        requests: list[tuple[Message, TrainRequest]] = []
        for message in messages:
            try:
                request = TrainRequest.from_record(message.content)
                works.append(self._work(request))
                requests.append((message, request))
            except BudgetSpent as error:
                replies.append(_error(f"{BUDGET}: {error}", message))
            except ShoalError as error:  # malformed, or a job from before the newest that comes again
                replies.append(_error(str(error), message))
        fits = self.trainer.train(works)
        honest = [self._honest(request, work, fit) for (_, request), work, fit in zip(requests, works, fits)]
        for (message, request), said in zip(requests, self._said(honest, works), strict=True):
            if isinstance(said, Exception):
                replies.append(_error(f"{type(said).__name__}: {said}", message))
            elif said is not None:
                replies.append(self._reply(request, said, message))
        return replies

    def _said(self, honest: Sequence[ReplyFields], works: Sequence[Work]) -> list[ReplyFields | Exception | None]:
        """What leaves the clients: of those that misbehave, what their behaviour makes of all the honest replies."""
        if not self.affected:
            return list(honest)
        columns = {w.client: self.space.columns(w.groups, w.client) for w in works}
        starts = {w.client: w.start[columns[w.client]] for w in works}
        lr = works[0].lr if works else None
        scene = Scene(self.seed, len(self.data), self.space, lr, starts, columns, self.rule)
        return self.behaviour.replies(honest, self.affected, scene)

    def _check(self, request: Request) -> None:
        layout = self.space.layout.hash
        if request.layout != layout:
            raise MalformedMessage("layout", f"this node's adapter has layout {layout}, not {request.layout:.40}")
        if not 0 <= request.client < len(self.data):
            raise MalformedMessage("schema", f"this node holds clients 0 to {len(self.data) - 1}, not {request.client}")
        if self.hosted is not None and request.client not in self.hosted:
            raise MalformedMessage("schema", f"this node hosts clients {sorted(self.hosted)}, not {request.client}")

    def _whole(self, state: np.ndarray, client: int, train: tuple[str, ...]) -> np.ndarray:
        """The state ``(d,)`` that a cohort trains from: ``state``, which the client holds, laid into the whole.

        What does not train is in the server's scale, since the slots of a cohort share it.
        """
        if len(state) == self.space.layout.size and self.space.units(client) is None:
            return state
        own = self.space.columns(None, client)
        whole = np.zeros(self.space.layout.size, np.float32)
        whole[own] = self.space.lift(state, None, client)
        mine = self.space.columns(train, client)
        whole[mine] = state[np.searchsorted(own, mine)]
        return whole

    def _work(self, request: TrainRequest) -> Work:
        self._check(request)
        lr = request.extra.get("lr")
        if not isinstance(lr, float):
            raise MalformedMessage("schema", f"a training request carries a learning rate lr, not {lr!r:.40}")
        state, train, base = self.holdings.open(request.client, request.version, request.state, request.extra)
        if not train:
            raise MalformedMessage("schema", "a training request names the groups that train")
        kept = self.memories.get(request.client)
        memory: Memory = {}
        if kept is not None and kept.round > request.round:
            text = (
                f"client {request.client} has done job {kept.round}; what it remembered before {request.round} is gone"
            )
            raise MalformedMessage("schema", text)
        if kept is not None:
            memory = kept.before if kept.round == request.round else kept.after
        start = self._whole(state, request.client, train)
        groups = None if len(self.space.columns(train)) == self.space.layout.size else train
        # Beside what does not train, jobs are alike if that is the same, whatever the version, for clients of one rank.
        shared = () if groups is None else (self._frozen(start, train), self.space.kind(request.client))
        examples = self.data.parts[request.client]
        if self.data.poison is not None:  # only hostile clients have any
            examples = self.data.poison.examples(request.client, request.round, examples)
        content = self._content(request, start, lr, train, base)
        job = self.guard.job(request.client, request.round, content, examples, memory)
        batches = self.local.batches(self.seed, request.client, request.round, examples) if job is None else job.batches
        private = None if job is None else job.private
        return Work(request.client, request.round, start, batches, lr, memory, groups, base, shared, private)

    def _content(
        self, request: TrainRequest, start: np.ndarray, lr: float, train: tuple[str, ...], base: Change
    ) -> str:
        """A name for all that the answer to ``request`` depends on beside its round; empty where nothing is claimed.

        Two requests that differ in any of it are two jobs, each with a charge and noise of its own.
        """
        if type(self.guard) is Guard:
            return ""
        content = hashlib.sha256(start.data)
        content.update(repr((request.version, lr, train)).encode())
        if base:
            packed, ranks = self.space.pack(base)
            content.update(f"base {ranks}".encode() + packed.tobytes())
        for name in sorted(set(request.arrays) - MASKING):  # masks are another thing than what is under them
            array = request.arrays[name]
            content.update(f"{name!r} {array.dtype} {array.shape}".encode() + array.tobytes())
        # A node knows its runs by the names that a server gives them, and its files may change between two starts.
        if self.guard.secret is not None:
            content.update(f"{self.guard.root} {self._sampled(request.client)}".encode())
        return content.hexdigest()[:32]

    def _sampled(self, client: int) -> str:
        """A name for the training samples of ``client``."""
        if client not in self._samples:
            own, content = self.data.train.select(self.data.parts[client], ""), hashlib.sha256()
            for array in (own.tokens, own.offsets, own.labels, own.prompt_lengths):
                content.update(b"none" if array is None else array.tobytes())
            self._samples[client] = content.hexdigest()
        return self._samples[client]

    def _frozen(self, start: np.ndarray, train: tuple[str, ...]) -> int:
        """A number that names what of ``start`` does not train."""
        still = np.ones(len(start), bool)
        still[self.space.columns(train)] = False
        return int.from_bytes(hashlib.sha256(start[still].tobytes()).digest()[:8], "little")

    def _honest(self, request: TrainRequest, work: Work, fit: Fit) -> ReplyFields:
        """What an honest client sends of a job; keeps what it remembers."""
        log = log_of(self.guard)
        if log is not None and fit.audit is not None and work.private is not None:
            log.add(work.private.key, fit.audit)
        kept = self.memories.get(request.client)
        if fit.memory or kept is not None:
            again = kept is not None and kept.round == request.round
            before = kept.before if kept is not None and again else (kept.after if kept is not None else {})
            self.memories[request.client] = Remembered(request.round, before, fit.memory)
        columns = self.space.columns(work.groups, request.client)
        trained = self.space.columns(work.groups)
        state = fit.state if len(columns) == len(trained) else fit.state[np.searchsorted(trained, columns)]
        if fit.sent is None:
            sent = state - (work.start if len(columns) == len(work.start) else work.start[columns])
        else:
            sent = fit.sent if len(columns) == len(trained) else fit.sent[np.searchsorted(trained, columns)]
        honest = ReplyFields(
            request.client, request.round, request.version, request.layout, sent,
            len(self.data.parts[request.client]), fit.steps, fit.tokens, fit.loss,
        )  # fmt: skip
        return self.guard.release(honest, columns)

    def _reply(self, request: TrainRequest, said: ReplyFields, message: Message) -> Message:
        if self.secure is not None:
            return self._masked(request, said, message)
        reply = TrainReply(
            said.client, said.round, said.version, said.layout, said.update, said.examples, said.steps, said.tokens,
            said.loss,
        )  # fmt: skip
        return Message(reply.to_record(), reply_to=message)

    def _masked(self, request: TrainRequest, said: ReplyFields, message: Message) -> Message:
        """The reply under secure aggregation: the update in its masked form, and no number of the client's own."""
        assert self.secure is not None
        try:
            arrays = self.secure.mask(request, said.update, said.examples)
        except ShoalError as error:
            return _error(str(error), message)
        # Steps of whole epochs tell how many examples there are.
        steps = 0 if self.sizes_hidden and self.local.epochs is not None else said.steps
        reply = TrainReply(
            said.client, said.round, said.version, said.layout, np.zeros(0, np.float32), 1, steps, 0, None,
            arrays=arrays,
        )  # fmt: skip
        return Message(reply.to_record(), reply_to=message)

    def query(self, messages: Sequence[Message]) -> list[Message]:
        """Replies to what is asked beside training, each kind by its own part of the node."""
        answering: dict[Any, Callable[[Sequence[Message]], list[Message]]] = {
            SecureRequest.kind: lambda some: [self._stage(m) for m in some],
            GradientRequest.kind: self.gradients,
            PeerRequest.kind: self.asked,
        }
        groups: dict[Any, list[Message]] = {}
        for message in messages:
            kind = dict(message.content.get("header", {})).get("kind")
            groups.setdefault(kind if kind in answering else StatisticRequest.kind, []).append(message)
        return [r for kind, some in groups.items() for r in answering.get(kind, self.statistics)(some)]

    def asked(self, messages: Sequence[Message]) -> list[Message]:
        """One reply each to what a schedule without a server asks of its peers."""
        refused = "this experiment's clients are no peers" if self.part is None else ""
        return self._answered(messages, PeerRequest, refused, lambda rs: self.part.answer(rs) if self.part else [])

    def gradients(self, messages: Sequence[Message]) -> list[Message]:
        """One reply each: coded sums of gradients, where all clients hold the same data and nothing protects them."""
        private = type(self.guard) is not Guard or self.secure is not None
        refused = "these clients' gradients are private" if private else ""
        return self._answered(messages, GradientRequest, refused, self.workers.answer)

    def _answered(
        self,
        messages: Sequence[Message],
        kind: type[R],
        refused: str,
        answer: Callable[[Sequence[R]], Sequence[TrainReply | MalformedMessage]],
    ) -> list[Message]:
        """A reply to each of ``messages``, by ``answer`` to all that are in order; ``refused`` says why none is."""
        replies: list[Message] = []
        asked: list[tuple[Message, R]] = []
        for message in messages:
            try:
                request = kind.from_record(message.content)
                self._check(request)
                if refused:
                    raise MalformedMessage("schema", refused)
                asked.append((message, request))
            except MalformedMessage as error:
                replies.append(_error(str(error), message))
        answers = answer([request for _, request in asked]) if asked else []
        for (message, _), reply in zip(asked, answers, strict=True):
            if isinstance(reply, MalformedMessage):
                replies.append(_error(str(reply), message))
            else:
                replies.append(Message(reply.to_record(), reply_to=message))
        return replies

    def _stage(self, message: Message) -> Message:
        try:
            request = SecureRequest.from_record(message.content)
            self._check(request)
            if self.secure is None:
                raise MalformedMessage("schema", "this experiment has no secure aggregation")
            arrays = self.secure.answer(request)
        except ShoalError as error:
            return _error(str(error), message)
        reply = TrainReply(
            request.client, request.round, request.version, request.layout, np.zeros(0, np.float32), 1, 0, 0, None,
            arrays=arrays,
        )  # fmt: skip
        return Message(reply.to_record(), reply_to=message)

    def statistics(self, messages: Sequence[Message]) -> list[Message]:
        """One reply each: a statistic of some of the client's examples, made private by the client where asked for."""
        replies: list[Message] = []
        asked: list[tuple[Message, StatisticRequest]] = []
        for message in messages:
            try:
                request = StatisticRequest.from_record(message.content)
                self._check(request)
                if self.initialisation is None:
                    raise MalformedMessage("schema", "this experiment's adapter needs no statistic")
                if not _asks(self.initialisation, request.client):
                    declared = f"adapter.init.source={self.initialisation.source}"
                    raise MalformedMessage("schema", f"with {declared} client {request.client} gives no statistic")
                asked.append((message, request))
            except MalformedMessage as error:
                replies.append(_error(str(error), message))
        holders = [(r.client, self.data.parts[r.client]) for _, r in asked]
        init = self.initialisation
        found = [] if init is None else sums(init, self.trainer, "train", holders, self.seed)
        for (message, request), (count, vector) in zip(asked, found, strict=True):
            reply = TrainReply(
                request.client,
                request.round,
                request.version,
                request.layout,
                vector.astype(np.float32),
                count,
                0,
                0,
                0.0,
            )
            replies.append(Message(reply.to_record(), reply_to=message))
        return replies

    def evaluate(self, messages: Sequence[Message], batch_size: int) -> list[Message]:
        """One reply each: the client's own test set under the request's state."""
        out: list[Message] = []
        for message in messages:
            try:
                request = EvaluateRequest.from_record(message.content)
                out.append(Message(self._score(request, batch_size).to_record(), reply_to=message))
            except MalformedMessage as error:
                out.append(_error(str(error), message))
        return out

    def _score(self, request: EvaluateRequest, batch_size: int) -> EvaluateReply:
        self._check(request)
        examples = self.data.client_tests[request.client]
        if len(examples) == 0:
            return EvaluateReply(request.client, request.round, request.version, 0, 0.0)
        state, _, base = self.holdings.open(request.client, request.version, request.state, request.extra)
        whole = self._whole(state, request.client, ())
        scores = self.trainer.evaluate(whole, "train", examples, batch_size, base)
        labels = self.data.train.labels if self.trainer.worker.cohort.task == "classification" else None
        found = numbers(scores, None if labels is None else labels[examples])
        loss = found.pop("loss")
        good = {k: float(v) for k, v in found.items() if v is not None}
        count = 1 if self.sizes_hidden else len(examples)
        return EvaluateReply(request.client, request.round, request.version, count, float(loss or 0.0), good)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that clients keep as named arrays, for a checkpoint."""
        part = {} if self.part is None else self.part.arrays()
        return self.holdings.parts() | part | self._memories(self.memories)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Undo `arrays`; others are ignored."""
        self.holdings.restore(arrays)
        if self.part is not None:
            self.part.restore(arrays)
        self.memories.clear()
        self._remember(arrays)

    def client_arrays(self, client: int) -> dict[str, np.ndarray]:
        """What one client keeps, for `restore_client`."""
        part = {} if self.part is None else self.part.arrays(client)
        return self.holdings.parts(client) | part | self._memories([client] if client in self.memories else [])

    def restore_client(self, client: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Put what ``client`` keeps back to what `client_arrays` gave; nothing for a client that kept nothing yet."""
        self.holdings.restore(arrays, client)
        if self.part is not None:
            self.part.restore(arrays, client)
        self.memories.pop(client, None)
        self._remember(arrays)

    def _memories(self, clients: Iterable[int]) -> dict[str, np.ndarray]:
        return {
            f"memory/{client}/{kept.round}/{side}/{name}": array
            for client, kept in ((c, self.memories[c]) for c in clients)
            for side, memory in (("before", kept.before), ("after", kept.after))
            for name, array in memory.items()
        }

    def _remember(self, arrays: Mapping[str, np.ndarray]) -> None:
        for path, array in arrays.items():
            if path.startswith("memory/"):
                _, client, round, side, name = path.split("/", 4)
                kept = self.memories.setdefault(int(client), Remembered(int(round), {}, {}))
                getattr(kept, side)[name] = array


def _asks(init: DataDriven, client: int) -> bool:
    """Whether the start that was declared is made from a statistic of ``client``."""
    return init.source in ("clients", "private") or (init.source == "client" and init.client == client)


def _error(reason: str, message: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
