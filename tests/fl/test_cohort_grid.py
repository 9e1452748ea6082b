"""Logical clients over few nodes: one message a node, one call a node, and every failure stays with its clients."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedTrimmedAvg

from fl.engine.cohort_grid import CohortGrid, client_of, cohort_app, node_id
from fl.engine.flower import quiet_flower
from fl.engine.in_process import InProcessGrid
from fl.engine.packing import pack, unpack
from fl.errors import ShoalError
from fl.keys import generator
from fl.messages import TrainReply, TrainRequest, freeze

JOINS = pytest.mark.parametrize("join", [False, True], ids=["shared", "joined"])


@pytest.fixture(autouse=True)
def _quiet():
    quiet_flower()


def clients_of(messages) -> list[int]:
    return [client_of(m.metadata.dst_node_id) for m in messages]


def answer(message: Message, **values) -> Message:
    client = client_of(message.metadata.dst_node_id)
    record = RecordDict({"m": MetricRecord({"client": client, **values})})
    return Message(record, reply_to=message)


def answer_all(messages: list[Message], context: Context) -> list[Message]:
    return [answer(m) for m in messages]


def broadcast(state: np.ndarray, clients: int) -> list[Message]:
    return [Message(TrainRequest(c, 1, 1, state, "x").to_record(), node_id(c), "train") for c in range(clients)]


def ask(clients, value: float = 0.0, kind: str = "train") -> list[Message]:
    return [Message(RecordDict({"c": ConfigRecord({"client": c, "v": value})}), node_id(c), kind) for c in clients]


def grid_of(handler, clients=10, nodes=2, join=None, copy="records", **more) -> CohortGrid:
    return CohortGrid(InProcessGrid(cohort_app(handler, **more), nodes, copy=copy), clients, join=join)


# Who gets what


@JOINS
def test_a_node_gets_its_clients_in_one_call(join):
    calls = []

    def train(messages, context):
        calls.append((context.node_config["partition-id"], clients_of(messages)))
        return [answer(m) for m in reversed(messages)]

    with grid_of(train, 10, 3, join) as grid:
        assert [client_of(n) for n in grid.get_node_ids()] == list(range(10))
        ids = grid.push_messages(ask([7, 0, 3, 5, 9, 1]))
        assert calls == []
        replies = grid.pull_messages(ids)
        assert grid.pull_messages(ids) == []
    assert sorted(calls) == [(0, [0, 3, 9]), (1, [7, 1]), (2, [5])]  # client % nodes, in the order of pushing
    assert [client_of(r.metadata.src_node_id) for r in replies] == [0, 1, 3, 5, 7, 9]
    assert [r.content["m"]["client"] for r in replies] == [0, 1, 3, 5, 7, 9]
    by_client = dict(zip([7, 0, 3, 5, 9, 1], ids, strict=True))
    assert [r.metadata.reply_to_message_id for r in replies] == [by_client[c] for c in [0, 1, 3, 5, 7, 9]]


def test_kinds_go_to_their_functions_and_groups_are_kept():
    seen = []

    def handler(name):
        def run(messages, context):
            seen.append((name, [(m.metadata.message_type, m.metadata.group_id) for m in messages]))
            return answer_all(messages, context)

        return run

    with grid_of(handler("train"), 4, 1, evaluate=handler("evaluate")) as grid:
        sent = ask([0, 1]) + ask([2], kind="evaluate") + ask([3])
        for number, message in enumerate(sent):
            message.metadata.group_id = str(number)
        replies = grid.send_and_receive(sent)
    assert seen == [("train", [("train", "0"), ("train", "1"), ("train", "3")]), ("evaluate", [("evaluate", "2")])]
    assert [(r.metadata.group_id, r.metadata.message_type) for r in replies] == [
        ("0", "train"), ("1", "train"), ("2", "evaluate"), ("3", "train"),
    ]  # fmt: skip


def test_without_an_evaluate_function_evaluating_is_an_error():
    with grid_of(answer_all) as grid:
        (reply,) = grid.send_and_receive(ask([3], kind="evaluate"))
    assert "evaluate" in reply.error.reason


def test_several_messages_for_one_client_are_answered_in_order():
    def train(messages, context):
        return [answer(m, v=m.content["c"]["v"]) for m in messages]

    with grid_of(train, 3, 1) as grid:
        first = grid.push_messages(ask([1], 1.0) + ask([0], 2.0) + ask([1], 3.0))
        second = grid.push_messages(ask([1], 4.0))
        replies = grid.pull_messages([*second, *first])
    assert [(r.content["m"]["client"], r.content["m"]["v"]) for r in replies] == [(0, 2), (1, 1), (1, 3), (1, 4)]


def test_only_what_is_asked_for_is_handed_out():
    with grid_of(answer_all) as grid:
        ids = grid.push_messages(ask([0, 1, 2]))
        assert len(grid.pull_messages(ids[:1])) == 1
        assert grid.pull_messages(["nonsense"]) == []
        assert [client_of(r.metadata.src_node_id) for r in grid.pull_messages(ids)] == [1, 2]


# What travels


class Watching(Grid):
    """Passes messages on to a grid, and keeps, spoils, drops or repeats them on the way."""

    def __init__(self, inner, spoil=lambda reply: reply):
        self.inner, self.spoil = inner, spoil
        self.sent: list[Message] = []
        self.refuse: set[int] = set()

    run = property(lambda self: self.inner.run)

    def set_run(self, run):
        self.inner.set_run(run)

    def create_message(self, *args, **kwargs):
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self):
        return self.inner.get_node_ids()[::-1]

    def push_messages(self, messages):
        self.sent += messages
        good = [m for m in messages if m.metadata.dst_node_id not in self.refuse]
        ids = iter(self.inner.push_messages(good))
        return [None if m.metadata.dst_node_id in self.refuse else next(ids) for m in messages]

    def pull_messages(self, message_ids):
        return [spoiled for r in self.inner.pull_messages(message_ids) if (spoiled := self.spoil(r)) is not None]

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("the cohort grid pushes and pulls")


def size_of(message: Message) -> int:
    return sum(len(a.data) for r in message.content.array_records.values() for a in r.values())


def test_a_broadcast_travels_once_a_node():
    state = freeze(np.arange(50_000, dtype=np.float32))
    grid = CohortGrid(watching := Watching(InProcessGrid(cohort_app(answer_all), 2)), 40)
    grid.send_and_receive(broadcast(state, 40))
    assert grid.join  # it can't know that this grid stays in the process
    assert len(watching.sent) == 2
    assert all(200_000 < size_of(m) < 215_000 for m in watching.sent)
    assert all(len(m.content) == 1 and len(m.content["cohort"]) == 2 for m in watching.sent)


@JOINS
def test_memory_does_not_grow_by_a_vector_a_message(join):
    size, clients = 250_000, 300

    def train(messages, context):
        requests = [TrainRequest.from_record(m.content) for m in messages]
        assert all(np.shares_memory(r.state, requests[0].state) for r in requests)
        return answer_all(messages, context)

    with grid_of(train, clients, 1, join) as grid:
        state = freeze(np.ones(size, np.float32))
        tracemalloc.start()
        replies = grid.send_and_receive(broadcast(state, clients))
        grown = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(replies) == clients and not any(r.has_error() for r in replies)
    assert grown < (10 if join else 3) * 4 * size


def test_in_one_process_no_byte_is_copied():
    updates = {}

    def train(messages, context):
        replies = []
        for m in messages:
            r = TrainRequest.from_record(m.content)
            assert np.shares_memory(r.state, state)
            updates[r.client] = freeze(np.full(3, r.client, np.float32))
            reply = TrainReply(r.client, 1, 1, "x", updates[r.client], 1, 1, 1, 0.5)
            replies.append(Message(reply.to_record(), reply_to=m))
        return replies

    state = freeze(np.zeros(3, np.float32))
    with grid_of(train, 5) as grid:
        replies = grid.send_and_receive(broadcast(state, 5))
    for client, reply in enumerate(replies):
        assert np.shares_memory(TrainReply.from_record(reply.content).update, updates[client])


@pytest.mark.parametrize("copy", ["records", "wire", "none"])
@JOINS
def test_every_way_of_travelling_gives_the_same(join, copy):
    def train(messages, context):
        out = []
        for m in messages:
            r = TrainRequest.from_record(m.content)
            new = freeze(r.state * np.float32(1.5) + r.client)
            out.append(
                Message(TrainReply(r.client, r.round, r.version, "x", new, 5, 1, 1, 0.1).to_record(), reply_to=m)
            )
        return out

    state = np.array([1e-40, -0.0, np.nan, 3.0], np.float32)
    with grid_of(train, 7, 3, join, copy) as grid:
        got = [TrainReply.from_record(r.content).update for r in grid.send_and_receive(broadcast(state, 7))]
    assert [g.tobytes() for g in got] == [(state * np.float32(1.5) + np.float32(c)).tobytes() for c in range(7)]


@JOINS
def test_clients_can_not_reach_each_other(join):
    seen = []

    def train(messages, context):
        for m in messages:
            seen.append((str(m.content["c"]), m.content["a"]["x"].dtype))
            m.content["c"]["list"].append(9)
            m.content["c"]["stage"] = "done"
            m.content["a"]["x"].dtype = "spoiled"
        return [Message(m.content, reply_to=m) for m in messages]

    arrays = ArrayRecord({"x": Array(np.zeros(2, np.float32))})
    shared = RecordDict({"c": ConfigRecord({"list": [1], "blob": b"\x00\xff", "big": 2**63}), "a": arrays})
    with grid_of(train, 3, 1, join) as grid:
        replies = grid.send_and_receive([Message(shared, node_id(c), "train") for c in range(3)])
    assert len(set(seen)) == 1
    assert shared["c"]["list"] == [1] and "stage" not in shared["c"] and shared["a"]["x"].dtype == "float32"
    assert all(r.content["c"] == {"list": [1, 9], "blob": b"\x00\xff", "big": 2**63, "stage": "done"} for r in replies)


# Failures


@JOINS
def test_an_error_of_one_client_stays_its_own(join):
    def train(messages, context):
        errors = {3: Error(7, "no data"), 4: Error(8, None)}
        return [
            Message(errors[c], reply_to=m) if (c := client_of(m.metadata.dst_node_id)) in errors else answer(m)
            for m in messages
            if client_of(m.metadata.dst_node_id) != 5
        ]

    with grid_of(train, 8, 2, join) as grid:
        replies = grid.send_and_receive(ask(range(8)))
    assert [r.has_error() for r in replies] == [False, False, False, True, True, True, False, False]
    assert (replies[3].error.code, replies[3].error.reason) == (7, "no data")
    assert (replies[4].error.code, replies[4].error.reason) == (8, None)
    assert "no reply" in replies[5].error.reason


def test_a_call_that_raises_fails_its_node_only():
    def train(messages, context):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("out of memory")
        return answer_all(messages, context)

    with grid_of(train, 6, 2) as grid:
        replies = grid.send_and_receive(ask(range(6)))
    assert [r.has_error() for r in replies] == [False, True] * 3
    assert all("out of memory" in r.error.reason for r in replies if r.has_error())


def test_a_dead_node_is_an_error_for_each_of_its_clients():
    def spoil(reply):
        if reply.metadata.src_node_id == 3:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=sent_to[3])
        return reply

    inner = InProcessGrid(cohort_app(answer_all), 2)
    grid = CohortGrid(watching := Watching(inner, spoil), 6)
    ids = grid.push_messages(ask(range(6)))
    sent_to = {m.metadata.dst_node_id: m for m in watching.sent}
    replies = grid.pull_messages(ids)
    assert [r.has_error() for r in replies] == [False, True] * 3
    assert {r.error.code for r in replies if r.has_error()} == {ErrorCode.NODE_UNAVAILABLE}
    assert [client_of(r.metadata.src_node_id) for r in replies] == list(range(6))


def test_what_flower_could_not_send_is_an_error():
    grid = CohortGrid(watching := Watching(InProcessGrid(cohort_app(answer_all), 2)), 4)
    watching.refuse = {2}
    replies = grid.send_and_receive(ask(range(4)))
    assert [r.has_error() for r in replies] == [True, False, True, False]
    watching.push_messages = lambda messages: []  # type: ignore[method-assign]  # Flower's answer to "too large"
    assert all("could not be sent" in r.error.reason for r in grid.send_and_receive(ask(range(4))))


def blob(index, data=b"", **arrays) -> RecordDict:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    made = {"index": Array("uint8", (len(text),), "s", text), "blob": Array("uint8", (len(data),), "s", data), **arrays}
    return RecordDict({"cohort": ArrayRecord({k: v for k, v in made.items() if v is not None})})


def table(contents, lengths=(), header=None):
    return {"header": {} if header is None else header, "contents": contents, "lengths": list(lengths)}


MALFORMED = {
    "empty": RecordDict(),
    "another record": RecordDict({"m": MetricRecord({"client": 1})}),
    "no array record": RecordDict({"cohort": ConfigRecord({"index": "[]"})}),
    "no index": RecordDict({"cohort": ArrayRecord()}),
    "index is no JSON": blob(b"\xff\x00"),
    "index is a number": blob(5),
    "deep": blob(b"[" * 100_000),
    "huge number": blob(b'{"header":{},"contents":[' + b"9" * 10_000 + b'],"lengths":[]}'),
    "no contents": blob({"header": {}, "lengths": []}),
    "too few": blob(table([[]])),
    "too many": blob(table([[]] * 3)),
    "no such record": blob(table([[["m", 4]], []])),
    "negative record": blob(table([[["m", -1]], []])),
    "record is text": blob(table([[["m", "x"]], []])),
    "entry is a number": blob(table([5, []])),
    "entry is null": blob(table([None, []])),
    "error without code": blob(table([{"reason": "x"}, []])),
    "bytes that are no record": blob(table([[["m", 0]], []], [3]), b"\xff\xff\xff"),
    "lengths beyond the blob": blob(table([[["m", 0]], []], [300]), b"abc"),
    "negative lengths": blob(table([[["m", 0]], []], [-3, 6]), b"abc"),
    "lengths are text": blob(table([[["m", 0]], []], ["3"]), b"abc"),
    "no lengths": blob({"header": {}, "contents": [[], []]}),
    "two names for one record": blob(table([[["m", 0], ["m"]], []], [0])),
    "separate records missing": blob(table([[["m", 0]], []]), blob=None),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_reply_is_an_error_for_the_clients_of_its_node(name):
    def spoil(reply):
        if reply.metadata.src_node_id == 3:
            reply.content = MALFORMED[name]
        return reply

    grid = CohortGrid(Watching(InProcessGrid(cohort_app(answer_all), 2), spoil), 4)
    replies = grid.send_and_receive(ask(range(4)))
    assert [r.has_error() for r in replies] == [False, True, False, True], name
    assert "malformed reply of node 3" in replies[1].error.reason


def test_random_damage_to_a_reply_never_raises():
    rng = generator(0, "damage")

    def spoil(reply):
        arrays = reply.content["cohort"]
        name = ["index", "blob"][int(rng.integers(2))]
        data = bytearray(arrays[name].data)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(data)))
            data[at : at + int(rng.integers(3))] = rng.bytes(int(rng.integers(3)))
        arrays[name] = Array("uint8", (len(data),), "s", bytes(data))
        return reply

    outcomes = set()
    for _ in range(400):
        grid = CohortGrid(Watching(InProcessGrid(cohort_app(answer_all), 1), spoil), 3)
        replies = grid.send_and_receive(ask(range(3)), timeout=0)
        assert [client_of(r.metadata.src_node_id) for r in replies] == [0, 1, 2]
        outcomes |= {r.has_error() for r in replies}
    assert outcomes == {True, False}


def test_replies_that_nobody_waits_for_are_ignored():
    pulls = []

    class Repeating(Watching):
        def pull_messages(self, message_ids):
            pulls.append(message_ids)
            replies = super().pull_messages(message_ids)
            stranger = Message(RecordDict(), reply_to=Message(RecordDict(), 2, "train"))
            return [stranger, *replies, *replies]

    grid = CohortGrid(Repeating(InProcessGrid(cohort_app(answer_all), 2)), 4)
    ids = grid.push_messages(ask(range(4)))
    assert len(grid.pull_messages(ids)) == 4
    assert grid.pull_messages(ids) == []
    assert len(pulls) == 1  # nobody is on the way any more
    assert not grid._wanted and not grid._in_flight and not grid._replies  # nor is anything kept


class Slow(Watching):
    """Replies come one pull late, node by node."""

    def pull_messages(self, message_ids):
        self.waiting = getattr(self, "waiting", []) + super().pull_messages(message_ids)
        self.pulls = getattr(self, "pulls", 0) + 1
        return [self.waiting.pop()] if self.pulls > 1 and self.waiting else []


def test_waiting_ends_when_all_have_answered():
    grid = CohortGrid(slow := Slow(InProcessGrid(cohort_app(answer_all), 3)), 7)
    replies = grid.send_and_receive(ask([6, 5, 4, 3, 2, 1, 0]), timeout=600, poll_s=0)
    assert [client_of(r.metadata.src_node_id) for r in replies] == list(range(7))
    assert slow.pulls == 4


def test_what_comes_after_the_timeout_is_dropped():
    grid = CohortGrid(Slow(InProcessGrid(cohort_app(answer_all), 1)), 3)
    sent = ask(range(3))
    assert grid.send_and_receive(sent, timeout=0) == []
    later = grid.push_messages(ask([0]))
    ids = [m.metadata.message_id for m in sent]
    got = [r for _ in range(3) for r in grid.pull_messages(ids + later)]
    assert [r.metadata.reply_to_message_id for r in got] == later


def test_a_node_message_lives_as_long_as_the_longest_of_its_clients():
    grid = CohortGrid(watching := Watching(InProcessGrid(cohort_app(answer_all))), 3)
    sent = ask(range(3))
    for message, ttl in zip(sent, (10.0, 30.0, 20.0), strict=True):
        message.metadata.ttl = ttl
    grid.send_and_receive(sent)
    assert [m.metadata.ttl for m in watching.sent] == [30.0]


def test_a_node_refuses_a_request_without_content():
    with InProcessGrid(cohort_app(answer_all)) as grid:
        header = {"clients": [0], "ids": ["c1"], "groups": [""], "join": True}
        (reply,) = grid.send_and_receive([Message(pack([Error(1, "no request")], header, join=True), 2, "train")])
    assert "no request" in reply.error.reason


# Delivered twice


def duplicate(app, message: Message, context: Context) -> tuple[Message, Message]:
    return app(message, context), app(message, context)


def node_message(message_id: str, run_id: int = 1, join: bool = True) -> Message:
    ids = {"clients": [0, 1], "ids": ["c1", "c2"], "groups": ["", ""], "join": join}
    contents = [RecordDict({"c": ConfigRecord({"client": c})}) for c in (0, 1)]
    with InProcessGrid(cohort_app(answer_all)):
        message = Message(pack(contents, ids, join=join), 2, "train")
    message.metadata.__dict__.update(_message_id=message_id, _run_id=run_id)
    return message


def test_a_message_delivered_twice_runs_once():
    calls = itertools.count(1)

    def train(messages, context):
        n = next(calls)
        return [answer(m, call=n) for m in messages]

    app, context = cohort_app(train), Context(1, 2, {}, RecordDict(), {})
    first, again = duplicate(app, node_message("a"), context)
    assert first.content == again.content
    assert again.metadata.reply_to_message_id == "a"

    def call_of(message):
        return unpack(app(message, context).content)[1][0]["m"]["call"]

    assert call_of(node_message("a")) == 1
    assert call_of(node_message("b")) == 2
    assert call_of(node_message("a", run_id=2)) == 3  # another run
    assert [call_of(node_message(name)) for name in "cdef"] == [4, 5, 6, 7]
    assert call_of(node_message("f")) == 7
    assert call_of(node_message("a")) == 8  # forgotten: only the last four are kept


def test_within_a_process_nothing_is_kept():
    ran = []

    def train(messages, context):
        ran.append(1)
        return answer_all(messages, context)

    app, context = cohort_app(train), Context(1, 2, {}, RecordDict(), {})
    duplicate(app, node_message("a", join=False), context)
    assert len(ran) == 2


def test_two_grids_over_one_app_do_not_share_replies():
    calls = itertools.count(1)

    def train(messages, context):
        n = next(calls)
        return [answer(m, call=n) for m in messages]

    app = cohort_app(train)
    seen = []
    for _ in range(2):
        with CohortGrid(InProcessGrid(app), 2, join=True) as grid:
            seen.append([r.content["m"]["call"] for r in grid.send_and_receive(ask([0, 1]))])
    assert seen == [[1, 1], [2, 2]]


# Flower's own strategies, and misuse


def strategy_result(strategy, clients, nodes, join=None, rounds=2):
    """Clients move half way to their number; client 3 always fails."""

    def train(messages, context):
        replies = []
        for m in messages:
            client = client_of(m.metadata.dst_node_id)
            (start,) = m.content["arrays"].to_numpy_ndarrays()
            moved = ArrayRecord([start + np.float32(0.5) * (client - start)])
            record = RecordDict({"a": moved, "m": MetricRecord({"num-examples": 1 + client % 3})})
            bad = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "always"), reply_to=m)
            replies.append(bad if client == 3 else Message(record, reply_to=m))
        return replies

    def evaluate(messages, context):
        return [Message(RecordDict({"m": MetricRecord({"num-examples": 1, "c": 1.0})}), reply_to=m) for m in messages]

    with grid_of(train, clients, nodes, join, evaluate=evaluate) as grid:
        start = ArrayRecord([np.linspace(0, 1, 5, dtype=np.float32)])
        return strategy.start(grid, start, num_rounds=rounds).arrays.to_numpy_ndarrays()[0]


def test_flowers_strategies_run_unmodified_over_many_clients_and_repeat_bit_for_bit():
    for strategy in (FedAvg, FedTrimmedAvg):
        ends = {
            strategy_result(strategy(), 60, nodes, join).tobytes()
            for nodes, join in ((1, None), (3, None), (7, True), (1, True))
        }
        assert len(ends) == 1, strategy


def test_fedavg_gives_the_weighted_mean():
    weights = np.array([0 if c == 3 else 1 + c % 3 for c in range(10)], float)
    centre = (weights * np.arange(10)).sum() / weights.sum()
    start = np.linspace(0, 1, 5)
    np.testing.assert_allclose(strategy_result(FedAvg(), 10, 2), start + 0.75 * (centre - start), rtol=1e-6)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="num_clients"):
        CohortGrid(InProcessGrid(cohort_app(answer_all)), 0)
    with grid_of(answer_all, 4) as grid:
        for bad in (-1, 4):
            with pytest.raises(ShoalError, match="no client has node id"):
                grid.push_messages(ask([0, bad]))
        assert grid.pull_messages(["c1", "c2"]) == []
        assert grid.push_messages([]) == []
    watching = Watching(InProcessGrid(cohort_app(answer_all)))
    watching.get_node_ids = list  # type: ignore[method-assign]
    with pytest.raises(ShoalError, match="no Flower node"):
        CohortGrid(watching, 2).push_messages(ask([0]))


def test_closing_closes_the_grid_below():
    inner = InProcessGrid(cohort_app(answer_all))
    CohortGrid(inner, 2).close()
    with pytest.raises(ShoalError, match="closed"):
        inner.push_messages([])


def test_the_assignment_never_changes():
    nodes = []

    def train(messages, context):
        nodes.append((context.node_id, clients_of(messages)))
        return answer_all(messages, context)

    inner = Watching(InProcessGrid(cohort_app(train), 4))
    grid = CohortGrid(inner, 4, nodes=[4, 2])
    grid.send_and_receive(ask([0, 1]))
    grid.send_and_receive(ask([1, 2]))
    assert nodes == [(4, [0]), (2, [1]), (2, [1]), (4, [2])]
    nodes.clear()
    grid = CohortGrid(inner, 4)
    grid.send_and_receive(ask([0]))
    inner.get_node_ids = lambda: [2]  # type: ignore[method-assign]  # nodes leave
    grid.send_and_receive(ask([0, 3]))
    assert [n for n, _ in nodes] == [2, 2, 5]
