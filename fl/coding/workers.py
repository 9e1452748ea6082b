"""What crosses the wire in gradient coding, and what workers do: coded sums of chunks' gradients.

A chunk is a range of the samples, which all workers hold in one order. Of a chunk ``C`` of N samples in all::

    g_C = (1 / N) sum_{j in C} (grad l_j, l_j)  in R^{d+1}

so that the sum over chunks is the gradient of the mean loss, and the loss itself beside it. ``g_C`` is rounded to
float32; a task's answer ``sum_C weight_C g_C`` is float64.

A request names its jobs by their states: that of its first task is the message's own vector, those of other jobs are
the arrays ``state/JOB``. Further arrays: ``jobs`` and ``counts`` ``(tasks,)``, ``ranges`` ``(2 chunks,)`` and
``weights`` ``(chunks,)`` of all tasks' chunks, one task after the other. The answer to task k is the array ``coded/k``.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clients.trainer import Trainer
from fl.coding.schemes import Task
from fl.messages import GradientRequest, MalformedMessage, Request, TrainReply

Range = tuple[int, int]
Name = tuple[int, bytes]  # of a job's state: the job, and a digest of the vector


def request(
    client: int,
    round: int,
    version: int,
    layout: str,
    tasks: Sequence[Task],
    bounds: np.ndarray,
    states: Mapping[int, np.ndarray],
    open_jobs: int,
) -> GradientRequest:
    """The request for ``tasks``; ``states`` are the jobs' vectors, ``bounds`` ``(chunks + 1,)`` cut the samples.

    ``open_jobs`` is how many jobs are worked on at a time: of so many states a node keeps the gradients.
    """
    chunks = np.concatenate([t.chunks for t in tasks])
    arrays: dict[str, np.ndarray] = {
        "jobs": np.array([t.job for t in tasks], dtype=np.uint32),
        "counts": np.array([len(t.chunks) for t in tasks], dtype=np.uint32),
        "ranges": np.stack([bounds[chunks], bounds[chunks + 1]], axis=1).reshape(-1).astype(np.uint32),
        "weights": np.concatenate([t.weights for t in tasks]).astype(np.float64),
    }
    first = tasks[0].job
    arrays |= {f"state/{t.job}": states[t.job] for t in tasks if t.job != first}
    return GradientRequest(client, round, version, states[first], layout, {"open": open_jobs}, arrays)


def answers(request: Request, size: int) -> dict[str, tuple[str, int]]:
    """The types and sizes of the arrays that answer ``request``, where ``size`` numbers train."""
    return {f"coded/{k}": ("float64", size + 1) for k in range(len(request.arrays["jobs"]))}


@dataclass(frozen=True)
class _Share:
    """One task as a worker sees it: whose gradients, of which ranges of samples, with which weights."""

    name: Name
    ranges: list[Range]
    weights: np.ndarray


def _read(request: GradientRequest, size: int, samples: int) -> tuple[list[_Share], dict[Name, np.ndarray]]:
    """The tasks of ``request`` and the states that they are at. Raises `MalformedMessage`."""
    arrays = request.arrays
    kinds = {"jobs": np.uint32, "counts": np.uint32, "ranges": np.uint32, "weights": np.float64}
    if any(name not in arrays or arrays[name].dtype != kind for name, kind in kinds.items()):
        raise MalformedMessage("schema", f"a gradient request holds the arrays {', '.join(kinds)}")
    jobs, counts, weights = arrays["jobs"], arrays["counts"].astype(np.int64), arrays["weights"]
    if not len(jobs) or len(counts) != len(jobs) or len(weights) != counts.sum() or not np.isfinite(weights).all():
        raise MalformedMessage("schema", "its tasks, their chunks and their weights don't match, or a weight is none")
    if len(arrays["ranges"]) != 2 * len(weights):
        raise MalformedMessage("schema", f"{len(weights)} chunks have no {len(arrays['ranges'])} ends")
    pairs = arrays["ranges"].astype(np.int64).reshape(-1, 2)
    if (pairs[:, 0] >= pairs[:, 1]).any() or (pairs[:, 1] > samples).any():
        raise MalformedMessage("schema", f"a chunk is a range of the {samples} samples here")
    shares, states = [], {}
    ends = np.cumsum(counts)
    for job, count, end in zip(jobs.tolist(), counts, ends, strict=True):
        state = request.state if job == jobs[0] else arrays.get(f"state/{job}")
        if state is None or state.dtype != np.float32 or len(state) != size:
            raise MalformedMessage("shape", f"the state of job {job} is no float32 ({size},)")
        name = (job, hashlib.sha256(state.tobytes()).digest())
        states[name] = state
        own = slice(int(end - count), int(end))
        shares.append(_Share(name, [(int(low), int(high)) for low, high in pairs[own]], weights[own]))
    return shares, states


class Workers:
    """The workers of one node. Each gradient of a chunk is computed once, however many of them are asked for it.

    It is a function of the state, the chunk and the job's number alone, bit for bit: the passes that make it hold the
    chunk's samples and no others. What is kept is that of the newest few states.
    """

    def __init__(self, trainer: Trainer, parts: Sequence[np.ndarray], batch_size: int, seed: int):
        self.trainer, self.parts, self.batch_size, self.seed = trainer, parts, batch_size, seed
        self.known: OrderedDict[Name, dict[Range, np.ndarray]] = OrderedDict()

    @cached_property
    def replicated(self) -> bool:
        """Whether all clients hold the same samples in the same order."""
        return all(np.array_equal(part, self.parts[0]) for part in self.parts)

    def answer(self, requests: Sequence[GradientRequest]) -> list[TrainReply | MalformedMessage]:
        """A reply to each request, or what is wrong with it."""
        space = self.trainer.worker.cohort.space
        columns = space.columns(space.trains(1))
        read: list[list[_Share] | MalformedMessage] = []
        states: dict[Name, np.ndarray] = {}
        most = 1
        for request in requests:
            try:
                if not self.replicated:
                    raise MalformedMessage("schema", "clients here hold data of their own, which no other may compute")
                shares, mine = _read(request, space.layout.size, len(self.parts[request.client]))
            except MalformedMessage as error:
                read.append(error)
                continue
            states |= mine
            read.append(shares)
            wanted = request.extra.get("open")
            most = max(most, min(wanted, 1024) if isinstance(wanted, int) else 1)
        for name in states:
            self.known.setdefault(name, {})
            self.known.move_to_end(name)
        todo: dict[tuple[Name, Range], int] = {}
        for request, found in zip(requests, read, strict=True):
            for share in found if isinstance(found, list) else ():
                missing = (r for r in share.ranges if r not in self.known[share.name])
                todo |= {(share.name, r): request.client for r in missing}
        self._compute(todo, states)
        replies = [self._reply(q, f, len(columns)) if isinstance(f, list) else f for q, f in zip(requests, read)]
        while len(self.known) > most:
            self.known.popitem(last=False)
        return replies

    def _compute(self, todo: Mapping[tuple[Name, Range], int], states: Mapping[Name, np.ndarray]) -> None:
        """The gradients of chunks of states, from the data of the workers that were asked for them."""
        calls, owners = [], []
        size = self.trainer.plan.cohort_size * self.batch_size
        for (name, (low, high)), client in todo.items():
            for first in range(low, high, size):
                cuts = range(first, min(first + size, high), self.batch_size)
                slots = [self.parts[client][cut : min(cut + self.batch_size, high)] for cut in cuts]
                keys = [(self.seed, "chunk", name[0], cut) for cut in cuts]
                calls.append((states[name], slots, keys))
                owners.append((name, (low, high), [len(s) for s in slots], len(self.parts[client])))
        sums: dict[tuple[Name, Range], np.ndarray] = {}
        for (name, chunk, counts, total), (losses, grads) in zip(owners, self.trainer.gradients(calls), strict=True):
            share = np.array(counts) / total
            part = share @ np.concatenate([grads, losses[:, None]], axis=1)
            sums[name, chunk] = sums[name, chunk] + part if (name, chunk) in sums else part
        for (name, chunk), gradient in sums.items():
            self.known[name][chunk] = gradient.astype(np.float32)

    def _reply(self, request: GradientRequest, shares: list[_Share], size: int) -> TrainReply:
        coded = {}
        for k, share in enumerate(shares):
            total = np.zeros(size + 1)
            for weight, chunk in zip(share.weights, share.ranges, strict=True):
                total += weight * self.known[share.name][chunk]
            coded[f"coded/{k}"] = total
        data, part = self.trainer.worker.sets["train"], self.parts[request.client]
        ranges = [r for share in shares for r in share.ranges]
        examples = sum(high - low for low, high in ranges)
        tokens = sum(int(data.lengths[part[low:high]].sum()) for low, high in ranges)
        return TrainReply(
            request.client, request.round, request.version, request.layout, np.zeros(0, np.float32), examples,
            -(-examples // self.batch_size), tokens, None, arrays=coded,
        )  # fmt: skip
