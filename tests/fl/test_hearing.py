"""What peers make of hostile models: robust rules in neighbourhoods, one message or one for each receiver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.robust.base import Mean
from aggregators.robust.centres import CenteredClipping, GeometricMedian
from aggregators.robust.coordinates import CoordinateMedian, TrimmedMean
from clients.adapters.space import Space
from clients.behaviours.base import SomeClients
from clients.behaviours.equivocation import Equivocation
from clients.behaviours.sign_flip import SignFlip
from clients.layout import Layout
from fl.network import Uniform
from fl.peers import Peers
from fl.schedules.dpsgd import DPSGD
from fl.schedules.monna import MoNNA
from fl.topology.fixed import Complete, Ring
from fl.validation import Validator
from tests.fl.asynchronous_worlds import world
from tests.fl.test_gossip import LOCAL, D, nothing, spread_out

N, BAD = 10, frozenset({3, 7})
HONEST = [p for p in range(N) if p not in BAD]


@dataclass(frozen=True)
class Says(SomeClients):
    """Hostile peers say one number everywhere."""

    crafts: ClassVar[bool] = True
    value: float = 0.0

    def craft(self, honest, own, facts):
        assert facts.states and list(facts.hostile) == sorted(BAD) and list(facts.honest) == HONEST
        return np.full(own.shape, self.value)


def played(schedule, rule, attack, topology=None, start=None, **more):
    w = world(nothing, N, size=D, exact=True, local=LOCAL, aggregator=rule, attack=attack, **more)
    w.peers = Peers.of(w.server, topology or Complete(), 3, N, BAD)
    w.peers.states = (spread_out(N) if start is None else start).copy()
    rounds = [e for e in schedule.run(w) if e["event"] == "round"]
    return rounds, w


def test_under_the_mean_a_hostile_row_counts_as_what_it_says():
    start = spread_out(N)
    rounds, w = played(DPSGD(rounds=1), FedAvg(weights="uniform"), Says(value=50.0), start=start)
    said = start.copy()
    said[sorted(BAD)] = 50.0
    assert np.allclose(w.peers.states[HONEST], said.mean(0), atol=1e-12)
    # a hostile peer knows its own model
    mine = said.copy()
    mine[3] = start[3]
    assert np.allclose(w.peers.states[3], mine.mean(0), atol=1e-12)
    assert rounds[0]["consensus"] < 1e-12  # of the honest
    assert np.allclose(w.server.vector, w.peers.states[HONEST].mean(0))


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(), GeometricMedian(), Mean()])
def test_a_robust_rule_is_applied_to_what_each_peer_has_heard(rule):
    start = spread_out(N)
    _, w = played(DPSGD(rounds=1), FedAvg(weights="uniform", combine=rule, f=2), Says(value=50.0), start=start)
    said = start.copy()
    said[sorted(BAD)] = 50.0
    if isinstance(rule, CoordinateMedian):
        assert np.allclose(w.peers.states[HONEST], np.median(said, axis=0), atol=1e-12)
    elif isinstance(rule, TrimmedMean):
        assert np.allclose(w.peers.states[HONEST], np.sort(said, axis=0)[2:-2].mean(0), atol=1e-12)
    if not isinstance(rule, Mean):
        assert np.abs(w.peers.states[HONEST]).max() < 5
    else:
        assert w.peers.states[HONEST].min() > 5


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e7])
@pytest.mark.parametrize("rule", [Mean(), CoordinateMedian()])
def test_what_is_not_finite_or_too_far_is_not_heard_and_counted(value, rule):
    start = spread_out(N)
    schedule = DPSGD(rounds=1)
    rounds, w = played(schedule, FedAvg(weights="uniform", combine=rule, f=2), Says(value=value), start=start)
    assert np.isfinite(w.peers.states).all() and np.abs(w.peers.states[HONEST]).max() < 5
    reason = "too_large" if value == 1e7 else "not_finite"
    assert rounds[0]["rejected"][reason] >= 2


def test_clipped_gossip_is_its_formula():
    start, tau = spread_out(N), 0.8
    rule = FedAvg(weights="uniform", combine=CenteredClipping(tau=tau, start="zero", iterations=1))
    _, w = played(DPSGD(rounds=1), rule, Says(value=9.0), Ring(), start)
    said = start.copy()
    said[sorted(BAD)] = 9.0
    weights = w.peers.graph(1).weights.toarray()
    for i in HONEST:
        gaps = said - start[i]
        clipped = gaps * np.minimum(1, tau / np.maximum(np.linalg.norm(gaps, axis=1), 1e-30))[:, None]
        assert np.allclose(w.peers.states[i], start[i] + weights[i] @ clipped, atol=1e-12)


def test_each_receiver_hears_its_own_lie():
    start = spread_out(N)
    attack = Equivocation(clients=sorted(BAD), scale=2.0)
    _, w = played(DPSGD(rounds=1), FedAvg(weights="uniform"), attack, start=start)
    mean = start[HONEST].mean(0)
    for i in HONEST:
        lie = start[i] + 2 * (start[i] - mean)
        assert np.allclose(w.peers.states[i], (start[HONEST].sum(0) + 2 * lie) / N, atol=1e-12)


def test_nearest_neighbours_leave_far_models_out_where_the_mean_does_not():
    start = spread_out(N)
    rule = FedAvg(weights="uniform", f=2)
    for value in (1e3, -40.0):
        _, w = played(MoNNA(rounds=3, reach="worst"), rule, Says(value=value), start=start)
        low, high = start[HONEST].min(0) - 1e-9, start[HONEST].max(0) + 1e-9
        assert ((w.peers.states[HONEST] >= low) & (w.peers.states[HONEST] <= high)).all()
        _, plain = played(
            MoNNA(rounds=3), FedAvg(weights="uniform", f=2, combine=Mean()), Says(value=value), start=start
        )
        assert (np.abs(plain.peers.states[HONEST]) > np.abs(start).max()).any()


def test_before_its_round_an_attack_says_nothing():
    start = spread_out(N)
    late = SignFlip(clients=sorted(BAD), from_round=3)
    _, w = played(DPSGD(rounds=2), FedAvg(weights="uniform"), late, start=start)
    _, honest = played(DPSGD(rounds=2), FedAvg(weights="uniform"), SignFlip(clients=[], from_round=3), start=start)
    assert np.array_equal(w.peers.states, honest.peers.states)


def test_what_never_travels_is_never_attacked():
    """The honest row of a frozen tensor is every receiver's own, whatever hostile peers say."""
    seen = []

    @dataclass(frozen=True)
    class Looks(Says):
        def craft(self, honest, own, facts):
            seen.append((honest.shape, own.shape, facts.columns.tolist(), facts.starts.shape))
            return np.full(own.shape, 5.0)

    space = Space(Layout(("a", "b"), ((4,), (2,))), ("still", "moving"), (("moving",),))
    w = world(
        lambda c, x: np.zeros(2, np.float32), N, size=6, space=space, local=LOCAL, attack=Looks(clients=sorted(BAD)),
        aggregator=FedAvg(weights="uniform", combine=CoordinateMedian(), f=2),
    )  # fmt: skip
    w.validator = Validator(space.layout.hash, 2)
    w.peers = Peers.of(w.server, Complete(), 3, N, BAD)
    w.peers.states[:, 4:] = np.random.default_rng(0).standard_normal((N, 2))
    list(DPSGD(rounds=1).run(w))
    assert seen == [((8, 2), (2, 2), [4, 5], (2, 2))]
    assert (w.peers.states[:, :4] == 0).all()


def test_a_round_with_no_honest_peer_left_is_survived():
    network = Uniform(seconds_per_step=1.0, latency_s=0.0, down_mbps=None, up_mbps=None, dropout=0.9)
    rule = FedAvg(weights="uniform", combine=CoordinateMedian(), f=2)
    rounds, w = played(DPSGD(rounds=20), rule, SignFlip(clients=sorted(BAD)), network=network)
    assert len(rounds) == 20 and any(e["heard_too_few"] for e in rounds)
    assert np.isfinite(w.peers.states).all()
