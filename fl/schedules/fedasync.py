"""FedAsync: a server step with every update that arrives (Xie, Koyejo and Gupta, arXiv 1903.03934, algorithm 1).

With the client's model ``y_i`` and the version ``x_s`` that it started from, ``u_i = y_i - x_s``::

    mix      x' = (1 - a_t) x + a_t y_i = x + a_t u_i - a_t (x - x_s)
    delta    x' = x + a_t u_i                                              a_t = alpha s(staleness)

The last term of ``mix``, the published form, pulls back towards the old version; ``delta`` has not got it. In the paper
clients have a proximal term (rho / 2) |y - x_s|^2: ``local=fedprox local.mu=RHO``. A client that is done begins anew at
once. With ``weights=unbiased`` it is asynchronous FedAvg of arXiv 2206.10189: ``r_i = p_i T_i sum_j 1 / T_j``.
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
class FedAsync(Asynchronous):
    """A server step with every update."""

    rounds: int = setting(100, ge=1, help="server steps, one with every update")
    mode: str = setting("mix", choices=["mix", "delta"], help="towards the client's model, or along its update")
    alpha: float = setting(0.6, gt=0, le=1, help="how far a fresh update moves the server")

    staleness: ClassVar[Staleness] = Polynomial(0.5)

    @property
    def size(self) -> int:
        return 1

    @property
    def step_size(self) -> float:
        return self.alpha

    @property
    def mixes(self) -> bool:
        return self.mode == "mix"

    def scale(self, world: World) -> float:
        return 1.0

    def contributions(self, durations: Sequence[int]) -> list[float]:
        """``q_i = (1 / T_i) / sum_j 1 / T_j``."""
        return [1 / sum(own / other for other in durations) for own in durations]

    def participations(self) -> int:
        return self.rounds

    def is_mean(self, settings: Any) -> bool:
        plain = self.alpha == 1 and self.weights == "identical" and not self.mixes
        return plain and not self.rule(settings.aggregator.staleness).weighs
