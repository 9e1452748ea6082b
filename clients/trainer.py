"""Training many clients' jobs as cohorts, in this process or in several, by a `Plan`."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from clients.adapters.base_change import Change
from clients.local.training import Fit, Work
from clients.pool import Pool, available
from clients.worker import Scores, Worker

HELD = 4  # changes of the base that workers keep between calls


@dataclass(frozen=True)
class Plan:
    """How the work is laid on the machine. Chosen by the user or by `clients.tuning`; never changes what is computed
    beyond rounding."""

    device: str = "cpu"
    dtype: str = "float32"  # of the frozen base; adapters and heads stay float32
    attention: str = "sdpa"
    cohort_size: int = 8
    workers: int = 1
    threads: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def settings(self) -> dict[str, Any]:
        return asdict(self)


def cohorts(works: Sequence[Work], lengths: np.ndarray, size: int, workers: int) -> list[list[int]]:
    """Indices of the jobs of each cohort: at most ``size`` a cohort, a multiple of ``workers`` cohorts if there is
    enough work.

    Jobs with like numbers of steps, then of like sample length, go together: little is padded, and a slot seldom
    ends before its neighbours. Within a cohort the number of steps falls. Jobs that train other tensors, or beside
    another version of what does not train, are never together.
    """
    mean = [float(np.sum(lengths[e]) / max(1, len(e))) for e in (np.concatenate(w.batches) for w in works)]
    alike: dict[tuple, list[int]] = {}
    for i, work in enumerate(works):
        alike.setdefault((work.groups, work.shared, work.base if isinstance(work.base, int) else 0), []).append(i)
    out = []
    for members in alike.values():
        order = sorted(members, key=lambda i: (-len(works[i].batches), -mean[i], works[i].client, i))
        number = -(-len(order) // size)
        number = min(len(order), -(-number // workers) * workers)
        cuts = [len(order) * i // number for i in range(number + 1)]
        out += [order[low:high] for low, high in itertools.pairwise(cuts)]
    return out


class Trainer:
    """Runs jobs and evaluations by a `Plan`. Close it when done: it may own processes."""

    def __init__(self, worker: Worker, plan: Plan, forks: bool = True):
        self.worker, self.plan = worker, plan
        self.on_cohort: Callable[[list[Fit]], None] = lambda fits: None
        # More than one thread too goes to a child: this process must not start a thread pool of its own, since a
        # process that has one can't fork safely, and a sweep forks again for its next run.
        apart = forks and plan.device == "cpu" and plan.workers * plan.threads > 1 and available()
        self.pool = Pool(worker, plan.workers, plan.threads) if apart else None
        if self.pool is None:
            torch.set_num_threads(plan.threads)
        self._held: OrderedDict[int, Change] = OrderedDict()  # changes of the base that the workers hold
        self._number = 0

    def _base(self, change: Change, most: int = HELD) -> int:
        """The number under which the workers hold ``change``; known by its identity, and kept for the last ``most``."""
        if not change:
            return 0
        for number, held in self._held.items():
            if held is change:
                self._held.move_to_end(number)
                return number
        self._number += 1
        self._held[self._number] = change
        forget = [self._held.popitem(last=False)[0] for _ in range(len(self._held) - most)]
        if self.pool is not None:
            self.pool.everywhere("hold", (self._number, change, forget))
        else:
            self.worker.hold(self._number, change, forget)
        return self._number

    def _run(self, tasks: list[tuple[str, tuple]], done: Callable[[Any], None] = lambda _: None) -> list[Any]:
        if self.pool is not None:
            return self.pool.run(tasks, done)
        results = []
        for method, arguments in tasks:
            results.append(getattr(self.worker, method)(*arguments))
            done(results[-1])
        return results

    def train(self, works: Sequence[Work]) -> list[Fit]:
        """The results of the jobs, in their order; `on_cohort` is told of each cohort as it ends."""
        lengths = np.asarray(self.worker.sets["train"].lengths)
        # All that this call needs are held at a time: outstanding work may start from many versions.
        most = max(HELD, len({id(w.base) for w in works}))
        works = [replace(w, base=w.base if isinstance(w.base, int) else self._base(w.base, most)) for w in works]
        groups = cohorts(works, lengths, self.plan.cohort_size, self.plan.workers)
        results = self._run([("fit", ([works[i] for i in group],)) for group in groups], self.on_cohort)
        out: list[Fit | None] = [None] * len(works)
        for group, fits in zip(groups, results, strict=True):
            for i, fit in zip(group, fits, strict=True):
                out[i] = fit
        return [fit for fit in out if fit is not None]

    def evaluate(
        self, state: np.ndarray, name: str, examples: np.ndarray, batch_size: int, base: Change | None = None
    ) -> Scores:
        """`Scores` of ``examples`` (indices into the set ``name``) in their order, with ``base`` added to the base.

        Batches are of like length and do not depend on the number of workers, so neither do the scores.
        """
        examples = np.asarray(examples, dtype=np.int64)
        # Longest first: what is left to wait for at the end is short.
        order = np.argsort(-np.asarray(self.worker.sets[name].lengths)[examples], kind="stable")
        parts = [order[low : low + batch_size] for low in range(0, len(order), batch_size)]
        number = self._base(base or {})
        results = self._run([("evaluate", (state, name, examples[part], number)) for part in parts])
        loss, targets = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
        predicted = np.zeros(len(examples), dtype=np.int64)
        for part, scores in zip(parts, results, strict=True):
            loss[part], targets[part], predicted[part] = scores.loss, scores.targets, scores.predicted
        return Scores(loss, targets, predicted)

    def statistics(
        self, kind: str, name: str, holders: Sequence[np.ndarray], clip: float | None, batch_size: int = 8
    ) -> list[np.ndarray]:
        """The statistic ``kind`` (`clients.adapters.statistics`), packed, of each of ``holders``' examples."""
        cuts = [[h[low : low + batch_size] for low in range(0, len(h), batch_size)] for h in holders]
        return self._run([("statistic", (kind, name, cut, clip)) for cut in cuts])

    def gradients(self, calls: Sequence[tuple[np.ndarray, list[np.ndarray], list]]) -> list[tuple[Any, Any]]:
        """`Worker.gradients` of each of ``calls``: a state, sets of examples, and their keys; a pass each."""
        return self._run([("gradients", call) for call in calls])

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None
