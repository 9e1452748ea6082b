"""A Flower grid in one process: no server, no sockets, no threads, the same order every time.

Ordinary Flower apps and strategies run on it as they are::

    with InProcessGrid(client_app, num_nodes=10) as grid:
        server_app(grid, grid.server_context({"num-rounds": 3}))
"""

from __future__ import annotations

import copy as copying
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fl.engine.flower import ensure_identity, quick_record
from fl.engine.packing import own_record
from fl.errors import ShoalError

log = logging.getLogger(__name__)
FIRST_NODE = 2  # 0 is no node and 1 is the server, in Flower
_run_ids = itertools.count(1)  # so that what an app remembers by run does not leak into the next grid's run


class InProcessGrid(Grid):
    """Runs ``client_app`` on ``num_nodes`` nodes, named 2, 3, ..., when their replies are pulled.

    Pushed messages wait; a pull runs all that wait, in the order in which they were pushed, and returns its replies
    sorted by node, so that sums over them repeat bit for bit although Flower's strategies shuffle the nodes. A client
    that raises becomes an error reply, as in Flower's own runtimes. Each node keeps one `Context` for the grid's
    life, with ``partition-id`` and ``num-partitions`` in its ``node_config``.

    ``copy`` says what a receiver gets, on either side:

    - ``records``: records of its own, over shared array bytes (which are immutable), as they were when pushed;
    - ``wire``: what is left after Flower's serialisation and back;
    - ``none``: the sender's own objects; for senders and receivers that change nothing.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        num_nodes: int = 1,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        copy: Literal["records", "wire", "none"] = "records",
        run_id: int | None = None,
    ):
        if num_nodes < 1 or copy not in _COPIES:
            raise ValueError(f"a grid needs num_nodes >= 1 and copy in {', '.join(_COPIES)}, not {num_nodes}, {copy!r}")
        self._run = Run.create_empty(next(_run_ids) if run_id is None else run_id)
        ensure_identity(self._run.run_id)
        self.shares_memory = copy != "wire"  # what is pushed arrives without being serialised
        self._app, self._copy, self._run_config = client_app, _COPIES[copy], dict(run_config or {})
        self._contexts = {
            FIRST_NODE + i: self._context(FIRST_NODE + i, {"partition-id": i, "num-partitions": num_nodes})
            for i in range(num_nodes)
        }
        self._ids = itertools.count(1)
        self._queue: deque[Message] = deque()  # pushed, not yet run
        self._replies: dict[str, Message] = {}  # by the id of the message that each one answers
        self._lock = threading.RLock()  # Flower's legacy server pushes from several threads
        self._closed = False

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        self._run = run

    def server_context(self, run_config: Mapping[str, bool | float | int | str] | None = None) -> Context:
        """A fresh context for a ServerApp of this run; ``run_config`` is by default the one that the clients have."""
        context = self._context(SUPERLINK_NODE_ID, {})
        if run_config is not None:
            context.run_config = dict(run_config)
        return context

    def _context(self, node: int, node_config: dict[str, bool | float | int | str]) -> Context:
        return Context(self._run.run_id, node, node_config, RecordDict(), dict(self._run_config))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue ``messages``; returns their ids. Raises `ShoalError` for an unknown node or a closed grid."""
        with self._lock:
            self._check_open()
            messages = list(messages)
            for message in messages:
                if message.metadata.dst_node_id not in self._contexts:
                    nodes = f"{FIRST_NODE} to {FIRST_NODE + len(self._contexts) - 1}"
                    raise ShoalError(f"there is no node {message.metadata.dst_node_id}; this grid has nodes {nodes}.")
            ids = []
            for message in messages:
                ids.append(str(next(self._ids)))
                stamp = {"_message_id": ids[-1], "_run_id": self._run.run_id, "_src_node_id": SUPERLINK_NODE_ID}
                message.metadata.__dict__.update(stamp)  # as Flower's grids do; there is no setter
                self._queue.append(self._copy(message))
            return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run all that waits, then hand out the replies to ``message_ids`` (each once), by node, then as pushed."""
        with self._lock:
            self._check_open()
            while self._queue:
                message = self._queue.popleft()
                reply = self._copy(self._answer(message))
                reply.metadata.__dict__["_message_id"] = str(next(self._ids))
                self._replies[message.metadata.message_id] = reply
            numbers = sorted(map(int, self._replies.keys() & set(message_ids)))
            replies = [self._replies.pop(str(number)) for number in numbers]
            return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull. Clients run inside this call, so ``timeout`` has nothing to cut short."""
        with self._lock:
            return self.pull_messages(self.push_messages(messages))

    def close(self) -> None:
        """Drop what is queued and what the nodes remember. The grid can't be used afterwards; closing twice is fine."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._replies.clear()
            self._contexts.clear()

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ShoalError("the grid is closed; open a new InProcessGrid.")

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            reply = self._app(message, self._contexts[node])
            if not isinstance(reply, Message):
                raise TypeError(f"a ClientApp returns a Message, not {type(reply).__name__}")
            return reply
        except Exception as error:
            log.error("node %d raised on a %s message", node, message.metadata.message_type, exc_info=error)
            reason = f"{type(error)}:<'{error}'>"  # the text of Flower's own runtimes
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _own_records(message: Message) -> Message:
    metadata = copying.copy(message.metadata)
    if message.has_error():
        return make_message(metadata, error=message.error)
    content = quick_record(RecordDict, {name: own_record(record) for name, record in message.content.items()})
    return make_message(metadata, content=content)


def _over_the_wire(message: Message) -> Message:
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))


_COPIES: dict[str, Callable[[Message], Message]] = {
    "records": _own_records,
    "wire": _over_the_wire,
    "none": lambda message: message,
}
