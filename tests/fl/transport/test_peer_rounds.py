"""Peers that exchange by themselves are the peers of the stacked schedule; and what happens when some of them fail."""

from __future__ import annotations

import time

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.robust.coordinates import CoordinateMedian
from clients.adapters.space import Space
from clients.layout import Layout
from fl import checkpoint
from fl.compose import compose
from fl.errors import ConfigError, RunStopped
from fl.experiment import Experiment, Settings
from fl.messages import MalformedMessage, TrainReply
from fl.mixing import Mixing
from fl.peer_rounds import PeerRounds
from fl.schedules.dpsgd import DPSGD
from fl.topology.fixed import Complete, Exponential, Ring
from fl.topology.one_peer import OnePeerExponential
from fl.transport.base import Address
from fl.transport.mailbox import Mailbox
from fl.transport.sockets import Sockets
from fl.validation import Reason, Rejection
from tests.fl.transport.credentials import Authority
from tests.fl.transport.nodes import (
    D,
    direct_world,
    gradient_step,
    mailboxes,
    part,
    stacked_world,
    states,
)
from tests.helpers import ENCODER, SHARED, go

N = 8
GRAPHS = [Ring(), Complete(), Exponential(), OnePeerExponential()]


def play(schedule, w):
    return [e for e in schedule.run(w) if e["event"] == "round"]


def start(parts, w, seed=1):
    """Peers that begin apart, where the numbers of float32 are exact."""
    w.peers.states = np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32).astype(w.peers.states.dtype)
    return w


@pytest.mark.parametrize("order", ["adapt_then_combine", "parallel"])
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: type(g).__name__)
def test_peers_that_exchange_by_themselves_are_the_stacked_ones(graph, order):
    parts = [part(m) for m in mailboxes(3)]
    w, v = direct_world(parts, graph, N), stacked_world(graph, N)
    for world in (w, v):
        start(parts, world)
    events = play(DPSGD(rounds=5, order=order, deadline_s=30.0), w)
    stacked = play(DPSGD(rounds=5, order=order), v)
    assert np.allclose(states(parts, N), v.peers.states, rtol=0, atol=1e-14)
    assert np.allclose(w.server.vector, v.server.vector, atol=1e-6)
    for mine, theirs in zip(events, stacked, strict=True):
        assert mine["consensus"] == pytest.approx(theirs["consensus"], rel=1e-5)
        assert mine["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-5)
        assert mine["missed"] == mine["uneven"] == 0 and mine["accepted"] == N and mine["dropped"] == {}
    links = [[a, b] for a, b, _ in w.peers.links()]
    assert links == [[a, b] for a, b, _ in v.peers.links()]


@pytest.mark.parametrize("graph", GRAPHS[:3], ids=lambda g: type(g).__name__)
def test_over_tls_between_three_nodes_too(graph, tmp_path):
    authority = Authority(tmp_path)
    nodes = [Sockets("127.0.0.1", 0, authority.identity(f"node-{i}")) for i in range(3)]
    parts = [part(node, dtype="float32") for node in nodes]
    w, v = direct_world(parts, graph, N, {c: nodes[c % 3].address for c in range(N)}), stacked_world(graph, N)
    for world in (w, v):
        start(parts, world)
    events = play(DPSGD(rounds=4, deadline_s=30.0), w)
    play(DPSGD(rounds=4), v)
    for node in nodes:
        node.close()
    assert np.allclose(states(parts, N), v.peers.states, rtol=0, atol=1e-6)
    assert all(e["missed"] == 0 for e in events)
    assert events[-1]["bytes_links"] == len(w.peers.graph(1).links) * (48 + 4 * D)


def test_what_never_trains_neither_travels_nor_changes():
    layout = Layout(("a", "b"), ((4,), (D - 4,)))
    space = Space(layout, ("still", "moving"), (("moving",),))
    parts = [part(m, space=space) for m in mailboxes(2)]
    w = start(parts, direct_world(parts, Ring(), N))
    frozen = w.peers.states[:, :4].copy()
    events = play(DPSGD(rounds=2, deadline_s=30.0), w)
    assert np.array_equal(states(parts, N)[:, :4], frozen)
    assert events[0]["bytes_links"] == 2 * N * (48 + 4 * 2 * (D - 4))


@pytest.mark.parametrize("order", ["adapt_then_combine", "parallel"])
def test_a_robust_rule_among_them_is_the_stacked_one(order):
    rule = FedAvg(weights="uniform", f=1, combine=CoordinateMedian())
    parts = [part(m, rule=rule) for m in mailboxes(3)]
    w, v = direct_world(parts, Complete(), N), stacked_world(Complete(), N, aggregator=rule)
    for world in (w, v):
        start(parts, world)
    play(DPSGD(rounds=3, order=order, deadline_s=30.0), w)
    play(DPSGD(rounds=3, order=order), v)
    assert np.allclose(states(parts, N), v.peers.states, rtol=0, atol=1e-12)


def test_real_training_at_two_nodes_is_the_run_in_one_process(tmp_path):
    words = ("schedule=dpsgd", "topology=complete", "local=sgd", "local.lr=0.1")
    go(tmp_path, *words)
    loaded = checkpoint.load(tmp_path / "checkpoint")
    assert loaded is not None
    settings = Settings.of(compose([*ENCODER, *words])[0])
    experiments, mail = [Experiment(settings, SHARED) for _ in range(2)], Mailbox()
    parts = [PeerRounds.of(e, mail) for e in experiments]
    cohort = experiments[0].trainer.worker.cohort
    w = direct_world(parts, Complete(), 4, local=settings.local)
    w.server = w.server.replace(vector=cohort.initial.numpy().astype(np.float32))
    w.peers.states[:] = w.server.vector
    list(DPSGD(rounds=2, deadline_s=60.0).run(w))
    found = states(parts, 4)
    for experiment in experiments:
        experiment.close()
    assert not np.allclose(found, cohort.initial.numpy(), atol=1e-4)
    assert np.allclose(found, loaded[0]["peers/states"], rtol=0, atol=1e-6)


# What fails


def test_a_training_that_fails_keeps_its_peer_out_and_holds_nobody_up():
    def fails(client, x):
        return Rejection(Reason.NOT_FINITE, "loss nan") if client == 2 else gradient_step(client, x)

    parts = [part(m, fails) for m in mailboxes(3)]
    w = start(parts, direct_world(parts, Ring(), N))
    before = w.peers.states.astype(np.float64)
    began = time.monotonic()
    [event] = play(DPSGD(rounds=1, deadline_s=30.0), w)
    assert time.monotonic() - began < 30
    after = before + [gradient_step(c, before[c]) * (c != 2) for c in range(N)]
    assert np.allclose(states(parts, N), Mixing(Ring().graph(N, 3, 1), frozenset({2})).mean(after), atol=1e-14)
    assert event["rejected"] == {"error": 1} and event["missed"] == 2 and event["uneven"] == 0


def test_a_node_that_is_not_reached_costs_the_deadline_and_its_weight_is_the_receivers_own():
    parts = [part(m) for m in mailboxes(4)]
    w = direct_world(parts, Ring(), N)
    start(parts, w)
    before = w.peers.states.astype(np.float64)
    w.grid.lose = lambda node, request: node == 1  # clients 1 and 5
    began = time.monotonic()
    [event] = play(DPSGD(rounds=1, deadline_s=1.5), w)
    assert time.monotonic() - began >= 1.5
    after = before + np.stack([gradient_step(c, before[c]) for c in range(N)])
    alive = [c for c in range(N) if c not in (1, 5)]
    wanted = Mixing(Ring().graph(N, 3, 1), frozenset({1, 5})).mean(after)
    assert np.allclose([parts[c % 4].own[c].state for c in alive], wanted[alive], atol=1e-14)
    assert event["rejected"] == {"error": 2} and event["missed"] == 4


class OneWay(Mailbox):
    """A mailbox that loses what client 3 sends to client 4."""

    def send(self, round, src, dst, vector):
        return 0 if (src, dst) == (3, 4) else super().send(round, src, dst, vector)


def test_a_link_that_fails_one_way_costs_the_exact_mean_and_is_counted():
    mail = OneWay()
    parts = [part(mail, lambda c, x: np.zeros(D)) for _ in range(N)]
    w = start(parts, direct_world(parts, Ring(), N))
    before = w.peers.states.astype(np.float64)
    [event] = play(DPSGD(rounds=1, deadline_s=1.5), w)
    weights = Ring().graph(N, 3, 1).weights.toarray()
    weights[4, 4], weights[4, 3] = weights[4, 4] + weights[4, 3], 0
    assert np.allclose(states(parts, N), weights @ before, atol=1e-14)
    assert event["missed"] == 1 and event["uneven"] == 1
    assert not np.allclose(states(parts, N).mean(0), before.mean(0), atol=1e-3)


def test_what_is_not_finite_or_too_far_is_not_heard():
    parts = [part(m, lambda c, x: np.full(D, np.inf) if c == 3 else np.zeros(D), bound=1e3) for m in mailboxes(1)]
    w = start(parts, direct_world(parts, Ring(), N))
    before = w.peers.states.astype(np.float64)
    [event] = play(DPSGD(rounds=1, deadline_s=30.0), w)
    weights = Ring().graph(N, 3, 1).weights.toarray()
    for c in (2, 4):
        weights[c, c], weights[c, 3] = weights[c, c] + weights[c, 3], 0
    others = [c for c in range(N) if c != 3]
    assert np.allclose(states(parts, N)[others], (weights @ before)[others], atol=1e-14)
    # A training whose update is not finite never gets here (`trained`); peer 3 is refused its own neighbours' models.
    assert event["rejected"]["not_finite"] >= 2


def test_a_node_dies_in_the_middle_of_a_round_and_comes_back_without_its_state(tmp_path):
    authority = Authority(tmp_path)
    identities = [authority.identity(f"node-{i}") for i in range(3)]
    nodes = [Sockets("127.0.0.1", 0, identity) for identity in identities]
    book = {c: nodes[c % 3].address for c in range(N)}
    port = nodes[1].port

    def dies(client, x):
        if client == 1 and len(w.grid.requests) > 2 * N:  # N rounds' and N states' requests: in its second round
            nodes[1].close()
            raise KeyboardInterrupt
        return gradient_step(client, x)

    class Mortal(PeerRounds):
        def answer(self, requests):
            try:
                return super().answer(requests)
            except KeyboardInterrupt:
                return [MalformedMessage("schema", "dead")] * len(requests)

    parts = [part(node, dies if i == 1 else gradient_step) for i, node in enumerate(nodes)]
    parts[1].__class__ = Mortal
    w = start(parts, direct_world(parts, Complete(), N, book))
    rounds = (e for e in DPSGD(rounds=4, deadline_s=3.0).run(w) if e["event"] == "round")
    assert next(rounds)["missed"] == 0
    known = w.peers.states[[1, 4, 7]].copy()
    began = time.monotonic()
    second = next(rounds)
    assert time.monotonic() - began >= 3  # its neighbours wait to the deadline, once
    assert second["rejected"] == {"error": 3} and second["missed"] == 5 * 3
    nodes[1] = Sockets("127.0.0.1", port, identities[1])
    parts[1] = w.grid.parts[1] = part(nodes[1])
    third = next(rounds)
    assert third["missed"] == 0 and third["accepted"] == N
    [sent] = [r.state for r in w.grid.requests if r.client == 4 and r.round == 3 and r.extra["stage"] == "round"]
    assert np.array_equal(sent, known[1].astype(np.float32))  # the newest that the server knows of it
    assert next(rounds)["missed"] == 0
    for node in nodes:
        node.close()


def test_the_same_request_twice_is_one_round_and_an_older_one_is_refused():
    parts = [part(m) for m in mailboxes(1)]
    w = start(parts, direct_world(parts, Ring(), N))
    play(DPSGD(rounds=2, deadline_s=30.0), w)
    after = states(parts, N)
    second = [r for r in w.grid.requests if r.round == 2 and r.extra["stage"] == "round"]
    again = parts[0].answer(second)
    assert again == [parts[0].own[c].reply for c in range(N)] and all(isinstance(r, TrainReply) for r in again)
    first = parts[0].answer([r for r in w.grid.requests if r.round == 1 and r.extra["stage"] == "round"])
    assert all(isinstance(r, MalformedMessage) and "has done round 2" in str(r) for r in first)
    assert np.array_equal(states(parts, N), after)


def test_a_node_that_kept_its_state_goes_on_from_it_whatever_the_server_believes():
    parts = [part(m) for m in mailboxes(1)]
    w, v = direct_world(parts, Ring(), N), stacked_world(Ring(), N)
    for world in (w, v):
        start(parts, world)
    rounds = (e for e in DPSGD(rounds=4, deadline_s=30.0).run(w) if e["event"] == "round")
    next(rounds), next(rounds)
    fresh = part(Mailbox())
    for c in range(N):
        fresh.restore(parts[0].arrays(c), c)
    assert fresh.arrays().keys() == parts[0].arrays().keys()
    parts[0] = w.grid.parts[0] = fresh
    assert [e["missed"] for e in rounds] == [0, 0]
    play(DPSGD(rounds=4), v)
    assert np.allclose(states(parts, N), v.peers.states, rtol=0, atol=1e-14)


def test_a_run_that_is_resumed_goes_on_from_the_checkpoint_not_from_what_nodes_still_hold():
    parts = [part(m) for m in mailboxes(2)]
    w, v = direct_world(parts, Ring(), N), stacked_world(Ring(), N)
    for world in (w, v):
        start(parts, world)
    rounds = (e for e in DPSGD(rounds=4, deadline_s=30.0).run(w) if e["event"] == "round")
    next(rounds), next(rounds)
    server, kept = w.server, w.keep()
    next(rounds)  # one more, which the checkpoint has nothing of
    again = direct_world(parts, Ring(), N)
    again.server, again.kept = server, kept
    play(DPSGD(rounds=4, deadline_s=30.0), again)
    play(DPSGD(rounds=4), v)
    assert np.allclose(states(parts, N), v.peers.states, rtol=0, atol=1e-6)  # states went through float32


def test_states_come_to_the_server_only_where_they_are_due():
    parts = [part(m) for m in mailboxes(2)]
    w = start(parts, direct_world(parts, Ring(), N))
    w.due = lambda round: round == 2
    before = w.server.vector
    rounds = (e for e in DPSGD(rounds=4, deadline_s=30.0).run(w) if e["event"] == "round")
    first = next(rounds)
    assert first["bytes_states"] == 0 and first["consensus"] is None and first["update_norm"] is None
    assert np.array_equal(w.server.vector, before) and w.server.round == 1
    second, third, last = rounds
    assert second["bytes_states"] == last["bytes_states"] == 4 * D * N and third["bytes_states"] == 0
    assert second["consensus"] > 0 and last["consensus"] > 0
    asked = [r.round for r in w.grid.requests if r.extra["stage"] == "state"]
    assert asked == [2] * N + [4] * N
    assert all(len(r.state) == 0 for r in w.grid.requests if r.round > 1)  # and none goes out after the first round
    assert np.allclose(w.server.vector, states(parts, N).mean(0), atol=1e-6)


def test_replies_hold_no_model():
    parts = [part(m) for m in mailboxes(2)]
    w = start(parts, direct_world(parts, Ring(), N))
    play(DPSGD(rounds=1, deadline_s=30.0), w)
    for own in (own for p in parts for own in p.own.values()):
        record = own.reply.to_record()
        assert set(record["arrays"]) == {"missed", "sent", "received"} and len(own.reply.update) == 0


def test_a_reply_about_other_links_is_rejected():
    class Liar(PeerRounds):
        def answer(self, requests):
            made = super().answer(requests)
            for reply in made:
                if reply.client == 0 and "sent" in reply.arrays:
                    reply.arrays["sent"] = np.full(5, 2**40, np.uint64)
                if reply.client == 1 and "missed" in reply.arrays:
                    reply.arrays["missed"] = np.array([6], np.uint32)
            return made

    parts = [part(m) for m in mailboxes(1)]
    parts[0].__class__ = Liar
    w = start(parts, direct_world(parts, Ring(), N))
    [event] = play(DPSGD(rounds=1, deadline_s=30.0), w)
    assert event["rejected"] == {"schema": 2} and event["accepted"] == N - 2


def test_a_node_that_does_not_listen_is_refused():
    parts = [part(None), *(part(m) for m in mailboxes(1))]
    w = direct_world(parts, Ring(), N)
    [event] = play(DPSGD(rounds=1, deadline_s=0.3), w)
    assert event["rejected"] == {"error": 4}
    [answer] = parts[0].answer(w.grid.requests[:1])
    assert isinstance(answer, MalformedMessage) and "shoal node --listen" in str(answer)
    w = direct_world(parts, Ring(), N, {c: Address("127.0.0.1", 1, "a") for c in range(N - 1)})
    with pytest.raises(ConfigError, match="client 7 does not listen"):
        play(DPSGD(rounds=1, deadline_s=0.3), w)


def test_a_round_that_nobody_finishes_stops_the_run():
    w = direct_world([part(None)], Ring(), N)
    with pytest.raises(RunStopped, match="no peer that trained, of 8 asked"):
        play(DPSGD(rounds=1, deadline_s=0.3), w)


@pytest.mark.parametrize(
    "change",
    [{"run": "00"}, {"run": "zz"}, {"lr": 1}, {"deadline_s": "soon"}, {"book": "{}"}, {"book": "["}, {"book": "[]"}],
)
def test_requests_that_make_no_sense_are_refused(change):
    parts = [part(m) for m in mailboxes(1)]
    w = direct_world(parts, Ring(), N)
    play(DPSGD(rounds=1, deadline_s=30.0), w)
    fresh = part(Mailbox())
    [request] = [r for r in w.grid.requests if r.client == 2 and r.extra["stage"] == "round"]
    bad = type(request)(2, 1, 0, request.state, request.layout, {**request.extra, **change}, request.arrays)
    assert isinstance(fresh.answer([bad])[0], MalformedMessage) and fresh.own == {}
    stateless = type(request)(2, 1, 0, request.state[:0], request.layout, request.extra, request.arrays)
    assert "no state to go on from" in str(fresh.answer([stateless])[0])
