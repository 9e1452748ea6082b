from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import expm

from fl.gossip.acid import Acid
from fl.gossip.clocks import PoissonClock
from fl.gossip.rates import uniform
from tests.fl.gossip.graphs import edges

N, D = 16, 6


def models(seed: int = 0, number: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, D)).astype(np.float32)


def rates(graph: str, per_peer: float = 1.0, number: int = N):
    return uniform(number, edges(graph, number)).times(number * per_peer / 2)


def meet_for(acid: Acid, graph: str, units: float, per_peer: float = 1.0) -> None:
    """Exchanges at the events of the edges' clock, without local steps."""
    used = rates(graph, per_peer, len(acid.states))
    clock = PoissonClock(used.values, 10**6, "meetings")
    while clock.peek()[0] <= units * 10**6:
        tick, edge = clock.pop()
        i, j = used.edges[edge].tolist()
        acid.meet(i, j, tick / 1e6, acid.apart(i, j, tick / 1e6))


def test_the_constants_are_those_of_the_graph():
    used = rates("ring")
    acid = Acid(models(), used)
    assert acid.eta == pytest.approx(1 / (2 * math.sqrt(used.chi1 * used.chi2)))
    assert acid.beta_t == pytest.approx(0.5 * math.sqrt(used.chi1 / used.chi2))


def test_the_flow_is_exact_and_lazy():
    acid = Acid(models(), rates("torus"))
    acid.states[:, 1] += models(1)
    start = acid.states.astype(np.float64)
    exact = expm(acid.eta * 3.7 * np.array([[-1, 1], [1, -1]]))
    expected = np.einsum("ab,nbd->nad", exact, start)
    assert np.abs(acid.at(3.7) - expected[:, 0]).max() < 1e-6
    for time in (0.4, 1.9, 3.7):
        acid.advance(2, time)
    assert np.abs(acid.states[2] - expected[2]).max() < 1e-6
    assert np.abs(acid.at(3.7) - expected[:, 0]).max() < 1e-6


@pytest.mark.parametrize("momentum", [False, True])
def test_meetings_keep_both_means(momentum):
    acid = Acid(models(), rates("ring") if momentum else None)
    acid.states[:, 1] += models(2)
    before = acid.states.sum(axis=1).mean(axis=0)
    first = acid.states[:, 0].mean(axis=0)
    meet_for(acid, "ring", 50.0)
    for peer in range(N):
        acid.advance(peer, 50.0)
    assert np.abs(acid.states.sum(axis=1).mean(axis=0) - before).max() < 1e-5
    if not momentum:
        assert np.abs(acid.states[:, 0].mean(axis=0) - first).max() < 1e-6


def test_a_step_moves_both_models_alike():
    acid = Acid(models(), rates("ring"))
    before = acid.states.copy()
    acid.step(3, 0.0, np.full(D, 0.5, np.float32))
    assert np.array_equal(acid.states[3], before[3] + np.float32(0.5))
    assert np.array_equal(np.delete(acid.states, 3, 0), np.delete(before, 3, 0))


def test_without_momentum_a_meeting_is_the_mean_of_a_pair_and_both_models_stay_one():
    acid = Acid(models(), None)
    acid.step(0, 1.0, np.ones(D, np.float32))
    x = acid.states[:, 0].copy()
    acid.meet(0, 1, 2.0, acid.apart(0, 1, 2.0))
    assert np.allclose(acid.states[[0, 1], 0], (x[0] + x[1]) / 2, atol=1e-6)
    meet_for(acid, "torus", 5.0)
    assert np.array_equal(acid.states[:, 0], acid.states[:, 1])


def test_what_changes_during_an_exchange_leaves_the_mean_alone():
    acid = Acid(models(), rates("torus"))
    mean = acid.states[:, 0].mean(axis=0)
    apart = acid.apart(4, 9, 1.0)
    step = np.linspace(0, 1, D).astype(np.float32)
    acid.step(4, 1.5, step)
    acid.meet(4, 9, 2.0, apart)
    assert np.abs(acid.at(2.0).mean(axis=0) - (mean + step / N)).max() < 1e-6


def spread(states: np.ndarray) -> float:
    return float(((states - states.mean(axis=0)) ** 2).sum())


def test_on_a_ring_momentum_makes_models_agree_sooner():
    """32 peers on a ring, the same meetings: the spread that is left is a hundredth of that of plain means."""
    plain = Acid(models(5, 32), None)
    quick = Acid(models(5, 32), rates("ring", number=32))
    for acid in (plain, quick):
        meet_for(acid, "ring", 150.0)
    assert spread(quick.at(150.0)) < spread(plain.at(150.0)) / 100
