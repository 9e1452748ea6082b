"""Jobs and exchanges of pairs on the virtual clock: what `schedule=ad_psgd` and `schedule=a2cid2` run on.

Each peer trains without pause. An edge is used at the events of a Poisson clock, if both of its ends are free: each
sends its model, and when both have arrived, both use the difference that they had when they sent. Where a job starts is
all that its result depends on, so all outstanding jobs are computed in one exchange with the nodes when the first of
them is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fl.clock import EventQueue, Priority
from fl.errors import RunStopped
from fl.gossip.acid import Acid
from fl.gossip.clocks import PoissonClock
from fl.gossip.rates import Rates
from fl.keys import generator
from fl.messages import TrainReply
from fl.peers import PeerJob
from fl.schedules.base import Event, Parts, World, client_event, outcome_fields
from fl.validation import Reason, Rejection

_PREFIX = "pairs/"
_ARRAYS = ("rows", "apart", "carried")


@dataclass
class Job:
    """A peer's job on its way; times are ticks. ``taken`` is what came of it, once it is computed.

    ``lost`` says that it comes to nothing, and ``met`` counts the exchanges that changed its peer's model meanwhile.
    """

    number: int
    phase: int
    lr: float
    began: int
    done: int
    lost: bool
    taken: list[Any] | None = None  # the reason and detail of a rejection; or examples, steps, tokens and loss
    met: int = 0


class Pairs:
    """The events of one run. ``rates`` are uses of the edges a unit of time, which is ``unit`` ticks.

    ``poisson`` says whether jobs take exponential times of mean ``unit``, in place of the devices' own.
    """

    def __init__(self, world: World, method: Acid, rates: Rates, unit: int, poisson: bool, rounds: int):
        assert world.peers is not None
        self.world, self.method, self.unit, self.poisson, self.rounds = world, method, unit, poisson, rounds
        self.peers, number = world.peers, len(world.peers)
        travels = len(world.server.space.moving)
        self.size = self.peers.size(world.server.layout.hash, {"model": ("float32", travels)})
        self.edges = rates.edges.tolist()
        self.clock = PoissonClock(rates.values, unit, world.seed, "edge clock")
        self.queue = EventQueue(world.clock)
        self.jobs: dict[int, Job] = {}  # by peer
        self.busy: dict[int, int] = {}  # peers in an exchange, and with whom
        self.rows = np.zeros_like(self.peers.states)  # where each job began; once it is computed, its update
        self.apart = np.zeros_like(self.peers.states)  # what each exchange on its way is about, by its first peer
        self.carried = np.zeros((number, 2), np.int64)  # bytes of each peer since its last job ended: down, up
        self.since = _Since()
        self.totals = dict.fromkeys(("jobs", "exchanges", "missed"), 0)
        self.waiting: set[int] = set()  # peers whose next job begins when they are available

    @property
    def time(self) -> float:
        """Now, in units of time."""
        return self.world.clock.now / self.unit

    def begin(self) -> None:
        """The first events of a new run."""
        for peer in range(len(self.peers)):
            self._begin(peer, 1, self.world.clock.now)
        self.queue.push(self.clock.peek()[0], Priority.EDGE)

    def events(self, end: int | None) -> Iterator[Event]:
        """An event for each job that ends and for each round, until the last round or the tick ``end``."""
        world = self.world
        while world.server.round < self.rounds:
            reason = world.guard.stopped()
            if reason is None and not (self.jobs or self.waiting):
                reason = "no peer takes part any more"
            if reason is not None:
                yield {"event": "stop", "round": world.server.round, "virtual_s": world.clock.now_s, "reason": reason}
                return
            head = self.queue.peek()
            if end is not None and head is not None and head.time > end:
                world.clock.advance(end)
                return
            event = self.queue.pop()
            if event.priority == Priority.EDGE:
                _, edge = self.clock.pop()
                self.queue.push(self.clock.peek()[0], Priority.EDGE)
                self._meet(*self.edges[edge])
            elif event.priority == Priority.ARRIVE:
                self._part(event.client)
            elif event.priority == Priority.SERVER_TICK:
                self.waiting.discard(event.client)
                self._begin(event.client, event.data, event.time)
            else:
                yield self._end(event.client)
                if self.totals["jobs"] % len(self.peers) == 0:
                    yield self._round()

    def _begin(self, peer: int, number: int, when: int | None) -> None:
        """Start the peer's job ``number`` at the first tick from ``when`` on at which it is available."""
        world, now = self.world, self.world.clock.now
        began = None if when is None else world.fleet.next_available(peer, when)
        if began is None:
            return
        if began > now:
            self.waiting.add(peer)
            self.queue.push(began, Priority.SERVER_TICK, peer, number)
            return
        times = world.fleet.job(peer, number, world.local.num_steps(world.sizes[peer]), 0, 0)
        length = times.compute
        if self.poisson:
            length = round(generator(world.seed, "job clock", peer, number).exponential(self.unit))
        lost = times.dropped_at is not None
        if times.dropped_at is not None:
            length = times.dropped_at
        phase, done = world.server.round + 1, now + max(1, length)
        self.rows[peer] = self.method.advance(peer, self.time)[0]
        self.jobs[peer] = Job(number, phase, world.local.lr_at(phase, self.rounds), now, done, lost)
        self.queue.push(done, Priority.COMPUTE_DONE, peer, number)

    def _meet(self, i: int, j: int) -> None:
        """The edge (i, j) is used now, if both are free."""
        now, fleet = self.world.clock.now, self.world.fleet
        if i in self.busy or j in self.busy or not (fleet.available(i, now) and fleet.available(j, now)):
            self.totals["missed"] += 1
            return
        self.totals["exchanges"] += 1
        arrived = self.peers.queues(self.world.network).send([(i, j, now, self.size), (j, i, now, self.size)])
        for src, dst in arrived:
            self.peers.traffic[src, dst] += self.size
            self.carried[src, 1] += self.size
            self.carried[dst, 0] += self.size
        self.apart[i] = self.method.apart(i, j, self.time)
        self.busy |= {i: j, j: i}
        over = max(arrived.values())
        if over > now:
            self.queue.push(over, Priority.ARRIVE, i)
        else:
            self._part(i)

    def _part(self, i: int) -> None:
        """The exchange whose first peer is i is over."""
        j = self.busy.pop(i)
        del self.busy[j]
        self.method.meet(i, j, self.time, self.apart[i])
        for peer in (i, j):
            if peer in self.jobs:
                self.jobs[peer].met += 1

    def _compute(self) -> None:
        """Compute all outstanding jobs together."""
        world = self.world
        due = [(p, job) for p, job in self.jobs.items() if job.taken is None and not job.lost]
        asked = [PeerJob(p, job.number, self.rows[p].copy(), job.lr, job.phase) for p, job in due]
        for (peer, job), got in zip(due, self.peers.train(world, asked), strict=True):
            said = got.outcome
            if isinstance(said, TrainReply):
                job.taken = [said.examples, said.steps, said.tokens, said.loss]
            else:
                job.taken = [said.reason.value, said.detail]
            self.rows[peer] = 0
            got.lay(self.rows[peer])
        world.validator.forget(min(job.number for job in self.jobs.values()))

    def _end(self, peer: int) -> Event:
        """The peer's job is over: its update counts, and the next job begins."""
        world, now = self.world, self.world.clock.now
        if self.jobs[peer].taken is None and not self.jobs[peer].lost:
            self._compute()
        job = self.jobs.pop(peer)
        outcome = self._outcome(peer, job)
        if isinstance(outcome, TrainReply):
            self.method.step(peer, self.time, self.rows[peer])
        self.totals["jobs"] += 1
        self.since.note(outcome, job.met)
        down, up = self.carried[peer].tolist()
        self.carried[peer] = 0
        self._begin(peer, job.number + 1, world.fleet.rejoins(peer, job.number, now) if job.lost else now)
        return client_event(
            round=job.number, version=job.phase - 1, client=peer, time=now, staleness=job.met, bytes_down=down,
            bytes_up=up, reply=outcome, taken=outcome, phases=(job.began, job.began, now),
        )  # fmt: skip

    def _outcome(self, peer: int, job: Job) -> TrainReply | Rejection:
        if job.lost or job.taken is None:
            return Rejection(Reason.ERROR, "its work was lost on the way")
        if len(job.taken) == 2:
            return Rejection(Reason(job.taken[0]), job.taken[1])
        layout = self.world.server.layout.hash
        return TrainReply(peer, job.number, job.phase - 1, layout, np.zeros(0, np.float32), *job.taken)

    def _round(self) -> Event:
        """As many jobs have ended as there are peers: the mean of all is the newest version."""
        world, server = self.world, self.world.server
        self.peers.states = self.method.at(self.time)
        self.peers.ready[:] = world.clock.now
        mean, consensus = self.peers.mean(), self.peers.consensus()
        if not np.isfinite(mean).all():
            raise RunStopped(
                f"The peers' models are no longer finite in round {server.round + 1}: the steps grew without bound. "
                "Lower local.lr."
            )
        moved = float(np.linalg.norm(mean - server.vector))
        world.server = server.replace(
            vector=mean.astype(np.float32), version=server.version + 1, round=server.round + 1
        )
        carried = int(self.peers.traffic.sum()) - self.since.carried
        event = {
            "event": "round",
            "round": world.server.round,
            "version": world.server.version,
            "virtual_s": world.clock.now_s,
            **self.since.fields(),
            "bytes_down": carried,
            "bytes_up": carried,
            "update_norm": moved,
            "bytes_once": 0,
            "aggregation_error": None,
            "epsilon": world.guard.epsilon,
            "live_versions": len(self.jobs),
            "consensus": consensus,
            "bytes_links": carried,
            "communications": self.totals["exchanges"],
            "missed": self.totals["missed"],
        }
        self.since = _Since(int(self.peers.traffic.sum()))
        return event

    def parts(self) -> Parts:
        """Everything that the rest of the run depends on, for a checkpoint after a round."""
        own = {name: getattr(self, name) for name in _ARRAYS}
        own |= {"states": self.method.states, "times": self.method.times}
        meta = {
            "jobs": [[peer, asdict(job)] for peer, job in self.jobs.items()],
            "busy": [list(pair) for pair in self.busy.items()],
            "waiting": sorted(self.waiting),
            "totals": self.totals,
            "clock": self.clock.state(),
            "links": self.peers.state(),
            "queue": self.queue.state(),
        }
        return self.peers.arrays() | {_PREFIX + name: array.copy() for name, array in own.items()}, meta

    def restore(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Go on from what `parts` gave."""
        self.peers.restore(arrays, meta["links"])
        for name in _ARRAYS:
            setattr(self, name, np.array(arrays[_PREFIX + name]))
        self.method.states = np.array(arrays[_PREFIX + "states"])
        self.method.times = np.array(arrays[_PREFIX + "times"])
        self.jobs = {peer: Job(**job) for peer, job in meta["jobs"]}
        self.busy = dict(meta["busy"])
        self.waiting, self.totals = set(meta["waiting"]), dict(meta["totals"])
        self.clock.restore(meta["clock"])
        self.queue = EventQueue.restore(meta["queue"])
        # One clock for the run: the world's.
        self.queue.clock = self.world.clock
        self.since = _Since(int(self.peers.traffic.sum()))


@dataclass
class _Since:
    """What has happened since the last round, of which ``carried`` bytes came before."""

    carried: int = 0
    outcomes: list[TrainReply | Rejection] = field(default_factory=list)
    met: list[int] = field(default_factory=list)  # of the accepted jobs

    def note(self, outcome: TrainReply | Rejection, met: int) -> None:
        self.outcomes.append(outcome)
        self.met += [met] if isinstance(outcome, TrainReply) else []

    def fields(self) -> dict[str, Any]:
        """The fields of the round's event."""
        staleness = sum(self.met) / len(self.met) if self.met else None
        return {**outcome_fields(self.outcomes), "staleness": staleness}
