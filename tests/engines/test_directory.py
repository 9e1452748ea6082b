"""Who holds which client: nodes that come, go, come back, and say what is not so."""

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from fl.engine import directory
from fl.engine.carried import PROTOCOL, Note, version
from fl.engine.cohort_grid import CohortGrid, client_of, node_id
from fl.engine.directory import Directory
from fl.engine.in_process import FIRST_NODE, InProcessGrid
from fl.errors import RunStopped
from fl.transport.base import Address

GOOD = {"shoal": version(), "protocol": PROTOCOL, "train": [], "test": [], "peer": "", "refused": ""}


class Nodes:
    """Nodes that say ``said``, by number; those ``away`` are not listed. ``asked`` are the hellos that each has had."""

    def __init__(self, *said):
        self.said, self.away, self.asked, self.since = list(said), set(), [], {}
        outer = self

        class Grid(InProcessGrid):
            def get_node_ids(self):
                return [n for n in super().get_node_ids() if n - FIRST_NODE not in outer.away]

            def get_nodes(self):
                return [
                    NodeInfo(node_id=n, last_activated_at=outer.since.get(n - FIRST_NODE, ""))
                    for n in self.get_node_ids()
                ]

        self.grid = Grid(self, len(said))

    def __call__(self, message: Message, context: Context) -> Message:
        node = context.node_id - FIRST_NODE
        assert message.metadata.message_type == "query.hello"
        self.asked.append(node)
        said = self.said[node]
        if isinstance(said, Error):
            return Message(said, reply_to=message)
        return Message(RecordDict({"hello": ConfigRecord({**GOOD, **said})}), reply_to=message)

    def directory(self, number: int) -> Directory:
        return Directory(self.grid, number, Note("run", "digest", 1, number), lambda text: None)


def test_each_client_has_the_node_that_says_so():
    nodes = Nodes({"clients": [0, 3]}, {"clients": [1, 2], "train": [5, 6], "test": [1, 2], "peer": "h:90 node-1"})
    found = nodes.directory(4)
    assert found.present() == [0, 1, 2, 3]
    assert [found.node(c) - FIRST_NODE for c in range(4)] == [0, 1, 1, 0]
    assert found.samples() == {1: (5, 1), 2: (6, 2)}
    assert found.book() == {1: Address("h", 90, "node-1"), 2: Address("h", 90, "node-1")}
    assert found.note([0])["nodes"] == 2
    found.look()
    assert nodes.asked == [0, 1]


def test_a_node_that_comes_back_is_asked_anew_and_may_host_others():
    nodes = Nodes({"clients": [0]}, {"clients": [1]})
    found = nodes.directory(2)
    assert found.present() == [0, 1]
    nodes.away = {1}
    assert found.present() == [0]
    assert found.node(1) is None
    nodes.away, nodes.said[0], nodes.said[1] = {0}, {"clients": [5]}, {"clients": [0, 1]}
    assert found.present() == [0, 1]
    assert found.node(0) == FIRST_NODE + 1
    assert nodes.asked == [0, 1, 1]


def test_the_first_node_has_a_client_until_it_is_gone():
    nodes = Nodes({"clients": [0]}, {"clients": [0, 1]})
    found = nodes.directory(2)
    assert found.present() == [0]
    assert "hosts client 0, which node" in found.refused[FIRST_NODE + 1]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"clients": [0], "protocol": 99}, "runs Shoal"),
        ({"clients": [0], "shoal": "0.0.9"}, r"runs Shoal 0\.0\.9"),
        ({"clients": [2]}, "hosts clients 2; the experiment has 0 to 1"),
        ({"clients": []}, "hosts clients none"),
        ({"clients": ["a"]}, "clients are no numbers"),
        ({"clients": [0], "train": [1, 2], "test": [1, 2]}, "shorter|longer|zip"),
        ({"clients": [0], "refused": "it has no data"}, "it has no data"),
        ({"clients": [0], "peer": "nowhere"}, "no address for peers"),
        ({"clients": [0], "train": [2**40], "test": [1]}, "numbers of samples that are none"),
        ({"clients": [0], "train": [0], "test": [1]}, "numbers of samples that are none"),
        (Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "broken"), "answered with an error: broken"),
    ],
    ids=str,
)
def test_what_a_node_may_not_say(said, why):
    nodes = Nodes(said, {"clients": [1]})
    found = nodes.directory(2)
    assert found.present() == [1]
    with pytest.raises(RunStopped, match=why):
        found.wait(0.01)


def test_it_waits_for_all_clients_and_says_who_is_missing():
    nodes = Nodes({"clients": [0]}, {"clients": [1, 2]}, {"clients": [3]})
    nodes.away = {1}
    with pytest.raises(RunStopped, match=r"No node holds clients 1-2 after 0\.05 s .*2 nodes are connected"):
        nodes.directory(4).wait(0.05)
    nodes.away = set()
    nodes.directory(4).wait(0.05)


def test_a_node_that_was_refused_is_asked_again_when_another_has_gone():
    nodes = Nodes({"clients": [0]}, {"clients": [0]})
    found = nodes.directory(1)
    assert found.present() == [0]
    assert list(found.refused) == [FIRST_NODE + 1]
    nodes.away = {0}
    assert found.present() == [0]
    assert found.node(0) == FIRST_NODE + 1


def test_a_node_that_was_refused_is_asked_again_after_a_while(monkeypatch):
    nodes = Nodes({"clients": [0], "refused": "not yet"})
    found = nodes.directory(1)
    assert found.present() == []
    nodes.said[0] = {"clients": [0]}
    assert found.present() == []
    monkeypatch.setattr(directory, "AGAIN_S", -1.0)
    assert found.present() == [0]


def test_what_a_node_was_sent_before_it_was_away_is_lost():
    """It died and came back between two looks: the SuperLink lists it, and knows since when it has been there."""
    nodes = Nodes({"clients": [0]}, {"clients": [1]})
    found = nodes.directory(2)
    grid = CohortGrid(nodes.grid, 2, join=True, places=found)
    assert found.present() == [0, 1]
    nodes.grid.pull_messages = lambda ids: []  # no reply comes
    ids = grid.push_messages([Message(RecordDict(), node_id(c), "train") for c in (0, 1)])
    assert grid.pull_messages(ids) == []
    del nodes.grid.pull_messages
    nodes.grid._queue.clear()
    nodes.since = {1: "later"}
    assert found.present() == [0, 1]
    assert nodes.asked == [0, 1, 1]
    (reply,) = grid.pull_messages(ids)
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert client_of(reply.metadata.src_node_id) == 1


def test_with_nobody_there_it_waits(monkeypatch):
    nodes = Nodes({"clients": [0]})
    found = nodes.directory(1)
    found.wait(5.0)
    nodes.away = {0}
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        nodes.away = set() if len(slept) == 3 else nodes.away

    monkeypatch.setattr(directory.time, "sleep", sleep)
    assert found.present() == [0]
    assert len(slept) == 3
    nodes.away, found.patience_s = {0}, 0.0
    assert found.present() == []


def test_what_is_about_to_leave_is_charged_first():
    class Charges:
        def __init__(self):
            self.answered, self.saved = {0: 2}, 0

        def heard(self, client, job):
            self.answered[client] = job

        def save(self):
            self.saved += 1

    found = Nodes({"clients": [0]}).directory(1)
    found.charges = Charges()
    found.present()
    found.leaving()
    found.heard(0, 3)
    assert (found.charges.saved, found.note([0])["answered"]) == (1, {"0": 3})
