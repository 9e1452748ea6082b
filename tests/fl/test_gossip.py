"""Schedules of peers that go in rounds: their invariants in float64, on functions in place of clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from clients.adapters.space import Space
from clients.layout import Layout
from clients.local.training import LocalTraining
from fl.compression import QSGD, RandomK, TopK, Whole
from fl.errors import ConfigError
from fl.mixing import Mixing
from fl.network import Uniform
from fl.peers import Peers, mean_and_consensus
from fl.schedules.choco import CHOCO
from fl.schedules.dpsgd import DPSGD
from fl.schedules.gradient_tracking import GradientTracking
from fl.schedules.monna import MoNNA
from fl.schedules.push_sum import PushSum
from fl.topology.drawn import ErdosRenyi
from fl.topology.fixed import Complete, Ring, Torus
from fl.topology.one_peer import OnePeerExponential
from fl.validation import Validator
from tests.fl.asynchronous_worlds import world

N, D, LR = 16, 6, 0.1
RNG = np.random.default_rng(0)
SCALES = RNG.uniform(0.5, 2.0, (N, D))  # f_i(x) = 1/2 sum_k s_ik (x_k - c_ik)^2
CENTRES = RNG.standard_normal((N, D))
BEST = (SCALES * CENTRES).sum(0) / SCALES.sum(0)
LOCAL = LocalTraining(steps=1, lr=LR)
EQUAL = FedAvg(weights="uniform")


def gradient_step(client, x):
    return -LR * SCALES[client] * (x - CENTRES[client])


def nothing(client, x):
    return np.zeros_like(x)


def peers_world(update=gradient_step, topology=None, number=N, start=None, **more):
    more = {"local": LOCAL, "aggregator": EQUAL, "exact": True, "size": D} | more
    w = world(update, number, **more)
    w.peers = Peers.of(w.server, topology or Ring(), 3, number, more.pop("hostile", frozenset()))
    if start is not None:
        w.peers.states = start.copy()
    return w


def play(schedule, w):
    return [e for e in schedule.run(w) if e["event"] == "round"], w.peers.states


def spread_out(number=N):
    return np.random.default_rng(1).standard_normal((number, D))


@pytest.mark.parametrize("schedule", [DPSGD, PushSum, lambda **k: CHOCO(compressor=Whole(), gamma=1, **k)])
def test_on_the_complete_graph_a_round_is_fedavg_with_equal_weights(schedule):
    _, states = play(schedule(rounds=1), peers_world(topology=Complete()))
    mean = np.mean([gradient_step(i, np.zeros(D)) for i in range(N)], axis=0)
    assert np.allclose(states, mean, atol=1e-14)


@pytest.mark.parametrize("order", ["adapt_then_combine", "parallel"])
def test_dpsgd_is_its_formula(order):
    start = spread_out()
    w = peers_world(start=start)
    _, states = play(DPSGD(rounds=1, order=order), w)
    matrix = w.peers.graph(1).weights.toarray()
    update = np.stack([gradient_step(i, start[i]) for i in range(N)])
    assert np.allclose(
        states, matrix @ start + update if order == "parallel" else matrix @ (start + update), atol=1e-14
    )


@pytest.mark.parametrize("compressor", [TopK(0.2), RandomK(0.4), QSGD(3), Whole()])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0])
def test_choco_keeps_the_mean_whatever_is_compressed_and_however_far_it_goes(compressor, gamma):
    start = spread_out()
    _, states = play(CHOCO(rounds=5, gamma=gamma, compressor=compressor), peers_world(nothing, start=start))
    assert np.allclose(states.mean(0), start.mean(0), atol=1e-13)
    assert not np.allclose(states, start)


def test_choco_reaches_the_exact_mean_where_naive_compression_stalls():
    size = 40
    start = np.random.default_rng(2).standard_normal((N, size))
    w = world(nothing, N, size=size, exact=True, local=LOCAL, aggregator=EQUAL)
    w.peers = Peers.of(w.server, Ring(), 3, N, frozenset())
    w.peers.states = start.copy()
    rounds = list(CHOCO(rounds=1500, gamma=0.2, compressor=TopK(0.1)).run(w))
    first, last = rounds[N]["consensus"], [e for e in rounds if e["event"] == "round"][-1]["consensus"]
    naive = start.copy()
    weights = w.peers.graph(1).weights.toarray()
    draw = np.random.default_rng(0)
    for _ in range(1500):
        sent = np.stack([TopK(0.1).compress(row, draw) for row in naive])
        naive = naive + 0.2 * (weights @ sent - sent)
    assert last < 1e-6 * first
    assert mean_and_consensus(naive)[1] > 0.05 * first


def test_gradient_tracking_follows_the_mean_gradient_and_has_no_bias():
    w = peers_world()
    tracked = GradientTracking(rounds=1)
    # mean_i y_i = mean_i g_i after every round
    for rounds in range(1, 12):
        w = peers_world()
        play(replace(tracked, rounds=rounds), w)
        arrays, _ = w.keep()
        assert np.allclose(arrays["gossip/tracker"].mean(0), arrays["gossip/gradient"].mean(0), atol=1e-13)
    _, exact = play(GradientTracking(rounds=1500), peers_world())
    _, biased = play(DPSGD(rounds=1500), peers_world())
    assert np.abs(exact - BEST).max() < 1e-8
    assert np.abs(biased - BEST).max() > 1e-2


def test_push_sum_averages_over_a_directed_graph_where_plain_column_weights_do_not():
    topology = ErdosRenyi(p=0.3, directed=True)
    start = spread_out()
    w = peers_world(nothing, topology, start=start)
    matrix = w.peers.graph(1).weights.toarray()
    assert np.allclose(matrix.sum(0), 1) and not np.allclose(matrix.sum(1), 1)
    _, states = play(PushSum(rounds=300), w)
    assert np.allclose(states, start.mean(0), atol=1e-12)
    arrays, _ = w.keep()
    assert arrays["gossip/weights"].sum() == pytest.approx(N, abs=1e-12)
    assert np.allclose(arrays["gossip/sums"].sum(0), start.sum(0), atol=1e-12)
    plain = np.linalg.matrix_power(matrix, 300) @ start
    assert np.abs(plain - start.mean(0)).max() > 0.05


def test_one_peer_exponential_is_exact_after_log2_n_rounds():
    start = spread_out()
    _, states = play(PushSum(rounds=4), peers_world(nothing, OnePeerExponential(), start=start))
    assert np.allclose(states, start.mean(0), atol=1e-14)
    _, before = play(PushSum(rounds=3), peers_world(nothing, OnePeerExponential(), start=start))
    assert np.abs(before - start.mean(0)).max() > 0.1


def test_monna_without_hostile_peers_is_the_mean_of_momentum_steps():
    start = spread_out()
    w = peers_world(topology=Complete(), start=start)
    rounds, states = play(MoNNA(rounds=1, beta=0.75), w)
    half = start - LR * 0.25 * SCALES * (start - CENTRES)
    assert np.allclose(states, half.mean(0), atol=1e-13)
    assert rounds[-1]["consensus"] < 1e-12


@pytest.mark.parametrize("reach", ["worst", "sampled", "network"])
def test_monna_waits_for_n_minus_f_and_keeps_the_n_minus_2f_nearest_with_its_own(reach):
    f, start = 3, spread_out()
    w = peers_world(nothing, Complete(), start=start, aggregator=FedAvg(weights="uniform", f=f))
    _, states = play(MoNNA(rounds=1, reach=reach), w)
    for i in range(N):
        gaps = np.linalg.norm(start - start[i], axis=1)
        if reach == "network":  # all arrive at once: the lowest numbers first
            first = [j for j in range(N) if j != i][: N - f - 1]
            near = sorted([i, *first], key=lambda j: gaps[j])[: N - 2 * f]
            assert np.allclose(states[i], start[near].mean(0), atol=1e-13)
        # whoever was heard, the result lies among the models
        assert (states[i] <= start.max(0) + 1e-12).all() and (states[i] >= start.min(0) - 1e-12).all()


def test_what_a_round_costs_and_how_long_it_takes():
    network = Uniform(seconds_per_step=1.0, latency_s=0.5, down_mbps=None, up_mbps=None)
    w = peers_world(topology=Torus(), network=network)
    rounds, _ = play(DPSGD(rounds=2), w)
    size = w.peers.size(w.server.layout.hash, {"model": ("float32", D)})
    assert 4 * D < size < 4 * D + 400
    assert rounds[0]["bytes_up"] == rounds[0]["bytes_down"] == N * 4 * size  # four neighbours each
    assert w.peers.traffic.sum() == 2 * N * 4 * size
    # LOCAL claims 5 steps in these worlds: 5 s of work, then two latencies
    assert [e["virtual_s"] for e in rounds] == [6.0, 12.0]


def test_a_lost_peer_keeps_its_state_and_the_mean_of_all_stays():
    graph = Ring().graph(8, 0, 1)
    weights = Mixing(graph, frozenset({2, 5})).weights.toarray()
    assert np.allclose(weights, weights.T) and np.allclose(weights.sum(0), 1)
    assert np.allclose(weights[2], np.eye(8)[2]) and (weights >= 0).all()
    start = spread_out(8)
    mixed = Mixing(graph, frozenset({2, 5})).mean(start)
    assert np.array_equal(mixed[2], start[2]) and np.allclose(mixed.mean(0), start.mean(0), atol=1e-15)
    graph = ErdosRenyi(p=0.4, directed=True).graph(8, 0, 1)
    assert np.allclose(Mixing(graph, frozenset({1}), pushes=True).weights.sum(0), 1)
    one_peer = Mixing(OnePeerExponential().graph(8, 0, 1), frozenset({1}))
    assert np.allclose(one_peer.weights.sum(1), 1)  # it is an average of what is heard, whoever is missing


@pytest.mark.parametrize("schedule", [DPSGD(rounds=1), GradientTracking(rounds=1), CHOCO(rounds=1)])
def test_directed_graphs_are_for_push_sum(schedule):
    with pytest.raises(ConfigError, match="push_sum"):
        play(schedule, peers_world(topology=ErdosRenyi(p=0.3, directed=True)))


def test_what_never_trains_stays_bit_for_bit():
    layout = Layout(("a", "b"), ((4,), (2,)))
    space = Space(layout, ("still", "moving"), (("moving",),))
    w = world(lambda c, x: gradient_step(c, x)[4:], N, size=6, space=space, aggregator=EQUAL, local=LOCAL)
    w.validator = Validator(layout.hash, 2)
    frozen = np.array([0.1, 1 / 3, 1e-7, 5], np.float32)
    w.server = replace(w.server, vector=np.concatenate([frozen, np.zeros(2, np.float32)]))
    w.peers = Peers.of(w.server, Torus(), 3, N, frozenset())
    rounds, states = play(DPSGD(rounds=5), w)
    assert (states[:, :4] == frozen).all() and np.abs(states[:, 4:]).max() > 0.01
    assert w.peers.size(layout.hash, {"model": ("float32", 2)}) * N * 4 == rounds[-1]["bytes_up"]


def test_the_column_blocks_of_a_mean_are_the_whole_product():
    rows = np.random.default_rng(0).standard_normal((9, 10_001))
    mixing = Mixing(Ring().graph(9, 0, 1))
    assert np.allclose(mixing.mean(rows), mixing.weights @ rows, atol=1e-15)
    mean, consensus = mean_and_consensus(rows)
    assert np.allclose(mean, rows.mean(0)) and consensus == pytest.approx(
        np.sqrt(np.mean(np.sum((rows - rows.mean(0)) ** 2, axis=1)))
    )


@pytest.mark.parametrize("compressor", [TopK(0.25), RandomK(0.25), QSGD(2), QSGD(7), Whole()])
def test_compressors_contract_and_their_messages_hold_them(compressor):
    size, delta = 64, {TopK: 0.25, RandomK: 0.25, QSGD: None, Whole: 1.0}[type(compressor)]
    if isinstance(compressor, QSGD):
        delta = 1 / (1 + min(size / compressor.levels**2, np.sqrt(size) / compressor.levels))
    vector = np.random.default_rng(1).standard_normal(size)
    errors = [
        np.sum((vector - compressor.compress(vector, np.random.default_rng(s))) ** 2) / np.sum(vector**2)
        for s in range(400)
    ]
    assert np.mean(errors) <= (1 - delta) + 0.02
    values = {"float32": 4, "uint32": 4, "uint8": 1}
    bits = 8 * sum(values[kind] * count for kind, count in compressor.payload(size).values())
    kept = 16
    if isinstance(compressor, QSGD):
        wanted = 32 + {2: 3, 7: 4}[compressor.levels] * size
    else:
        wanted = {TopK: kept * 64, RandomK: kept * 32, Whole: size * 32}[type(compressor)]
    assert bits == wanted


def test_graphs_that_are_too_thin_for_a_rule_are_refused_before_training():
    from aggregators.robust.nearest import Krum

    w = peers_world(topology=Ring(), aggregator=FedAvg(weights="uniform", f=1, combine=Krum()))
    with pytest.raises(ConfigError, match="2 neighbours"):
        play(DPSGD(rounds=1), w)
    assert w.grid.pushes == []


def test_a_peer_that_is_away_comes_back_and_time_goes_on_meanwhile():
    network = Uniform(
        seconds_per_step=1.0, latency_s=0.0, down_mbps=None, up_mbps=None, availability=0.5, availability_period_s=60
    )
    w = peers_world(topology=Torus(), network=network, per_round=N)
    rounds, _ = play(DPSGD(rounds=60), w)
    assert len(rounds) == 60 and {e["sampled"] for e in rounds} != {N}
    began = [e for e in rounds if e["sampled"] < N]
    assert began and all(e["accepted"] == e["sampled"] for e in rounds)


@pytest.mark.parametrize("dropout", [0.2, 0.4])
def test_a_lost_peer_takes_no_step_along_its_tracker(dropout):
    errors = {}
    for lost in (0.0, dropout):
        network = Uniform(seconds_per_step=1.0, latency_s=0.0, down_mbps=None, up_mbps=None, dropout=lost)
        _, states = play(GradientTracking(rounds=1500), peers_world(network=network))
        errors[lost] = np.abs(states - BEST).max()
    assert errors[0.0] < 1e-8
    assert errors[dropout] < {0.2: 5e-5, 0.4: 1e-2}[dropout]


@pytest.mark.parametrize("schedule", [GradientTracking(rounds=1), CHOCO(rounds=1)])
@pytest.mark.parametrize("topology", [OnePeerExponential(), ErdosRenyi(p=0.6, redraw_every=2)])
def test_memory_of_links_asks_for_links_that_stay(schedule, topology):
    with pytest.raises(ConfigError, match="stays the same"):
        play(schedule, peers_world(topology=topology))
