"""Sequential gradient coding: which shares of which jobs the workers compute in a round, and when a job can be decoded.

Job t is a full gradient, a sum over chunks of the data; it begins in round t and is due at the end of round t + T.
Loads are shares of the full gradient's work, for each worker and round.

========= ====================================== =========== =======================================================
scheme    load                                   delay T     what it is sure to tolerate
========= ====================================== =========== =======================================================
GC        (s + 1) / n                            0           s stragglers a round (s = 0: uncoded)
SR-SGC    (s + 1) / n, s = ceil(B l / (W-1+B))   B           in any W rounds (B, W, l)-bursty, or s stragglers a round;
                                                             B divides W - 1
M-SGC     (l + 1) (W-1+B) / (n (B + (W-1)(l+1))) W - 2 + B   in any W - 1 + B rounds (B, W, l)-bursty, or
                                                             (B, W - 1 + B, l)-arbitrary
========= ====================================== =========== =======================================================

Krishnan, Ebrahimi, Khisti, arXiv 2211.13802. A scheme keeps a bit for each worker, part and job of
the last T + 1: nothing grows with the number of rounds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fl.coding.codes import Code, make_code
from fl.coding.stragglers import Arbitrary, Bursty, Either, Model
from fl.errors import ShoalError


@dataclass(frozen=True, eq=False)
class Task:
    """A worker's share of ``job``: ``sum_j weights_j g_j`` over ``chunks`` ``(k,)``. ``part`` names it in the job."""

    job: int
    part: int
    chunks: np.ndarray
    weights: np.ndarray


class Scheme(ABC):
    """What the schemes share. ``jobs`` is how many there are (numbered from 1), in rounds 1 to ``jobs + delay``.

    - ``shares`` ``(chunks,)``: the share of the data that each chunk holds; they add up to 1.
    - ``parts``: how many different tasks of one job a worker may have.
    - ``model``: the straggler patterns after which every job meets its deadline.
    - ``got``: of each job that is not over, ``(n, parts)`` bool: which tasks' results have arrived.

    In each round call `assign`, then `done`, then `decode` for the job that is due, ``round - delay``.
    """

    delay: int
    load: float
    parts: int
    shares: np.ndarray
    model: Model

    def __init__(self, n: int, jobs: int):
        self.n, self.jobs = n, jobs
        self.got: dict[int, np.ndarray] = {}

    @abstractmethod
    def _parts(self, job: int, slot: int, got: np.ndarray) -> np.ndarray:
        """``(n,)``: the part of ``job`` that each worker does in the round ``job + slot``; -1: none."""

    @abstractmethod
    def _task(self, job: int, worker: int, part: int) -> Task: ...

    @abstractmethod
    def _combine(self, got: np.ndarray) -> dict[tuple[int, int], float] | None: ...

    def _received(self, job: int) -> np.ndarray:
        return self.got.get(job, np.zeros((self.n, self.parts), dtype=bool))

    def _plan(self, round: int) -> list[tuple[int, np.ndarray]]:
        """``(job, parts (n,))`` of the jobs that are worked on in ``round``, the newest first."""
        jobs = range(min(round, self.jobs), max(0, round - self.delay - 1), -1)
        return [(job, self._parts(job, round - job, self._received(job))) for job in jobs]

    def assign(self, round: int) -> list[list[Task]]:
        """Each worker's tasks in ``round``, the newest job's first. Changes nothing."""
        tasks: list[list[Task]] = [[] for _ in range(self.n)]
        for job, parts in self._plan(round):
            for worker in np.flatnonzero(parts >= 0):
                tasks[worker].append(self._task(job, int(worker), int(parts[worker])))
        return tasks

    def done(self, round: int, delivered: np.ndarray) -> None:
        """Note the round's end: ``delivered`` ``(n,)`` says whose results have arrived. Forgets jobs that are over."""
        for job, parts in self._plan(round):
            workers = np.flatnonzero(delivered & (parts >= 0))
            bits = self._received(job).copy()
            bits[workers, parts[workers]] = True
            self.got[job] = bits
        self.got = {job: bits for job, bits in self.got.items() if job >= round - self.delay}

    def decode(self, job: int) -> dict[tuple[int, int], float] | None:
        """The weights of the results, by (worker, part), that add up to the full gradient; None: it can't be had."""
        return self._combine(self._received(job))

    def decodable(self, job: int) -> bool:
        return self.decode(job) is not None

    def state(self) -> dict[str, np.ndarray]:
        """The bits, for a checkpoint."""
        return {str(job): bits.astype(np.uint8) for job, bits in self.got.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Undo `state`."""
        self.got = {int(job): bits.astype(bool) for job, bits in state.items()}


class GC(Scheme):
    """Gradient coding of each round by itself: a job that s or fewer workers owe can be decoded at once."""

    parts = 1

    def __init__(self, n: int, jobs: int, s: int, kind: str = "auto", seed: int = 0):
        super().__init__(n, jobs)
        self.code = make_code(n, s, kind, seed)
        self.delay, self.load = 0, (s + 1) / n
        self.shares = np.full(n, 1 / n)
        self.model: Model = Bursty(W=1, B=1, lam=s)

    def _parts(self, job: int, slot: int, got: np.ndarray) -> np.ndarray:
        return np.zeros(self.n, dtype=np.int64)

    def _task(self, job: int, worker: int, part: int) -> Task:
        return Task(job, part, self.code.chunks[worker], self.code.weights[worker])

    def _combine(self, got: np.ndarray) -> dict[tuple[int, int], float] | None:
        return _weights(self.code, got[:, 0], 0)


class SRSGC(GC):
    """Selective repeat: a job that more than s workers owe after its round is mended B rounds later.

    Then as many of those that owe it as exceed s repeat their task of it, in place of the present job's.
    """

    def __init__(self, n: int, jobs: int, B: int, W: int, lam: int, kind: str = "auto", seed: int = 0):
        _check(n, B, W, lam)
        if (W - 1) % B:
            raise ShoalError(f"SR-SGC needs a B that divides W - 1, not B = {B} and W = {W}.")
        super().__init__(n, jobs, math.ceil(B * lam / (W - 1 + B)), kind, seed)
        few = Bursty(W=1, B=1, lam=self.code.s)
        self.delay, self.model = B, Either(W, (Bursty(W, B, lam), few))

    def _repeats(self, job: int) -> np.ndarray:
        """``(n,)`` bool: who repeats its task of ``job``."""
        owe = np.flatnonzero(~self._received(job)[:, 0])
        again = np.zeros(self.n, dtype=bool)
        again[owe[: max(0, len(owe) - self.code.s)]] = job >= 1
        return again

    def _parts(self, job: int, slot: int, got: np.ndarray) -> np.ndarray:
        if slot == 0:
            return np.where(self._repeats(job - self.delay), -1, 0)
        return np.where(self._repeats(job) & (slot == self.delay), 0, -1)


class MSGC(Scheme):
    """Multiplexed: most of the data is uncoded, and retried by its owner; a small part is coded against all else.

    A worker has ``W - 1 + B`` tasks of a job, one in each of its rounds. ``D1``: W - 1 chunks of its own, of size
    ``(l + 1) k``. ``D2``: B groups of n chunks of size ``k``, each group under an (n, l) code, so that such a task is
    of the same size. ``k = 1 / (n (B + (W - 1)(l + 1)))``. The first W - 1 rounds go to D1; each later one to a chunk
    of D1 that has not arrived, or else to its group of D2. With l = n there is no D2.
    """

    def __init__(self, n: int, jobs: int, B: int, W: int, lam: int, kind: str = "auto", seed: int = 0):
        super().__init__(n, jobs)
        _check(n, B, W, lam)
        self.own, self.groups = W - 1, B
        self.parts, self.delay = W - 1 + B, W - 2 + B
        # A job is worked on in W - 1 + B rounds, and needs nothing of any other.
        self.model = Either(self.parts, (Bursty(W, B, lam), Arbitrary(self.parts, B, lam)))
        self.code: Code | None = make_code(n, lam, kind, seed) if lam < n else None
        if self.code is None:
            self.shares = np.full(n * self.own, 1 / (n * self.own))
            self.load = self.parts / (n * self.own)
        else:
            k = 1 / (n * (B + self.own * (lam + 1)))
            self.shares = np.repeat([(lam + 1) * k, k], [n * self.own, n * B])
            self.load = (lam + 1) * k * self.parts

    def _parts(self, job: int, slot: int, got: np.ndarray) -> np.ndarray:
        if slot < self.own:
            return np.full(self.n, slot)
        missing = ~got[:, : self.own]
        return np.where(missing.any(1), missing.argmax(1), -1 if self.code is None else slot)

    def _task(self, job: int, worker: int, part: int) -> Task:
        if part < self.own:
            return Task(job, part, np.array([worker * self.own + part]), np.ones(1))
        assert self.code is not None
        first = self.n * self.own + (part - self.own) * self.n
        return Task(job, part, first + self.code.chunks[worker], self.code.weights[worker])

    def _combine(self, got: np.ndarray) -> dict[tuple[int, int], float] | None:
        if not got[:, : self.own].all():
            return None
        weights = {(i, j): 1.0 for i in range(self.n) for j in range(self.own)}
        for part in range(self.own, self.parts) if self.code is not None else ():
            found = _weights(self.code, got[:, part], part)
            if found is None:
                return None
            weights |= found
        return weights


def _weights(code: Code | None, arrived: np.ndarray, part: int) -> dict[tuple[int, int], float] | None:
    assert code is not None
    found = code.decode(np.flatnonzero(arrived).tolist())
    return None if found is None else {(int(i), part): float(found[i]) for i in np.flatnonzero(found)}


def _check(n: int, B: int, W: int, lam: int) -> None:
    if not 1 <= B < W or not 0 <= lam <= n:
        raise ShoalError(
            f"A (B, W, lambda)-bursty model of {n} workers has 1 <= B < W and 0 <= lambda <= {n}, "
            f"not B = {B}, W = {W}, lambda = {lam}."
        )
