"""Optimisers as elementwise functions on stacked states ``(S, d)``, with the semantics of ``torch.optim``.

Each slot has its own learning rate, and since every operation is elementwise a slot's result does not depend on the
slots beside it. State tensors have the shape of the parameters; all updates are in place, so that a view of the
active slots is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl.config import setting

State = dict[str, Tensor]


@dataclass(frozen=True)
class Optimizer:
    """Base of the optimisers: `state_names` says which tensors it keeps, `step` applies one update in place."""

    @property
    def state_names(self) -> tuple[str, ...]:
        return ()

    def init(self, params: Tensor) -> State:
        """Fresh state (zeros) for ``params`` ``(S, d)``."""
        return {name: torch.zeros_like(params) for name in self.state_names}

    def step(self, params: Tensor, grads: Tensor, state: State, step: int, lr: Tensor) -> None:
        """Update ``params`` in place; ``step`` counts from 1, ``lr`` is ``(S, 1)``. ``grads`` may be overwritten."""
        raise TypeError(f"{type(self).__name__} has no step")


@dataclass(frozen=True)
class SGD(Optimizer):
    """``g += wd p``; ``b = mu b + (1 - dampening) g`` (``b = g`` at the first step); ``p -= lr b``.

    With Nesterov the step is ``g + mu b``. As ``torch.optim.SGD``.
    """

    momentum: float = setting(0.0, ge=0, lt=1, help="momentum mu")
    dampening: float = setting(0.0, ge=0, lt=1, help="dampening of the gradient in the momentum")
    nesterov: bool = setting(False, help="Nesterov momentum")
    weight_decay: float = setting(0.0, ge=0, help="L2 penalty")

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def step(self, params: Tensor, grads: Tensor, state: State, step: int, lr: Tensor) -> None:
        if self.weight_decay:
            grads.add_(params, alpha=self.weight_decay)
        if self.momentum:
            buffer = state["momentum"]
            if step == 1:
                buffer.copy_(grads)
            else:
                buffer.mul_(self.momentum).add_(grads, alpha=1 - self.dampening)
            grads = grads.add_(buffer, alpha=self.momentum) if self.nesterov else buffer
        params.sub_(grads * lr)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), as torch's ``AdamW``.

    ``p *= 1 - lr wd``; ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g^2``;
    ``p -= lr / (1-b1^t) * m / (sqrt(v) / sqrt(1-b2^t) + eps)``.
    """

    beta1: float = setting(0.9, ge=0, lt=1, help="decay of the first moment")
    beta2: float = setting(0.999, ge=0, lt=1, help="decay of the second moment")
    eps: float = setting(1e-8, gt=0, help="added to the denominator")
    weight_decay: float = setting(0.0, ge=0, help="decoupled weight decay")

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("first", "second")

    def step(self, params: Tensor, grads: Tensor, state: State, step: int, lr: Tensor) -> None:
        first, second = state["first"], state["second"]
        if self.weight_decay:
            params.mul_(1 - lr * self.weight_decay)
        first.lerp_(grads, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(grads, grads, value=1 - self.beta2)
        denominator = second.sqrt().div_((1 - self.beta2**step) ** 0.5).add_(self.eps)
        params.sub_(first.div(denominator).mul_(lr / (1 - self.beta1**step)))
