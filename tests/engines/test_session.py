"""Clients at nodes of their own: the same adapter as in one process, whatever dies and comes back in between."""

import numpy as np
import pytest
from flwr.app import Error, Message

from fl.errors import RunStopped
from tests.engines.linked import GONE, Hosts
from tests.helpers import FIXED, clients, final, go, rounds, vector

STATE = ("experiment=fed_sb", "data.public=20", "schedule.rounds=3")
METHODS = {
    "fedit": ("experiment=fedit", "data.public=20"),
    "fed_sb": STATE,
    "rolora": ("experiment=rolora", "data.public=20", "schedule.rounds=3"),
    "client_momentum": ("local=client_momentum", "local.steps=1", "schedule.rounds=3"),
    "fedbuff": ("schedule=fedbuff", "schedule.buffer=4", "schedule.rounds=2"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_adapter_and_payloads_as_in_one_process(tmp_path, name):
    go(tmp_path / "here", *METHODS[name])
    Hosts(tmp_path, (0, 3), (1, 2)).run(tmp_path / "hosts", *METHODS[name])
    np.testing.assert_array_equal(vector(tmp_path / "hosts"), vector(tmp_path / "here"))
    there, here = final(tmp_path / "hosts"), final(tmp_path / "here")
    assert [there[k] for k in ("bytes_up", "bytes_down", "rejected")] == [
        here[k] for k in ("bytes_up", "bytes_down", "rejected")
    ]


def test_a_node_that_starts_anew_in_every_message_goes_on_from_its_disk(tmp_path):
    """As a stock SuperNode's processes do."""
    go(tmp_path / "here", *STATE)
    hosts = Hosts(tmp_path, (0, 3), (1, 2))

    def fresh(node, message, answer):
        hosts.start(node)
        return answer(message)

    hosts.between = fresh
    hosts.run(tmp_path / "hosts", *STATE)
    np.testing.assert_array_equal(vector(tmp_path / "hosts"), vector(tmp_path / "here"))


def test_a_reply_that_is_lost_is_made_again_from_the_same_memory(tmp_path):
    """The node did the work, remembered it, and died before its reply left; the same job comes again after a resume."""
    words = (
        "local=client_momentum",
        "local.steps=1",
        "schedule.rounds=3",
        "schedule.min_clients=4",
        "checkpoint_every=1",
    )
    go(tmp_path / "here", *words)
    hosts = Hosts(tmp_path, (0, 3), (1, 2))
    seen = []

    def lose(node, message, answer):
        reply = answer(message)
        if node == 1 and message.metadata.message_type == "train":
            seen.append(message)
            if len(seen) == 2:
                hosts.start(1)
                return Message(Error(GONE, "it died"), reply_to=message)
        return reply

    hosts.between = lose
    with pytest.raises(RunStopped, match=r"Round 2 has 2 accepted updates of 4"):
        hosts.run(tmp_path / "hosts", *words)
    hosts.run(tmp_path / "hosts", *words, resume=True)
    np.testing.assert_array_equal(vector(tmp_path / "hosts"), vector(tmp_path / "here"))


def test_a_node_that_lost_its_disk_is_sent_everything_again(tmp_path):
    words = (*STATE, "schedule.min_clients=2", "sampling=available")
    hosts = Hosts(tmp_path, (0, 3), (1, 2))
    trained = []

    def wipe(node, message, answer):
        if message.metadata.message_type == "train":
            trained.append(node)
            if trained.count(1) == 2 and node == 1:
                hosts.folder = tmp_path / "new disk"
                hosts.start(1)
        return answer(message)

    hosts.between = wipe
    hosts.run(tmp_path / "hosts", *words)
    found = rounds(tmp_path / "hosts")
    assert [e["accepted"] for e in found] == [4, 2, 4]
    assert found[1]["rejected"] == {"error": 2}


def test_a_job_that_comes_twice_is_counted_once(tmp_path):
    """Flower may deliver a message twice: the second answer is the first one's, and the server takes one."""
    go(tmp_path / "here", *STATE)
    hosts = Hosts(tmp_path, (0, 3), (1, 2))

    def twice(node, message, answer):
        first = answer(message)
        again = answer(message)
        if first.has_content() and "cohort" in first.content:
            blobs = [m.content["cohort"]["blob"].data for m in (first, again)]
            assert blobs[0] == blobs[1]
        return again

    hosts.between = twice
    hosts.run(tmp_path / "hosts", *STATE)
    np.testing.assert_array_equal(vector(tmp_path / "hosts"), vector(tmp_path / "here"))


def test_a_node_that_is_away_is_missed_and_taken_back(tmp_path):
    hosts = Hosts(tmp_path, (0, 3), (1, 2))
    trained = []

    def away(node, message, answer):
        if message.metadata.message_type == "train":
            trained.append(node)
            hosts.away = {1} if trained.count(0) in (1, 2) else set()
        return answer(message)

    hosts.between = away
    words = ("schedule.rounds=4", "sampling=available", "schedule.min_clients=1", "evaluation.clients=never")
    hosts.run(tmp_path / "hosts", *words)
    events = [clients(tmp_path / "hosts", round) for round in range(1, 5)]
    there = [sorted(e["client"] for e in found if e["accepted"]) for found in events]
    assert there == [[0, 1, 2, 3], [0, 3], [0, 3], [0, 1, 2, 3]]
    assert {e["reason"] for found in events for e in found if not e["accepted"]} == {"error"}


def test_a_node_with_another_device_setting_trains_by_it(tmp_path):
    hosts = Hosts(tmp_path, (0, 3), (1, 2), engine={"threads": 2})
    hosts.run(tmp_path / "hosts")
    assert [s.experiment.trainer.plan.threads for h in hosts.sessions.values() for s in h.sites.values()] == [2, 2]


def test_a_client_of_another_node_is_refused(tmp_path):
    """What a directory would never ask: the node says which clients it hosts."""
    hosts = Hosts(tmp_path, (0, 1), (2, 3))
    hosts.run(tmp_path / "first", *FIXED)
    (site,) = hosts.sessions[0].sites.values()
    site.node.hosted = frozenset({0, 1})
    layout = site.node.space.layout
    from fl.messages import TrainRequest

    request = TrainRequest(2, 1, 0, np.zeros(layout.size, np.float32), layout.hash, {"lr": 0.1, "train": "all"})
    (reply,) = site.node.train([Message(request.to_record(), 5, "train")])
    assert "hosts clients [0, 1], not 2" in reply.error.reason


def test_nothing_is_forked_where_flower_s_threads_are_at_work(tmp_path, monkeypatch):
    """A child of a process with threads may wait for ever for a lock that one of them held."""

    def forked(*arguments):
        raise AssertionError("a process was forked")

    monkeypatch.setattr("clients.trainer.Pool", forked)
    Hosts(tmp_path, (0, 3), (1, 2)).run(tmp_path / "hosts", "engine.threads=2")
    assert final(tmp_path / "hosts")["rounds"] == 2
