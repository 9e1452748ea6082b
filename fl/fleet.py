"""The clients' devices and links at work in one run: when a job begins, ends and arrives, in ticks of virtual time.

A job is a download, local work and an upload. With ``x|mbps = ticks(8 x / (mbps 10^6))`` (0 where mbps is null)::

    turn  = max(start, the server's link is free) + bytes_down|server_down_mbps     the link is then busy until turn
    began = turn + ticks(latency_s + 8 bytes_down / (down_mbps 10^6))
    done  = began + ticks(compute_s)
    turn' = max(done, the server's link is free) + bytes_up|server_up_mbps
    arrived = turn' + ticks(latency_s + 8 bytes_up / (up_mbps 10^6))

Each of the server's two links is a queue that serves messages first come, first served: in the order in which they
are ready to leave their senders. Store and forward: a message passes one link whole, then the next. A job that is lost
while its client works takes no turn on the way up.

A client whose window of availability closes before its work is done finishes it all the same, loses it at that tick, or
stops, download and work, until the next window (``network.on_leave``). An upload that has begun goes through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl.clock import ticks
from fl.keys import Part, generator

if TYPE_CHECKING:
    from fl.network import Network


@dataclass(frozen=True)
class Begun:
    """A job up to its upload, in absolute ticks.

    ``began``: the download is over; ``done``: the work is over; ``dropped_at``: it is lost without a word, or None.
    """

    began: int
    done: int
    dropped_at: int | None


@dataclass(frozen=True)
class Job(Begun):
    """A whole job, in absolute ticks. ``arrived``: the upload is at the server, or would be; ``done`` if none began."""

    arrived: int


@dataclass(frozen=True)
class Times:
    """The parts of a job that waits for nobody, in ticks; ``dropped_at`` counts from its start."""

    down: int
    compute: int
    up: int
    dropped_at: int | None = None

    @property
    def total(self) -> int:
        return self.down + self.compute + self.up


@dataclass
class Link:
    """One of the server's links: a queue served first come, first served. ``mbps`` None: it holds nobody up."""

    mbps: float | None
    free_at: int = 0

    def ticks(self, size: int) -> int:
        """Ticks that ``size`` bytes are on the link."""
        return transfer(size, self.mbps)

    def send(self, now: int, size: int) -> int:
        """The tick at which a message that is ready at ``now`` has passed the link."""
        if self.mbps is None:
            return now
        self.free_at = max(now, self.free_at) + self.ticks(size)
        return self.free_at


def transfer(size: int, mbps: float | None, latency_s: float = 0.0) -> int:
    """Ticks of ``size`` bytes on a link of ``mbps`` 10^6 bits a second (None: unlimited)."""
    return ticks(latency_s + (0.0 if mbps is None else 8 * size / (mbps * 1e6)))


class Fleet:
    """The ``number`` clients of the run with ``seed``. What is on the server's links, and who is away, is its state."""

    def __init__(self, network: Network, seed: int, number: int):
        self.network, self.seed, self.number = network, seed, number
        self.down, self.up = Link(network.server_down_mbps), Link(network.server_up_mbps)
        self.away: dict[int, int] = {}  # lost in a synchronous round, until a tick

    def begin(self, client: int, job: int, start: int, steps: int, bytes_down: int, bytes_up: int) -> Begun:
        """Job number ``job`` of ``client``, asked for at tick ``start``. To be called in the order of ``start``."""
        times = self._times(client, job, steps, bytes_down, bytes_up)
        turn = self.down.send(start, bytes_down)
        began, there = self._work(client, turn, times.down - self.down.ticks(bytes_down))
        done, there = self._work(client, began, times.compute) if there else (began, False)
        share = self._lost(client, job)
        length = turn - start - self.down.ticks(bytes_down) + times.total  # of the job if its client stays
        ends = [] if share is None else [start + int(share * length)]
        return Begun(began, done, min(ends if there else [*ends, done], default=None))

    def upload(self, client: int, start: int, size: int) -> int:
        """The tick at which ``size`` bytes arrive that are ready at tick ``start``. To be called in that order."""
        device = self.network.device(self.seed, client, self.number)
        return self.up.send(start, size) + transfer(size, device.up_mbps, device.latency_s)

    def jobs(self, start: int, asked: Sequence[tuple[int, int, int, int, int]]) -> list[Job]:
        """A synchronous round: ``asked`` are (client, job, steps, bytes_down, bytes_up), all asked for at ``start``.

        Downloads take their turns in the order of clients, uploads in the order in which the work is done (the lower
        client first). Both of the server's links are free at the start: a round that is over leaves nothing on them.
        """
        self.down, self.up = Link(self.network.server_down_mbps), Link(self.network.server_up_mbps)
        self.away = {c: until for c, until in self.away.items() if until > start}
        begun = {c: self.begin(c, job, start, steps, down, up) for c, job, steps, down, up in sorted(asked)}
        sizes = {client: up for client, _, _, _, up in asked}
        arrived = {}
        for client in sorted(begun, key=lambda c: (begun[c].done, c)):
            one = begun[client]
            if one.dropped_at is not None and self.network.rejoin_s:
                self.away[client] = one.dropped_at + ticks(self.network.rejoin_s)
            lost = one.dropped_at is not None and one.dropped_at <= one.done
            arrived[client] = one.done if lost else self.upload(client, one.done, sizes[client])
        return [Job(begun[c].began, begun[c].done, begun[c].dropped_at, arrived[c]) for c, *_ in asked]

    def job(self, client: int, job: int, steps: int, bytes_down: int, bytes_up: int, *stage: Part) -> Times:
        """The times of a job that finds both links free and its client at home.

        ``stage`` names what is done beside the training of that round; whether it is lost is drawn apart.
        """
        times = self._times(client, job, steps, bytes_down, bytes_up)
        share = self._lost(client, job, *stage)
        dropped_at = None if share is None else int(share * times.total)
        return Times(times.down, times.compute, times.up, dropped_at)

    def duration(self, client: int, steps: int, bytes_down: int, bytes_up: int) -> int | None:
        """Ticks of an undisturbed job; None where they are drawn anew for each job."""
        return None if self.network.varies else self._times(client, 0, steps, bytes_down, bytes_up).total

    def available(self, client: int, now: int) -> bool:
        """Whether ``client`` can start work at tick ``now``."""
        return self.next_available(client, now) == now

    def next_available(self, client: int, now: int) -> int | None:
        """The first tick >= ``now`` at which ``client`` can start work; None if there is none."""
        return self.network.next_available(self.seed, client, max(now, self.away.get(client, now)))

    @property
    def cycle(self) -> int | None:
        """Ticks after which everyone's availability has repeated; None where it does not, but comes to an end."""
        cycle = self.network.cycle
        return None if cycle is None else cycle + ticks(self.network.rejoin_s)

    def rejoins(self, client: int, job: int, dropped_at: int) -> int | None:
        """The tick at which ``client``, lost in ``job`` at ``dropped_at``, can work again; None: never."""
        return self.next_available(client, dropped_at + ticks(self.network.rejoin_s))

    def state(self) -> dict[str, Any]:
        """Everything that changes, as JSON-able values, for a checkpoint."""
        away = [[client, until] for client, until in sorted(self.away.items())]
        return {"down_free_at": self.down.free_at, "up_free_at": self.up.free_at, "away": away}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.down.free_at, self.up.free_at = state["down_free_at"], state["up_free_at"]
        self.away = dict(state["away"])

    def _times(self, client: int, job: int, steps: int, bytes_down: int, bytes_up: int) -> Times:
        device = self.network.device(self.seed, client, self.number)
        return Times(
            self.down.ticks(bytes_down) + transfer(bytes_down, device.down_mbps, device.latency_s),
            ticks(self.network.compute_s(self.seed, client, job, steps, device)),
            self.up.ticks(bytes_up) + transfer(bytes_up, device.up_mbps, device.latency_s),
        )

    def _lost(self, client: int, job: int, *stage: Part) -> float | None:
        """The share of its length after which a job is lost, or None."""
        if not self.network.dropout:
            return None
        lost, when = generator(self.seed, "network", client, job, *stage).random(2)
        return float(when) if lost < self.network.dropout else None

    def _work(self, client: int, start: int, length: int) -> tuple[int, bool]:
        """The tick at which ``length`` ticks of work from ``start`` on are over; False with that of leaving before."""
        on_leave, now, seed = self.network.on_leave, start, self.seed
        if on_leave == "finish":
            return start + length, True
        while True:
            closes = self.network.leaves(seed, client, now)
            if closes is None or now + length <= closes:
                return now + length, True
            opens = self.network.next_available(seed, client, closes)
            if on_leave == "lose" or opens is None:
                return closes, False
            length, now = length - (closes - now), opens
