"""Gradient coding at the server: rounds of the workers, and the steps of the models when their jobs are due.

The settings are those of `fl.schedules.gradient_coding`, which says what a job is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Message

from aggregators.base import move
from fl.coding import workers
from fl.coding.master import Master, Round
from fl.coding.schemes import Scheme, Task
from fl.errors import ConfigError, RunStopped
from fl.fleet import Job
from fl.keys import generator
from fl.messages import GradientRequest, TrainReply, freeze, payload_bytes
from fl.schedules.base import Event, Parts, World, client_event
from fl.state import ServerState
from fl.validation import Reason, Rejection, Validator

if TYPE_CHECKING:
    from fl.schedules.gradient_coding import GradientCoding

Result = tuple[int, int, int]  # job, worker, part


class Jobs:
    """One run's jobs: the models that they are steps of, and the results of those that are not over."""

    def __init__(self, settings: GradientCoding, world: World, scheme: Scheme):
        self.settings, self.world, self.scheme = settings, world, scheme
        self.master = Master(self.scheme, world.sizes[0], settings.mu, settings.waiting)
        if (np.diff(self.master.bounds) < 1).any():
            chunks = len(self.scheme.shares)
            allowed = f"at most what gives each of this scheme's {chunks} chunks one of the {world.sizes[0]} samples"
            raise ConfigError("clients.number", world.number, allowed, "Raise data.max_train, or lower it.")
        space = world.server.space
        self.columns = space.columns(space.trains(1))
        self.models = [world.server, *(_start(world, m) for m in range(1, settings.models or self.scheme.delay + 1))]
        self.results: dict[Result, np.ndarray] = {}
        size = len(self.columns)
        self.validator = Validator(
            space.layout.hash, 0, None, world.number * world.sizes[0], lambda request: workers.answers(request, size)
        )
        self.since, self.rejected = Counter[str](), Counter[str]()
        self._up: dict[int, int] = {}  # number of tasks -> bytes of their answer

    def model(self, job: int) -> int:
        """Which model ``job`` is a step of."""
        return (job - 1) % len(self.models)

    def round(self, number: int) -> Iterator[Event]:
        """Round ``number`` of the workers; an event for each of them that has work."""
        world, tasks = self.world, self.scheme.assign(number)
        start, asked, absent = self._ready([i for i, own in enumerate(tasks) if own])
        jobs = {task.job for own in tasks for task in own}
        states = {job: freeze(self.models[self.model(job)].vector) for job in jobs}
        version = {job: self.models[self.model(job)].version for job in jobs}
        layout, delay = world.server.layout.hash, self.scheme.delay
        requests = {
            i: workers.request(
                i, number, version[tasks[i][0].job], layout, tasks[i], self.master.bounds, states, delay + 1
            )
            for i in asked
        }
        down = {i: payload_bytes(r.to_record()) for i, r in requests.items()}
        sizes = {i: (self._steps(tasks[i]), down[i], self._upload(requests[i])) for i in asked}
        found = self.master.round(world.fleet, number, start, sizes, absent)
        used = [i for i in asked if not found.cut.late[i]]
        outcome: dict[int, TrainReply | Rejection] = {i: _missed(found.jobs[i]) for i in asked}
        sent: dict[int, int] = {}
        for client, reply in world.ask([requests[i] for i in used])[0] if used else ():
            if client not in sent:  # of a reply that comes twice the first counts
                outcome[client] = self._checked(reply, requests[client])
                sent[client] = 0 if reply.has_error() else payload_bytes(reply.content)
        self.validator.clear()
        world.clock.advance(start + found.cut.end)
        late = found.cut.late.copy()
        for i in asked:
            taken = outcome[i]
            late[i] = isinstance(taken, Rejection)
            if isinstance(taken, TrainReply):
                for k, task in enumerate(tasks[i]):
                    self.results[task.job, i, task.part] = taken.arrays[f"coded/{k}"]
        self.master.done(number, late)
        yield from self._events(number, start, found, requests, outcome, down, sent)

    def _ready(self, busy: list[int]) -> tuple[int, list[int], list[int]]:
        """The round's first tick, at which somebody can work; who of ``busy`` can, and who can't."""
        world = self.world
        times = [world.fleet.next_available(i, world.clock.now) for i in busy]
        start = min((t for t in times if t is not None), default=None if busy else world.clock.now)
        if start is None:
            raise RunStopped(
                "No worker is available, now or later: see network.availability and the windows of a trace."
            )
        world.clock.advance(start)
        asked = [i for i, t in zip(busy, times) if t is not None and t <= start]
        return start, asked, [i for i in busy if i not in asked]

    def _steps(self, tasks: list[Task]) -> int:
        return -(-self.master.samples(tasks) // self.world.local.batch_size)

    def _upload(self, request: GradientRequest) -> int:
        """Bytes of the answer, but for a few: its numbers are not known yet."""
        wanted = workers.answers(request, len(self.columns))
        if len(wanted) not in self._up:
            arrays = {name: np.zeros(size) for name, (_, size) in wanted.items()}
            reply = TrainReply(
                0, 1, 1, request.layout, np.zeros(0, np.float32), 1 << 7, 1, 1 << 14, None, arrays=arrays
            )
            self._up[len(wanted)] = payload_bytes(reply.to_record())
        return self._up[len(wanted)]

    def _checked(self, reply: Message, request: GradientRequest) -> TrainReply | Rejection:
        taken = self.validator.check(reply, request)
        if isinstance(taken, TrainReply) and not all(np.isfinite(a).all() for a in taken.arrays.values()):
            return Rejection(Reason.NOT_FINITE, "a coded sum is not finite")
        return taken

    def _events(
        self, number: int, start: int, found: Round, requests: Mapping[int, GradientRequest],
        outcome: Mapping[int, TrainReply | Rejection], down: Mapping[int, int], sent: Mapping[int, int],
    ) -> Iterator[Event]:  # fmt: skip
        end = start + found.cut.end
        for i in sorted(requests, key=lambda i: (min(found.jobs[i].arrived, end), i)):
            taken, job = outcome[i], found.jobs[i]
            good = taken if isinstance(taken, TrainReply) else None
            self.since.update(sampled=1, accepted=good is not None, bytes_down=down[i], bytes_up=sent.get(i, 0))
            self.since.update(client_steps=good.steps if good else 0, tokens=good.tokens if good else 0)
            if isinstance(taken, Rejection):
                self.rejected[taken.reason.value] += 1
            yield client_event(
                round=number, version=requests[i].version, client=i, time=min(job.arrived, end), staleness=0,
                bytes_down=down[i], bytes_up=sent.get(i, 0), reply=taken, taken=taken,
                phases=(start, min(job.began, end), min(job.done, end)),
            )  # fmt: skip

    def step(self, job: int) -> Event:
        """The job that is due: its model's step, or none where its gradient can't be decoded."""
        world, index = self.world, self.model(job)
        weights, server = self.scheme.decode(job), self.models[index]
        new, loss = server, None
        if weights is not None:
            total = sum(a * self.results[job, i, part] for (i, part), a in weights.items())
            assert isinstance(total, np.ndarray)
            loss = float(total[-1])
            models = len(self.models)
            steps = -(-(self.settings.rounds - index) // models)
            delta = -world.local.lr_at((job - 1) // models + 1, steps) * total[:-1]
            if float(np.linalg.norm(delta)) > self.settings.max_update_norm:
                self.rejected[Reason.TOO_LARGE.value] += 1
            else:
                whole = len(self.columns) == world.server.layout.size
                new = move(server, delta, world.optimizer, None if whole else self.columns)
        if index == 0:
            new = world.accept(server, new)
        self.models[index] = new
        self.models[0] = world.server = self.models[0].replace(round=job)
        self.results = {result: vector for result, vector in self.results.items() if result[0] != job}
        counts = ("sampled", "accepted", "bytes_down", "bytes_up", "client_steps", "tokens")
        since, rejected = {name: self.since[name] for name in counts}, dict(sorted(self.rejected.items()))
        self.since.clear()
        self.rejected.clear()
        return {
            "event": "round",
            "round": job,
            "version": world.server.version,
            "virtual_s": world.clock.now_s,
            **since,
            "rejected": rejected,
            "loss": loss,
            "update_norm": float(np.linalg.norm(new.vector.astype(np.float64) - server.vector.astype(np.float64))),
            "bytes_once": 0,
            "aggregation_error": None,
            "epsilon": None,
            "staleness": 0.0,
            "live_versions": len(self.scheme.got),
            "model": index,
            "decoded": weights is not None,
        }

    def parts(self) -> Parts:
        """What goes on after a step, as arrays and plain values; undone by `restore`."""
        arrays = {f"coding/got/{job}": bits for job, bits in self.scheme.state().items()}
        arrays["coding/late"] = self.master.late.astype(np.uint8)
        arrays |= {f"coding/result/{k}": vector for k, vector in enumerate(self.results.values())}
        for m, server in enumerate(self.models[1:], start=1):
            arrays[f"coding/model/{m}"] = server.vector
            arrays |= {f"coding/optimizer/{m}/{name}": array for name, array in server.optimizer.items()}
        meta = {
            "results": [list(result) for result in self.results],
            "versions": [server.version for server in self.models],
        }
        return arrays, meta

    def restore(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Undo `parts`; other arrays are ignored."""

        def under(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        self.scheme.restore(under("coding/got/"))
        self.master.late = arrays["coding/late"].astype(bool)
        rows = enumerate(meta["results"])
        self.results = {(job, i, part): arrays[f"coding/result/{k}"] for k, (job, i, part) in rows}
        for m, version in list(enumerate(meta["versions"]))[1:]:
            memory = under(f"coding/optimizer/{m}/")
            vector = arrays[f"coding/model/{m}"]
            self.models[m] = self.models[m].replace(vector=vector, version=version, optimizer=memory)


def _missed(job: Job) -> Rejection:
    if job.dropped_at is not None:
        return Rejection(Reason.ERROR, "its work was lost on the way")
    return Rejection(Reason.LATE, "its answer is not waited for")


def _start(world: World, index: int) -> ServerState:
    """Where model ``index`` > 0 starts: see `fl.schedules.gradient_coding`."""
    server, rng = world.server, generator(world.seed, "gradient coding start", index)
    vector = server.vector.copy()
    for low, high in server.space.spans.values():
        part = vector[low:high].astype(np.float64)
        vector[low:high] = part.mean() + part.std() * rng.standard_normal(high - low)
    return server.replace(vector=vector)
