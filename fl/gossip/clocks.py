"""Poisson clocks in whole ticks. An event's time depends on the clock's key and its number alone.

Gaps are exponential draws, rounded to ticks one by one, so a clock's times are exact sums. Of a clock nothing has to be
kept but how many events it has had and when the newest was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fl.keys import Part, generator

BLOCK = 256  # events that one generator draws


class PoissonClock:
    """Several independent Poisson processes as one: events at the sum of their ``rates``, each of one of them.

    ``rates`` are events a unit of time, which is ``unit`` ticks; ``key`` names the draws. A rate of zero never rings.
    """

    def __init__(self, rates: Sequence[float] | np.ndarray, unit: int, *key: Part):
        self.bounds = np.cumsum(np.asarray(rates, dtype=np.float64))
        self.gap, self.key = unit / self.bounds[-1], key
        self.rung, self.now = 0, 0  # events so far, and the tick of the newest
        self._block = -1
        self._gaps: list[int] = []
        self._which: list[int] = []

    def peek(self) -> tuple[int, int]:
        """The next event: its tick, and which process it is of."""
        block, place = divmod(self.rung, BLOCK)
        if block != self._block:
            drawn = generator(*self.key, block)
            self._gaps = np.rint(drawn.exponential(self.gap, BLOCK)).astype(np.int64).tolist()
            # "right", and never the last bound: a process of rate zero has no room of its own.
            at = np.searchsorted(self.bounds, drawn.random(BLOCK) * self.bounds[-1], side="right")
            self._which = np.minimum(at, int(np.argmax(self.bounds >= self.bounds[-1]))).tolist()
            self._block = block
        return self.now + self._gaps[place], self._which[place]

    def pop(self) -> tuple[int, int]:
        """Take the next event."""
        event = self.peek()
        self.rung, self.now = self.rung + 1, event[0]
        return event

    def state(self) -> list[int]:
        """What a checkpoint keeps."""
        return [self.rung, self.now]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from what `state` gave."""
        self.rung, self.now = int(state[0]), int(state[1])
