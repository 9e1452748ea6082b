"""Just One Byte written from its definition, one number at a time, with nothing of the library in it.

Peers minimise quadratics ``L_k(theta) = |theta - target_k|^2 / 2``; a direction is whatever ``z(t, k, s)`` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Directions = Callable[[int, int, int], np.ndarray]


def levels() -> list[float]:
    """The 255 numbers that one byte stands for."""
    sizes = [math.exp(e / 8) for e in range(-63, 64)]
    return [0.0, *sizes, *(-x for x in sizes)]


def one_byte(g: float) -> float:
    """The level that ``g`` is sent as, by looking at all of them: the nearest in size's logarithm, or zero."""
    smallest = math.exp(-63 / 8)
    if abs(g) < smallest / 2:
        return 0.0
    sign = math.copysign(1.0, g)
    return min((x for x in levels() if x * sign > 0), key=lambda x: abs(math.log(abs(x)) - math.log(abs(g))))


def state(theta: np.ndarray, scalars: dict, z: Directions, lr: float, norm: str) -> np.ndarray:
    """theta ``(d,)`` after all rounds of ``scalars[t][k][s]``, in float64 and one sum."""
    out = theta.astype(np.float64)
    for t, peers in scalars.items():
        n = sum(len(own) for own in peers.values())
        for k, own in peers.items():
            for s, g in enumerate(own):
                out = out - lr * float(g) / (n if norm == "n" else math.sqrt(n)) * z(t, k, s).astype(np.float64)
    return out


def run_in_place(
    targets: np.ndarray, z: Directions, rounds: int, directions: int, eps: float, lr: float, restore: bool
) -> list[np.ndarray]:
    """Every peer's replica, float32, of a run whose probes add eps z, take 2 eps z away and add eps z again.

    With ``restore`` the state is put back from a copy instead.
    """
    peers, d = targets.shape
    replicas = [np.zeros(d, np.float32) for _ in range(peers)]
    for t in range(1, rounds + 1):
        scalars = []
        for k, theta in enumerate(replicas):
            for s in range(directions):
                kept, move = theta.copy(), np.float32(eps) * z(t, k, s).astype(np.float32)
                theta += move
                plus = 0.5 * float(((theta - targets[k]) ** 2).sum())
                theta -= np.float32(2) * move
                minus = 0.5 * float(((theta - targets[k]) ** 2).sum())
                theta += move
                if restore:
                    theta[:] = kept
                scalars.append((k, s, (plus - minus) / (2 * eps)))
        for theta in replicas:
            for k, s, g in scalars:
                theta -= np.float32(lr * g / len(scalars)) * z(t, k, s).astype(np.float32)
    return replicas
