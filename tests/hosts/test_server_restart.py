"""The SuperLink is killed in the middle of a run: a new one goes on with its database, and the run is resumed."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.hosts.processes import Loopback, Scene, free_port

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")]


def test_a_run_goes_on_after_its_superlink_was_killed(tmp_path):
    with Loopback() as hosts:
        scene = Scene(hosts, tmp_path, ["node-0"], free_port())
        first = scene.server()
        node = scene.node("node-0", "0-3")
        run = scene.run("schedule.rounds=8", "schedule.deadline_s=60", "local.steps=20", "network.rejoin_s=1")
        scene.wait_round(2, run, 180)
        [superlink] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(superlink), signal.SIGKILL)
        assert first.wait(30) == 128 + signal.SIGKILL
        over = len(scene.events("round"))
        scene.server()
        assert scene.wait_end(run) == 3  # it stopped, and says how it goes on
        assert f"shoal run --resume {tmp_path / 'server' / 'run'}" in scene.log("run")
        assert over < 8

        again = scene.resume()
        assert scene.wait_end(again) == 0, scene.tails()
        assert node.poll() is None and "answers again" in scene.log("node-0")  # the same process, all the time
        record, rounds, events = scene.record(), scene.events("round"), scene.events("client")
        assert record["status"] == "completed"
        assert [e["round"] for e in rounds] == list(range(1, 9))
        assert sorted((e["round"], e["client"]) for e in events if e["accepted"]) == [
            (number, client) for number in range(1, 9) for client in range(4)
        ]
