"""MoNNA: local momentum and nearest-neighbour averaging among hostile peers (Farhadkhani et al., arXiv 2209.10931).

    m_i <- beta m_i + (1 - beta) g_i,    theta_i <- theta_i - lr m_i,   which is sent to all
    wait for the first n - f - 1 models of others; with its own these are S_i, n - f models
    theta_i <- mean of the n - 2f models of S_i that are nearest to theta_i (its own is one of them)

with ``f = aggregator.f``. ``g_i = -u_i / lr`` is the change of local training per learning rate: the gradient for one
step of SGD. With ``f = 0`` every peer takes the exact mean, and all agree after one round.

``reach`` says whom a peer hears first: by the arrival of messages (network), the worst case of the paper, in which
all hostile models and a drawn n - 2f - 1 of the other honest ones arrive first (worst), or a drawn n - f - 1 of the
others (sampled). ``aggregator.combine`` and ``aggregator.pre`` put another rule in place of nearest-neighbour
averaging: trimmed_mean or gm for the paper's MoCWTM and MoGM, mean for plain averaging of what is heard.

The analysis is for complete graphs. On others a peer waits for all but f of its neighbours, and there is no theorem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aggregators.combining import Combining
from aggregators.robust import NNA
from aggregators.robust.base import Auto
from fl.config import setting
from fl.errors import ConfigError
from fl.hearing import hear
from fl.keys import generator
from fl.peers import Peers
from fl.schedules.base import World
from fl.schedules.gossip import Arrays, Gossip, Round, check_neighbourhoods, check_steady, exchange


@dataclass(frozen=True)
class MoNNA(Gossip):
    """Local momentum, the first n - f models, and the mean of the nearest: one vector over each link and way."""

    beta: float = setting(0.9, ge=0, lt=1, help="share of the old momentum; 0: none")
    reach: str = setting(
        "worst", choices=["worst", "sampled", "network"], help="whose models a peer hears first (see above)"
    )

    crafts = True
    graph = "complete"

    def payload(self, size: int) -> Mapping[str, tuple[str, int]]:
        return {"model": ("float32", size)}

    def check(self, settings: Any) -> None:
        super().check(settings)
        check_steady(self, settings)

    def rule_of(self, world: World) -> Combining:
        """The run's rule, with nearest-neighbour averaging where none is named."""
        rule = world.aggregator
        assert isinstance(rule, Combining)
        return replace(rule, combine=NNA()) if isinstance(rule.combine, Auto) else rule

    def check_graph(self, world: World, peers: Peers) -> None:
        rule = self.rule_of(world)
        smallest = min(len(peers.graph(1).neighbours(p)) for p in range(len(peers)))
        if smallest <= rule.f:
            allowed = f"below {smallest}, the neighbours that some peer has: it waits for all but f of them"
            raise ConfigError("aggregator.f", rule.f, allowed)
        check_neighbourhoods(rule, smallest - rule.f, smallest)

    def mix(self, round: Round, memory: Arrays) -> None:
        world, peers = round.world, round.peers
        rule = self.rule_of(world)
        gradient = round.updates / -round.lr
        momentum = memory.get("momentum", np.zeros_like(gradient))
        momentum = self.beta * momentum + (1 - self.beta) * gradient
        gone = sorted(round.mixing.lost)
        if gone:
            momentum[gone] = memory["momentum"][gone] if "momentum" in memory else 0
        memory["momentum"] = momentum
        step = -round.lr * momentum
        step[gone] = 0
        models = peers.states + step
        arrived = exchange(round, self.payload(len(round.columns)))
        active = round.number >= world.attack.from_round
        bad = peers.hostile - round.mixing.lost if active else frozenset()
        heard: dict[int, np.ndarray] = {}
        for peer in range(len(peers)):
            if peer in round.mixing.lost:
                continue
            near = round.mixing.heard(peer)
            wanted = max(0, min(len(near), len(peers.graph(round.number).neighbours(peer)) - rule.f))
            heard[peer] = first = self._first(round, peer, near, wanted, bad, arrived)
            times = [arrived[int(j), peer] for j in first]
            peers.ready[peer] = max([int(round.done[peer]), *times])
        peers.states = hear(round, rule, models, heard)

    def _first(
        self, round: Round, peer: int, near: np.ndarray, wanted: int, bad: frozenset[int], arrived: Mapping[Any, int]
    ) -> np.ndarray:
        """The ``wanted`` of the peers ``near`` whose models ``peer`` takes in, ascending."""
        if self.reach == "network":
            order = sorted(near.tolist(), key=lambda j: (arrived[j, peer], j))
        else:
            order = generator(round.world.seed, "reach", round.number, peer).permutation(near).tolist()
            if self.reach == "worst":
                order.sort(key=lambda j: j not in bad)
        return np.array(sorted(order[:wanted]), np.int64)
