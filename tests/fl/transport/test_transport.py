"""What every transport promises, on each of them: delivered once, in its round, to whom it is for."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from fl.errors import ShoalError
from fl.transport.base import Address, Exchange
from fl.transport.frames import HEADER
from fl.transport.mailbox import Mailbox
from fl.transport.sockets import Sockets
from tests.fl.transport.credentials import Authority

FIRST, SECOND = bytes(15) + b"\1", bytes(15) + b"\2"
LENGTH = 5
SOON_S, NEVER_S = 10.0, 0.15


def until(condition) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Group:
    """Three nodes; client c lives on node c % 3."""

    def __init__(self, transports, book):
        self.transports, self.book = transports, book

    def at(self, client: int):
        return self.transports[client % 3]

    def begin(self, round: int, nodes=(0, 1, 2), run: bytes = FIRST, clients: int = 6) -> None:
        for node in nodes:
            mine = frozenset(c for c in range(clients) if c % 3 == node)
            end = time.monotonic() + SOON_S
            self.transports[node].begin(Exchange(run, round, mine, LENGTH, end, self.book))

    def send(self, round: int, src: int, dst: int, value: float | None) -> int:
        vector = None if value is None else np.full(LENGTH, value, np.float32)
        return self.at(src).send(round, src, dst, vector)

    def hear(self, round: int, dst: int, *srcs: int, wait_s: float = SOON_S) -> dict[int, float | None]:
        found = self.at(dst).receive(round, dst, srcs, time.monotonic() + wait_s)
        return {src: None if v is None else float(v[0]) for src, v in found.items()}

    def count(self, client: int, reason: str) -> int:
        return self.at(client).counts[reason]


@pytest.fixture(params=["mailbox", "tcp", "tls"])
def group(request, tmp_path):
    transports = [Mailbox()] * 3
    if request.param == "tcp":
        transports = [Sockets("127.0.0.1", 0, None, insecure=True) for _ in range(3)]
    if request.param == "tls":
        authority = Authority(tmp_path)
        transports = [Sockets("127.0.0.1", 0, authority.identity(f"node-{i}", openssh=i < 2)) for i in range(3)]
    book = {c: getattr(transports[c % 3], "address", Address("", 0, "")) for c in range(6)}
    yield Group(transports, book)
    for transport in transports:
        transport.close()


class TestTransport:
    def test_everybody_hears_everybody_on_its_node_and_on_others(self, group):
        for round in (1, 2, 3):  # connections are kept from round to round
            group.begin(round)
            for src in range(6):
                for dst in range(6):
                    if src != dst:
                        assert group.send(round, src, dst, 10 * round + src) == HEADER.size + 4 * LENGTH
            for dst in range(6):
                others = [c for c in range(6) if c != dst]
                assert group.hear(round, dst, *others) == {src: 10 * round + src for src in others}

    def test_it_returns_what_is_here_at_the_deadline(self, group):
        group.begin(1)
        group.send(1, 0, 1, 7)
        assert group.hear(1, 1, 0) == {0: 7}
        began = time.monotonic()
        assert group.hear(1, 1, 0, 2, wait_s=NEVER_S) == {0: 7}
        assert time.monotonic() - began >= NEVER_S

    def test_a_peer_that_takes_no_part_says_so_and_nobody_waits_for_it(self, group):
        group.begin(1)
        assert group.send(1, 0, 1, None) == HEADER.size
        assert group.hear(1, 1, 0) == {0: None}

    def test_who_is_ahead_is_heard_when_its_round_begins(self, group):
        """Also before the receiver knows of the run."""
        group.begin(1, nodes=[0])
        group.send(1, 0, 1, 1)
        group.begin(2, nodes=[0])
        group.send(2, 0, 1, 2)
        time.sleep(NEVER_S)
        group.begin(1, nodes=[1])
        assert group.hear(1, 1, 0) == {0: 1}
        group.begin(2, nodes=[1])
        assert group.hear(2, 1, 0) == {0: 2}

    def test_what_comes_twice_counts_once(self, group):
        group.begin(1)
        group.send(1, 0, 1, 1)
        assert group.hear(1, 1, 0) == {0: 1}
        group.send(1, 0, 1, 99)
        until(lambda: group.count(1, "duplicate") == 1)
        assert group.hear(1, 1, 0) == {0: 1}

    def test_what_is_of_an_earlier_round_or_start_is_dropped_and_counted(self, group):
        group.begin(1)
        group.begin(2, nodes=[1, 2])
        group.send(1, 0, 1, 1)
        until(lambda: group.count(1, "stale") == 1)
        group.begin(1, nodes=[1], run=SECOND)
        group.send(1, 0, 1, 2)
        until(lambda: group.count(1, "stale") == 2)
        assert group.hear(1, 1, 0, wait_s=NEVER_S) == {}
        group.begin(1, nodes=[0], run=SECOND)
        group.send(1, 0, 1, 3)
        assert group.hear(1, 1, 0) == {0: 3}

    def test_what_another_peer_is_sent_is_not_heard(self, group):
        group.begin(1)
        group.send(1, 0, 4, 1)
        assert group.hear(1, 4, 0) == {0: 1}
        assert group.hear(1, 1, 0, wait_s=NEVER_S) == {}

    def test_closing_ends_the_waiting(self, group):
        group.begin(1)
        threading.Timer(0.1, group.at(1).close).start()
        began = time.monotonic()
        assert group.hear(1, 1, 0) == {}
        assert time.monotonic() - began < SOON_S


def test_addresses_are_written_and_read():
    for address in (Address("10.0.0.3", 9000, "node-3"), Address("host", 1, ""), Address("::1", 9000, "a")):
        assert Address.of(str(address)) == address
    for text in ("host", "host:", "host:port", "host:70000", ""):
        with pytest.raises(ShoalError, match="HOST:PORT"):
            Address.of(text)
