"""Client momentum: one gradient a round, averaged over the rounds by each client for itself (client half of DP-BREM).

    phi_i <- beta phi_i + (1 - beta) g_i,   phi_i = 0 at first,    sent: -lr phi_i

with ``g_i`` the gradient at the round's state (Karimireddy et al., arXiv 2012.10333, algorithm 2; Gu et al., arXiv
2306.12608). What is sent is the change that a step of size ``lr`` along the momentum would make, so any aggregation
rule can use it. The client takes no step itself: each round's gradient is taken where the server is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from clients.cohort import Cohort
from clients.local.optimizers import SGD, Optimizer
from clients.local.training import Fit, LocalTraining, MakeBatch, Work, audited, clip_rows, kept
from fl.config import setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.adapters.base import Adapter

MOMENTUM = "momentum"  # the memory's name for phi_i


@dataclass(frozen=True)
class ClientMomentum(LocalTraining):
    """One gradient a round into a momentum ``(d,)`` that the client keeps; one that is not asked keeps it as it is.

    A client's gradients all pass `gradient`, so they are clipped (and noised, or not) as the privacy mechanism says.
    Raises `ConfigError` for more than one step a round, and for an optimiser of its own: the momentum is one.
    """

    keeps_private: ClassVar[bool] = True

    steps: int | None = setting(1, ge=1, help="gradients a round: 1")
    lr: float = setting(0.1, gt=0, help="step size along the momentum")
    optimizer: Optimizer = setting(SGD(), help="plain SGD: the momentum is kept beside it")
    beta: float = setting(0.9, ge=0, lt=1, help="share of the old momentum; 0 sends the gradient")

    def __post_init__(self) -> None:
        if self.steps != 1 or self.epochs is not None:
            key, value = ("local.steps", self.steps) if self.epochs is None else ("local.epochs", self.epochs)
            raise ConfigError(key, value, "one gradient a round: local.steps=1 and local.epochs=null")
        if self.optimizer != SGD():
            allowed = "local/optimizer=sgd without momentum and weight decay: local.beta is the momentum"
            raise ConfigError("local.optimizer", self.optimizer, allowed)

    def check(self, adapter: Adapter) -> None:
        if adapter.form == "alternating":
            allowed = "with an adapter that trains the same tensors in every round: the momentum goes on"
            raise ConfigError("local", "client_momentum", allowed, "Choose another adapter than rolora.")

    def fit(self, cohort: Cohort, works: Sequence[Work], make_batch: MakeBatch) -> list[Fit]:
        if any(len(work.batches) != 1 for work in works):
            raise ValueError("a job of client momentum is one batch")
        start = np.stack([work.start for work in works]).astype(np.float32, copy=False)
        params = torch.from_numpy(start.copy()).to(cohort.device)
        batch = make_batch(range(len(works)), 0)
        loss, grads = self.gradient(cohort, params, batch, works, 0)
        if self.clip_norm is not None:
            grads = clip_rows(grads, self.clip_norm)
        fresh, losses = grads.cpu().numpy(), loss.tolist()
        tokens = (batch.attention_mask.sum(-1) * (batch.weights > 0)).sum(1).tolist()
        fits = []
        for s, work in enumerate(works):
            old = work.memory.get(MOMENTUM, np.zeros_like(fresh[s]))
            momentum = np.float32(self.beta) * old + np.float32(1 - self.beta) * fresh[s]
            sent = np.float32(-work.lr) * momentum
            memory = kept(work) | {MOMENTUM: momentum}
            fits.append(Fit(work.client, start[s] + sent, losses[s], 1, int(tokens[s]), memory, sent, audited(work)))
        return fits
