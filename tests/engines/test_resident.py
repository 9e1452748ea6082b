"""A resident node at a SuperLink that a test makes up: whatever arrives, it answers, goes on, and leaves when told."""

from __future__ import annotations

import logging
import signal
import threading

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto, user_config_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fl.engine import node_link
from fl.engine.flower import ensure_identity
from fl.engine.resident import Pace, serve_node, until_signal
from fl.errors import ShoalError

CODES = ApiErrorCode
REQUESTS = {
    "register-node": fleet_pb2.RegisterNodeFleetRequest,
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "unregister-node": fleet_pb2.UnregisterNodeFleetRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "get-run": run_pb2.GetRunRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "push-object": message_pb2.PushObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}


class FakeSuperLink:
    """Answers a node's requests; when its messages are all handed out it sets ``stop``.

    ``trouble[path]`` are what to answer first: a status, an exception to raise, (status, code of Flower), or "after":
    do the work, and answer 500.
    """

    def __init__(self):
        self.stop, self.queue, self.objects, self.over = Waiting(), [], {}, set()
        self.trouble, self.seen, self.replies, self.pushed, self.node_id = {}, [], {}, {}, 7
        self.unstored = 0

    def send(self, message: Message, head: Message | None = None, root=None) -> Message:
        """Queue ``message``; ``head`` and ``root`` (an object) take its place where a test wants that."""
        message.metadata.__dict__["_message_id"] = message.object_id
        root = root or message
        self.objects |= {key: part.deflate() for key, part in get_all_nested_objects(root).items()}
        proto = message_to_proto(remove_content_from_message(head or message))
        proto.metadata.message_id = root.object_id
        self.queue.append((proto, get_object_tree(root)))
        return message

    def reply_to(self, message: Message) -> Message:
        """The one reply to ``message``."""
        (found,) = (r for r in self.replies.values() if r.metadata.reply_to_message_id == message.metadata.message_id)
        return inflate_object_from_contents(found.metadata.message_id, dict(self.pushed))

    def count(self, path: str) -> int:
        return sum(name == path for name, _ in self.seen)

    def __call__(self, http: httpx.Request) -> httpx.Response:
        path = http.url.path.removeprefix("/v1/fleet/")
        request = REQUESTS[path].FromString(http.read())
        self.seen.append((path, request))
        first = self.trouble.get(path) or [None]
        match first.pop(0):
            case None:
                return self._answer(path, request)
            case Exception() as error:
                raise error
            case "after":
                self._answer(path, request)
                return httpx.Response(500)
            case httpx.Response() as answer:
                return answer
            case (status, code):
                return httpx.Response(status, json={"code": int(code), "detail": "no"})
            case status:
                return httpx.Response(status)

    def _answer(self, path, request):
        if getattr(request, "run_id", 0) in self.over:
            return httpx.Response(403)
        answer = getattr(self, "do_" + path.replace("-", "_"), lambda request: None)(request)
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, content=answer.SerializeToString() if answer is not None else b"")

    def do_activate_node(self, request):
        if request.heartbeat_interval < 10:
            return httpx.Response(400, json={"code": int(CODES.FLEET_INVALID_HEARTBEAT_INTERVAL), "detail": "no"})
        return fleet_pb2.ActivateNodeResponse(node_id=self.node_id)

    def do_pull_messages(self, request):
        if not self.queue:
            self.stop.set()
            return None
        head, tree = self.queue.pop(0)
        return fleet_pb2.PullMessagesResponse(messages_list=[head], message_object_trees=[tree])

    def do_pull_object(self, request):
        content = self.objects.get(request.object_id)
        if content is None:
            return message_pb2.PullObjectResponse()
        return message_pb2.PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def do_push_messages(self, request):
        (reply,), (tree,) = request.messages_list, request.message_object_trees
        if reply.metadata.run_id in self.over:
            return httpx.Response(403)
        assert reply.metadata.message_id == tree.object_id
        self.replies[reply.metadata.message_id] = reply
        wanted = {tree.object_id, *(c.object_id for c in tree.children)} | _below(tree)
        return fleet_pb2.PushMessagesResponse(objects_to_push=wanted - self.pushed.keys(), session_id="s")

    def do_push_object(self, request):
        if self.unstored:
            self.unstored -= 1
            return message_pb2.PushObjectResponse(stored=False)
        assert get_object_id(request.object_content) == request.object_id
        self.pushed[request.object_id] = request.object_content
        return message_pb2.PushObjectResponse(stored=True)

    def do_get_run(self, request):
        words = user_config_to_proto({"cfg": f"of {request.run_id}"})
        return run_pb2.GetRunResponse(run=run_pb2.Run(run_id=request.run_id, override_config=words))


def _below(tree) -> set[str]:
    return {tree.object_id}.union(*(_below(child) for child in tree.children))


class Waiting(threading.Event):
    """A stop event on which nobody waits."""

    def wait(self, timeout=None):
        return self.is_set()


@pytest.fixture
def link(monkeypatch):
    """A SuperLink that nodes of this test connect to."""
    ensure_identity(1)
    fake, connect = FakeSuperLink(), node_link.connect

    def connected(*args):
        client = connect(*args)
        client._client = httpx.Client(transport=httpx.MockTransport(fake))
        return client

    monkeypatch.setattr(node_link, "connect", connected)
    monkeypatch.setattr("fl.engine.retrying.time.sleep", lambda seconds: None)
    return fake


def message(kind: str = "train", run_id: int = 5, **values) -> Message:
    made = Message(RecordDict({"c": ConfigRecord({"x": 1, **values})}), 7, kind)
    made.metadata.__dict__["_run_id"] = run_id
    return made


def counting_app(calls: list | None = None) -> ClientApp:
    """Answers how many messages of this run it has had, and with what settings."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = context.state.setdefault("n", ConfigRecord({"n": 0}))
        number["n"] += 1
        if calls is not None:
            calls.append(message.content["c"]["x"])
        said = {"n": number["n"], "cfg": context.run_config["cfg"], "node": context.node_config["node"]}
        return Message(RecordDict({"c": ConfigRecord(said)}), reply_to=message)

    return app


def raising_app(error: Exception) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise error

    return app


def serve(link, app=None, **settings):
    serve_node("x:1", app or counting_app(), insecure=True, node_config={"node": "n"}, stop=link.stop, **settings)


def test_messages_are_answered_and_the_node_leaves(link):
    first, second, other = (link.send(m) for m in (message(x=1), message(x=2), message(run_id=6)))
    calls = []
    serve(link, counting_app(calls))
    said = [dict(link.reply_to(m).content["c"]) for m in (first, second, other)]
    assert said == [
        {"n": 1, "cfg": "of 5", "node": "n"},
        {"n": 2, "cfg": "of 5", "node": "n"},
        {"n": 1, "cfg": "of 6", "node": "n"},
    ]
    assert calls == [1, 2, 1]
    confirmed = [request.message_object_id for path, request in link.seen if path == "confirm-message-received"]
    assert confirmed == [m.metadata.message_id for m in (first, second, other)]
    paths = [path for path, _ in link.seen]
    assert paths[:2] == ["register-node", "activate-node"] and paths[-2:] == ["deactivate-node", "unregister-node"]
    assert "get-fab" not in paths


def test_a_type_that_the_app_does_not_have(link):
    asked, after = link.send(message("query.secrets")), link.send(message())
    calls = []
    serve(link, counting_app(calls))
    error = link.reply_to(asked).error
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "no 'query.secrets' messages; it takes train" in error.reason
    assert link.reply_to(after).has_content() and calls == [1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("an example: Mr Smith"), "ValueError (the node's log says more)"),
        (httpx.ConnectError("Mr Smith"), "ConnectError (the node's log says more)"),
        (ShoalError("rank=3 is not allowed."), "ShoalError: rank=3 is not allowed."),
        (ShoalError("x" * 10_000), "ShoalError: " + "x" * 488),
    ],
    ids=["unknown", "of the network", "for the user", "long"],
)
def test_an_app_that_raises(link, caplog, error, reason):
    """Only what is meant for users leaves the node; all of it is logged here."""
    asked = link.send(message())
    serve(link, raising_app(error))
    assert link.reply_to(asked).error.reason == reason
    assert not any(b"Smith" in content for content in link.pushed.values())
    assert str(error)[:100] in caplog.text


@pytest.mark.parametrize("answer", [None, "text", Message], ids=str)
def test_an_app_whose_answer_can_not_be_sent(link, answer):
    app = ClientApp()

    @app.train()
    def train(message, context):
        if answer is not Message:
            return answer
        reply = Message(RecordDict({"c": ConfigRecord()}), reply_to=message)
        reply.content.__dict__["_data"]["c"] = object()
        return reply

    asked = link.send(message())
    serve(link, app)
    assert "log says more" in link.reply_to(asked).error.reason


def test_a_message_that_is_too_large_is_not_loaded(link):
    large = link.send(message(parts=[bytes([n]) * 1000 for n in range(10)]))
    after = link.send(message())
    serve(link, max_message_bytes=5000)
    assert link.reply_to(large).error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert "larger than 5000 bytes" in link.reply_to(large).error.reason
    assert link.reply_to(after).has_content()
    assert link.count("confirm-message-received") == 2


class Unread(httpx.SyncByteStream):
    """A body that nobody may read."""

    def __iter__(self):
        raise AssertionError("it was read")


def test_one_large_answer_is_refused_before_it_is_read(link):
    large, after = link.send(message(x=1)), link.send(message(x=2))
    unread = httpx.Response(200, headers={"content-length": str(3 * 2**20)}, stream=Unread())
    link.trouble["pull-object"] = [unread]
    serve(link, max_message_bytes=10_000)
    assert "bytes in one answer" in link.reply_to(large).error.reason
    assert link.reply_to(after).has_content()


def garbage(link, name: str) -> Message:
    """Queue a message with something wrong about it."""
    asked = message()
    if name == "changed on the way":
        link.send(asked)
        content = link.objects[asked.content.object_id]
        link.objects[asked.content.object_id] = content[:-1] + bytes([content[-1] ^ 1])
    elif name == "an object is missing":
        link.send(asked)
        del link.objects[asked.content.object_id]
    elif name == "no message":
        link.send(asked, root=asked.content)
    elif name == "no object":
        link.send(asked)
        link.objects[get_object_id(b"\xff garbage")] = b"\xff garbage"
        head, _ = link.queue.pop()
        link.queue.append((head, message_pb2.ObjectTree(object_id=get_object_id(b"\xff garbage"))))
    else:
        kind, run_id = ("query", 5) if name == "another type" else ("train", 6)
        link.send(asked, head=message(kind, run_id))
    asked.metadata.__dict__["_message_id"] = link.queue[-1][0].metadata.message_id
    return asked


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("changed on the way", "changed on the way"),
        ("an object is missing", "does not have it"),
        ("no message", "it is a RecordDict"),
        ("no object", "make no message"),
        ("another type", "says message_type 'query', and it 'train'"),
        ("another run", "says run_id 6, and it 5"),
    ],
)
def test_what_is_not_what_it_says(link, name, reason):
    asked, after, calls = garbage(link, name), link.send(message(x=2)), []
    serve(link, counting_app(calls))
    assert reason in link.reply_to(asked).error.reason
    assert link.reply_to(after).has_content() and calls == [2]
    assert link.count("confirm-message-received") == 2


def test_a_head_that_can_not_be_read_is_confirmed_and_dropped(link, caplog):
    link.send(message())
    link.queue[0][0].metadata.message_type = "no such thing"
    after = link.send(message())
    serve(link)
    assert link.reply_to(after).has_content() and len(link.replies) == 1
    assert "its head can't be read" in caplog.text and link.count("confirm-message-received") == 2


@pytest.mark.parametrize("path", ["pull-object", "get-run", "push-messages", "push-object", "confirm-message-received"])
def test_a_run_that_is_over(link, path):
    link.send(message())
    after = link.send(message(run_id=6))
    link.trouble[path] = [403]
    serve(link)
    assert link.reply_to(after).content["c"]["n"] == 1
    assert [request.run_id for name, request in link.seen if name == "get-run"].count(5) <= 1  # its context is dropped


def test_contexts_are_dropped_when_their_run_is_over(link):
    app = ClientApp()

    @app.train()
    def train(message, context):
        if message.metadata.run_id == 6:
            link.over = {5}
        return Message(RecordDict(), reply_to=message)

    for run_id in (5, 6, 7, 8):
        link.send(message(run_id=run_id))
    serve(link, app)
    asked = [request.run_id for path, request in link.seen if path == "get-run"]
    assert asked == [5, 6, 5, 7, 5, 6, 8, 6, 7]


@pytest.mark.parametrize("path", [p for p in REQUESTS if not p.startswith(("dea", "unr", "send"))])
@pytest.mark.parametrize("first", [500, 503, httpx.ConnectError("away"), "after"], ids=str)
def test_trouble_of_the_superlink_is_survived(link, path, first):
    """Each request may fail, with or without effect: all messages are answered, once."""
    if (path, first) == ("pull-messages", "after"):
        pytest.skip("Flower hands a message out once; it is lost with the answer")
    asked = [link.send(message(x=n)) for n in range(3)]
    link.trouble[path] = [first] * 3 if first != "after" else [first]
    calls = []
    serve(link, counting_app(calls))
    assert [link.reply_to(m).content["c"]["n"] for m in asked] == [1, 2, 3]
    assert calls == [0, 1, 2]


def test_objects_that_are_not_stored_are_pushed_again(link):
    asked, link.unstored = link.send(message()), 3
    serve(link)
    assert link.reply_to(asked).has_content()


def test_an_object_that_is_never_stored_does_not_end_the_node(link, caplog):
    link.send(message(x=1))
    link.unstored = 1000
    link.queue.append(None)
    handed_out = link.do_pull_messages

    def pull(request):
        if link.queue and link.queue[0] is None:
            link.queue.pop(0)
            link.unstored = 0
            link.send(message(x=2))
        return handed_out(request)

    link.do_pull_messages, calls = pull, []
    serve(link, counting_app(calls))
    assert calls == [1, 2] and "a message was lost" in caplog.text
    assert {r.metadata.reply_to_message_id for r in link.replies.values()} and link.pushed


def test_a_reply_that_the_superlink_does_not_take_is_given_up(link, caplog):
    asked, after = link.send(message(x=1)), link.send(message(x=2))
    link.trouble["push-messages"] = [400]
    serve(link)
    assert link.reply_to(after).has_content()
    assert asked.metadata.message_id not in {r.metadata.reply_to_message_id for r in link.replies.values()}
    assert "HTTP 400" in caplog.text


def test_a_forgotten_node_joins_again(link, caplog):
    link.trouble["pull-messages"] = [None, 401]
    first, second = link.send(message(x=1)), link.send(message(x=2))
    serve(link)
    assert link.reply_to(first).content["c"]["n"] == link.reply_to(second).content["c"]["n"] == 1
    assert link.count("register-node") == 2 and "does not know node 7" in caplog.text


@pytest.fixture
def key_file(tmp_path):
    key = ec.generate_private_key(ec.SECP384R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.OpenSSH, plain))
    return tmp_path / "key"


def test_a_key_in_use_is_waited_for(link, key_file, caplog):
    asked = link.send(message())
    link.trouble["activate-node"] = [(412, CODES.FLEET_NODE_ACTIVATION_FAILED), None] * 3
    serve(link, key_file=key_file)
    assert link.reply_to(asked).has_content()
    assert [r.levelname for r in caplog.records if "is in use" in r.message] == ["WARNING"]
    intervals = [request.heartbeat_interval for path, request in link.seen if path == "activate-node"]
    assert intervals == [30.0, -1.0] * 3 + [30.0]
    assert not link.count("register-node") and not link.count("unregister-node")


def test_a_superlink_that_gives_errors_for_long_is_waited_for(link, key_file, monkeypatch):
    made = node_link.Retry
    monkeypatch.setattr(node_link, "Retry", lambda what, patience_s, away_s, **kw: made(what, 0.0, away_s, **kw))
    asked = link.send(message())
    link.trouble["activate-node"] = [500, 500, None]
    serve(link, key_file=key_file)
    assert link.reply_to(asked).has_content()


@pytest.mark.parametrize(
    ("path", "answers", "text"),
    [
        ("activate-node", [(412, CODES.FLEET_NODE_ACTIVATION_FAILED)] * 2, r"know the key .*key.*among the server"),
        ("activate-node", [401], "clocks"),
        ("activate-node", [404], "HTTP 404"),
        ("activate-node", [403], "Is it a SuperLink"),
    ],
    ids=["unknown key", "signature", "no such page", "forbidden"],
)
def test_what_waiting_does_not_heal(link, key_file, path, answers, text):
    link.trouble[path] = list(answers)
    with pytest.raises(ShoalError, match=text):
        serve(link, key_file=key_file)
    assert not link.count("pull-messages")


def test_a_node_without_a_key_where_keys_are_asked_for(link):
    link.trouble["register-node"] = [(412, CODES.FLEET_SUPERNODE_REGISTRATION_DISABLED)]
    with pytest.raises(ShoalError, match="only nodes with a known key"):
        serve(link)


def test_a_key_that_was_registered_before_the_answer_got_lost(link):
    link.trouble["register-node"] = [500, (412, CODES.PUBLIC_KEY_ALREADY_IN_USE)]
    asked = link.send(message())
    serve(link)
    assert link.reply_to(asked).has_content()


def test_a_key_file_that_is_none(tmp_path, link):
    (tmp_path / "key").write_text("no key")
    for name in ("key", "absent"):
        with pytest.raises(ShoalError, match="can't read the node's key"):
            serve(link, key_file=tmp_path / name)


def test_certificates_that_are_none(link):
    with pytest.raises(ShoalError, match="CA certificates"):
        serve_node("x:1", ClientApp(), insecure=False, root_certificates=b"no", stop=link.stop)


def test_stop_while_the_superlink_is_away(link):
    link.stop = threading.Event()
    link.trouble["register-node"] = [httpx.ConnectError("away")] * 1000
    threading.Timer(0.5, link.stop.set).start()
    serve(link)
    assert 1 <= link.count("register-node") < 10 and not link.count("deactivate-node")


def test_stop_ends_after_the_message_in_hand(link):
    app = ClientApp()

    @app.train()
    def train(message, context):
        link.stop.set()
        return Message(RecordDict(), reply_to=message)

    first, second = link.send(message(x=1)), link.send(message(x=2))
    serve(link, app)
    assert link.reply_to(first).has_content()
    assert len(link.replies) == 1 and second is not None
    assert link.count("deactivate-node") == 1


def test_stop_while_the_superlink_gives_errors(link):
    link.trouble["activate-node"] = [500] * 1000
    link.stop.set()
    serve(link)
    assert not link.seen
    link.stop.clear()
    link.trouble["register-node"] = [None]
    link.do_register_node = lambda request: link.stop.set()
    serve(link)
    assert not link.count("pull-messages") and not link.count("deactivate-node")


def test_leaving_is_tried_again_when_the_database_is_locked(link, caplog):
    link.trouble["deactivate-node"] = [500, 500]
    serve(link)
    assert link.count("deactivate-node") == 3 and link.count("unregister-node") == 1
    assert "without a word" not in caplog.text


def test_leaving_while_the_superlink_is_away_does_not_wait(link, caplog):
    link.trouble["deactivate-node"] = [httpx.ConnectError("away")] * 1000
    serve(link)
    assert link.count("deactivate-node") == 1 and "without a word" in caplog.text


def test_an_interrupt_leaves(link):
    link.send(message())
    with pytest.raises(KeyboardInterrupt):
        serve(link, raising_app(KeyboardInterrupt()))
    assert link.count("deactivate-node") == 1


def test_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = until_signal()
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_pace_of_polls():
    pace = Pace(idle_s=3.0)
    assert pace.next(True) == 0.05
    waits = [pace.next(False) for _ in range(20)]
    assert waits[:3] == pytest.approx([0.075, 0.1125, 0.16875])
    assert waits == sorted(waits) and waits[-1] == 3.0
    assert pace.next(True) == 0.05
    pace.nodes(64)
    assert [pace.next(False), pace.next(True)] == [64 / 50, 64 / 50]
    pace.nodes(1000)
    assert pace.next(False) == 20.0  # not faster than the SuperLink can answer them all
    pace.nodes(2)
    assert pace.next(True) == 0.05


def test_a_poll_without_work_waits_longer(link):
    waits, pace = [], Pace()

    class Stop(Waiting):
        def wait(self, timeout=None):
            waits.append(timeout)
            if len(waits) == 4:
                self.set()
            return self.is_set()

    link.stop, link.do_pull_messages = Stop(), lambda request: None
    serve(link, pace=pace)
    assert waits == pytest.approx([0.075, 0.1125, 0.16875, 0.253125])


def test_no_line_a_request(link, caplog):
    with caplog.at_level(logging.INFO):
        link.send(message())
        serve(link)
    assert [r.name for r in caplog.records if r.name == "httpx"] == []
