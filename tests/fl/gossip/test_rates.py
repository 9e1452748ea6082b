from __future__ import annotations

import numpy as np
import pytest

from fl.errors import ConfigError, ShoalError
from fl.gossip.rates import Rates, optimal, uniform
from tests.fl.gossip.graphs import edges
from tests.oracles import dadao as oracle

GRAPHS = ["ring", "path", "star", "torus", "grid", "complete", "barbell"]


@pytest.mark.parametrize("name", GRAPHS)
def test_chi_is_that_of_the_definition(name):
    pairs = edges(name)
    values = np.random.default_rng(1).uniform(0.1, 2.0, len(pairs))
    rates = Rates(16, pairs, values)
    assert (rates.chi1, rates.chi2) == pytest.approx(oracle.chi(16, pairs, values), rel=1e-9)
    assert rates.chi2 <= rates.chi1


@pytest.mark.parametrize("name", ["ring", "star", "complete"])
def test_on_edge_transitive_graphs_every_edge_has_the_same_resistance(name):
    # Foster: sum over edges of rate x resistance = n - 1.
    assert uniform(16, edges(name)).chi2 == pytest.approx(15 / 2, rel=1e-12)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_needed_factor_reaches_the_condition_exactly(name):
    rates = uniform(16, edges(name))
    assert rates.total == pytest.approx(1)
    scaled = rates.times(rates.needed)
    assert scaled.chi1 * scaled.chi2 == pytest.approx(0.5, rel=1e-9)
    assert scaled.total == pytest.approx(rates.needed)


def test_more_communication_lowers_both_in_proportion():
    rates = uniform(9, edges("grid", 9))
    twice = rates.times(2)
    assert (twice.chi1, twice.chi2) == pytest.approx((rates.chi1 / 2, rates.chi2 / 2))


def test_a_graph_in_parts_is_refused():
    with pytest.raises(ShoalError, match="not connected"):
        uniform(4, np.array([[0, 1], [2, 3]]))


def test_an_edge_that_is_not_used_does_not_connect():
    pairs = np.array([[0, 1], [1, 2], [0, 2]])
    assert Rates(3, pairs, np.array([1.0, 1.0, 0.0])).chi2 == pytest.approx(0.5)
    with pytest.raises(ShoalError, match="not connected"):
        Rates(3, pairs, np.array([1.0, 0.0, 0.0]))


def test_optimal_rates_without_cvxpy_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cvxpy", None)
    with pytest.raises(ConfigError, match="rates"):
        optimal(4, edges("ring", 4))


@pytest.mark.parametrize(("name", "number", "least", "even"), [("barbell", 10, 18.2, 38.4), ("grid", 9, 9.83, 10.10)])
def test_optimal_rates_need_fewer_communications(name, number, least, even):
    pytest.importorskip("cvxpy")
    pairs = edges(name, number)
    found = optimal(number, pairs)
    assert found.total == pytest.approx(1)
    assert found.needed == pytest.approx(least, rel=0.01)
    assert uniform(number, pairs).needed == pytest.approx(even, rel=0.01)


def test_a_ring_gains_nothing_from_optimal_rates():
    pytest.importorskip("cvxpy")
    pairs = edges("ring", 8)
    assert optimal(8, pairs).needed == pytest.approx(uniform(8, pairs).needed, rel=1e-3)
