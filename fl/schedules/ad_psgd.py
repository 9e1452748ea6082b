"""AD-PSGD: peers train without pause and meet in pairs (Lian et al., arXiv 1710.06952).

A job starts from a copy of its peer's model, takes as long as the peer's device needs (or an exponential time,
``clock=poisson``), and its change is added to what the model has become meanwhile. Beside that every edge of the graph
is used at the events of a Poisson clock of its own: both ends send their models, and when both have arrived,

    x_i -= m / 2,   x_j += m / 2,        m = x_i - x_j when they were sent,

which keeps the mean whatever happens in between. A peer is in one exchange at a time; a use of an edge whose ends are
not both free is left out, and counted as ``missed``. ``schedule=a2cid2`` adds momentum to the same events.

A unit of time is the mean time of a job, over all peers, and ``communications`` is in how many exchanges a peer takes
part per unit, on average. A round is over when as many jobs have ended as there are peers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl.clock import ticks
from fl.config import setting
from fl.errors import ConfigError
from fl.gossip.acid import Acid
from fl.gossip.pairs import Pairs
from fl.gossip.rates import Rates, uniform
from fl.network import Instant
from fl.schedules.base import Event, Schedule, World
from fl.schedules.gossip import check_peers


def check_edges(schedule: Schedule, settings: Any) -> None:
    """Raise `ConfigError` for what schedules whose edges have clocks have no place for."""
    check_peers(schedule, settings)
    graph, name = settings.graph, type(schedule).__name__
    if graph.directed or graph.varies:
        raise ConfigError("topology", graph.name, f"an undirected graph that stays under {name}: its edges have clocks")


@dataclass(frozen=True)
class ADPSGD(Schedule):
    """Jobs and exchanges of pairs, each in its own time."""

    rounds: int = setting(10, ge=1, help="times as many jobs as there are peers")
    until_s: float | None = setting(None, gt=0, help="virtual seconds after which the run ends; null: after rounds")
    communications: float = setting(
        1.0, gt=0, le=1000, help="exchanges that a peer takes part in per job's mean time, on average"
    )
    clock: str = setting(
        "devices", choices=["devices", "poisson"], help="how long jobs take: as network= says, or exponential times"
    )
    unit_s: float = setting(1.0, gt=0, le=1e9, help="virtual seconds of a job on average, with clock=poisson")

    decentral = True

    def check(self, settings: Any) -> None:
        check_edges(self, settings)
        if self.clock == "devices" and isinstance(settings.network, Instant):
            allowed = "poisson with network=instant, where jobs take no time"
            raise ConfigError("schedule.clock", "devices", allowed, "Or use network=lognormal.")

    def participations(self) -> int | None:
        return None

    def method(self, start: np.ndarray, rates: Rates) -> Acid:
        """The models of all peers, from ``start`` ``(n, d)``; ``rates`` are uses of edges a unit of time."""
        return Acid(start, None)

    def run(self, world: World) -> Iterator[Event]:
        peers = world.peers
        assert peers is not None
        rates = uniform(len(peers), peers.graph(1).edges).times(len(peers) * self.communications / 2)
        poisson = self.clock == "poisson"
        unit = ticks(self.unit_s) if poisson else _mean_job(world)
        pairs = Pairs(world, self.method(peers.states, rates), rates, max(1, unit), poisson, self.rounds)
        if world.kept is None:
            pairs.begin()
        else:
            pairs.restore(*world.kept)
        world.keep = pairs.parts
        yield from pairs.events(None if self.until_s is None else ticks(self.until_s))
        yield {"event": "links", "round": world.server.round, "links": peers.links()}


def _mean_job(world: World) -> int:
    """Ticks of the peers' first jobs, on average."""
    steps = [world.local.num_steps(size) for size in world.sizes]
    times = [world.fleet.job(peer, 1, count, 0, 0).compute for peer, count in enumerate(steps)]
    return round(sum(times) / len(times))
