"""Work on its way: who is at work on which version, when its result arrives, and when it is computed.

*When* a result arrives is planned as soon as the work is given out, from the models of `fl.fleet`: it takes no result
to know how many steps a client will take and how large its update will be. *What* it is depends on the version that the
client started from and on nothing that happens meanwhile. So all work that is outstanding is computed together when the
first of its results is due, in cohorts that mix versions, and an asynchronous run costs the arithmetic of a
synchronous one. Work that is lost on the way is never computed.

A start version is kept as long as somebody works from it (`Versions`), so memory holds the live versions and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Message

from fl.clock import EventQueue, Priority, ticks
from fl.messages import Scalar, TrainReply, TrainRequest, payload_bytes
from fl.schedules.base import Parts, World
from fl.state import ServerState, Update
from fl.validation import Reason, Rejection


@dataclass
class Versions:
    """The server's states that work started from, each kept until it is released as often as it was held.

    Of a state only what an update is read with is kept: the vector and its space.
    """

    states: dict[int, ServerState] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)

    def hold(self, server: ServerState) -> ServerState:
        kept = self.states.get(server.version)
        if kept is None:
            kept = self.states[server.version] = server.replace(base={}, increment={}, optimizer={}, extra={})
        self.held[server.version] = self.held.get(server.version, 0) + 1
        return kept

    def release(self, version: int) -> None:
        self.held[version] -= 1
        if self.held[version] == 0:
            del self.held[version], self.states[version]


@dataclass
class Task:
    """A job of one client on its way; times are ticks.

    ``job`` counts the client's jobs from 1, ``phase`` is the server's round that it was given out for. ``request`` is
    there until the job is computed, ``result`` from then on. ``lost_at`` says when it was lost on the way, and
    ``given_up`` that its deadline has passed.
    """

    client: int
    job: int
    phase: int
    start: ServerState
    sent: int
    began: int
    done: int
    bytes_down: int
    request: TrainRequest | None
    lost_at: int | None = None
    given_up: bool = False
    result: TrainReply | Rejection | None = None
    planned_up: int = 0  # bytes of the reply, as its time is reckoned with, and as they came to be
    bytes_up: int = 0
    arrived: int | None = None  # of an accepted reply that no server step has used yet


# What a checkpoint keeps of a task beside its start, request and result.
_KEPT = (
    "client", "job", "phase", "sent", "began", "done", "bytes_down", "planned_up", "bytes_up", "lost_at", "given_up",
)  # fmt: skip


class Tasks:
    """The outstanding work of one run on the virtual clock, and the events that it leads to.

    `give` hands out a job; `queue` gives the next event. Events are named by priority: ``COMPUTE_DONE`` (the client's
    work is done: pass it to `upload`), ``ARRIVE`` (its reply is here, or a client whose work was lost is back: pass it
    to `take`), ``SERVER_TICK`` (a time that was asked for by `at`, or a client's deadline).
    """

    def __init__(self, world: World, oldest: int | None = None):
        self.world, self.oldest = world, oldest  # an update of a higher staleness is rejected
        self.queue = EventQueue(world.clock)
        self.versions = Versions()
        self.out: dict[int, Task] = {}  # by client, in the order in which they were given out
        self.arrived: list[Task] = []  # accepted, and not yet used
        self.jobs: dict[int, int] = {}  # jobs given to each client so far
        self.counts: dict[int, int] = {}  # of these, how many a server step has used
        self.retired: set[int] = set()  # clients that take part no more
        self.draws = 0  # how often clients were chosen from those that were free
        self.wake = -1  # the planned moment at which an idle client becomes available
        self._up: dict[int, int] = {}  # size of an update -> bytes of its message

    # Time

    def peek(self) -> int | None:
        """The tick of the next event; None if nothing is planned."""
        head = self.queue.peek()
        return None if head is None else head.time

    def wait(self, end: int | None) -> int | None:
        """The tick of the next event, when all that can be given out has been. ``end`` is where the run ends."""
        return self.peek()

    def now(self) -> int:
        """The tick at which work is given out."""
        return self.world.clock.now

    def at(self, time: int, data: str) -> None:
        """Plan the server's own event ``data`` at tick ``time``."""
        self.queue.push(time, Priority.SERVER_TICK, -1, data)

    def find(self, client: int, job: Any) -> Task | None:
        """The task of an event; None where it is over."""
        task = self.out.get(client)
        return task if task is not None and task.job == job else None

    # Work

    def give(self, client: int, lr: float, deadline_s: float | None = None) -> Task:
        """Give ``client`` the server's present state to train, now."""
        world, now, server = self.world, self.now(), self.world.server
        job, phase = self.jobs.get(client, 0) + 1, server.round + 1
        self.jobs[client] = job
        request = world.train_request(client, job, lr, server, phase=phase)
        down = payload_bytes(request.to_record())
        task = Task(client, job, phase, self.versions.hold(server), now, now, now, down, request)
        task.planned_up = self._upload_bytes(request)
        self.out[client] = task
        if deadline_s is not None:
            self.queue.push(now + ticks(deadline_s), Priority.SERVER_TICK, client, job)
        self._plan(task, request)
        return task

    def _plan(self, task: Task, request: TrainRequest) -> None:
        """Plan what becomes of ``task``, which sets out now."""
        steps = self.world.local.num_steps(self.world.sizes[task.client])
        size = _timed_bytes(request)
        begun = self.world.fleet.begin(task.client, task.job, task.sent, steps, size, task.planned_up)
        task.began, task.done = begun.began, begun.done
        if begun.dropped_at is not None and begun.dropped_at <= begun.done:
            self._lose(task, begun.dropped_at)
        else:
            task.lost_at = begun.dropped_at
            self.queue.push(begun.done, Priority.COMPUTE_DONE, task.client, task.job)

    def upload(self, task: Task) -> None:
        """The work of ``task`` is done: its reply sets out, if nothing happens to it."""
        arrives = self.world.fleet.upload(task.client, task.done, task.planned_up)
        if task.lost_at is not None:
            self._lose(task, min(task.lost_at, arrives))
        else:
            self.queue.push(arrives, Priority.ARRIVE, task.client, task.job)

    def _lose(self, task: Task, when: int) -> None:
        """``task`` is lost at ``when``: the server hears of it when its client is back."""
        back = self.world.fleet.rejoins(task.client, task.job, when)
        task.lost_at, task.done = when, min(task.done, when)
        self.queue.push(when if back is None else back, Priority.ARRIVE, task.client, task.job)

    def take(self, task: Task) -> TrainReply | Rejection:
        """What came of ``task``, which is over now. What is accepted waits for `collect`."""
        if task.lost_at is not None:
            task.result = Rejection(Reason.ERROR, "its work was lost on the way")
        elif task.result is None:
            self._compute()
        del self.out[task.client]
        result, staleness = task.result, self.world.server.version - task.start.version
        assert result is not None
        if isinstance(result, TrainReply):
            self.world.downlink.heard(task.client, task.start.version)
        if isinstance(result, TrainReply) and task.given_up:
            result = Rejection(Reason.LATE, "the time for the job was over")
        if isinstance(result, TrainReply) and self.oldest is not None and staleness > self.oldest:
            result = Rejection(Reason.STALE, f"it is {staleness} versions old, and may be {self.oldest}")
        if isinstance(result, TrainReply):
            task.arrived = self.world.clock.now
            self.arrived.append(task)
        else:
            self.versions.release(task.start.version)
        return result

    def collect(self, most: int | None) -> list[Update]:
        """The first ``most`` (None: all) accepted updates that wait, in the order of their arrival."""
        used, self.arrived = self.arrived[:most], self.arrived[len(self.arrived) if most is None else most :]
        updates = []
        for task in used:
            assert isinstance(task.result, TrainReply) and task.arrived is not None
            updates.append(self.world.update(task.result, task.start, task.sent, task.arrived, task.phase))
            self.counts[task.client] = self.counts.get(task.client, 0) + 1
            self.versions.release(task.start.version)
        return updates

    def _compute(self) -> None:
        """Compute everything that is outstanding and will arrive, together."""
        world = self.world
        due = [t for t in self.out.values() if t.request is not None and t.lost_at is None]
        requests = [t.request for t in due if t.request is not None]
        replies, _ = world.ask(requests)
        for client, reply in replies:
            task = self.out[client]
            if task.request is not None:  # of a reply that comes twice the first counts
                self.answered(task, reply)
        world.validator.clear()

    def answered(self, task: Task, reply: Message) -> None:
        """The reply to ``task`` is known."""
        task.result = self.world.validator.check(reply, task.request)
        self.world.doubt(task.client, reply)
        task.bytes_up = 0 if reply.has_error() else payload_bytes(reply.content)
        task.request = None

    def _upload_bytes(self, request: TrainRequest) -> int:
        """Bytes of a reply to ``request`` in which all numbers beside the update are small.

        Its own would be of a few bytes more or less. So it doesn't matter which reply is computed when, and clients
        with equal devices stay together whatever their numbers are.
        """
        size = self.world.validator.size(request)
        if size not in self._up:
            reply = TrainReply(0, 0, 0, request.layout, np.zeros(size, np.float32), 1, 1, 1, 1.0)
            self._up[size] = payload_bytes(reply.to_record())
        return self._up[size]

    def duration(self, client: int) -> int | None:
        """Ticks that an undisturbed job of ``client`` takes; None where that changes from job to job.

        What trains is sent both ways: where clients keep what does not, it is not a first job's time.
        """
        world, space = self.world, self.world.server.space
        # Of the first round whenever it is asked for: a run that goes on shall find the same.
        request = world.train_request(client, 1, 1.0, world.server.replace(version=0), phase=1)
        if world.downlink.keeps:
            groups = space.trains(1)
            extra: dict[str, Scalar] = {"lr": 1.0, "sent": ",".join(groups), "train": ",".join(groups), "known": 0}
            request = replace(request, state=space.take(world.server.vector, groups, client), extra=extra)
        steps = world.local.num_steps(world.sizes[client])
        return world.fleet.duration(client, steps, _timed_bytes(request), self._upload_bytes(request))

    # Checkpoints

    def parts(self) -> Parts:
        """Everything on its way as arrays and plain values, undone by `restore`.

        Taken after a server step, which has used all that had arrived.
        """
        assert not self.arrived
        arrays = {f"tasks/start/{v}": state.vector for v, state in self.versions.states.items()}
        rows: list[dict[str, Any]] = []
        contents: dict[int, str] = {}  # requests that share an array are kept once
        for task in self.out.values():
            row: dict[str, Any] = {name: getattr(task, name) for name in _KEPT} | {"version": task.start.version}
            if task.request is not None:
                request = task.request
                name = contents.setdefault(id(request.state), f"tasks/state/{task.client}")
                arrays[name] = request.state
                arrays |= {f"tasks/sent/{task.client}/{k}": a for k, a in request.arrays.items()}
                row["request"] = {"state": name, "extra": dict(request.extra), "arrays": list(request.arrays)}
            if isinstance(task.result, TrainReply):
                arrays[f"tasks/update/{task.client}"] = task.result.update
                row["reply"] = {
                    "examples": task.result.examples, "steps": task.result.steps, "tokens": task.result.tokens,
                    "loss": task.result.loss, "extra": dict(task.result.extra),
                }  # fmt: skip
            elif task.result is not None:
                row["rejection"] = [task.result.reason.value, task.result.detail]
            rows.append(row)
        meta = {
            "queue": self.queue.state(),
            "out": rows,
            "jobs": {str(c): n for c, n in self.jobs.items()},
            "counts": {str(c): n for c, n in self.counts.items()},
            "retired": sorted(self.retired),
            "draws": self.draws,
            "wake": self.wake,
        }
        return arrays, meta

    def restore(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Undo `parts`; other arrays are ignored."""
        world, layout = self.world, self.world.server.layout.hash
        self.queue = EventQueue.restore(meta["queue"])
        world.clock = self.queue.clock
        self.jobs = {int(c): n for c, n in meta["jobs"].items()}
        self.counts = {int(c): n for c, n in meta["counts"].items()}
        self.retired, self.draws, self.wake = set(meta["retired"]), meta["draws"], meta["wake"]
        self.versions = Versions()
        for row in meta["out"]:
            client, job, version = row["client"], row["job"], row["version"]
            start = world.server.replace(vector=arrays[f"tasks/start/{version}"], version=version)
            task = Task(**{n: row[n] for n in _KEPT}, start=self.versions.hold(start), request=None)
            if "request" in row:
                sent = row["request"]
                extra = {n: arrays[f"tasks/sent/{client}/{n}"] for n in sent["arrays"]}
                state = arrays[sent["state"]]
                task.request = TrainRequest(client, job, version, state, layout, sent["extra"], extra)
            elif "reply" in row:
                update = arrays[f"tasks/update/{client}"]
                task.result = TrainReply(client, job, version, layout, update, **row["reply"])
            elif "rejection" in row:
                reason, detail = row["rejection"]
                task.result = Rejection(Reason(reason), detail)
            self.out[client] = task


def _timed_bytes(request: TrainRequest) -> int:
    """Bytes of ``request`` as its time is reckoned with: those of client 0, since a longer number of a client would
    part those with equal devices by a tick."""
    return payload_bytes(replace(request, client=0).to_record())
