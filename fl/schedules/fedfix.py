"""FedFix: a server step every ``dt`` seconds (Fraboni et al., arXiv 2206.10189, section 4).

At each tick the server uses what has arrived since the last one and sends the new version to those clients; a client
that is done waits for the tick, one that is not goes on from the version that it has. A tick without an update counts,
and changes nothing. A client whose jobs take ``T_i`` contributes at every ``ceil(T_i / dt)``-th tick. With
``dt >= max T_i`` that is FedAvg, and as ``dt`` becomes small it tends to a step with every update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fl.clock import ticks
from fl.config import setting
from fl.errors import ConfigError
from fl.schedules.asynchronous import Asynchronous
from fl.schedules.base import World


@dataclass(frozen=True)
class FedFix(Asynchronous):
    """A server step every ``tick_s`` seconds."""

    rounds: int = setting(20, ge=1, help="server steps, one at every tick")
    tick_s: float = setting(1.0, gt=0, le=1e9, help="virtual seconds between server steps")
    weights: str = setting("unbiased", choices=["identical", "unbiased"], help="what a contribution counts for")

    def __post_init__(self) -> None:
        if ticks(self.tick_s) == 0:
            raise ConfigError("schedule.tick_s", self.tick_s, "at least one microsecond")

    @property
    def period(self) -> int:
        return ticks(self.tick_s)

    def scale(self, world: World) -> float:
        return float(world.number)

    def contributions(self, durations: Sequence[int]) -> list[float]:
        """``q_i = 1 / ceil(T_i / dt)``, in whole ticks."""
        return [1 / -(-own // self.period) for own in durations]

    def participations(self) -> int:
        return self.rounds
