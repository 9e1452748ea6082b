"""Slow twin of `aggregators.robust`: every rule from its definition, on float64 rows, with loops and whole vectors.

Here too: hostile rows of several kinds, to try the rules on.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np

Rows = np.ndarray  # (n, d)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((np.asarray(a, np.float64) - b) ** 2).sum()))


def krum_score(rows: Rows, i: int, f: int) -> float:
    n = len(rows)
    others = sorted(distance(rows[i], rows[j]) ** 2 for j in range(n) if j != i)
    return sum(others[: max(1, n - f - 2)])


def by_krum(rows: Rows, f: int) -> list[int]:
    """By rising score; where two are each other's nearest, which is all that counts, first the one nearer to all."""

    def key(i: int) -> tuple[float, float]:
        return krum_score(rows, i, f), sum(distance(rows[i], x) ** 2 for x in rows)

    return sorted(range(len(rows)), key=key)


def krum(rows: Rows, f: int) -> np.ndarray:
    return rows[by_krum(rows, f)[0]]


def multi_krum(rows: Rows, f: int, m: int | None = None) -> np.ndarray:
    m = m or len(rows) - f - 2
    return sum(rows[i] for i in by_krum(rows, f)[:m]) / m


def nna(rows: Rows, f: int) -> np.ndarray:
    nearest = sorted(range(len(rows)), key=lambda i: distance(rows[i], 0 * rows[i]))[: len(rows) - f]
    return sum(rows[i] for i in nearest) / len(nearest)


def mda_subsets(rows: Rows, f: int) -> list[tuple[int, ...]]:
    """All subsets of n - f rows of the least diameter (to 12 digits)."""
    apart = [[distance(a, b) for b in rows] for a in rows]
    found: list[tuple[float, tuple[int, ...]]] = []
    for subset in combinations(range(len(rows)), len(rows) - f):
        found.append((max((apart[i][j] for i, j in combinations(subset, 2)), default=0.0), subset))
    least = min(found)[0]
    return [subset for diameter, subset in found if diameter <= least * (1 + 1e-12)]


def mda(rows: Rows, f: int) -> np.ndarray:
    """Of several subsets the one that drops the rows of the largest sums of squared distances, one after another."""
    subsets = mda_subsets(rows, f)
    sums = [sum(distance(a, b) ** 2 for b in rows) for a in rows]
    far_first = sorted(range(len(rows)), key=lambda i: -sums[i])
    best = max(subsets, key=lambda s: [i not in s for i in far_first])
    return np.mean([rows[i] for i in best], axis=0)


def median(rows: Rows, weights: np.ndarray | None = None) -> np.ndarray:
    n, d = rows.shape
    weights = np.ones(n) if weights is None else weights
    out = np.zeros(d)
    for c in range(d):
        values = sorted(zip(rows[:, c], weights, strict=True))
        half = sum(weights) / 2
        # the interval of minimisers of sum_i w_i |x_i - m|; its middle
        low = next(v for k, (v, _) in enumerate(values) if sum(w for _, w in values[: k + 1]) >= half * (1 - 1e-12))
        high = next(
            v for k, (v, _) in reversed(list(enumerate(values))) if sum(w for _, w in values[k:]) >= half * (1 - 1e-12)
        )
        out[c] = (low + high) / 2
    return out


def trimmed_mean(rows: Rows, f: int) -> np.ndarray:
    return np.array([np.mean(sorted(column)[f : len(column) - f]) for column in rows.T])


def around_median(rows: Rows, keep: int) -> np.ndarray:
    out = []
    for column in rows.T:
        middle = np.median(column)
        out.append(np.mean(sorted(column, key=lambda x: (abs(x - middle), x))[:keep]))
    return np.array(out)


def meamed(rows: Rows, f: int) -> np.ndarray:
    return around_median(rows, len(rows) - f)


def bulyan(rows: Rows, f: int) -> np.ndarray:
    left, chosen = list(rows), []
    while len(chosen) < len(rows) - 2 * f:
        chosen.append(left.pop(by_krum(np.array(left), f)[0]))
    return around_median(np.array(chosen), len(rows) - 4 * f)


def geometric_median(rows: Rows, weights: np.ndarray | None = None, steps: int = 20_000) -> np.ndarray:
    weights = np.ones(len(rows)) if weights is None else weights
    z = median(rows, weights)
    for _ in range(steps):
        pull = [w / max(1e-13, distance(x, z)) for w, x in zip(weights, rows, strict=True)]
        new = sum(p * x for p, x in zip(pull, rows, strict=True)) / sum(pull)
        if distance(new, z) < 1e-13:
            break
        z = new
    return z


def sum_of_distances(rows: Rows, z: np.ndarray, weights: np.ndarray | None = None) -> float:
    weights = np.ones(len(rows)) if weights is None else weights
    return sum(w * distance(x, z) for w, x in zip(weights, rows, strict=True))


def centered_clipping(
    rows: Rows, tau: float, iterations: int, centre: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    weights = np.ones(len(rows)) / len(rows) if weights is None else weights / sum(weights)
    v = centre
    for _ in range(iterations):
        v = v + sum(w * (x - v) * min(1, tau / max(1e-300, distance(x, v))) for w, x in zip(weights, rows, strict=True))
    return v


def caf(rows: Rows, f: int) -> np.ndarray:
    n = len(rows)
    counts = np.ones(n)
    best, least = rows.mean(axis=0), np.inf
    while sum(counts) > n - 2 * f:
        mean = sum(c * x for c, x in zip(counts, rows, strict=True)) / sum(counts)
        spread = sum(c * np.outer(x - mean, x - mean) for c, x in zip(counts, rows, strict=True)) / sum(counts)
        values, vectors = np.linalg.eigh(spread)
        if values[-1] < least:
            best, least = mean, values[-1]
        t = np.array([float((x - mean) @ vectors[:, -1]) ** 2 for x in rows])
        top = max(t[counts > 0])
        if top == 0:
            break
        counts = np.array([max(0.0, c * (1 - s / top)) for c, s in zip(counts, t, strict=True)])
        counts[counts < 1e-9] = 0
    return best


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def fltrust(rows: Rows, root: np.ndarray) -> np.ndarray:
    trust = [max(0.0, cosine(x, root)) for x in rows]
    if sum(trust) == 0:
        return np.zeros(rows.shape[1])
    size = np.linalg.norm(root)
    return sum(t * size / np.linalg.norm(x) * x for t, x in zip(trust, rows, strict=True)) / sum(trust)


def foolsgold(rows: Rows, sums: Rows) -> np.ndarray:
    n = len(rows)
    alike = [[cosine(sums[i], sums[j]) if i != j else None for j in range(n)] for i in range(n)]
    nearest = [max(c for c in row if c is not None) for row in alike]
    weights = []
    for i in range(n):
        most = -np.inf
        for j in range(n):
            if j != i:
                pardon = max(0, nearest[i]) / nearest[j] if nearest[j] > nearest[i] and nearest[j] > 0 else 1
                most = max(most, alike[i][j] * pardon)
        weights.append(min(1.0, max(0.0, 1 - most)))
    if max(weights) == 0:
        return np.zeros(rows.shape[1])
    weights = [min(0.99, w / max(weights)) for w in weights]
    weights = [0.0 if w == 0 else min(1.0, max(0.0, np.log(w / (1 - w)) + 0.5)) for w in weights]
    return sum(w * x for w, x in zip(weights, rows, strict=True)) / sum(weights)


def nnm(rows: Rows, f: int) -> Rows:
    out = []
    for i, x in enumerate(rows):
        order = sorted(range(len(rows)), key=lambda j: (j != i, distance(x, rows[j])))
        out.append(np.mean([rows[j] for j in order[: len(rows) - f]], axis=0))
    return np.array(out)


def clipping(rows: Rows, norm: float) -> Rows:
    return np.array([x * min(1.0, norm / max(1e-300, np.linalg.norm(x))) for x in rows])


def arc(rows: Rows, f: int) -> Rows:
    n = len(rows)
    largest = sorted((float(np.linalg.norm(x)) for x in rows), reverse=True)
    return clipping(rows, largest[2 * f * (n - f) // n])


def dense(lefts: list[list[np.ndarray]], rights: list[list[np.ndarray]], rest: Rows) -> Rows:
    """Weight changes as rows: the products of all modules, flattened, and the rest."""
    modules = [
        np.array([(a @ b).ravel() for a, b in zip(l, r, strict=True)]) for l, r in zip(lefts, rights, strict=True)
    ]
    return np.concatenate([*modules, rest], axis=1)


def kappa(rows: Rows, honest: np.ndarray, outcome: np.ndarray) -> float:
    """``||F - mean_S||^2`` over the honest rows' mean squared distance from their mean: what a kappa has to exceed."""
    good = rows[honest]
    mean = good.mean(axis=0)
    return distance(outcome, mean) ** 2 / float(np.mean([distance(x, mean) ** 2 for x in good]))


def _far(honest: Rows, f: int, draw: np.random.Generator) -> Rows:
    return np.tile(honest.mean(axis=0) + 10.0 ** draw.uniform(0, 6) * draw.normal(size=honest.shape[1]), (f, 1))


def _alie(honest: Rows, f: int, draw: np.random.Generator) -> Rows:
    return np.tile(honest.mean(axis=0) - draw.uniform(0, 4) * honest.std(axis=0, ddof=1), (f, 1))


def _ipm(honest: Rows, f: int, draw: np.random.Generator) -> Rows:
    return np.tile(-draw.uniform(0, 3) * honest.mean(axis=0), (f, 1))


def _mimic(honest: Rows, f: int, draw: np.random.Generator) -> Rows:
    return np.tile(honest[draw.integers(len(honest))], (f, 1))


def _noise(honest: Rows, f: int, draw: np.random.Generator) -> Rows:
    return honest.mean(axis=0) + draw.uniform(0, 5) * draw.normal(size=(f, honest.shape[1]))


def _shifted(honest: Rows, f: int, draw: np.random.Generator) -> Rows:
    direction = draw.normal(size=honest.shape[1])
    spread = np.sqrt(((honest - honest.mean(axis=0)) ** 2).sum(axis=1).mean())
    return np.tile(honest.mean(axis=0) + draw.uniform(0, 3) * spread * direction / np.linalg.norm(direction), (f, 1))


ATTACKS: tuple[Callable[[Rows, int, np.random.Generator], Rows], ...] = (_far, _alie, _ipm, _mimic, _noise, _shifted)


def attacked(n: int, f: int, d: int, draw: np.random.Generator, attack: int) -> tuple[Rows, np.ndarray]:
    """``n`` rows in random order, of which f are hostile, and where the honest ones are."""
    centre = draw.normal(size=d) * draw.choice([0.0, 1.0, 30.0])
    scales = np.exp(draw.normal(size=d)) if draw.random() < 0.5 else np.ones(d)
    honest = centre + scales * draw.normal(size=(n - f, d))
    if draw.random() < 0.3:  # clients of two kinds
        honest[: (n - f) // 3] += 3 * draw.normal(size=d)
    if f == 0:
        return honest, np.arange(n)
    rows = np.concatenate([honest, ATTACKS[attack % len(ATTACKS)](honest, f, draw)])
    order = draw.permutation(n)
    return rows[order], np.flatnonzero(order < n - f)
