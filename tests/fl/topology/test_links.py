"""Times of messages against a simulation tick by tick, and where latencies and rates come from."""

import numpy as np
import pytest

from fl.clock import ticks
from fl.fleet import transfer
from fl.network import Instant, Lognormal, Uniform
from fl.topology.fixed import Complete, Ring
from fl.topology.links import Links
from tests.oracles.graphs import arrivals

BYTE = 8.0  # at 8 Mbps a byte takes one tick


def links(number: int = 4, **settings) -> Links:
    return Links(Ring(latency_s=settings.pop("latency_s", 0.0), mbps=settings.pop("mbps", BYTE)), Instant(), 0, number)


@pytest.mark.parametrize("seed", range(6))
def test_arrivals_are_those_of_a_simulation(seed):
    rng = np.random.default_rng(seed)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j and rng.random() < 0.7]
    messages = [(i, j, int(rng.integers(0, 30)), int(rng.integers(1, 20))) for i, j in pairs]
    ones = dict.fromkeys(range(5), 1)
    expected = arrivals(messages, ones, ones, latency=7)
    order = rng.permutation(len(messages))
    assert links(5, latency_s=7e-6).send([messages[i] for i in order]) == expected


def test_a_sender_s_messages_leave_one_after_the_other():
    net = Links(Ring(), Uniform(latency_s=0.0, up_mbps=BYTE, down_mbps=None), 0, 4)
    assert net.send([(0, 2, 5, 100), (0, 1, 5, 100), (0, 3, 5, 10)]) == {(0, 1): 105, (0, 2): 205, (0, 3): 215}
    assert net.send([(0, 1, 50, 100)]) == {(0, 1): 315}  # the queue goes on
    assert net.send([(0, 1, 1000, 100)]) == {(0, 1): 1100}


def test_a_receiver_takes_one_after_the_other():
    net = Links(Ring(), Uniform(latency_s=0.0, up_mbps=None, down_mbps=BYTE), 0, 4)
    assert net.send([(2, 0, 5, 100), (1, 0, 5, 100), (3, 0, 4, 10)]) == {(3, 0): 14, (1, 0): 114, (2, 0): 214}
    assert net.send([(3, 0, 100, 10)]) == {(3, 0): 224}


def test_links_are_the_devices_or_the_topology_s():
    network = Lognormal(latency_s=0.3, up_mbps=5.0, down_mbps=20.0)
    here, there = (network.device(1, peer, 3) for peer in (0, 2))
    left = transfer(12345, here.up_mbps)
    expected = left + ticks(here.latency_s) + ticks(there.latency_s) + transfer(12345, there.down_mbps)
    assert Links(Ring(), network, 1, 3).send([(0, 2, 0, 12345)]) == {(0, 2): expected}
    own = Links(Ring(latency_s=0.25, mbps=2.0), network, 1, 3)
    assert own.send([(0, 2, 0, 12345)]) == {(0, 2): 2 * transfer(12345, 2.0) + 250_000}
    assert Links(Ring(), Instant(), 0, 3).send([(0, 2, 9, 10**9)]) == {(0, 2): 9}


def test_a_complete_graph_is_not_free():
    """n - 1 messages through one uplink take n - 1 times as long."""
    for number in (3, 9):
        net = Links(Complete(mbps=BYTE, latency_s=0.0), Instant(), 0, number)
        graph = Complete().graph(number, 0, 1)
        arrived = net.send([(i, j, 0, 50) for i, j in graph.links.tolist()])
        assert len(arrived) == number * (number - 1)
        assert max(net.up_free) == 50 * (number - 1)
        assert max(arrived.values()) >= 50 * number


def test_nothing_to_send_and_the_same_pair_twice():
    assert links().send([]) == {}
    with pytest.raises(ValueError, match="two messages from 0 to 1"):
        links().send([(0, 1, 0, 1), (0, 1, 5, 1)])


def test_a_checkpoint_holds_the_queues():
    first, second = links(), links()
    messages = [(0, 1, 0, 70), (2, 1, 3, 50), (1, 0, 4, 10)]
    first.send(messages)
    second.restore(first.state())
    assert first.send([(0, 1, 20, 5), (1, 2, 1, 5)]) == second.send([(0, 1, 20, 5), (1, 2, 1, 5)])
    first.send([(3, 0, 100, 7)])
    assert second.state() != first.state()
