"""FedBuff: a server step with every ``buffer`` updates (Nguyen et al., arXiv 2106.06639, algorithm 1)::

    x' = x + (1 / c) sum of c updates s(staleness_i) u_i,     c = buffer

A place that becomes free is filled at once, whether or not the buffer is full, so a fast client may be in one buffer
several times, each time with the version that it really started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from aggregators.staleness import Polynomial, Staleness
from fl.config import setting
from fl.schedules.asynchronous import Asynchronous
from fl.schedules.base import World


@dataclass(frozen=True)
class FedBuff(Asynchronous):
    """A server step with every ``buffer`` updates."""

    rounds: int = setting(30, ge=1, help="server steps, one with every full buffer")
    buffer: int = setting(10, ge=1, help="updates that a server step waits for")

    staleness: ClassVar[Staleness] = Polynomial(0.5)

    @property
    def size(self) -> int:
        return self.buffer

    def scale(self, world: World) -> float:
        return float(self.buffer)

    def contributions(self, durations: Sequence[int]) -> list[float]:
        """``q_i = c (1 / T_i) / sum_j 1 / T_j``."""
        return [self.buffer / sum(own / other for other in durations) for own in durations]

    def participations(self) -> int:
        return self.rounds * self.buffer

    def is_mean(self, settings: Any) -> bool:
        return self.weights == "identical" and not self.rule(settings.aggregator.staleness).weighs
