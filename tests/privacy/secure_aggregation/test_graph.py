import itertools
import math

import numpy as np
import pytest

from fl.errors import ConfigError
from fl.keys import generator
from privacy.secure_aggregation.graph import Plan, Topology, log2_disconnected, log2_tails, neighbours


def connected(graph, removed):
    left = set(graph) - set(removed)
    seen, todo = set(), [next(iter(left))]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [j for j in graph[node] if j in left]
    return seen == left


@pytest.mark.parametrize(("clients", "degree"), [(7, 4), (10, 2), (40, 12), (5, 4), (6, 5)])
def test_the_graph_is_regular_and_symmetric(clients, degree):
    ids = [3 * i + 1 for i in range(clients)]
    graph = neighbours(Plan(clients, degree, 2, -40, -20), ids, generator(1))
    assert sorted(graph) == ids
    for i, around in graph.items():
        assert len(around) == degree and i not in around and list(around) == sorted(set(around))
        assert all(i in graph[j] for j in around)


def test_the_order_is_random_and_replays():
    plan = Plan(50, 8, 3, -40, -20)
    same, other = (neighbours(plan, range(50), generator(seed)) for seed in (1, 2))
    assert neighbours(plan, range(50), generator(1)) == same != other


def test_tails_against_counting():
    n, marked, degree = 9, 3, 4  # the others are 0..7, the marked ones 0..2
    tails = log2_tails(n, marked, degree)
    subsets = list(itertools.combinations(range(n - 1), degree))
    for least in range(degree + 2):
        share = sum(1 for s in subsets if sum(j < marked for j in s) >= least) / len(subsets)
        expected = math.log2(n * share) if share else -math.inf
        assert tails[least] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("missing", [2, 4, 5, 6])
def test_the_bound_on_falling_apart_holds_for_every_set_of_missing_clients(missing):
    n, degree = 12, 4
    graph = neighbours(Plan(n, degree, 2, -1, -1), range(n), generator(0))
    sets = list(itertools.combinations(range(n), missing))
    share = sum(not connected(graph, removed) for removed in sets) / len(sets)
    bound = 2.0 ** log2_disconnected(n, missing, degree)
    assert share <= bound
    assert (share > 0) == (missing >= degree)  # and it says no only where it is so
    if share:
        assert bound < 4 * share


@pytest.mark.parametrize("clients", [33, 100, 1000, 5000])
@pytest.mark.parametrize(("colluding", "dropout"), [(0.1, 0.1), (0.0, 0.3), (1 / 3, 0.2)])
def test_a_plan_keeps_its_bounds_and_is_the_smallest(clients, colluding, dropout):
    topology = Topology(colluding, dropout)
    plan = topology.plan(clients)
    corrupt, dropped = topology.missing(clients)

    def failures(degree, threshold):
        exposed = 2.0 ** log2_tails(clients, corrupt, degree)[threshold]
        apart = 2.0 ** log2_disconnected(clients, corrupt + dropped, degree)
        return exposed + apart, 2.0 ** log2_tails(clients, dropped, degree)[degree - threshold + 1]

    assert not plan.complete and plan.degree % 2 == 0
    exposed, lost = failures(plan.degree, plan.threshold)
    assert exposed <= 2.0**-40 and lost <= 2.0**-20
    assert 2.0**plan.security_log2 == pytest.approx(exposed, rel=1e-6)
    assert 2.0**plan.correctness_log2 == pytest.approx(lost, rel=1e-6)
    for threshold in range(2, plan.degree - 1):
        exposed, lost = failures(plan.degree - 2, threshold)
        assert exposed > 2.0**-40 or lost > 2.0**-20


def test_one_share_is_never_enough():
    assert Topology(0.0, 0.1, complete_up_to=0).plan(10).threshold >= 2
    ring = Topology(0.0, 0.0, complete_up_to=0).plan(50)
    assert (ring.degree, ring.threshold) == (2, 2)


def test_the_degree_grows_like_a_logarithm():
    degrees = [Topology().plan(n).degree for n in (1000, 10_000, 100_000, 1_000_000)]
    assert all(0 < b - a < 12 for a, b in itertools.pairwise(degrees))
    assert degrees[0] < 60


def test_simulated_failures_are_below_the_bound():
    """At bounds large enough to be seen: 20 clients, half of them marked."""
    n, degree, marked, threshold = 20, 6, 8, 5
    bound = 2.0 ** log2_tails(n, marked, degree)[threshold]
    trials, hits = 4000, 0
    for trial in range(trials):
        graph = neighbours(Plan(n, degree, threshold, -1, -1), range(n), generator("simulated", trial))
        hits += any(sum(j < marked for j in graph[i]) >= threshold for i in range(marked, n))
    # the bound is 0.83 and hits are counted in [0, trials]: Hoeffding's 0.05 has probability 2e-9
    assert 0.05 < hits / trials <= bound + 0.05


@pytest.mark.parametrize("clients", [4, 10, 32])
def test_few_clients_get_the_complete_graph(clients):
    topology = Topology()
    plan = topology.plan(clients)
    corrupt, dropped = topology.missing(clients)
    assert plan.complete and corrupt < plan.threshold <= plan.degree - dropped
    assert plan.threshold >= 2
    assert not Topology(complete_up_to=0).plan(32).complete
    assert Topology(complete_up_to=100).plan(100).complete


@pytest.mark.parametrize(("topology", "clients"), [
    (Topology(), 1), (Topology(), 2), (Topology(), 3), (Topology(0.0, 0.1), 3),
    (Topology(0.5, 0.4), 10), (Topology(0.0, 0.9), 12),
])  # fmt: skip
def test_too_few_clients_for_the_fractions_are_refused(topology, clients):
    with pytest.raises(ConfigError, match=f"clients={clients} .*neighbours that stay"):
        topology.plan(clients)


def test_a_plan_is_for_its_number_of_clients():
    with pytest.raises(ValueError, match="3 ids for a plan of 4"):
        neighbours(Topology().plan(4), np.arange(3).tolist(), generator(0))
