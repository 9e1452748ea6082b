"""What has come for the peers of a node, and what they wait for: messages by round, each pair's first one.

A message is of now, or of later (a round that its receiver has not begun), or stale. Names of runs rise with every
start, so what was on its way when a run was resumed is stale.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable

import numpy as np

from fl.transport.base import Exchange, Heard

NOW, LATER, STALE = "now", "later", "stale"


class Inbox:
    """Thread-safe. Messages of later rounds are kept if they are put; whoever must not keep them waits (`settled`)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._open: dict[int, tuple[bytes, int]] = {}  # receiver -> run and round
        self._here: dict[tuple[int, bytes, int], Heard] = {}  # (receiver, run, round) -> by sender
        self._closed = False

    def begin(self, exchange: Exchange) -> None:
        """The peers ``mine`` begin a round; what has come for them in earlier ones is forgotten."""
        with self._changed:
            self._open |= dict.fromkeys(exchange.mine, (exchange.run, exchange.round))
            self._here = {k: h for k, h in self._here.items() if self._when(k[1], k[2], k[0]) != STALE}
            self._changed.notify_all()

    def _when(self, run: bytes, round: int, dst: int) -> str:
        began = self._open.get(dst, (b"", 0))
        return NOW if (run, round) == began else LATER if (run, round) > began else STALE

    def count(self, reason: str) -> None:
        """Count a message that was dropped or refused."""
        with self._changed:
            self.counts[reason] += 1

    def settled(self, run: bytes, round: int, dst: int, timeout_s: float) -> str:
        """Whether a message is of now or stale; of later, if ``dst`` does not begin its round in ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._when(run, round, dst) != LATER, timeout_s)
            return self._when(run, round, dst)

    def put(self, run: bytes, round: int, src: int, dst: int, vector: np.ndarray | None) -> None:
        """A message that has come."""
        with self._changed:
            if self._when(run, round, dst) == STALE:
                self.counts["stale"] += 1
                return
            heard = self._here.setdefault((dst, run, round), {})
            if src in heard:
                self.counts["duplicate"] += 1
                return
            heard[src] = vector
            self._changed.notify_all()

    def receive(self, round: int, dst: int, srcs: Iterable[int], deadline: float) -> Heard:
        """See `fl.transport.base.PeerTransport.receive`."""
        wanted = set(srcs)
        with self._changed:
            key = dst, self._open.get(dst, (b"", 0))[0], round
            there = lambda: self._closed or wanted <= self._here.get(key, {}).keys()  # noqa: E731
            self._changed.wait_for(there, max(0.0, deadline - time.monotonic()))
            return {src: vector for src, vector in self._here.get(key, {}).items() if src in wanted}

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
