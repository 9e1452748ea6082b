"""A whole run whose models go from node to node: real programs over TLS, and the states of the run in one process."""

from __future__ import annotations

import numpy as np
import pytest

from fl import checkpoint
from tests.helpers import go
from tests.hosts.processes import Loopback, Scene, free_port

WORDS = ("schedule=dpsgd", "topology=ring", "local=sgd", "local.lr=0.1", "schedule.rounds=3")
HOSTED = {"node-0": "0-1", "node-1": "2", "node-2": "3"}


@pytest.mark.slow
def test_three_nodes_come_to_the_states_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    go(tmp_path / "one", *WORDS)
    with Loopback() as hosts:
        scene = Scene(hosts, tmp_path, list(HOSTED), free_port())
        scene.server()
        for name, clients in HOSTED.items():
            scene.node(name, clients, "--listen", f"127.0.0.1:{free_port()}")
        run = scene.run(*WORDS, "engine.peers=direct", "schedule.deadline_s=60", "evaluation.every=2")
        assert scene.wait_end(run) == 0, scene.tails()
        rounds = scene.events("round")
    assert [e["accepted"] for e in rounds] == [4] * 3 and {e["missed"] for e in rounds} == {0}
    # Round 1 is not evaluated: no state comes to the server.
    size = len(checkpoint.load(tmp_path / "one" / "checkpoint")[0]["server/vector"])
    assert [e["bytes_states"] for e in rounds] == [0, 4 * 4 * size, 4 * 4 * size]
    assert [e["consensus"] is None for e in rounds] == [True, False, False]
    assert {e["bytes_links"] for e in rounds} == {8 * (48 + 4 * size)}
    one, many = (
        checkpoint.load(folder / "checkpoint")[0]["peers/states"]
        for folder in (tmp_path / "one", tmp_path / "server/run")
    )
    assert np.allclose(one, many, rtol=0, atol=1e-6) and np.ptp(one, axis=0).max() > 1e-4
