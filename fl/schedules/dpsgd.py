"""Decentralized SGD: peers average their models with their neighbours' (Lian et al., arXiv 1705.09056, algorithm 1).

    order=parallel               x_i' = sum_j W_ij x_j + u_i          (D-PSGD: mix and step in parallel)
    order=adapt_then_combine     x_i' = sum_j W_ij (x_j + u_j)

with ``u_i`` the change that peer i's local training makes from ``x_i`` (``-lr g_i`` for one step of SGD) and ``W`` the
graph's doubly stochastic weights. On the complete graph the second form is FedAvg with equal weights. A constant step
leaves a bias in proportion to how much the peers' data differ.

``aggregator.combine`` and ``aggregator.pre`` put a robust rule in place of the average (`fl.mixing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl.config import setting
from fl.errors import ConfigError
from fl.hearing import average
from fl.messages import Request
from fl.schedules.base import PeerPart
from fl.schedules.direct import EXPECTED, is_direct
from fl.schedules.gossip import Arrays, Gossip, Round, exchange, wait_for_all

if TYPE_CHECKING:
    from fl.experiment import Experiment


@dataclass(frozen=True)
class DPSGD(Gossip):
    """Local training and one exchange of models with the neighbours a round: one vector over each link and way."""

    order: str = setting(
        "adapt_then_combine", choices=["adapt_then_combine", "parallel"], help="mix models after the step, or before it"
    )

    crafts = True
    travels = True

    def part(self, experiment: Experiment) -> PeerPart | None:
        from fl.peer_rounds import PeerRounds

        settings = experiment.settings
        return PeerRounds.of(experiment, experiment.transport) if is_direct(settings) else None

    def expects(self, request: Request) -> Mapping[str, tuple[str, int]]:
        return EXPECTED.get(str(request.extra.get("stage")), {})

    def check(self, settings: Any) -> None:
        super().check(settings)
        if self.order == "parallel" and settings.attack.crafts and settings.attack.poisons:
            allowed = "adapt_then_combine with an attack that enlarges what it learnt: models are sent before the step"
            raise ConfigError("schedule.order", self.order, allowed)

    def payload(self, size: int) -> Mapping[str, tuple[str, int]]:
        return {"model": ("float32", size)}

    def mix(self, round: Round, memory: Arrays) -> None:
        peers = round.peers
        wait_for_all(round, exchange(round, self.payload(len(round.columns))))
        if self.order == "parallel":
            peers.states = average(round, peers.states) + round.updates
        else:
            round.updates += peers.states  # in place: at a thousand peers a new array costs as much as the mixing
            peers.states = average(round, round.updates)
