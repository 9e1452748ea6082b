"""Work on its way in real time: `fl.tasks` where messages are pushed as work is given out and replies are waited for.

All that is given out at one moment is pushed together, so that a node trains it as one cohort.
A reply is an event at the tick at which it is found (`fl.wall`); at its deadline a job is given up, which frees its
place, and its client is free when it has answered or is lost. A server's step that is overdue by whole periods, since
the server was busy, is taken at the newest of the ticks it missed, and the others are left out.

A checkpoint keeps what is on its way. A run that goes on gives it out anew, as the same jobs with the same content, so
that for a client that had done one already it is a message that comes twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Message

from fl.clock import Priority, ticks
from fl.messages import TrainReply, TrainRequest
from fl.schedules.base import World
from fl.tasks import Task, Tasks
from fl.validation import Reason, Rejection
from fl.wall import GONE, TIMED_OUT, UNSENT, WallFleet


class WallTasks(Tasks):
    """The outstanding work of one run by the wall's clock. ``period`` are the ticks between a server's steps."""

    def __init__(self, world: World, wall: WallFleet, oldest: int | None = None, period: int | None = None):
        super().__init__(world, oldest)
        self.wall, self.period = wall, period
        self.unsent: list[Task] = []
        self.sent: dict[str, Task] = {}  # by the id of the message

    def now(self) -> int:
        return self.wall.now(self.world.clock)

    def wait(self, end: int | None) -> int | None:
        """Send what was given out, and wait for a reply or a planned event; beyond ``end``: nothing comes by it.

        None: nothing is on its way and nothing is planned.
        """
        grid, clock = self.world.grid, self.world.clock
        if end is None or self.now() < end:
            self._send()
        while True:
            gone = self.wall.missing(grid, {self._node(task) for task in self.sent.values()})
            found = self.wall.look(grid, self.sent)
            now = self.now()
            self._skip(now)
            due = min((t for t in (self.peek(), end) if t is not None), default=None)
            when = now if due is None else max(clock.now, min(now, due))
            for message_id, reply in found:
                self._hear(self.sent.pop(message_id), reply, when)
            for task in [t for t in self.sent.values() if self._node(t) in gone]:
                self._end(task, GONE, when)
            head = self.peek()
            if head is None and not self.sent:
                return None
            if end is not None and now >= end and (head is None or head > end):
                return end + 1
            if head is not None and head <= now:
                return head
            self.wall.rest(clock, due)

    def take(self, task: Task) -> TrainReply | Rejection:
        if task.result is None:
            self._end(task, TIMED_OUT)
        for seq in self._planned(task.client):
            self.queue.cancel(seq)
        return super().take(task)

    def _node(self, task: Task) -> int:
        return self.world.nodes[task.client]

    def _plan(self, task: Task, request: TrainRequest) -> None:
        self.unsent.append(task)
        self.queue.push(task.sent + ticks(self.wall.network.timeout_s), Priority.ARRIVE, task.client, task.job)

    def _send(self) -> None:
        tasks, self.unsent = self.unsent, []
        messages = [self.world.message(task.request) for task in tasks if task.request is not None]
        ids = self.wall.push(self.world.grid, messages) if messages else []
        for task, message_id in zip(tasks, ids, strict=True):
            if message_id is None:
                self._end(task, UNSENT, self.world.clock.now)
            else:
                self.sent[message_id] = task

    def _hear(self, task: Task, reply: Message, when: int) -> None:
        self.answered(task, reply)
        self.world.validator.clear()
        if reply.has_error():
            self.wall.lose(task.client, when)  # or a client that fails at once would be asked without a pause
        self.queue.push(when, Priority.ARRIVE, task.client, task.job)

    def _end(self, task: Task, why: str, when: int | None = None) -> None:
        """``task`` is lost; the event of that is at ``when`` (None: it is happening)."""
        task.request, task.result = None, Rejection(Reason.ERROR, why)
        ids = [message_id for message_id, other in self.sent.items() if other is task]
        self.wall.drop(ids)
        for message_id in ids:
            del self.sent[message_id]
        self.wall.lose(task.client, self.world.clock.now if when is None else when)
        if when is not None:
            self.queue.push(when, Priority.ARRIVE, task.client, task.job)

    def _planned(self, client: int) -> list[int]:
        """The planned events of the job of ``client``."""
        return [seq for _, _, whose, seq, _ in self.queue.state()["events"] if whose == client]

    def _skip(self, now: int) -> None:
        """Put off the server's step by the periods that it has missed."""
        head = self.queue.peek()
        if self.period is not None and head is not None and head.data == "step" and now - head.time >= self.period:
            self.queue.cancel(head.seq)
            self.at(now - (now - head.time) % self.period, "step")

    def restore(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Undo `parts`, and give out anew what was on its way, with as much time as it had at first."""
        self.wall.check_resumed(self.world.guard, self.world.apart)
        now = meta["queue"]["now"]
        sent = {row["client"]: row["sent"] for row in meta["out"] if "request" in row}
        events = [[now + row[0] - sent.get(row[2], now), *row[1:]] for row in meta["queue"]["events"]]
        super().restore(arrays, {**meta, "queue": {**meta["queue"], "events": events}})
        for task in self.out.values():
            if task.request is None:
                continue
            if task.given_up:
                self._end(task, "its time was over when the run was interrupted", now)
            else:
                task.sent = now
                self.unsent.append(task)
