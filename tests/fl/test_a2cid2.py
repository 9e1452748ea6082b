from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clients.adapters.space import Space
from clients.layout import Layout
from fl.downlink import Downlink
from fl.errors import ConfigError
from fl.gossip.acid import Acid
from fl.gossip.pairs import Pairs
from fl.network import Instant, Lognormal, Uniform
from fl.peers import Peers
from fl.run import resume
from fl.schedules.a2cid2 import A2CiD2
from fl.schedules.ad_psgd import ADPSGD
from fl.state import ServerState
from fl.topology.fixed import Complete, Ring, Torus
from tests.fl.asynchronous_worlds import BARE, EQUAL, F80, STEPS, world
from tests.helpers import SHARED, clients, go, rounds
from tests.test_resume import killed_at, moments, same_end

N, D = 8, 5
TARGETS = np.random.default_rng(1).normal(size=(64, D)).astype(np.float32)
SLOW = Uniform(seconds_per_step=2e-4, **{**BARE, "latency_s": 4e-4})  # an exchange takes 800 ticks, a job 1000


def towards(client: int, start: np.ndarray) -> np.ndarray:
    """A step of gradient descent on ``|x - target|^2 / 2``."""
    return np.float32(0.2) * (TARGETS[client] - start)


def peers_world(topology: Any = None, number: int = N, network: Any = EQUAL, **more: Any):
    space = Space(Layout(("x",), ((D,),)))
    made = world(towards, number, D, network, space=space, **more)
    made.downlink = Downlink(space, False, own=True)
    made.peers = Peers.of(made.server, topology or Ring(), made.seed, number, frozenset())
    return made


def play(schedule: Any, w: Any) -> list[dict[str, Any]]:
    return list(schedule.run(w))


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == kind]


def updates(w: Any) -> dict[tuple[int, int], np.ndarray]:
    """What each job came to, by its client and number."""
    return {(r.client, r.round): towards(r.client, r.state) for r in w.grid.requests}


@pytest.mark.parametrize("schedule", [ADPSGD, A2CiD2])
@pytest.mark.parametrize("network", [EQUAL, F80, SLOW])
def test_the_mean_moves_by_the_updates_alone(schedule, network):
    """Whatever is exchanged meanwhile, the models add up to the updates that have ended."""
    w = peers_world(network=network)
    ended: list[tuple[int, int]] = []
    for event in schedule(rounds=12).run(w):
        if event["event"] == "client":
            ended.append((event["client"], event["round"]))
        if event["event"] == "round" and schedule is ADPSGD:
            made = updates(w)
            total = np.sum([made[job] for job in ended], axis=0)
            assert np.abs(w.peers.states.sum(axis=0) - total).max() < 1e-4
            assert np.abs(w.server.vector - w.peers.states.mean(axis=0)).max() < 1e-6
    assert len(ended) == 12 * N


def test_with_momentum_both_models_together_keep_the_sum(monkeypatch):
    seen: list[Pairs] = []
    begin = Pairs.begin
    monkeypatch.setattr(Pairs, "begin", lambda self: (seen.append(self), begin(self))[1])
    w = peers_world(network=SLOW)
    ended = [(e["client"], e["round"]) for e in of(play(A2CiD2(rounds=12), w), "client")]
    made = updates(w)
    total = 2 * np.sum([made[job] for job in ended], axis=0)
    assert np.abs(seen[0].method.states.sum(axis=(0, 1)) - total).max() < 1e-4


@pytest.mark.parametrize("schedule", [ADPSGD, A2CiD2])
def test_peers_come_to_the_mean_of_their_targets(schedule):
    w = peers_world(topology=Torus(), number=16)
    events = of(play(schedule(rounds=60, communications=4.0), w), "round")
    assert np.linalg.norm(w.server.vector - TARGETS[:16].mean(axis=0)) < 0.15
    assert events[-1]["consensus"] < np.linalg.norm(TARGETS[:16] - TARGETS[:16].mean(axis=0)) / np.sqrt(16) / 2


def test_momentum_holds_models_on_a_ring_closer_together():
    found = {}
    for schedule in (ADPSGD, A2CiD2):
        w = peers_world(number=32)
        events = of(play(schedule(rounds=40, communications=2.0), w), "round")
        found[schedule] = (np.mean([e["consensus"] for e in events[20:]]), events[-1]["communications"])
    assert found[A2CiD2][1] == found[ADPSGD][1]  # the same exchanges
    assert found[A2CiD2][0] < 0.8 * found[ADPSGD][0]


def test_outstanding_jobs_are_computed_together():
    w = peers_world(network=F80)
    play(ADPSGD(rounds=10), w)
    assert len(w.grid.pushes) < len(w.grid.jobs) / 2
    assert len(set(w.grid.jobs)) == len(w.grid.jobs)


def test_a_job_starts_from_its_peers_model_and_is_added_to_what_that_has_become():
    """One pair, an exchange in the middle of every job: by hand."""
    w = peers_world(topology=Complete(), number=2, network=Uniform(seconds_per_step=2e-4, **BARE), seed=11)
    x, start, events = np.zeros((2, D)), np.zeros((2, D)), []
    log: list[tuple[str, int]] = []

    class Logged(Acid):
        def step(self, peer, time, update):
            log.append(("step", peer))
            super().step(peer, time, update)

        def meet(self, i, j, time, apart):
            log.append(("meet", i))
            super().meet(i, j, time, apart)

    class Watched(ADPSGD):
        def method(self, start, rates):
            return Logged(start, None)

    events = of(play(Watched(rounds=8, communications=2.0), w), "client")
    for kind, peer in log:
        if kind == "meet":
            x[:] = x.mean(axis=0)
        else:
            x[peer] += 0.2 * (TARGETS[peer] - start[peer])
            start[peer] = x[peer]
    assert np.abs(w.peers.states - x).max() < 1e-5
    assert sum(kind == "meet" for kind, _ in log) > 4
    assert sum(e["staleness"] for e in events) > 0


def test_a_peer_is_in_one_exchange_at_a_time(monkeypatch):
    free: dict[int, float] = {}
    spans: list[float] = []
    apart, meet = Acid.apart, Acid.meet
    open_: dict[int, float] = {}

    def begin(self, i, j, time):
        for peer in (i, j):
            assert free.get(peer, 0.0) <= time and peer not in open_
            open_[peer] = time
        return apart(self, i, j, time)

    def end(self, i, j, time, gap):
        for peer in (i, j):
            spans.append(time - open_.pop(peer))
            free[peer] = time
        meet(self, i, j, time, gap)

    monkeypatch.setattr(Acid, "apart", begin)
    monkeypatch.setattr(Acid, "meet", end)
    events = of(play(ADPSGD(rounds=20, communications=2.0), peers_world(network=SLOW)), "round")
    assert events[-1]["missed"] > 0
    assert np.allclose(spans, 0.8)
    monkeypatch.undo()
    # Links without latency hold nobody up.
    assert of(play(ADPSGD(rounds=20, communications=2.0), peers_world()), "round")[-1]["missed"] == 0


def test_exchanges_come_as_often_as_asked_and_are_counted_in_bytes():
    w = peers_world(topology=Complete(), number=16)
    events = play(ADPSGD(rounds=100, communications=1.5), w)
    last = of(events, "round")[-1]
    units = last["virtual_s"] / (STEPS * 2e-4)
    expected = 16 * 1.5 / 2 * units
    assert abs(last["communications"] - expected) < 4 * np.sqrt(expected)
    size = w.peers.size(w.server.layout.hash, {"model": ("float32", D)})
    assert w.peers.traffic.sum() == 2 * size * last["communications"]
    assert sum(e["bytes_links"] for e in of(events, "round")) == w.peers.traffic.sum()
    assert of(events, "links")[0]["links"] == w.peers.links()


def test_poisson_jobs_take_their_unit_on_average():
    w = peers_world(network=Instant(), number=16)
    events = of(play(ADPSGD(rounds=50, clock="poisson", unit_s=0.01), w), "client")
    lengths = np.array([e["done_s"] - e["began_s"] for e in events]) / 0.01
    # Short jobs end more often before the run does, so the mean of those that ended lies a little below 1.
    assert abs(lengths.mean() - 1) < 4 / np.sqrt(len(lengths)) + 0.05


def test_lost_jobs_change_nothing_and_are_never_computed():
    network = Lognormal(dropout=0.3, **BARE)
    w = peers_world(network=network)
    events = of(play(ADPSGD(rounds=12), w), "client")
    lost = {(e["client"], e["round"]) for e in events if not e["accepted"]}
    assert lost and not lost & set(w.grid.jobs)
    made = updates(w)
    total = np.sum([made[e["client"], e["round"]] for e in events if e["accepted"]], axis=0)
    assert np.abs(w.peers.states.sum(axis=0) - total).max() < 1e-4


def test_a_rejected_update_changes_nothing():
    w = peers_world(fault=lambda request: None if request.client else _nan)
    events = of(play(ADPSGD(rounds=4), w), "client")
    assert {e["reason"] for e in events if e["client"] == 0} == {"not_finite"}
    assert all(e["accepted"] for e in events if e["client"])
    assert np.isfinite(w.peers.states).all()


def _nan(reply):
    import dataclasses

    return [dataclasses.replace(reply, update=np.full_like(reply.update, np.nan))]


def test_a_run_ends_at_its_time():
    w = peers_world()
    events = play(ADPSGD(rounds=1000, until_s=0.0123), w)
    assert w.clock.now_s == pytest.approx(0.0123)
    assert of(events, "round")[-1]["virtual_s"] <= 0.0123


def test_what_never_trains_stays_as_it_is_and_does_not_travel():
    layout = Layout(("a", "b"), ((2,), (3,)))
    space = Space(layout, ("A", "B"), (("B",),))

    def update(client, start):
        return np.full(3, client + 1, np.float32)

    w = world(update, 4, D, EQUAL, space=space)
    w.downlink = Downlink(space, False, own=True)
    w.server = ServerState(np.array([1, 2, 0, 0, 0], np.float32), space)
    w.validator._size = lambda request: 3
    w.validator.layout = layout.hash
    w.peers = Peers.of(w.server, Ring(), 0, 4, frozenset())
    play(A2CiD2(rounds=5), w)
    assert np.array_equal(w.peers.states[:, :2], np.tile([1, 2], (4, 1)))
    assert (w.peers.states[:, 2:] > 0).all()


# Whole runs

TINY = ("network=lognormal", "topology=ring", "schedule.rounds=3", "local.steps=1")


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("a2cid2", 0.35), ("a2cid2", 0.85), ("ad_psgd", 0.6), pytest.param("ad_psgd", 0.35, marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path, schedule, share):
    chosen = (*TINY, f"schedule={schedule}", "topology.latency_s=0.05")
    total = moments(tmp_path / "whole", *chosen)
    killed_at(int(total * share), tmp_path / "cut", *chosen)
    resume(tmp_path / "cut", shared=SHARED, quiet=True)
    same_end(tmp_path / "cut", tmp_path / "whole")


def test_a_run_trains_an_adapter(tmp_path):
    go(tmp_path / "run", *TINY, "schedule=a2cid2", "schedule.rounds=8", "local.steps=4", "local.lr=0.01")
    found = rounds(tmp_path / "run")
    assert [e["round"] for e in found] == list(range(1, 9))
    assert found[-1]["loss"] < found[0]["loss"]
    assert len(clients(tmp_path / "run")) == 8 * 4


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (("network=instant", "topology=ring"), "schedule.clock"),
        (("network=lognormal", "topology=one_peer_exponential"), "topology"),
        (("network=lognormal", "topology=erdos_renyi", "topology.redraw_every=1"), "topology"),
        (("network=lognormal", "aggregator.combine=krum", "aggregator.f=1"), "aggregator.combine"),
    ],
)
def test_what_it_has_no_place_for_is_refused(tmp_path, more, key):
    with pytest.raises(ConfigError) as error:
        go(tmp_path / "run", "schedule=a2cid2", *more)
    assert error.value.key == key
