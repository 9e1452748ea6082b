"""Messages as Flower carries them: a head, and a tree of objects that are named by their SHA-256 hashes.

The SuperLink checks a message's head (who sends it to whom, in answer to what); nobody checks its content, which has a
head of its own. `fetch` gets the objects and takes them only if they are what was announced: as large as allowed, with
the hashes that name them, and a message with the head that the SuperLink has checked. `Replies` does so for a server.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)

MAX_MESSAGE_BYTES = 4 * 2**30
CHECKED = ("run_id", "src_node_id", "dst_node_id", "message_type", "reply_to_message_id")
log = logging.getLogger(__name__)


class RefusedMessage(Exception):
    """What arrived is not what is taken here: too large, changed on the way, or not what it says it is."""


def fetch(
    head: Metadata,
    tree: ObjectTree,
    pull: Callable[[PullObjectRequest], PullObjectResponse],
    node: Any,
    max_bytes: int,
    stop: threading.Event,
) -> Message:
    """The message of ``head``, from the objects of ``tree``, asked for with ``pull`` in the name of ``node``.

    Waits for objects that the sender has announced and not sent yet, for minutes, or until ``stop`` is set. Raises
    `RefusedMessage`, or Flower's ``ObjectPullError`` for objects that never come, and what ``pull`` raises.
    """
    lock, fetched = threading.Lock(), 0

    def fetch_one(object_id: str) -> bytes:
        nonlocal fetched
        if stop.is_set():
            raise RefusedMessage("nobody waits for it any more")
        response = pull(PullObjectRequest(node=node, run_id=head.run_id, object_id=object_id))
        if not response.object_found:
            raise ObjectPullError(object_id, "the SuperLink does not have it")
        if not response.object_available:
            raise ObjectUnavailableError(object_id)
        with lock:
            fetched += len(response.object_content)
            if fetched > max_bytes:
                raise RefusedMessage(f"it is larger than {max_bytes} bytes")
        if get_object_id(response.object_content) != object_id:
            raise RefusedMessage("it was changed on the way: an object does not have the hash that names it")
        return response.object_content

    ids = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
    contents = pull_objects(list(ids), fetch_one, initial_backoff=0.05, backoff_cap=1.0)
    try:
        message = inflate_object_from_contents(tree.object_id, contents)
    except Exception as error:  # the sender decides what is in them, so anything may break
        raise RefusedMessage(f"its objects make no message ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise RefusedMessage(f"it is a {type(message).__name__}, not a message")
    for name in CHECKED:
        said, found = getattr(head, name), getattr(message.metadata, name)
        if said != found:
            raise RefusedMessage(f"its head says {name} {said!r}, and it {found!r}")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def limit_answers(client: httpx.Client, max_bytes: int) -> None:
    """Let ``client`` raise `RefusedMessage`, before it reads it, for an answer larger than ``max_bytes`` and 1 MiB."""

    def check(response: httpx.Response) -> None:
        length = int(response.headers.get("content-length") or 0)
        if length > max_bytes + 2**20:
            raise RefusedMessage(f"it has {length} bytes in one answer, more than {max_bytes}")

    client.event_hooks = {"response": [check]}


class Replies:
    """Replies for the server of ``grid``, Flower's HttpGrid, in place of its ``pull_messages``.

    That waits, for all replies, until the last object of one has been uploaded, which a node can hold up for minutes;
    it raises where a reply's objects make no message; and it believes a content that claims to answer another node's
    message. Here each reply is fetched by a thread, `pull` gives those that are complete, and a reply that is refused
    becomes an error reply from its own node.
    """

    def __init__(self, grid: Any, max_bytes: int = MAX_MESSAGE_BYTES, threads: int = 16):
        self.grid, self.max_bytes = grid, max_bytes
        limit_answers(grid._runtime_client._client, max_bytes)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads, "replies")
        self._coming: dict[str, Future[Message]] = {}  # by the id of the message that is answered

    def pull(self, message_ids: Iterable[str], wait_s: float = 0.05) -> list[Message]:
        """The replies to ``message_ids`` that are complete, each once; waits ``wait_s`` for those on their way."""
        wanted = set(message_ids)
        if ask := wanted - self._coming.keys():
            response = self.grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=sorted(ask)))
            for proto, tree in zip(response.messages_list, response.message_object_trees, strict=True):
                head = message_from_proto(proto).metadata
                if head.reply_to_message_id not in ask:
                    continue  # Flower adds messages to the server itself, which Shoal does not use
                self._coming[head.reply_to_message_id] = self._pool.submit(self._fetch, head, tree)
        waiting = {key: self._coming[key] for key in wanted & self._coming.keys()}
        wait(waiting.values(), timeout=wait_s)
        done = [key for key, future in waiting.items() if future.done()]
        return [self._coming.pop(key).result() for key in done]

    def close(self) -> None:
        """Give up what is on its way."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, head: Metadata, tree: ObjectTree) -> Message:
        client, node = self.grid._runtime_client, self.grid.node
        try:
            message = fetch(head, tree, client.PullObject, node, self.max_bytes, self._stop)
        except (RefusedMessage, ObjectPullError) as refused:
            log.warning("a reply of node %d was refused: %s", head.src_node_id, refused)
            message = make_message(head, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, f"refused: {refused}"))
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=head.run_id, message_object_id=tree.object_id)
        )
        return message
