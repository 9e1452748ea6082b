"""DyLoRA: one adapter whose leading blocks are adapters of every lower rank (Valipour et al., arXiv 2210.07558).

Each step draws a rank b for each client and trains the leading block alone, at the scale of an adapter of rank b:

    W = W0 + alpha/b B[:, :b] A[:b]        loss and gradient of this; the other rows and columns get none.

With ``s = alpha/r`` this is ``s (r/b) B[:, :b] A[:b]``; the authors multiply each factor by sqrt(r/b). At b = r it is
the adapter itself, and a leading block with an unchanged alpha is what PEFT builds for ``r = b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.cohort import Cohort, CohortBatch
from clients.local import private
from clients.local.training import LocalTraining, Work
from fl.config import setting
from fl.errors import ConfigError
from fl.keys import generator

if TYPE_CHECKING:
    from clients.adapters.base import Adapter


@dataclass(frozen=True)
class DyLoRA(LocalTraining):
    """`LocalTraining` that draws b uniformly from ``min_rank .. r`` at each step, r being the client's own rank.

    Where modules have different ranks, one draw u in [0, 1) serves all: ``b = lo + floor(u (r - lo + 1))`` with
    ``lo = min(min_rank, r)``. It comes from the key ("dylora", client, round, step, the step's examples): the examples
    bring in the run's seed.

    ``frozen`` trains row b of A and column b of B alone (the authors' "frozen" mode). What is not trained has gradient
    zero: an optimiser with a momentum still moves it by what it remembers.
    """

    min_rank: int = setting(1, ge=1, help="smallest rank that is drawn")
    frozen: bool = setting(False, help="a step trains only the last of the rows and columns that were drawn")

    def gradient(
        self, cohort: Cohort, params: Tensor, batch: CohortBatch, works: Sequence[Work], step: int
    ) -> tuple[Tensor, Tensor]:
        draws = [draw(work, step) for work in works]
        factor, moving = self.masks(cohort, params, works, draws)
        losses, grads = private.gradients(cohort, params * factor, batch, works, step, self.accumulation)
        return losses, grads.mul_(factor).mul_(moving)

    def masks(
        self, cohort: Cohort, params: Tensor, works: Sequence[Work], draws: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """What ``params`` ``(S, d)`` and their gradients are multiplied by, and the gradients once more (0 or 1).

        The factor r/b is all on one side: gradients of a product don't depend on how its scale is split.
        """
        factor, moving = torch.ones_like(params), torch.ones_like(params)
        scaled, trained = cohort.layout.views(factor), cohort.layout.views(moving)
        for module in cohort.space.modules:
            ranks = [cohort.space.rank(module, work.client) for work in works]
            drawn = [self.rank(r, u) for r, u in zip(ranks, draws, strict=True)]
            last = params.new_tensor(drawn).unsqueeze(1)  # (S, 1)
            index = torch.arange(1, module.rank + 1, device=params.device)
            block = (index <= last) * params.new_tensor(ranks).unsqueeze(1) / last  # (S, r)
            moves = (index == last).to(params) if self.frozen else (index <= last).to(params)
            # Columns of B, rows of A. One of them takes the factor: what is zero in one is zero in the product.
            parts = [(module.b, (slice(None), None)), (module.a, (slice(None), slice(None), None))]
            parts = [(name, axes) for name, axes in parts if name in scaled]
            for place, (name, axes) in enumerate(parts):
                if place == 0:
                    scaled[name].mul_(block[axes])
                trained[name].mul_(moves[axes])
        return factor, moving

    def rank(self, rank: int, draw: float) -> int:
        """The rank b of a module of ``rank`` r for a draw in [0, 1)."""
        low = min(self.min_rank, rank)
        return low + int(draw * (rank - low + 1))

    def check(self, adapter: Adapter) -> None:
        if adapter.form not in ("lora", "b", "alternating"):
            raise ConfigError(
                "local", "dylora", "with an adapter that trains A or B of B A (adapter=lora, ffa, rolora)"
            )
        if getattr(adapter, "rslora", False):
            allowed = "false with local=dylora: an adapter of rank b has the scale alpha/b"
            raise ConfigError("adapter.rslora", True, allowed)
        if self.min_rank > max(getattr(adapter, "ranks", ()), default=self.min_rank):
            raise ConfigError("local.min_rank", self.min_rank, "at most adapter.rank")


def draw(work: Work, step: int) -> float:
    """In [0, 1), for the step ``step`` of ``work``: of a private job not by its examples, which are secret."""
    if work.private is not None:
        return float(generator("dylora", *work.private.key, step).random())
    examples = (int(example) for example in work.batches[step])
    return float(generator("dylora", work.client, work.round, step, *examples).random())
