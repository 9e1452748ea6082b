"""Weights against their definition, and spectral gaps against known numbers, formulas and other libraries' graphs."""

import networkx
import numpy as np
import pytest
from scipy.sparse import linalg as sparse_linalg

from fl.topology import Graph
from tests.oracles.graphs import column_stochastic, metropolis_hastings, reached


def random_pairs(seed: int, number: int, p: float) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [(i, j) for i in range(number) for j in range(number) if i != j and rng.random() < p]


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_metropolis_hastings(seed):
    pairs = random_pairs(seed, 9, 0.2)
    graph = Graph.of(9, np.array(pairs))
    expected = np.array(metropolis_hastings(9, pairs), dtype=float)
    np.testing.assert_allclose(graph.weights.toarray(), expected, atol=1e-15)
    assert (graph.weights.toarray() == graph.weights.toarray().T).all()
    assert graph.doubly_stochastic
    for peer in range(9):
        assert graph.neighbours(peer).tolist() == [j for j in range(9) if j != peer and expected[peer, j]]


@pytest.mark.parametrize("seed", range(4))
def test_directed_weights_split_each_peer_s_value_evenly(seed):
    pairs = random_pairs(seed, 9, 0.3)
    graph = Graph.of(9, np.array(pairs), directed=True)
    expected = np.array(column_stochastic(9, pairs), dtype=float)
    np.testing.assert_allclose(graph.weights.toarray(), expected, atol=1e-15)
    np.testing.assert_allclose(graph.weights.sum(axis=0), 1.0, atol=1e-15)
    assert not graph.doubly_stochastic
    for peer in range(9):
        assert graph.neighbours(peer).tolist() == sorted(i for i, j in pairs if j == peer)
    assert graph.degrees.tolist() == [sum(i == peer for i, _ in pairs) for peer in range(9)]


def test_edges_are_each_once_and_in_order():
    pairs = np.array([[3, 1], [1, 3], [2, 2], [0, 3], [0, 1]])
    assert Graph.of(4, pairs).edges.tolist() == [[0, 1], [0, 3], [1, 3]]
    assert Graph.of(4, pairs, directed=True).edges.tolist() == [[0, 1], [0, 3], [1, 3], [3, 1]]
    assert Graph.of(4, pairs).links.tolist() == [[0, 1], [0, 3], [1, 0], [1, 3], [3, 0], [3, 1]]


@pytest.mark.parametrize("directed", [False, True])
def test_connected_means_that_every_rumour_reaches_everyone(directed):
    seen = set()
    for seed in range(40):
        pairs = random_pairs(seed, 7, 0.22)
        both = pairs if directed else pairs + [(j, i) for i, j in pairs]
        expected = all(len(reached(7, both, start)) == 7 for start in range(7))
        assert Graph.of(7, np.array(pairs), directed).connected == expected
        seen.add(expected)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("drawn", "edges", "gap"),
    [
        (networkx.cycle_graph(16), 16, 0.051),
        (networkx.path_graph(16), 15, 0.013),
        (networkx.star_graph(15), 15, 0.063),
        (networkx.random_regular_graph(3, 16, seed=0), 24, 0.151),
        (networkx.connected_watts_strogatz_graph(16, 4, 0.3, seed=0), 32, 0.150),
        (networkx.gnp_random_graph(16, 0.4, seed=1), 40, 0.228),
        (networkx.complete_graph(16), 120, 1.0),
    ],
)
def test_gaps_of_known_graphs(drawn, edges, gap):
    graph = Graph.of(16, np.array(drawn.edges))
    assert len(graph.edges) == edges
    assert graph.gap == pytest.approx(gap, abs=5.1e-4)  # known to three places


def test_a_graph_in_two_parts_has_no_gap():
    graph = Graph.of(6, np.array([[0, 1], [1, 2], [3, 4], [4, 5]]))
    assert graph.gap == pytest.approx(0, abs=1e-12)
    assert not graph.connected


def test_the_gap_sees_eigenvalues_near_minus_one():
    """A complete bipartite graph's weights have -(n/2 - 1)/(n/2 + 1), larger in modulus than its other eigenvalues."""
    half = 8
    graph = Graph.of(2 * half, np.array([(i, half + j) for i in range(half) for j in range(half)]))
    assert graph.gap == pytest.approx(1 - (half - 1) / (half + 1))


@pytest.mark.parametrize(
    "drawn",
    [
        networkx.random_regular_graph(3, 120, seed=0),  # Lanczos finds it
        networkx.cycle_graph(400),  # eigenvalues close to each other: shift and invert
        networkx.complete_bipartite_graph(60, 60),
    ],
)
def test_gaps_of_large_graphs_are_those_of_the_dense_solver(drawn, monkeypatch):
    pairs, number = np.array(drawn.edges), drawn.number_of_nodes()
    dense = Graph.of(number, pairs).gap
    monkeypatch.setattr("fl.topology.graph.DENSE", 10)
    assert Graph.of(number, pairs).gap == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize("drawn", [networkx.cycle_graph(40), networkx.complete_bipartite_graph(9, 9)])
def test_gaps_where_lanczos_fails_see_both_ends(drawn, monkeypatch):
    pairs, number = np.array(drawn.edges), drawn.number_of_nodes()
    dense, solve = Graph.of(number, pairs).gap, sparse_linalg.eigsh

    def fails(*args, **kwargs):
        if "sigma" not in kwargs:
            raise sparse_linalg.ArpackNoConvergence("no", np.zeros(0), np.zeros((0, 0)))
        return solve(*args, **kwargs)

    monkeypatch.setattr("fl.topology.graph.DENSE", 10)
    monkeypatch.setattr("scipy.sparse.linalg.eigsh", fails)
    assert Graph.of(number, pairs).gap == pytest.approx(dense, rel=1e-6)


def test_gaps_of_large_directed_graphs(monkeypatch):
    pairs = np.array(random_pairs(3, 80, 0.1))
    dense = Graph.of(80, pairs, directed=True).gap
    monkeypatch.setattr("fl.topology.graph.DENSE_DIRECTED", 10)
    assert Graph.of(80, pairs, directed=True).gap == pytest.approx(dense, rel=1e-6)


def test_a_directed_ring_s_gap():
    peers = np.arange(12)
    ring = Graph.of(12, np.stack([peers, (peers + 1) % 12], axis=1), directed=True)
    assert ring.gap == pytest.approx(1 - np.cos(np.pi / 12))
