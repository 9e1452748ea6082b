"""The master's rounds on the virtual clock: who is sent what, when a round ends, and whose answers count.

A worker that is late is told to stop: its work of the round is lost, and it begins the next round with all others.
Which answers will count is known from sizes and speeds alone, so the late ones are never computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fl.coding.schemes import Scheme, Task
from fl.coding.wait import Cut, cut
from fl.fleet import Fleet, Job


@dataclass(frozen=True)
class Round:
    """``jobs``: when each worker that was asked begins, is done and arrives; ``cut``: how the round ended."""

    jobs: Mapping[int, Job]
    cut: Cut


class Master:
    """Runs ``scheme`` over ``samples`` samples. ``late`` ``(rounds, n)``: the stragglers of the last W - 1 rounds."""

    def __init__(self, scheme: Scheme, samples: int, mu: float, waiting: str):
        self.scheme, self.mu, self.waiting = scheme, mu, waiting
        self.bounds = np.rint(np.concatenate([[0.0], np.cumsum(scheme.shares)]) * samples).astype(np.int64)
        self.late = np.zeros((0, scheme.n), dtype=bool)

    def samples(self, tasks: Sequence[Task]) -> int:
        """How many samples' gradients ``tasks`` are made of."""
        return sum(int((self.bounds[t.chunks + 1] - self.bounds[t.chunks]).sum()) for t in tasks)

    def round(
        self, fleet: Fleet, number: int, start: int, asked: Mapping[int, tuple[int, int, int]], absent: Sequence[int]
    ) -> Round:
        """Round ``number`` from tick ``start``. ``asked``: (steps, bytes down, bytes up) of each worker that has work.

        ``absent`` are those that have some and could not be asked.
        """
        work = [(worker, number, *sizes) for worker, sizes in asked.items()]
        jobs = dict(zip(asked, fleet.jobs(start, work), strict=True))
        times: list[int | None] = [0] * self.scheme.n
        for worker in absent:
            times[worker] = None
        for worker, job in jobs.items():
            times[worker] = None if job.dropped_at is not None else job.arrived - start
        return Round(jobs, cut(times, self.mu, self.late, self.scheme.model, self.waiting))

    def done(self, number: int, late: np.ndarray) -> None:
        """Round ``number`` is over, and nothing came from the workers that are ``late`` ``(n,)``."""
        self.scheme.done(number, ~late)
        recent = np.concatenate([self.late, late[None]])
        self.late = recent[max(0, len(recent) - self.scheme.model.W + 1) :]
