"""Slow twins of gradient coding: straggler models window by window, and a master that keeps every result it is sent."""

from __future__ import annotations

import itertools

import numpy as np


def windows(pattern: np.ndarray, length: int):
    """All runs of ``length`` consecutive rounds of ``pattern`` ``(rounds, n)``; shorter ones where it is short."""
    for first in range(max(1, len(pattern) - length + 1)):
        yield pattern[first : first + length]


def bursty(pattern: np.ndarray, B: int, W: int, lam: int) -> bool:
    """(B, W, lambda)-bursty, by its definition."""
    for window in windows(pattern, W):
        late = [np.flatnonzero(column) for column in window.T if column.any()]
        if len(late) > lam or any(rounds[-1] - rounds[0] + 1 > B for rounds in late):
            return False
    return True


def arbitrary(pattern: np.ndarray, N: int, W: int, lam: int) -> bool:
    """(N, W, lambda)-arbitrary, by its definition."""
    for window in windows(pattern, W):
        counts = [int(column.sum()) for column in window.T if column.any()]
        if len(counts) > lam or any(count > N for count in counts):
            return False
    return True


def run(scheme, pattern: np.ndarray, gradients: dict[int, np.ndarray]) -> dict[int, np.ndarray | None]:
    """Each job's decoded gradient, or None where it can't be had at its deadline, under the stragglers of ``pattern``.

    ``gradients`` are the chunks' ``(chunks, d)`` of each job. Every number is computed one by one.
    """
    results: dict[tuple[int, int, int], np.ndarray] = {}
    decoded: dict[int, np.ndarray | None] = {}
    for round, late in enumerate(pattern, start=1):
        for worker, tasks in enumerate(scheme.assign(round)):
            for task in tasks if not late[worker] else ():
                total = np.zeros(gradients[task.job].shape[1])
                for chunk, weight in zip(task.chunks, task.weights, strict=True):
                    total += weight * gradients[task.job][chunk].astype(np.float64)
                results[task.job, worker, task.part] = total
        scheme.done(round, ~late)
        due = round - scheme.delay
        if due >= 1:
            found = scheme.decode(due)
            decoded[due] = None if found is None else sum(a * results[due, i, part] for (i, part), a in found.items())
    return decoded


def patterns(n: int, rounds: int):
    """Every pattern there is."""
    for bits in itertools.product([False, True], repeat=n * rounds):
        yield np.array(bits).reshape(rounds, n)


def cut(times: list[int | None], mu: float, past: np.ndarray, admits) -> tuple[int, tuple[bool, ...]] | None:
    """The earliest tick from ``(1 + mu)`` times the fastest answer on at which those who are late may be; by trial."""
    known = [t for t in times if t is not None]
    first = int((1 + mu) * min(known))
    for end in range(first, max(first, *known) + 1):
        late = np.array([t is None or t > end for t in times])
        if admits(past, late):
            return end, tuple(late.tolist())
    return None
