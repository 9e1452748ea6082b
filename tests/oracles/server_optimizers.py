"""Slow twin of `aggregators.server_optimizers`: Algorithm 2 of Reddi et al. (2021), one scalar at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def adaptive_federated_optimization(
    method: str,
    x: Sequence[float],
    rounds: Sequence[Sequence[Sequence[float]]],
    eta: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> list[list[float]]:
    """``x_1, x_2, ...`` from ``x_0`` and ``rounds[t][i][j]``, coordinate j of client i's ``x_i^K - x_t`` in round t."""
    x = list(x)
    m_previous = [0.0] * len(x)
    v_previous = [tau**2] * len(x)  # "v_{-1} >= tau^2"
    trajectory = []
    for deltas in rounds:
        for j in range(len(x)):
            delta = 0.0
            for client in deltas:
                delta += client[j]
            delta = delta / len(deltas)
            m = beta1 * m_previous[j] + (1 - beta1) * delta
            if method == "fedadagrad":
                v = v_previous[j] + delta**2
            elif method == "fedyogi":
                v = v_previous[j] - (1 - beta2) * delta**2 * _sign(v_previous[j] - delta**2)
            elif method == "fedadam":
                v = beta2 * v_previous[j] + (1 - beta2) * delta**2
            else:
                raise ValueError(method)
            x[j] = x[j] + eta * m / (math.sqrt(v) + tau)
            m_previous[j], v_previous[j] = m, v
        trajectory.append(list(x))
    return trajectory


def server_momentum(
    x: Sequence[float], rounds: Sequence[Sequence[Sequence[float]]], lr: float, momentum: float
) -> list[list[float]]:
    """FedAvgM (Hsu et al. 2019): ``v <- momentum v + Delta``, ``x <- x + lr v``."""
    x, velocity, trajectory = list(x), [0.0] * len(x), []
    for deltas in rounds:
        for j in range(len(x)):
            mean = sum(client[j] for client in deltas) / len(deltas)
            velocity[j] = momentum * velocity[j] + mean
            x[j] = x[j] + lr * velocity[j]
        trajectory.append(list(x))
    return trajectory
