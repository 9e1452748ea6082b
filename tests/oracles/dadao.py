"""DADAO eagerly and from the definition: every peer flows at every event, by a matrix exponential; and what it is
compared with, synchronous gradient tracking. Float64, and no code of the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from scipy.linalg import expm


def chi(number: int, edges: np.ndarray, rates: np.ndarray) -> tuple[float, float]:
    """``1 / lambda_min^+`` and half the largest resistance of an edge."""
    laplacian = np.zeros((number, number))
    ends = []
    for (i, j), rate in zip(edges, rates, strict=True):
        e = np.zeros(number)
        e[i], e[j] = 1, -1
        laplacian += rate * np.outer(e, e)
        ends.append(e)
    inverse = np.linalg.pinv(laplacian, hermitian=True)
    return 1 / np.sort(np.linalg.eigvalsh(laplacian))[1], max(e @ inverse @ e for e in ends) / 2


def generator_matrix(smoothness: float, convexity: float) -> np.ndarray:
    """M of the flow ``d/dt (x, x~, y, y~, z, z~) = M (...)``."""
    nu = convexity / 2
    s = math.sqrt(nu / smoothness)
    eta, alpha, alpha_t, theta = s / 8, s / 4, s / 8, 1 / (2 * s)
    return np.array(
        [
            [-eta, eta, 0, 0, 0, 0],
            [eta, -eta, 0, 0, 0, 0],
            [0, 0, -alpha, alpha, 0, 0],
            [0, -theta * nu, -theta, 0, -theta, 0],
            [0, 0, 0, 0, -alpha, alpha],
            [0, 0, 0, 0, alpha_t, -alpha_t],
        ]
    )


def run(
    start: np.ndarray,
    gradient: Callable[[int, np.ndarray], np.ndarray],
    events: Iterable[tuple[float, int | tuple[int, int]]],
    smoothness: float,
    convexity: float,
    chi1: float,
) -> np.ndarray:
    """The states ``(n, 6, d)`` after ``events``: times with the peer that takes a gradient, or the pair that meets."""
    nu = convexity / 2
    s = math.sqrt(nu / smoothness)
    matrix = generator_matrix(smoothness, convexity)
    states = np.zeros((len(start), 6, start.shape[1]))
    states[:, 0] = states[:, 1] = start
    now = 0.0
    for time, what in events:
        states = np.einsum("ab,nbd->nad", expm(matrix * (time - now)), states)
        now = time
        if isinstance(what, tuple):
            i, j = what
            m = states[i, 2] + states[i, 4] - states[j, 2] - states[j, 4]
            states[i, 4] -= m / 2
            states[j, 4] += m / 2
            states[i, 5] -= 2 * chi1 / s * m
            states[j, 5] += 2 * chi1 / s * m
        else:
            x, _, _, yt, _, _ = states[what].copy()
            r = gradient(what, x) - nu * x - yt
            states[what, 0] -= r / (4 * smoothness)
            states[what, 1] -= r / (4 * math.sqrt(nu * smoothness))
            states[what, 3] += (s / 4 + 1) * r
    return states


def gradient_tracking(
    gradients: Callable[[np.ndarray], np.ndarray],
    weights: np.ndarray,
    best: np.ndarray,
    lr: float,
    most: int,
    to: float,
) -> int | None:
    """Iterations of ``x <- W (x - lr y), y <- W y + g(x') - g(x)`` from zero until the mean squared distance to
    ``best`` is ``to`` of that at the start; None: not within ``most``."""
    x = np.zeros((len(weights), len(best)))
    g = gradients(x)
    y = g.copy()
    for iteration in range(1, most + 1):
        x = weights @ (x - lr * y)
        fresh = gradients(x)
        y, g = weights @ y + fresh - g, fresh
        error = ((x - best) ** 2).sum() / len(x) / (best @ best)
        if error <= to:
            return iteration
        if not error < 1e6:
            return None
    return None
