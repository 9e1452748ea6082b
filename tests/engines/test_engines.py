"""The same experiment on every engine: in one process, in Ray workers, on resident nodes and on stock SuperNodes."""

import importlib.util
import socket

import numpy as np
import pytest

from tests.engines.linked import Hosts
from tests.helpers import FIXED, final, go, rounds, vector
from tests.hosts.processes import SERVER, Loopback, Scene

pytestmark = pytest.mark.slow
EXPERIMENTS = ("fedit", "fed_sb")
WORDS = ("data.public=20", "schedule.rounds=2", "clients.number=4", "evaluation.clients=never")
NODES = {"node-0": "0,3", "node-1": "1-2"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Both experiments in this process."""
    folder = tmp_path_factory.mktemp("here")
    for name in EXPERIMENTS:
        go(folder / name, f"experiment={name}", *WORDS)
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A SuperLink with TLS and keys."""
    with Loopback() as hosts:
        made = Scene(hosts, tmp_path_factory.mktemp("scene"), list(NODES), free_port())
        made.server()
        yield made


def same(found, here) -> None:
    np.testing.assert_allclose(vector(found), vector(here), rtol=1e-5, atol=1e-7)
    counts = ("bytes_up", "bytes_down", "rejected", "client_steps")
    assert [final(found)[k] for k in counts] == [final(here)[k] for k in counts]
    assert [e["bytes_up"] for e in rounds(found)] == [e["bytes_up"] for e in rounds(here)]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_ray_workers(experiment, here, tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    go(tmp_path / "ray", f"experiment={experiment}", *WORDS, "engine=ray", "engine.nodes=2", *FIXED)
    same(tmp_path / "ray", here / experiment)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_sessions_in_this_process(experiment, here, tmp_path):
    Hosts(tmp_path, (0, 3), (1, 2)).run(tmp_path / "hosts", f"experiment={experiment}", *WORDS)
    same(tmp_path / "hosts", here / experiment)


@pytest.mark.parametrize("kind", ["resident", "stock"])
def test_hosts(kind, here, scene):
    """Over TLS with keys. Stock SuperNodes take the place, and the keys, of resident ones that have left."""
    nodes = [
        scene.node(name, clients, *(["--stock"] if kind == "stock" else []), log=f"{kind}-{name}")
        for name, clients in NODES.items()
    ]
    for experiment in EXPERIMENTS:
        run = scene.run(f"experiment={experiment}", *WORDS, name=f"{kind}-{experiment}")
        assert scene.wait_end(run, 400) == 0, scene.tails()
        same(scene.folder / SERVER / f"{kind}-{experiment}", here / experiment)
    for node in nodes:
        node.terminate()
        assert node.wait(30) == 0, scene.tails()


@pytest.mark.parametrize(("schedule", "killed"), [("fedbuff", False), ("fedbuff", True), ("fedasync", False)])
def test_schedules_without_rounds(schedule, killed, scene):
    """Two clients live on each node. One that is killed after the first step is missed, and not waited for."""
    name = f"{schedule}-{killed}"
    first = scene.node("node-0", "0-1", log=f"{name}-0")
    second = scene.node("node-1", "2-3", log=f"{name}-1")
    run = scene.run(f"schedule={schedule}", "schedule.rounds=6", name=name)
    if killed:
        scene.wait_round(1, run, name=name)
        scene.hosts.kill(second)
    assert scene.wait_end(run, 300) == 0, scene.tails()
    arrivals = scene.events("client", name)
    assert [e["version"] for e in scene.events("round", name)] == list(range(1, 7))
    assert len({(e["client"], e["round"]) for e in arrivals}) == len(arrivals)
    assert killed or all(e["accepted"] for e in arrivals)
    assert {e["reason"] for e in arrivals} <= {None, "error"}
    for node in (first, second):
        node.terminate()
        node.wait(30)


def test_peers_send_models_through_the_server_or_to_each_other(scene, tmp_path):
    """The same graph, the same adapter: mixed by the server, or by the nodes over TLS with the nodes' own keys."""
    words = ("schedule=dpsgd", "topology=ring", "schedule.rounds=2", "clients.number=4")
    go(tmp_path / "here", *words)
    nodes = [
        scene.node(name, clients, "--listen", f"127.0.0.1:{free_port()}", log=f"peers-{name}")
        for name, clients in NODES.items()
    ]
    for way in ("relay", "direct"):
        run = scene.run(*words, f"engine.peers={way}", "schedule.deadline_s=60", name=f"peers-{way}")
        assert scene.wait_end(run, 300) == 0, scene.tails()
        found = scene.folder / SERVER / f"peers-{way}"
        np.testing.assert_allclose(vector(found), vector(tmp_path / "here"), rtol=1e-5, atol=1e-7)
        assert all(("missed" in event) == (way == "direct") for event in rounds(found))
    for node in nodes:
        node.terminate()
        node.wait(30)
