"""Peers that go in rounds, in real time: their messages are relayed by the server, over nodes that are threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from fl import checkpoint
from fl.compose import compose
from fl.compression import TopK
from fl.errors import ConfigError, RunStopped
from fl.experiment import Settings
from fl.mixing import Mixing
from fl.network import WallClock
from fl.peers import Peers
from fl.schedules.choco import CHOCO
from fl.schedules.dpsgd import DPSGD
from fl.schedules.gradient_tracking import GradientTracking
from fl.schedules.monna import MoNNA
from fl.schedules.push_sum import PushSum
from fl.topology.fixed import Complete, Ring
from privacy.base import Guard, Statement
from tests.fl.asynchronous_worlds import world
from tests.fl.deployment import deploy
from tests.helpers import ENCODER, clients, go, rounds

N, D = 5, 5
SECONDS = (0.9, 1.37, 2.11, 0.71, 1.05)
SCHEDULES = {
    "dpsgd": DPSGD(rounds=4),
    "parallel": DPSGD(rounds=4, order="parallel"),
    "gradient_tracking": GradientTracking(rounds=4),
    "push_sum": PushSum(rounds=4),
    "choco": CHOCO(rounds=4, compressor=TopK(0.4)),
    "monna": MoNNA(rounds=4, reach="sampled"),
}


def update(client: int, start: np.ndarray) -> np.ndarray:
    """Half of the way to a point of the client's own."""
    return 0.5 * (np.arange(len(start)) * (client + 1) - start)


def silent(reply):
    return []


@pytest.fixture
def deployment(monkeypatch):
    made = deploy(monkeypatch, update)
    yield made
    made.close()


def peers_world(graph, grid=None, **more):
    more = {"aggregator": FedAvg(weights="uniform")} | more
    network = more.pop("network", WallClock())
    w = world(update, N, network=network, **more) if grid is not None else world(update, N, **more)
    w.grid = w.grid if grid is None else grid
    w.peers, w.downlink.own = Peers.of(w.server, graph, 3, N, frozenset()), True
    return w


def ready(deployment, *but: int):
    for client, each in enumerate(SECONDS):
        if client not in but:
            deployment.add(client, each)


def play(schedule, w):
    return [e for e in schedule.run(w) if e["event"] == "round"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_does_what_it_does_on_the_virtual_clock(deployment, name):
    ready(deployment)
    graph = Complete() if name == "monna" else Ring()
    w, v = peers_world(graph, deployment), peers_world(graph)
    real, virtual = play(SCHEDULES[name], w), play(SCHEDULES[name], v)
    assert np.array_equal(w.peers.states, v.peers.states) and not np.allclose(w.peers.states, 0)
    for key in ("version", "accepted", "bytes_up", "bytes_links", "consensus", "update_norm"):
        assert [e[key] for e in real] == [e[key] for e in virtual]
    # A round is as long as its slowest peer: messages between peers take no time beside that.
    assert [e["virtual_s"] for e in real] == pytest.approx([2.11 * k for k in range(1, 5)], abs=0.15)


def test_when_a_peer_answered_is_known_and_what_it_did_before_is_not(deployment):
    ready(deployment)
    events = [e for e in DPSGD(rounds=2).run(peers_world(Ring(), deployment)) if e["event"] == "client"]
    second = [e for e in events if e["round"] == 2]
    assert {e["sent_s"] for e in second} == {next(e["virtual_s"] for e in events if e["client"] == 2)}
    assert {e["began_s"] for e in events} == {e["done_s"] for e in events} == {None}


def test_monna_hears_the_first_that_answer(deployment):
    ready(deployment)
    w = peers_world(Complete(), deployment, aggregator=FedAvg(weights="uniform", f=1))
    play(MoNNA(rounds=1, reach="network", beta=0.0), w)
    models = np.stack([update(c, np.zeros(D)) for c in range(N)])
    for peer in range(N):
        order = sorted((c for c in range(N) if c != peer), key=lambda c: SECONDS[c])
        heard = [peer, *order[: N - 1 - 1]]
        nearest = sorted(heard, key=lambda c: np.linalg.norm(models[c] - models[peer]))[: N - 2]
        assert np.allclose(w.peers.states[peer], models[nearest].mean(0), atol=1e-6)


def test_who_is_late_is_left_out_and_keeps_its_state(deployment):
    ready(deployment, 2)
    deployment.add(2, lambda job: 7.5 if job == 2 else 1.0)
    w = peers_world(Ring(), deployment)
    events, states = [], []
    for event in DPSGD(rounds=4, deadline_s=5.0).run(w):
        events.append(event)
        if event["event"] == "round":
            states.append(w.peers.states.copy())
    found = [e for e in events if e["event"] == "round"]
    assert [e["rejected"] for e in found] == [{}, {"late": 1}, {}, {}]
    assert np.diff([e["virtual_s"] for e in found])[0] == pytest.approx(5.0, abs=0.1)
    assert np.array_equal(states[1][2], states[0][2])
    step = np.stack([update(c, states[0][c]) * (c != 2) for c in range(N)])
    wanted = Mixing(Ring().graph(N, 3, 1), frozenset({2})).mean(states[0] + step)
    assert np.allclose(states[1], wanted, atol=1e-5)
    assert np.allclose(states[1].mean(0), (states[0] + step).mean(0), atol=1e-5)  # relayed: the mean is kept
    [late] = [e for e in events if e["event"] == "client" and not e["accepted"]]
    assert (late["client"], late["round"], late["reason"]) == (2, 2, "late")
    assert not np.array_equal(states[2][2], states[1][2])


@pytest.mark.parametrize("schedule", [DPSGD(rounds=6), GradientTracking(rounds=6), CHOCO(rounds=6), PushSum(rounds=6)])
def test_a_node_that_goes_is_lost_and_comes_back(deployment, schedule):
    ready(deployment, 2)
    deployment.add(2, 1.0, gone=(1.5, 6.0))
    w = peers_world(Ring(), deployment, network=WallClock(rejoin_s=3.0))
    found = play(schedule, w)
    assert [e["round"] for e in found] == list(range(1, 7))
    assert sum(e["rejected"].get("error", 0) for e in found) in (1, 2)
    assert any(e["sampled"] == N - 1 for e in found)  # while it is away nobody asks it
    assert found[-1]["accepted"] == N and np.isfinite(w.peers.states).all()


def test_a_round_without_anybody_stops_the_run(deployment):
    for client in range(N):
        deployment.add(client, 1.0, silent)
    with pytest.raises(RunStopped, match="no peer that trained, of 5 asked .the first: late"):
        play(DPSGD(rounds=2, deadline_s=3.0), peers_world(Ring(), deployment))
    assert deployment.time == pytest.approx(3.0, abs=0.1)


def test_when_all_are_away_the_round_waits_for_the_first_to_be_back(deployment):
    for client in range(N):
        deployment.add(client, 1.0)
    w = peers_world(Ring(), deployment)
    w.fleet.away = {c: 4_000_000 + c for c in range(N)}
    [event] = play(DPSGD(rounds=1), w)
    assert event["virtual_s"] == pytest.approx(5.0, abs=0.1) and event["accepted"] >= 1


def test_the_end_by_time(deployment):
    ready(deployment)
    found = play(DPSGD(rounds=100, until_s=5.0), peers_world(Ring(), deployment))
    assert len(found) == 3


def test_a_run_goes_on_after_an_interruption(deployment):
    ready(deployment)
    v = peers_world(Ring())
    play(DPSGD(rounds=4), v)
    w = peers_world(Ring(), deployment)
    play(DPSGD(rounds=2), w)
    again = peers_world(Ring(), deployment)
    again.server, again.kept = w.server, w.keep()
    again.fleet.restore(w.fleet.state())
    again.clock.advance(w.clock.now)
    found = play(DPSGD(rounds=4), again)
    assert np.array_equal(again.peers.states, v.peers.states)
    assert found[0]["virtual_s"] > w.clock.now_s


def test_a_run_with_a_claim_does_not_go_on_after_an_interruption(deployment):
    class Claims(Guard):
        def statement(self):
            return replace(Statement("x"), unit="example")

    ready(deployment)
    w = peers_world(Ring(), deployment, guard=Claims())
    w.fleet.restore(w.fleet.state())
    with pytest.raises(ConfigError, match="Start the run anew"):
        play(DPSGD(rounds=1), w)


def test_a_run_in_one_process_is_the_run_on_the_virtual_clock(tmp_path):
    words = ("schedule=dpsgd", "local=sgd", "local.lr=0.1")
    go(tmp_path / "virtual", *words)
    go(tmp_path / "wall", *words, "network=wall_clock", "schedule.deadline_s=300")
    states = [checkpoint.load(tmp_path / name / "checkpoint")[0]["peers/states"] for name in ("virtual", "wall")]
    assert np.array_equal(*states)
    assert [e["bytes_links"] for e in rounds(tmp_path / "virtual")] == [
        e["bytes_links"] for e in rounds(tmp_path / "wall")
    ]
    assert {e["began_s"] for e in clients(tmp_path / "wall")} == {None}


REFUSED = {
    "schedule=ad_psgd network=wall_clock schedule.clock=poisson": "network",
    "schedule=a2cid2 network=wall_clock schedule.clock=poisson": "network",
    "schedule=dadao network=wall_clock adapter=head": "network",
    "schedule=just_one_byte network=wall_clock": "network",
    "schedule=dpsgd schedule.deadline_s=5": "schedule.deadline_s",
    "schedule=dpsgd network=wall_clock topology.latency_s=1": "topology.latency_s",
    "schedule=dpsgd network=wall_clock topology.mbps=1": "topology.mbps",
}
DIRECT = "engine=superlink engine.peers=direct "
REFUSED_DIRECT = {
    DIRECT + "schedule=dpsgd": "schedule.deadline_s",
    DIRECT + "schedule=push_sum schedule.deadline_s=60": "schedule",
    DIRECT + "schedule=monna schedule.deadline_s=60": "schedule",
    DIRECT + "schedule=dpsgd schedule.deadline_s=60 privacy=dp_sgd local.steps=2": "privacy",
    DIRECT + "schedule=dpsgd schedule.deadline_s=60 attack=label_flip": "attack",
    DIRECT + "schedule=dpsgd schedule.deadline_s=60 attack=sign_flip": "attack",
    DIRECT + "schedule=dpsgd schedule.deadline_s=60 adapter.init=pissa": "adapter/init",
}


@pytest.mark.parametrize("words", REFUSED | REFUSED_DIRECT)
def test_what_is_refused_before_anything_loads(words):
    base = [w for w in ENCODER if not (w.startswith("engine.") and "superlink" in words)]
    with pytest.raises(ConfigError) as refused:
        Settings.of(compose([*base, *words.split()])[0])
    assert refused.value.key == (REFUSED | REFUSED_DIRECT)[words]


def test_models_that_never_pass_the_server_are_one_word_away():
    words = (DIRECT + "schedule=dpsgd schedule.deadline_s=60").split()
    base = [w for w in ENCODER if not w.startswith("engine.")]
    assert Settings.of(compose([*base, *words])[0]).schedule.deadline_s == 60
