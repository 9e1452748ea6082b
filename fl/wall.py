"""Real time: clients whose messages take the time they take (``network=wall_clock``).

Ticks are microseconds of this machine's monotonic clock since the run began; a run that goes on starts at the tick of
its checkpoint. The server pushes messages when it gives work out and looks for replies with growing pauses, so a reply
has arrived at the look that finds it, or at the planned event (a deadline, a server's step) that this look is late for.

A client is lost when its node is gone: Flower answers for it (``NODE_UNAVAILABLE``), the grid does not list it any
more, its message could not be sent, or it has not answered for ``network.timeout_s`` seconds. It is asked again
``network.rejoin_s`` seconds later. The first reply to a message counts; later ones, and those that nobody waits for
any more, are taken off the grid and dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fl.clock import Clock, seconds, ticks
from fl.errors import ConfigError
from fl.fleet import Fleet, Job
from fl.network import WallClock
from privacy.base import Guard

SHORTEST_S, LONGEST_S, GROWTH = 0.01, 1.0, 1.5  # pauses between looks for replies
NODES_S = 5.0  # between looks at which nodes are connected
TIMED_OUT = "it gave no answer in network.timeout_s"
GONE = "its node is gone"
UNSENT = "its message could not be sent, or its node is gone"
monotonic, sleep = time.monotonic, time.sleep

Heard = Callable[[int, Message], bool]  # is given a client and its reply; true: no more are needed


class WallFleet(Fleet):
    """The clients of a deployment: nothing about them is planned, all is waited for."""

    network: WallClock

    def __init__(self, network: WallClock, seed: int, number: int):
        super().__init__(network, seed, number)
        self.arrived: dict[int, int] = {}  # when each client was heard last, in `ask`
        self.resumed = False
        self._zero: float | None = None  # the monotonic clock at tick 0
        self._pause_s = SHORTEST_S
        self._nodes_at = -NODES_S
        self._late: set[str] = set()  # messages whose replies nobody waits for any more

    # Time

    def now(self, clock: Clock) -> int:
        """The present tick, which is never before that of the run's ``clock``."""
        if self._zero is None:
            self._zero = monotonic() - clock.now_s
        return max(clock.now, ticks(max(0.0, monotonic() - self._zero)))

    def rest(self, clock: Clock, until: int | None) -> None:
        """Pause before the next look, to tick ``until`` at most. Pauses grow until `look` finds something."""
        pause_s, self._pause_s = self._pause_s, min(LONGEST_S, GROWTH * self._pause_s)
        left_s = pause_s if until is None else seconds(max(0, until - self.now(clock)))
        sleep(min(pause_s, left_s))

    def sleep(self, clock: Clock, until: int) -> None:
        """Let the time pass to tick ``until``."""
        sleep(seconds(max(0, until - self.now(clock))))

    # Messages

    def push(self, grid: Grid, messages: Sequence[Message]) -> list[str | None]:
        """Send ``messages`` to the nodes that are connected; the id of each, None where it could not be sent."""
        self._pause_s = SHORTEST_S
        nodes = set(grid.get_node_ids())
        there = [m for m in messages if m.metadata.dst_node_id in nodes]
        ids = list(grid.push_messages(there)) if there else []
        if len(ids) != len(there):
            ids = [""] * len(there)  # Flower's answer to a payload that is too large
        sent = iter(ids)
        return [next(sent) or None if m.metadata.dst_node_id in nodes else None for m in messages]

    def look(self, grid: Grid, ids: Collection[str]) -> list[tuple[str, Message]]:
        """The replies to the messages ``ids`` that are here, the first to each."""
        found: dict[str, Message] = {}
        if ids or self._late:
            for reply in grid.pull_messages(sorted({*ids, *self._late})):
                answered = reply.metadata.reply_to_message_id
                self._late.discard(answered)
                if answered in ids:
                    found.setdefault(answered, reply)
        if found:
            self._pause_s = SHORTEST_S
        return list(found.items())

    def drop(self, ids: Iterable[str]) -> None:
        """Nobody waits for the replies to the messages ``ids`` any more."""
        self._late.update(ids)

    def missing(self, grid: Grid, nodes: Collection[int]) -> set[int]:
        """Which of ``nodes`` are not connected, as far as the grid is asked: every `NODES_S` seconds."""
        if not nodes or monotonic() - self._nodes_at < NODES_S:
            return set()
        self._nodes_at = monotonic()
        return set(nodes) - set(grid.get_node_ids())

    def lose(self, client: int, now: int) -> None:
        """``client`` is lost, and will be asked again."""
        self.away[client] = now + ticks(self.network.rejoin_s)

    def ask(
        self, grid: Grid, clock: Clock, messages: Mapping[int, Message], until: int | None, heard: Heard
    ) -> list[tuple[int, Message]]:
        """Send ``messages`` to their clients and wait for replies, to tick ``until`` or until ``heard`` has enough.

        For a client that is lost there is an error reply; who is only late has none.
        """
        replies: list[tuple[int, Message]] = []
        enough = False

        def hear(client: int, reply: Message) -> None:
            nonlocal enough
            now = self.now(clock)
            self.arrived[client] = now if until is None else min(now, until)
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                self.lose(client, now)
            replies.append((client, reply))
            enough = heard(client, reply) or enough

        waiting: dict[str, int] = {}
        for client, message_id in zip(messages, self.push(grid, list(messages.values())), strict=True):
            if message_id is None:
                hear(client, _lost(messages[client], UNSENT))
            else:
                waiting[message_id] = client
        timeout = self.now(clock) + ticks(self.network.timeout_s)
        while waiting and not enough:
            now = self.now(clock)  # before the look: what is here by then has come in time
            nodes = {messages[c].metadata.dst_node_id for c in waiting.values()}
            gone = self.missing(grid, nodes)
            for message_id, reply in self.look(grid, waiting):
                hear(waiting.pop(message_id), reply)
            for message_id, client in list(waiting.items()):
                if messages[client].metadata.dst_node_id in gone or now >= timeout:
                    hear(client, _lost(messages[client], TIMED_OUT if now >= timeout else GONE))
                    self.drop([message_id])
                    del waiting[message_id]
            if until is not None and now >= until:
                break
            if waiting and not enough:
                self.rest(clock, timeout if until is None else min(until, timeout))
        self.drop(waiting)
        return replies

    # What the schedules ask of a fleet

    def jobs(self, start: int, asked: Sequence[tuple[int, int, int, int, int]]) -> list[Job]:
        """When the clients that `ask` heard arrived; what was before is not known."""
        return [Job(start, self.arrived[c], None, self.arrived[c]) for c, *_ in asked]

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.resumed = True

    def check_resumed(self, guard: Guard, apart: bool = False) -> None:
        """Raise `ConfigError` where a run goes on whose books may miss something.

        What was released after the checkpoint is not in its books, and as nothing is replayed, the same job would get
        the same noise for another content. Clients on hosts (``apart``) keep books of their own, which tell the second
        content of a job from the first, and what the server charges is on disk before it asks (`fl.engine.home`).
        """
        unit = guard.statement().unit
        if self.resumed and unit is not None and not (apart and guard.client_state(0)):
            allowed = f"a model of time: a run with a privacy claim about one {unit} can't go on on the wall clock"
            raise ConfigError("network", "WallClock", allowed, "Start the run anew.")


def _lost(message: Message, why: str) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, why), reply_to=message)
