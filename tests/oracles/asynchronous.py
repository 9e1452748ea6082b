"""The slow twin of the asynchronous schedules: tick after tick, on clients whose objectives are quadratic, in float64.

Written from the formulas of FedAsync (arXiv 1903.03934), FedBuff (arXiv 2106.06639) and the general form of Fraboni et
al. (arXiv 2206.10189). It keeps every version that there ever was, and no queue of events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Quadratics:
    """``f_i(x) = 1/2 (x - c_i)^T H_i (x - c_i)`` of M clients: ``hessians`` ``(M, d, d)``, ``centres`` ``(M, d)``."""

    hessians: np.ndarray
    centres: np.ndarray
    lr: float
    steps: int

    @classmethod
    def drawn(cls, seed: int, number: int, size: int, lr: float, steps: int) -> Quadratics:
        """Eigenvalues between 0.5 and 1.5; centres from N(0, I)."""
        rng = np.random.default_rng(seed)
        turns = np.linalg.qr(rng.standard_normal((number, size, size)))[0]
        values = rng.uniform(0.5, 1.5, (number, 1, size))
        return cls((turns * values) @ turns.transpose(0, 2, 1), rng.standard_normal((number, size)), lr, steps)

    def update(self, client: int, start: np.ndarray) -> np.ndarray:
        """``K`` steps of gradient descent on ``f_i``, as the change from ``start``."""
        x = start
        for _ in range(self.steps):
            x = x - self.lr * self.hessians[client] @ (x - self.centres[client])
        return x - start

    def optimum(self, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """Where ``sum_i w_i f_i`` is least."""
        left = np.einsum("i,ijk->jk", np.asarray(weights), self.hessians)
        right = np.einsum("i,ijk,ik->j", np.asarray(weights), self.hessians, self.centres)
        return np.linalg.solve(left, right)


@dataclass
class Arrival:
    tick: int
    client: int
    start_version: int
    staleness: int


@dataclass
class Step:
    tick: int
    version: int
    staleness: list[int]
    state: np.ndarray


def f80(number: int, slowest: int) -> list[int]:
    """Ticks of a job of each client: ``T_i = T (1 - 0.8 i / (M - 1))``."""
    return [round(slowest * (1 - 0.8 * i / (number - 1))) for i in range(number)]


def contributions(scheme: str, durations: Sequence[int], size: int = 1) -> list[float]:
    """How often client i is in one server step, in the long run (the ``p_i / d_i`` of the unbiased weights).

    ``size`` is FedBuff's buffer, and FedFix's ticks between steps.
    """
    if scheme == "fedfix":
        return [1 / math.ceil(t / size) for t in durations]
    return [(size if scheme == "fedbuff" else 1) / t / sum(1 / other for other in durations) for t in durations]


def play(
    durations: Sequence[int],
    update: Callable[[int, np.ndarray], np.ndarray],
    start: np.ndarray,
    steps: int,
    weight: Callable[[int, int, int], float],
    buffer: int | None = None,
    period: int | None = None,
    mix: bool = False,
    factor: Callable[[int], float] = lambda staleness: 1.0,
) -> tuple[list[Arrival], list[Step]]:
    """``steps`` server steps: with every ``buffer`` arrivals, or at every ``period`` ticks.

    ``weight`` (client, its contributions so far, server steps so far, both with this one) is what one contribution is
    multiplied with, beside ``factor`` of its staleness.
    """
    number, now = len(durations), 0
    versions = [start]
    begun: dict[int, tuple[int, int]] = {}  # client -> tick and version of its job's start
    waiting: list[tuple[int, int]] = []  # client and start version of what has arrived
    counts = [0] * number
    arrivals: list[Arrival] = []
    done: list[Step] = []

    def step() -> None:
        newest, moved = versions[-1], np.zeros_like(start)
        ages = [len(versions) - 1 - version for _, version in waiting]
        for client, _ in waiting:
            counts[client] += 1
        for (client, version), age in zip(waiting, ages, strict=True):
            change = update(client, versions[version])
            if mix:
                change = versions[version] + change - newest
            moved = moved + factor(age) * weight(client, counts[client], len(done) + 1) * change
        if waiting:
            versions.append(newest + moved)
        waiting.clear()
        done.append(Step(now, len(versions) - 1, ages, versions[-1]))

    while len(done) < steps:
        for client in range(number):
            if client in begun and begun[client][0] + durations[client] == now and len(done) < steps:
                version = begun.pop(client)[1]
                arrivals.append(Arrival(now, client, version, len(versions) - 1 - version))
                waiting.append((client, version))
                if buffer is not None and len(waiting) == buffer:
                    step()
        if period is not None and now > 0 and now % period == 0:
            step()
        if period is None or now % period == 0:
            for client in range(number):
                begun.setdefault(client, (now, len(versions) - 1))
        now += 1
    return arrivals, done
