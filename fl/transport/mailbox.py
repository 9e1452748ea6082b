"""Peers of one process: a message is handed over by memory. One mailbox serves any number of nodes (and threads)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from fl.transport.base import Exchange, Heard
from fl.transport.frames import size
from fl.transport.inbox import Inbox


class Mailbox:
    """A `fl.transport.base.PeerTransport` for all nodes of this process."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._runs: dict[int, bytes] = {}

    @property
    def counts(self) -> Counter[str]:
        return self._inbox.counts

    def begin(self, exchange: Exchange) -> None:
        self._runs |= dict.fromkeys(exchange.mine, exchange.run)
        self._inbox.begin(exchange)

    def send(self, round: int, src: int, dst: int, vector: np.ndarray | None) -> int:
        self._inbox.put(self._runs[src], round, src, dst, vector)
        return size(vector)

    def receive(self, round: int, dst: int, srcs: Iterable[int], deadline: float) -> Heard:
        return self._inbox.receive(round, dst, srcs, deadline)

    def close(self) -> None:
        self._inbox.close()
