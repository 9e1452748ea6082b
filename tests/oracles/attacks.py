"""Slow twin of `clients.behaviours`: each attack from its definition, coordinate by coordinate, in Python floats.

Sizes that the library finds in closed form are found here by bisection on the definition's bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm

Rows = Sequence[Sequence[float]]


def mean(rows: Rows) -> list[float]:
    return [math.fsum(column) / len(column) for column in zip(*rows, strict=True)]


def deviation(rows: Rows) -> list[float]:
    out = []
    for column in zip(*rows, strict=True):
        centre = math.fsum(column) / len(column)
        out.append(math.sqrt(math.fsum((x - centre) ** 2 for x in column) / (len(column) - 1)))
    return out


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    return math.dist(a, b)


def moved(rows: Rows, direction: Sequence[float], size: float) -> list[float]:
    return [m + size * p for m, p in zip(mean(rows), direction, strict=True)]


def alie(rows: Rows, number: int, hostile: int) -> list[float]:
    needed = math.floor(number / 2 + 1) - hostile
    z = norm.ppf((number - hostile - needed) / (number - hostile))
    return moved(rows, deviation(rows), -z)


def ipm(rows: Rows, scale: float) -> list[float]:
    return [-scale * m for m in mean(rows)]


def direction(rows: Rows, kind: str) -> list[float]:
    centre = mean(rows)
    if kind == "std":
        return [-s for s in deviation(rows)]
    if kind == "sign":
        return [-math.copysign(1, m) if m else 0.0 for m in centre]
    length = math.sqrt(math.fsum(m * m for m in centre))
    return [-m / length for m in centre]


def within_max(rows: Rows, vector: Sequence[float]) -> bool:
    bound = max(distance(a, b) for a in rows for b in rows)
    return max(distance(vector, x) for x in rows) <= bound


def within_sum(rows: Rows, vector: Sequence[float]) -> bool:
    bound = max(math.fsum(distance(a, b) ** 2 for b in rows) for a in rows)
    return math.fsum(distance(vector, x) ** 2 for x in rows) <= bound


def largest(rows: Rows, kind: str, within: Callable[[Rows, Sequence[float]], bool]) -> float:
    """The largest size, by doubling and bisection: the bounds are convex in it, and hold at zero."""
    way = direction(rows, kind)
    low, high = 0.0, 1.0
    while within(rows, moved(rows, way, high)):
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if within(rows, moved(rows, way, middle)):
            low = middle
        else:
            high = middle
    return low


def extreme(rows: Rows) -> int:
    """The row furthest from the mean along the first right singular vector of the centred rows."""
    centred = np.array(rows) - np.array(mean(rows))
    first = np.linalg.svd(centred)[2][0]
    return int(np.argmax([abs(sum(c * v for c, v in zip(row, first, strict=True))) for row in centred]))


def coordinate_median(rows: np.ndarray) -> np.ndarray:
    """A rule to search against."""
    out = []
    for column in zip(*rows.tolist(), strict=True):
        ordered = sorted(column)
        half = len(ordered) // 2
        out.append(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)
    return np.array(out)


def insert_trigger(tokens: Sequence[int], trigger: Sequence[int], longest: int) -> list[int]:
    """One token dropped at a time, from before the last, until the sample fits."""
    out = [tokens[0], *trigger, *tokens[1:]]
    while len(out) > longest and len(out) > 1 + len(trigger) + 1:
        del out[-2]
    return out
