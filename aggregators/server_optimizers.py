"""Server optimisers: how far to go along the mean update ``Delta_t`` (FedOpt; Reddi et al. 2021, arXiv 2003.00295).

FedAvgM (Hsu et al. 2019, arXiv 1909.06335), with heavy-ball momentum as `torch.optim.SGD` has it::

    m_t = momentum * m_{t-1} + Delta_t,     x_{t+1} = x_t + lr * m_t

The adaptive ones (Reddi et al., Algorithm 2) share two lines and differ in ``v_t``::

    m_t = beta1 * m_{t-1} + (1 - beta1) * Delta_t
    FedAdagrad  v_t = v_{t-1} + Delta_t^2
    FedYogi     v_t = v_{t-1} - (1 - beta2) * Delta_t^2 * sign(v_{t-1} - Delta_t^2)
    FedAdam     v_t = beta2 * v_{t-1} + (1 - beta2) * Delta_t^2
    x_{t+1} = x_t + lr * m_t / (sqrt(v_t) + tau)

elementwise, with ``m_{-1} = 0`` and no bias correction. Algorithm 2 asks for ``v_{-1} >= tau^2``; we take
``v_{-1} = tau^2``. Flower's strategies start ``v`` at 0, and its FedAdam corrects the bias
(docs/methods/server_optimizers.md).

Everything is float64 ``(d,)``, in and out.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from aggregators.base import OptimizerState, ServerOptimizer
from fl.config import setting


@dataclass(frozen=True)
class SGD(ServerOptimizer):
    """Gradient descent on the server, with momentum FedAvgM; ``lr=1, momentum=0`` is plain federated averaging."""

    lr: float = setting(1.0, gt=0, help="server learning rate; 1 takes the mean of the clients")
    momentum: float = setting(0.0, ge=0, lt=1, help="how much of the last step to repeat; FedAvgM uses 0.9")

    @property
    def plain(self) -> bool:
        return self.lr == 1 and self.momentum == 0

    def step(
        self, vector: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if self.momentum == 0:
            return vector + self.lr * delta, {}
        m = self.momentum * state["m"] + delta if "m" in state else delta.copy()
        return vector + self.lr * m, {"m": m}


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """The lines that FedAdagrad, FedAdam and FedYogi share."""

    lr: float = setting(0.01, gt=0, help="server learning rate (eta); a coordinate moves by about this much a round")
    beta1: float = setting(0.9, ge=0, lt=1, help="decay of the mean of past updates")
    tau: float = setting(1e-3, gt=0, help="adaptivity: the size of update below which a coordinate counts as still")

    def step(
        self, vector: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        m = (1 - self.beta1) * delta
        if "m" in state:
            m += self.beta1 * state["m"]
        v = self.second_moment(state["v"] if "v" in state else np.full_like(delta, self.tau**2), delta**2)
        return vector + self.lr * m / (np.sqrt(v) + self.tau), {"m": m, "v": v}

    @abstractmethod
    def second_moment(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        """``v_t`` from ``v_{t-1}`` and ``Delta_t^2``; a new array."""


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """``v_t = v_{t-1} + Delta_t^2``: steps only shrink. The paper runs it without momentum (``beta1 = 0``)."""

    beta1: float = setting(0.0, ge=0, lt=1, help="decay of the mean of past updates")

    def second_moment(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return v + square


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """``v_t`` is a decaying mean of ``Delta_t^2``."""

    beta2: float = setting(0.99, ge=0, lt=1, help="decay of the mean of past squared updates")

    def second_moment(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(Adaptive):
    """``v_t`` moves towards ``Delta_t^2`` by a step that does not depend on how far ``v`` is: a rare coordinate is not
    forgotten as fast as by FedAdam."""

    beta2: float = setting(0.99, ge=0, lt=1, help="decay of the mean of past squared updates")

    def second_moment(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return v - (1 - self.beta2) * square * np.sign(v - square)
