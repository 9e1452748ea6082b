"""Three hosts, TLS and keys: a node dies in the middle of a round and comes back, a link is cut and healed."""

import time
from collections import Counter

import pytest

from tests.hosts.namespaces import Hosts, missing
from tests.hosts.processes import Scene

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
ROUNDS = 16
LOST = {"late", "error"}


def test_a_run_ends_with_its_losses_listed(tmp_path):
    with Hosts("one", "two") as hosts:
        scene = Scene(hosts, tmp_path, ["node-0", "node-1", "node-2"])
        scene.server()
        first = scene.node("node-0", "0-1", host="one")
        scene.node("node-1", "2-3", host="two")
        scene.node("node-2", "4-5", host="one")
        run = scene.run(
            "clients.number=6",
            "sampling=available",
            f"schedule.rounds={ROUNDS}",
            "schedule.deadline_s=12",
            "schedule.min_clients=1",
            "network.timeout_s=40",
            "network.rejoin_s=2",
            "local.steps=60",
        )
        scene.wait_round(1, run, 180)
        time.sleep(1)  # the next round has begun
        hosts.kill(first)
        killed_in = len(scene.events("round")) + 1
        scene.node("node-0", "0-1", host="one", log="node-0-again")
        scene.wait_round(killed_in, run)
        time.sleep(1)
        hosts.cut("two")
        cut_in = len(scene.events("round")) + 1
        scene.wait_round(cut_in, run)
        hosts.heal("two")
        assert scene.wait_end(run, 600) == 0, scene.tails()

    record, events, rounds = scene.record(), scene.events("client"), scene.events("round")
    assert record["status"] == "completed" and record["error"] is None
    assert [e["round"] for e in rounds] == list(range(1, ROUNDS + 1))
    lost = [e for e in events if not e["accepted"]]
    assert {e["client"] for e in lost if e["round"] == killed_in and e["reason"] in LOST} >= {0, 1}
    assert {e["client"] for e in lost if e["round"] == cut_in and e["reason"] in LOST} >= {2, 3}
    # Both are back at the end, the killed node by the process that was started in its place.
    assert "has joined" in scene.log("node-0-again")
    assert {e["client"] for e in events if e["round"] == ROUNDS and e["accepted"]} == set(range(6))
    # Every loss is counted, by reason, in the round's line and in the record, and no update counts twice.
    assert sum((Counter(e["rejected"]) for e in rounds), Counter()) == Counter(record["final"]["rejected"])
    assert Counter(e["reason"] for e in lost) == Counter(record["final"]["rejected"])
    accepted = Counter((e["client"], e["round"]) for e in events if e["accepted"])
    assert set(accepted.values()) == {1}
    assert sum(accepted.values()) == sum(e["accepted"] for e in rounds)
    assert not scene.log("run").count("Traceback"), scene.tails()
