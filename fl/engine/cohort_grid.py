"""Logical clients over few Flower nodes: to a server, every client is a node; a node trains its clients as a cohort.

Client c lives on node ``c % nodes``. All messages for one node in one ``push_messages`` call travel as one Flower
message, are handed to one call of the node's function, and come back as one. Works over any Flower grid.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fl.engine.packing import Content, pack, unpack
from fl.errors import ShoalError
from fl.transport.base import Address

FIRST_CLIENT = 1_000_000  # client c is node 1000000 + c, apart from the ids of InProcessGrid's nodes
Handler = Callable[[list[Message], Context], list[Message]]
Enter = Callable[[dict[str, Any], Context], None]


def node_id(client: int) -> int:
    """The node id under which ``client`` is known to a server."""
    return FIRST_CLIENT + client


def client_of(node: int) -> int:
    """The client that a node id stands for."""
    return node - FIRST_CLIENT


class Places(Protocol):
    """Who is where, when nodes come and go."""

    def node(self, client: int) -> int | None:
        """The Flower node that holds ``client``; None: there is none now."""

    def present(self) -> list[int]:
        """The clients whose nodes are connected, after another look."""

    def note(self, clients: Sequence[int]) -> dict[str, Any]:
        """What a message for ``clients`` tells their node, as JSON-able values."""

    def stay(self, node: int) -> Any:
        """What is another after ``node`` was away: what it had been sent before is lost."""

    def book(self) -> Mapping[int, Address]:
        """Where the nodes of clients listen for each other; those that don't are left out."""

    def leaving(self) -> None:
        """Messages are about to leave."""

    def heard(self, client: int, job: int) -> None:
        """``client`` has answered the training request for a ``job``."""


class _Dealt:
    """Client c lives on node ``c % n`` of the n nodes given, or connected at the first push."""

    def __init__(self, grid: Grid, number: int, nodes: Sequence[int]):
        self.grid, self.number, self.nodes = grid, number, list(nodes)

    def node(self, client: int) -> int | None:
        if not self.nodes:
            self.nodes = sorted(self.grid.get_node_ids())
            if not self.nodes:
                raise ShoalError("no Flower node is connected, so there is nobody to train.")
        return self.nodes[client % len(self.nodes)]

    def present(self) -> list[int]:
        return list(range(self.number))

    def note(self, clients: Sequence[int]) -> dict[str, Any]:
        return {}

    def stay(self, node: int) -> Any:
        return None

    def book(self) -> Mapping[int, Address]:
        return {}

    def leaving(self) -> None:
        pass

    def heard(self, client: int, job: int) -> None:
        pass


@dataclass(frozen=True)
class _Sent:
    """What a reply needs of the message that it answers (not its content)."""

    number: int
    metadata: Metadata

    @property
    def order(self) -> tuple[int, int]:
        return self.metadata.dst_node_id, self.number


class CohortGrid(Grid):
    """Shows ``num_clients`` clients as nodes of ``grid``, with ids from `node_id`.

    ``nodes`` are the Flower nodes to use, by default all that are connected at the first push; the assignment of
    clients never changes after that. ``places`` say instead which node holds a client now. ``join`` is passed to
    `fl.engine.packing.pack`; by default it is off where ``grid`` hands objects over in this process. Replies come
    sorted by client, then in the order of pushing. A node that fails, or answers something malformed, becomes an error
    reply for each of its clients; it never raises.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        nodes: Sequence[int] | None = None,
        join: bool | None = None,
        places: Places | None = None,
    ):
        if num_clients < 1:
            raise ValueError(f"num_clients must be >= 1, not {num_clients}")
        self.grid, self.num_clients = grid, num_clients
        self.join = not getattr(grid, "shares_memory", False) if join is None else join
        self.places: Places = places or _Dealt(grid, num_clients, nodes or [])
        self._numbers = itertools.count(1)
        self._in_flight: dict[str, list[_Sent]] = {}  # by the id of the node's message
        self._stays: dict[str, tuple[int, Any]] = {}  # by the same: its node, and the stay in which it was sent
        self._wanted: set[str] = set()  # ids of clients' messages without a reply yet
        self._replies: dict[str, tuple[_Sent, Message]] = {}  # by the id of the client's message

    @property
    def run(self) -> Run:
        return self.grid.run

    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def everyone(self) -> list[int]:
        """The node ids of all clients, whether their nodes are connected or not."""
        return [node_id(client) for client in range(self.num_clients)]

    def get_node_ids(self) -> list[int]:
        return [node_id(client) for client in self.places.present()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send ``messages`` to their clients; returns their ids. Raises `ShoalError` for an unknown client."""
        messages = list(messages)
        for message in messages:
            if not 0 <= client_of(message.metadata.dst_node_id) < self.num_clients:
                clients = f"{node_id(0)} to {node_id(self.num_clients - 1)}"
                raise ShoalError(f"no client has node id {message.metadata.dst_node_id}; they go from {clients}.")
        cohorts: dict[tuple[int | None, str], list[tuple[_Sent, Message]]] = {}
        for message in messages:
            sent = _Sent(next(self._numbers), message.metadata)
            sent.metadata.__dict__["_message_id"] = f"c{sent.number}"  # as Flower's grids do; there is no setter
            node = self.places.node(client_of(sent.metadata.dst_node_id))
            cohorts.setdefault((node, sent.metadata.message_type), []).append((sent, message))
        self._wanted.update(message.metadata.message_id for message in messages)
        for key in [key for key in cohorts if key[0] is None]:
            group = [sent for sent, _ in cohorts.pop(key)]
            self._deliver(group, [Error(ErrorCode.NODE_UNAVAILABLE, "no node holds this client")] * len(group))
        outgoing = [self._cohort_message(node or 0, kind, cohort) for (node, kind), cohort in cohorts.items()]
        self.places.leaving()
        pushed = list(self.grid.push_messages(outgoing)) if outgoing else []
        pushed += [""] * (len(outgoing) - len(pushed))  # Flower leaves out, or names None, what it could not send
        for pushed_id, ((node, _), cohort) in zip(pushed, cohorts.items(), strict=True):
            group = [sent for sent, _ in cohort]
            if pushed_id:
                self._in_flight[pushed_id] = group
                self._stays[pushed_id] = (node or 0, self.places.stay(node or 0))
            else:
                self._deliver(group, [Error(ErrorCode.NODE_UNAVAILABLE, "could not be sent")] * len(group))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to ``message_ids`` that are here, each once."""
        if self._in_flight:
            for reply in self.grid.pull_messages(list(self._in_flight)):
                group = self._in_flight.pop(reply.metadata.reply_to_message_id, None)
                if group is not None:
                    self._deliver(group, _contents(reply, len(group)))
            for lost in [m for m in self._in_flight if self._stays[m][1] != self.places.stay(self._stays[m][0])]:
                group = self._in_flight.pop(lost)
                self._deliver(group, [Error(ErrorCode.NODE_UNAVAILABLE, "its node was away since")] * len(group))
            self._stays = {m: stay for m, stay in self._stays.items() if m in self._in_flight}
        here = self._replies.keys() & set(message_ids)
        return [reply for _, reply in sorted((self._replies.pop(i) for i in here), key=lambda pair: pair[0].order)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None, poll_s: float = 0.05
    ) -> list[Message]:
        """Push, and pull every ``poll_s`` until all have answered or ``timeout`` seconds are over.

        What comes after the timeout is dropped. Replies are sorted as `pull_messages` sorts them.
        """
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            got = self.pull_messages(waiting)
            replies += got
            waiting.difference_update(reply.metadata.reply_to_message_id for reply in got)
            if waiting and deadline is not None and time.monotonic() >= deadline:
                self._wanted -= waiting
                break
            if waiting:
                time.sleep(poll_s)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def close(self) -> None:
        """Forget what is on its way, and close the grid below if it can be closed."""
        self._in_flight.clear()
        self._replies.clear()
        self._wanted.clear()
        if callable(close := getattr(self.grid, "close", None)):
            close()

    def __enter__(self) -> CohortGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cohort_message(self, node: int, kind: str, cohort: list[tuple[_Sent, Message]]) -> Message:
        sent = [message.metadata for _, message in cohort]
        groups = [metadata.group_id for metadata in sent]
        clients, ids = [client_of(m.dst_node_id) for m in sent], [m.message_id for m in sent]
        header: dict[str, Any] = {"clients": clients, "ids": ids, "groups": groups, "join": self.join}
        if note := self.places.note(clients):
            header["note"] = note
        content = pack([message.content for _, message in cohort], header, join=self.join)
        group = groups[0] if len(set(groups)) == 1 else ""
        return Message(content, node, kind, ttl=max(m.ttl for m in sent), group_id=group)

    def _deliver(self, group: list[_Sent], contents: Sequence[Content]) -> None:
        for sent, content in zip(group, contents, strict=True):
            if (message_id := sent.metadata.message_id) in self._wanted:
                self._wanted.remove(message_id)
                self._replies[message_id] = (sent, _reply_to(sent.metadata, content))
                if sent.metadata.message_type == "train" and not isinstance(content, Error):
                    job = sent.metadata.group_id
                    self.places.heard(client_of(sent.metadata.dst_node_id), int(job) if job.isdecimal() else 0)


def _contents(reply: Message, count: int) -> Sequence[Content]:
    """What ``reply``, a node's answer, holds for each of its ``count`` clients. Never raises."""
    try:
        if reply.has_error():
            return [reply.error] * count
        contents = unpack(reply.content, count)[1]
        if len(contents) != count:
            raise ValueError(f"{len(contents)} contents for {count} clients")
        return contents
    except Exception as error:  # the node decides what is in it, so anything may break
        text = f"malformed reply of node {reply.metadata.src_node_id} ({type(error).__name__}: {error!s:.200})"
        return [Error(ErrorCode.UNKNOWN, text)] * count


def _reply_to(request: Metadata, content: Content) -> Message:
    metadata = Metadata(
        run_id=request.run_id,
        message_id=f"r{request.message_id}",
        src_node_id=request.dst_node_id,
        dst_node_id=request.src_node_id,
        reply_to_message_id=request.message_id,
        group_id=request.group_id,
        created_at=request.created_at,
        ttl=request.ttl,
        message_type=request.message_type,
    )
    if isinstance(content, Error):
        return make_message(metadata, error=content)
    return make_message(metadata, content=content)


def cohort_app(
    train: Handler,
    evaluate: Handler | None = None,
    query: Handler | None = None,
    remember: int = 4,
    enter: Enter | None = None,
) -> ClientApp:
    """The ClientApp of a node under a `CohortGrid`: gives all messages that came together to one call.

    ``train``, ``evaluate`` and ``query`` get the clients' messages (``metadata.dst_node_id`` is `node_id` of the
    client) and the node's context, and return a reply to each, made with ``Message(content or Error,
    reply_to=message)``, in any order; a client without one gets an error. If the call raises, Flower answers for the
    node, so for every client.

    ``enter`` is called before, with what the message tells its node (`Places.note`); what it raises is the answer.

    Flower may deliver a message twice over a network. The last ``remember`` replies are kept by run and message id and
    sent again instead of running twice. Within a process (``join`` off) a message comes once and nothing is kept.
    """
    app = ClientApp()
    remembered: OrderedDict[tuple[int, str], RecordDict] = OrderedDict()

    def register(kind: Callable[[], Callable[[Handler], Handler]], handler: Handler) -> None:
        def answer(message: Message, context: Context) -> Message:
            key = (message.metadata.run_id, message.metadata.message_id)
            if key not in remembered:
                header, contents = unpack(message.content)
                if enter is not None:
                    enter(dict(header.get("note", {})), context)
                packed = _run(handler, message, header, contents, context)
                if not header["join"]:
                    return Message(packed, reply_to=message)
                remembered[key] = packed
                if len(remembered) > remember:
                    remembered.popitem(last=False)
            return Message(remembered[key], reply_to=message)

        kind()(answer)  # type: ignore[arg-type]

    register(app.train, train)  # type: ignore[arg-type]
    if evaluate is not None:
        register(app.evaluate, evaluate)  # type: ignore[arg-type]
    if query is not None:
        register(app.query, query)  # type: ignore[arg-type]
    return app


def _run(handler: Handler, message: Message, header: dict, contents: Sequence[Content], context: Context) -> RecordDict:
    """Give ``handler`` one message for each client, and pack its replies in the same order."""
    messages = []
    for client, message_id, group, content in zip(
        header["clients"], header["ids"], header["groups"], contents, strict=True
    ):
        if isinstance(content, Error):
            raise ValueError(content.reason)
        metadata = Metadata(
            run_id=message.metadata.run_id,
            message_id=message_id,
            src_node_id=message.metadata.src_node_id,
            dst_node_id=node_id(client),
            reply_to_message_id="",
            group_id=group,
            created_at=message.metadata.created_at,
            ttl=message.metadata.ttl,
            message_type=message.metadata.message_type,
        )
        messages.append(make_message(metadata, content=content))
    replies = {reply.metadata.reply_to_message_id: reply for reply in handler(messages, context)}
    missing = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the node has no reply for this client")
    answers = [replies.get(message_id) for message_id in header["ids"]]
    packed = [missing if r is None else r.error if r.has_error() else r.content for r in answers]
    return pack(packed, {}, join=header["join"])
