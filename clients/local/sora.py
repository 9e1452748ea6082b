"""SoRA's training: a proximal step on the gates drives those of useless ranks to zero (Ding et al., arXiv 2311.11696).

The objective is ``l(A, g, B) + lambda |g|_1``. After each optimiser step on l, of learning rate eta, each gate passes

    prox(g) = argmin_x (x - g)^2 / (2 eta) + lambda |x| = sign(g) max(|g| - eta lambda, 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from clients.cohort import Cohort
from clients.local.training import LocalTraining
from fl.config import setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.adapters.base import Adapter


@dataclass(frozen=True)
class SoRATraining(LocalTraining):
    """`LocalTraining` with the proximal step of ``l1 |g|_1``; ``l1`` 0 is plain training. For ``adapter=sora``.

    The threshold is ``lr l1`` with the round's learning rate, so that what the steps converge to does not depend on
    the rate. The authors give the threshold xi = eta lambda itself.
    """

    l1: float = setting(0.5, ge=0, help="weight lambda of |g|_1; a step's threshold is lr times it")

    def after_step(self, params: Tensor, lr: Tensor, cohort: Cohort) -> None:
        views = cohort.layout.views(params)
        for module in cohort.space.modules:
            if module.core in views:
                gate = views[module.core]  # (slots, rank)
                gate.copy_(soft_threshold(gate, lr * self.l1))

    def check(self, adapter: Adapter) -> None:
        if adapter.form != "gated":
            raise ConfigError("local", "sora", "with adapter=sora, which has gates", "Or choose local=adamw.")


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    """``sign(x) max(|x| - threshold, 0)``."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)
