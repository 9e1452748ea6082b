"""Replies as a server takes them: complete ones, each for the message that its node was sent, and no garbage."""

from __future__ import annotations

import threading

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto import message_pb2, runtime_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run, RunNotRunningException
from flwr.superlink.grid import HttpGrid

from fl.engine.flower import ensure_identity
from fl.engine.objects import Replies
from fl.engine.retrying import RetryGrid
from fl.errors import RunStopped


class FakeRuntime:
    """A SuperLink's Runtime API: hands a reply out once, and an error for a message that it does not have any more."""

    def __init__(self):
        self.heads, self.objects, self.withheld, self.confirmed, self.status = {}, {}, set(), [], {}
        self.asked = []
        self.lock = threading.Lock()

    def sent(self, node: int) -> Message:
        made = Message(RecordDict(), node, "train")
        made.metadata.__dict__["_message_id"] = made.object_id
        return made

    def reply(self, message: Message, **values) -> Message:
        """A node answers ``message`` with ``values``."""
        content = RecordDict({"c": ConfigRecord(values), "a": ArrayRecord({"a": Array(np.arange(5.0))})})
        return self.put(Message(content, reply_to=message))

    def put(self, made: Message, head: Message | None = None) -> Message:
        """A node sends ``made``; ``head`` is what it shows the SuperLink to be answering."""
        made.metadata.__dict__["_message_id"] = made.object_id
        proto = message_to_proto(remove_content_from_message(Message(RecordDict(), reply_to=head) if head else made))
        proto.metadata.message_id = made.object_id
        self.heads[proto.metadata.reply_to_message_id] = (proto, get_object_tree(made))
        self.objects |= {key: part.deflate() for key, part in get_all_nested_objects(made).items()}
        return made

    def __call__(self, http: httpx.Request) -> httpx.Response:
        path = http.url.path.removeprefix("/v1/runtime/")
        if status := self.status.get(path):
            return httpx.Response(status)
        with self.lock:
            answer = getattr(self, "do_" + path.replace("-", "_"))(http.read())
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, content=answer.SerializeToString())

    def do_pull_messages(self, body):
        asked = runtime_pb2.PullAppMessagesRequest.FromString(body).message_ids
        self.asked += asked
        here = [self.heads.pop(i) for i in asked if i in self.heads]
        return runtime_pb2.PullAppMessagesResponse(
            messages_list=[head for head, _ in here], message_object_trees=[tree for _, tree in here]
        )

    def do_pull_object(self, body):
        object_id = message_pb2.PullObjectRequest.FromString(body).object_id
        content = self.objects.get(object_id)
        if isinstance(content, httpx.Response):
            return content
        here = content is not None and object_id not in self.withheld
        return message_pb2.PullObjectResponse(
            object_found=content is not None, object_available=here, object_content=content if here else b""
        )

    def do_confirm_message_received(self, body):
        self.confirmed.append(message_pb2.ConfirmMessageReceivedRequest.FromString(body).message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()


@pytest.fixture
def runtime():
    ensure_identity(1)
    return FakeRuntime()


@pytest.fixture
def grid(runtime):
    below = HttpGrid("127.0.0.1:1", insecure=True, token="t")
    below.set_run(Run.create_empty(1))
    below._runtime_client._client = httpx.Client(transport=httpx.MockTransport(runtime))
    made = RetryGrid(below, patience_s=0.0)
    yield made
    made.close()


def pulled(grid, *messages) -> dict[str, Message]:
    """Replies by the message that they answer; pulls until all are here."""
    ids, replies = {m.metadata.message_id for m in messages}, []
    for _ in range(400):
        replies += grid.pull_messages(ids - {r.metadata.reply_to_message_id for r in replies})
        if len(replies) == len(ids):
            break
    return {r.metadata.reply_to_message_id: r for r in replies}


def test_replies_come_whole_and_are_confirmed(runtime, grid):
    first, second = runtime.sent(3), runtime.sent(4)
    made = [runtime.reply(first, x=1), runtime.reply(second, x=2)]
    replies = pulled(grid, first, second)
    for message, reply in zip((first, second), made, strict=True):
        got = replies[message.metadata.message_id]
        assert got.content == reply.content and got.metadata.message_id == reply.metadata.message_id
        assert got.metadata.src_node_id == message.metadata.dst_node_id
    assert sorted(runtime.confirmed) == sorted(m.metadata.message_id for m in made)
    assert grid.pull_messages([first.metadata.message_id]) == []


def test_one_that_is_still_coming_holds_nobody_up_and_is_not_asked_for_twice(runtime, grid):
    slow, quick = runtime.sent(3), runtime.sent(4)
    made = runtime.reply(slow, x=1)
    runtime.withheld = {made.content["c"].object_id}
    ids = [slow.metadata.message_id, quick.metadata.message_id]
    assert grid.pull_messages(ids) == []
    runtime.reply(quick, x=2)
    assert list(pulled(grid, quick)) == ids[1:]
    assert grid.pull_messages(ids) == []
    assert runtime.asked.count(ids[0]) == 1  # Flower would say that it has it no more
    runtime.withheld = set()
    assert pulled(grid, slow)[ids[0]].content["c"]["x"] == 1


def test_a_reply_to_another_nodes_message_is_refused(runtime, grid):
    """Its head, which the SuperLink checks, answers the node's own message; its content claims to answer another."""
    mine, victims = runtime.sent(3), runtime.sent(4)
    forged = Message(RecordDict({"c": ConfigRecord({"x": 666})}), reply_to=mine)
    forged.metadata.__dict__["_reply_to_message_id"] = victims.metadata.message_id
    runtime.put(forged, head=mine)
    replies = pulled(grid, mine)
    refused = replies[mine.metadata.message_id]
    assert refused.error.code == ErrorCode.MESSAGE_UNAVAILABLE and "its head says" in refused.error.reason
    assert refused.metadata.src_node_id == 3
    assert grid.pull_messages([victims.metadata.message_id]) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing", "does not have it"), ("changed", "changed on the way"), ("large", "larger than 1000 bytes")],
)
def test_garbage_is_an_error_of_its_node(runtime, grid, name, reason):
    message, other = runtime.sent(3), runtime.sent(4)
    made = runtime.reply(message, x=1, filling=bytes(2000 if name == "large" else 1))
    runtime.reply(other, x=2)
    key = made.content["c"].object_id
    if name == "missing":
        del runtime.objects[key]
    elif name == "changed":
        runtime.objects[key] += b"x"
    grid._replies.max_bytes = 1000
    replies = pulled(grid, message, other)
    assert reason in replies[message.metadata.message_id].error.reason
    assert replies[other.metadata.message_id].content["c"]["x"] == 2


def test_one_large_object_is_refused_before_it_is_read(runtime, grid):
    class Unread(httpx.SyncByteStream):
        def __iter__(self):
            raise AssertionError("it was read")

    message = runtime.sent(3)
    made = runtime.reply(message, x=1)
    key = made.content["c"].object_id
    runtime.objects[key] = httpx.Response(200, headers={"content-length": str(2**40)}, stream=Unread())
    assert "bytes in one answer" in pulled(grid, message)[message.metadata.message_id].error.reason


def test_an_error_reply_comes_as_it_is(runtime, grid):
    message = runtime.sent(3)
    runtime.put(Message(Error(2, "no"), reply_to=message))
    assert pulled(grid, message)[message.metadata.message_id].error.reason == "no"


def test_trouble_while_a_reply_is_fetched_stops_the_run(runtime, grid):
    message = runtime.sent(3)
    for status, error in ((500, RunStopped), (403, RunNotRunningException)):
        runtime.reply(message, x=1)
        runtime.status = {"pull-object": status}
        with pytest.raises(error):
            pulled(grid, message)


def test_closing_gives_up_what_is_coming(runtime, grid):
    message = runtime.sent(3)
    runtime.withheld = {runtime.reply(message, x=1).content["a"].object_id}
    replies = Replies(grid.grid)
    assert replies.pull([message.metadata.message_id]) == []
    (future,) = replies._coming.values()
    replies.close()
    assert future.result(30).error.code == ErrorCode.MESSAGE_UNAVAILABLE
