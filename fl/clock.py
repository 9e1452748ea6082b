"""Virtual time: whole microsecond ticks, and a queue of events with one fixed order for events of the same tick.

Whole numbers, because sums of float times depend on their order and miss exact ties. Events are taken in the order of
``(time, priority, client, seq)``: what arrives at a tick counts in a server step of that tick, whichever was
planned first, and an evaluation sees everything that happened.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

TICKS_PER_SECOND = 1_000_000


def ticks(seconds: float) -> int:
    """``seconds`` in ticks, rounded to the nearest (halves to even). Raises `ValueError` if negative or not finite."""
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"a duration is a finite number of seconds >= 0, not {seconds}")
    return round(seconds * TICKS_PER_SECOND)


def seconds(ticks: int) -> float:
    """``ticks`` in seconds, the float nearest to it; ``ticks(seconds(t)) == t`` for 0 <= t < 2**51 (71 years)."""
    return ticks / TICKS_PER_SECOND


class Priority(IntEnum):
    """The order of events of one tick."""

    ARRIVE = 0  # a message reaches its receiver
    COMPUTE_DONE = 1  # a client has finished its work
    EDGE = 2  # two peers exchange
    SERVER_TICK = 3  # the server takes a step, or a deadline passes
    EVAL = 4  # somebody looks


@dataclass(frozen=True, order=True)
class Event:
    """Something that happens at ``time`` (ticks), to ``client`` (-1: to none). ``data`` must be JSON-able."""

    time: int
    priority: Priority
    client: int
    seq: int  # unique in a queue, so that comparing two events never reaches their data
    data: Any = None


class Clock:
    """The current virtual time, ``now`` in ticks. It never goes back."""

    def __init__(self, now: int = 0):
        self.now = now

    @property
    def now_s(self) -> float:
        return seconds(self.now)

    def advance(self, to: int) -> None:
        """Move to tick ``to``. Raises `ValueError` if that is in the past."""
        if to < self.now:
            raise ValueError(f"the clock is at tick {self.now} and can't go back to {to}")
        self.now = to


class EventQueue:
    """Planned events in their order. `pop` moves the clock to the event that it returns."""

    def __init__(self, clock: Clock | None = None):
        self.clock = clock if clock is not None else Clock()
        self._heap: list[Event] = []
        self._planned: set[int] = set()  # seq of every event in the heap that is not cancelled
        self._next_seq = 0

    def __len__(self) -> int:
        return len(self._planned)

    def push(self, time: int, priority: Priority, client: int = -1, data: Any = None) -> int:
        """Plan an event and return its ``seq``, which names it. Raises `ValueError` for a time in the past."""
        if time < self.clock.now:
            raise ValueError(f"tick {time} is in the past: the clock is at {self.clock.now}")
        event = Event(time, Priority(priority), client, self._next_seq, data)
        self._next_seq += 1
        heapq.heappush(self._heap, event)
        self._planned.add(event.seq)
        return event.seq

    def peek(self) -> Event | None:
        """The next event, left where it is; None if nothing is planned."""
        while self._heap and self._heap[0].seq not in self._planned:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def pop(self) -> Event:
        """Take the next event and move the clock to it. Raises `IndexError` if nothing is planned."""
        event = self.peek()
        if event is None:
            raise IndexError("no event is planned")
        heapq.heappop(self._heap)
        self._planned.remove(event.seq)
        self.clock.advance(event.time)
        return event

    def cancel(self, seq: int) -> bool:
        """Drop the event named ``seq``; False if it has happened, was cancelled or never was."""
        if seq not in self._planned:
            return False
        self._planned.remove(seq)
        return True

    def state(self) -> dict[str, Any]:
        """Everything, as JSON-able values, for a checkpoint. The queue that `restore` makes of it pops the same."""
        events = sorted(event for event in self._heap if event.seq in self._planned)
        rows = [[e.time, int(e.priority), e.client, e.seq, e.data] for e in events]
        return {"now": self.clock.now, "next_seq": self._next_seq, "events": rows}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> EventQueue:
        """The queue, and its clock, whose `state` this is."""
        queue = cls(Clock(state["now"]))
        queue._next_seq = state["next_seq"]
        queue._heap = [Event(t, Priority(p), client, seq, data) for t, p, client, seq, data in state["events"]]
        heapq.heapify(queue._heap)
        queue._planned = {event.seq for event in queue._heap}
        return queue
