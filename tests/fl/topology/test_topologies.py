"""Every topology: its graph against networkx's, its gap, what it refuses, and how it changes with rounds and seeds."""

import json
import math
import re
from pathlib import Path as FilePath

import networkx
import numpy as np
import pytest

from fl.errors import ConfigError
from fl.topology.auto import Auto, resolve
from fl.topology.drawn import ErdosRenyi, RandomRegular, WattsStrogatz
from fl.topology.fixed import Complete, Exponential, Hypercube, Path, Ring, Star, Torus
from fl.topology.one_peer import OnePeerExponential

DOCUMENT = FilePath(__file__).parents[3] / "docs" / "topologies.md"
FIXED = [Ring(), Path(), Star(), Torus(), Hypercube(), Exponential(), Complete()]
RANDOM = [RandomRegular(), WattsStrogatz(), ErdosRenyi(), ErdosRenyi(directed=True)]
EVERY = [*FIXED, Ring(directed=True), Exponential(directed=True), OnePeerExponential(), *RANDOM]


def edges_of(graph) -> set[tuple[int, int]]:
    return {tuple(edge) for edge in graph.edges.tolist()}


def known(name: str, n: int) -> networkx.Graph:
    side = math.isqrt(n)
    return {
        "ring": lambda: networkx.cycle_graph(n),
        "path": lambda: networkx.path_graph(n),
        "star": lambda: networkx.star_graph(n - 1),
        "torus": lambda: networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(side, side, periodic=True)),
        "hypercube": lambda: networkx.relabel_nodes(
            networkx.hypercube_graph(n.bit_length() - 1), lambda digits: int("".join(map(str, digits)), 2)
        ),
        "exponential": lambda: networkx.circulant_graph(n, [1 << k for k in range((n - 1).bit_length())]),
        "complete": lambda: networkx.complete_graph(n),
    }[name]()


@pytest.mark.parametrize("topology", FIXED, ids=lambda t: t.name)
@pytest.mark.parametrize("number", [4, 16, 64])
def test_fixed_graphs_are_networkx_s(topology, number):
    expected = {(min(edge), max(edge)) for edge in known(topology.name, number).edges}
    assert edges_of(topology.graph(number, 0, 1)) == expected


@pytest.mark.parametrize(
    ("topology", "gap"),
    zip(FIXED, [0.051, 0.013, 0.0625, 0.4, 0.4, 0.5, 1.0]),
    ids=lambda x: getattr(x, "name", ""),
)
def test_gaps_of_sixteen_peers(topology, gap):
    about = topology.about(16, seed=3)
    assert about["gap"] == pytest.approx(gap, abs=5.1e-4)
    assert about["edges"] == {"ring": 16, "path": 15, "star": 15, "complete": 120, "exponential": 56}.get(
        topology.name, 32
    )


def possible(topology, number: int) -> bool:
    return {
        "hypercube": number in (2, 4, 8),
        "torus": number not in (2, 3, 5),
        "random_regular": number > 3 and number % 2 == 0,
        "watts_strogatz": number > 4,
    }.get(topology.name, True)


@pytest.mark.parametrize("topology", EVERY, ids=lambda t: f"{t.name}{'_directed' * t.directed}")
@pytest.mark.parametrize("number", [2, 3, 4, 5, 8, 10, 12])
def test_every_graph_is_connected_or_refused(topology, number):
    if not possible(topology, number):
        with pytest.raises(ConfigError, match=r"clients\.number|topology\.degree"):
            topology.check(number)
        return
    topology.check(number)
    graph = topology.drawn(number, 5)
    assert graph.connected
    assert graph.number == number
    assert graph.directed == topology.directed
    assert not (graph.edges[:, 0] == graph.edges[:, 1]).any()
    json.dumps(topology.about(number, 5), allow_nan=False)


@pytest.mark.parametrize("topology", EVERY, ids=lambda t: t.name)
def test_one_peer_has_nobody_to_talk_to(topology):
    with pytest.raises(ConfigError, match=r"clients\.number=1"):
        topology.check(1)


def test_the_documentation_s_table_is_true():
    rows = re.findall(r"^\| `(\w+)`(, `directed`)? \|[^|]*\|[^|]*\| (\d+) \| ([\d.]+) \|", DOCUMENT.read_text(), re.M)
    named = {(t.name, t.directed and t.name != "one_peer_exponential"): t for t in EVERY}
    assert {(name, bool(directed)) for name, directed, _, _ in rows} == set(named)
    for name, directed, edges, gap in rows:
        about = named[name, bool(directed)].about(16, 0)
        assert about["edges"] == int(edges), name
        assert about["gap"] == pytest.approx(float(gap), abs=5.1e-4), name


@pytest.mark.parametrize("k", [3, 5, 6])
def test_gaps_are_those_of_their_formulas(k):
    n, side = 1 << k, 1 << (k + 1) // 2
    cosine = lambda x: 1 - math.cos(math.pi * x)  # noqa: E731
    for topology, gap in (
        (Ring(), 2 / 3 * cosine(2 / n)),
        (Ring(directed=True), cosine(1 / n)),
        (Path(), 2 / 3 * cosine(1 / n)),
        (Star(), 1 / n),
        (Hypercube(), 2 / (k + 1)),
        (Exponential(), 2 / k),
        (Exponential(directed=True), 2 / (k + 1)),
        (OnePeerExponential(), 1.0),
        (Complete(), 1.0),
    ):
        assert topology.gap(n, 0) == pytest.approx(gap, abs=1e-9), topology
    if k > 3:
        assert Torus().gap(n, 0) == pytest.approx(2 / 5 * cosine(2 / side), abs=1e-9)


def test_a_torus_is_as_square_as_can_be():
    assert Torus().graph(12, 0, 1).neighbours(0).tolist() == [1, 3, 4, 8]  # 3 x 4
    assert Torus(rows=2).graph(12, 0, 1).neighbours(0).tolist() == [1, 5, 6]  # two rows: one of the four is twice
    with pytest.raises(ConfigError, match="rows x columns"):
        Torus().check(7)
    for rows in (5, 12):
        with pytest.raises(ConfigError, match=r"topology\.rows"):
            Torus(rows=rows).check(12)


def test_a_hypercube_needs_a_power_of_two():
    with pytest.raises(ConfigError, match="Choose 8 or 16"):
        Hypercube().check(10)


def test_directed_rings_and_exponentials_send_forward():
    assert Ring(directed=True).graph(4, 0, 1).edges.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    graph = Exponential(directed=True).graph(8, 0, 1)
    assert [j for i, j in graph.edges.tolist() if i == 5] == [1, 6, 7]
    assert graph.doubly_stochastic


@pytest.mark.parametrize("number", [2, 4, 8, 16, 32])
def test_one_peer_exponential_is_exact_after_log2_n_rounds(number):
    values = np.random.default_rng(0).standard_normal((number, 3))
    mixed, rounds = values, number.bit_length() - 1
    for round in range(1, rounds + 1):
        assert np.abs(mixed - values.mean(axis=0)).max() > 1e-3
        graph = OnePeerExponential().graph(number, 0, round)
        assert graph.degrees.tolist() == [1] * number
        assert graph.doubly_stochastic
        assert set(graph.weights.data.tolist()) == {0.5}
        mixed = graph.weights @ mixed
    np.testing.assert_allclose(mixed, np.broadcast_to(values.mean(axis=0), mixed.shape), atol=1e-15)


@pytest.mark.parametrize("number", [3, 5, 6, 12, 16])
def test_one_peer_exponential_s_gap_is_that_of_a_period(number):
    topology, product = OnePeerExponential(), np.eye(number)
    for round in range(1, (number - 1).bit_length() + 1):
        product = topology.graph(number, 0, round).weights.toarray() @ product
    second = np.sort(np.abs(np.linalg.eigvals(product)))[-2]
    assert topology.gap(number, 0) == pytest.approx(1 - second, abs=1e-9)


def test_one_peer_exponential_repeats():
    topology = OnePeerExponential()
    graphs = [topology.graph(10, 0, round) for round in range(1, 9)]
    assert all(graphs[i] is graphs[i + 4] for i in range(4))
    assert [g.neighbours(0).tolist() for g in graphs[:4]] == [[9], [8], [6], [2]]
    assert len({tuple(map(tuple, g.edges.tolist())) for g in graphs}) == 4


@pytest.mark.parametrize("topology", RANDOM, ids=lambda t: f"{t.name}{'_directed' * t.directed}")
def test_random_graphs_follow_the_seed(topology):
    first = topology.graph(12, 0, 1)
    assert topology.graph(12, 0, 40) is first
    assert edges_of(type(topology)(**vars(topology)).graph(12, 0, 1)) == edges_of(first)
    assert any(edges_of(topology.graph(12, seed, 1)) != edges_of(first) for seed in range(1, 4))
    assert not topology.varies


def test_random_graphs_are_drawn_anew():
    topology = ErdosRenyi(redraw_every=3)
    graphs = [topology.graph(12, 0, round) for round in range(1, 10)]
    assert topology.varies
    assert [g is graphs[3 * (i // 3)] for i, g in enumerate(graphs)] == [True] * 9
    assert len({frozenset(edges_of(g)) for g in graphs}) == 3
    assert edges_of(graphs[0]) == edges_of(ErdosRenyi().graph(12, 0, 1))


def test_random_graphs_are_what_they_are_called():
    assert RandomRegular(degree=5).graph(12, 0, 1).degrees.tolist() == [5] * 12
    unwired = WattsStrogatz(degree=4, p=0.0).graph(10, 0, 1)
    assert unwired.neighbours(0).tolist() == [1, 2, 8, 9]
    assert len(WattsStrogatz(degree=4, p=0.5).graph(10, 0, 1).edges) == 20
    counts = [len(ErdosRenyi(p=0.3).graph(40, seed, 1).edges) for seed in range(20)]
    assert np.mean(counts) == pytest.approx(0.3 * 780, abs=3 * math.sqrt(780 * 0.21 / 20))


def test_random_graphs_that_can_t_be_are_refused():
    for topology, number, setting in (
        (RandomRegular(degree=3), 7, "topology.degree"),
        (RandomRegular(degree=8), 8, "topology.degree"),
        (WattsStrogatz(degree=3), 9, "topology.degree"),
        (WattsStrogatz(degree=10), 10, "topology.degree"),
    ):
        with pytest.raises(ConfigError, match=setting):
            topology.check(number)
    for topology, setting in ((ErdosRenyi(p=0.001), "topology.p"), (RandomRegular(degree=1), "topology.degree")):
        with pytest.raises(ConfigError, match="none of 100 draws") as caught:
            topology.graph(20, 0, 1)
        assert caught.value.key == setting


def test_auto_is_what_the_schedule_names():
    assert resolve(Auto(latency_s=0.5, mbps=3.0), "ring") == Ring(latency_s=0.5, mbps=3.0)
    assert resolve(Auto(), "complete") == Complete()
    chosen = Star()
    assert resolve(chosen, "ring") is chosen
    with pytest.raises(ConfigError, match="topology=NAME"):
        Auto().graph(4, 0, 1)


def test_a_picture_has_a_place_for_each_peer():
    for topology in EVERY:
        about = topology.about(16, 0)
        places = np.array(about["positions"])
        assert places.shape == (16, 2)
        assert np.abs(places).max() <= 1.0001
        apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(16)
        assert apart.min() > 0.02
        assert {tuple(edge) for edge in about["edge_list"]} >= edges_of(topology.graph(16, 0, 1))
    large = Ring().about(201, 0)
    assert large["positions"] is large["edge_list"] is None
    assert large["edges"] == 201
