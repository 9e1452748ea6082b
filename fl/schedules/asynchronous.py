"""Asynchronous schedules on the virtual clock: clients work all the time, each from the version that it was given.

A server step uses the updates that have arrived since the last one (Fraboni et al., arXiv 2206.10189, eq. 4)::

    x' = x + sum_i d_i u_i,     d_i = a s(staleness_i) r_i

with ``u_i`` the change that client i made from the version it started from. The schedules differ in when a step happens
and when a client that is done gets new work. ``r_i`` says what one contribution counts for:

========= ============================ =====================================================================
weights   r_i                          what is minimised in the long run (a s = 1)
========= ============================ =====================================================================
identical 1 / c, the schedule's own c  sum_i q_i f_i / sum_i q_i: who contributes often counts more
unbiased  p_i / q_i                    sum_i p_i f_i, the objective of FedAvg, and sum_i q_i r_i = 1
========= ============================ =====================================================================

``p_i`` are the shares of the clients by ``aggregator.weights``, and ``q_i`` the contributions of client i to one server
step, in the mean: from the durations of the clients' jobs (``rates=model``), or counted (``rates=observed``:
``q_i = c_i / n`` after c_i contributions in n steps, this one included).

Work is computed when it is due, together with all that is outstanding (`fl.tasks`). What arrives at a tick counts in a
server step of that tick, and clients get new work when all of a tick has happened: so with equal devices FedBuff and
FedFix are FedAvg, bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aggregators.staleness import drift
from fl.clock import Priority, ticks
from fl.config import setting
from fl.errors import ConfigError, RunStopped
from fl.messages import TrainReply
from fl.schedules.base import Event, Schedule, World, client_event
from fl.state import ServerState, Update
from fl.tasks import Task, Tasks
from fl.validation import Reason, Rejection
from fl.wall_tasks import WallTasks


@dataclass(frozen=True)
class Asynchronous(Schedule):
    """What the asynchronous schedules share; ``rounds`` counts the server's steps."""

    until_s: float | None = setting(None, gt=0, help="virtual seconds after which the run ends; null: after rounds")
    weights: str = setting("identical", choices=["identical", "unbiased"], help="what a contribution counts for")
    rates: str = setting(
        "model", choices=["model", "observed"], help="how unbiased weights know how often a client contributes"
    )
    max_staleness: int | None = setting(None, ge=0, help="an update that is more versions old is rejected; null: none")
    deadline_s: float | None = setting(
        None, gt=0, help="virtual seconds after which a job is given up and its place is free; null: none"
    )

    @property
    def size(self) -> int | None:
        """How many updates make the server step; None: it steps by time."""
        return None

    @property
    def period(self) -> int | None:
        """Ticks between server steps; None: it steps by the number of updates."""
        return None

    @abstractmethod
    def scale(self, world: World) -> float:
        """``c``: a contribution of ``weights=identical`` counts for ``1 / c``."""

    @abstractmethod
    def contributions(self, durations: Sequence[int]) -> list[float]:
        """``q_i`` of clients that work all the time and whose jobs take ``durations`` ticks."""

    @property
    def step_size(self) -> float:
        """``a``: a factor of all weights."""
        return 1.0

    @property
    def mixes(self) -> bool:
        """Whether the server moves towards clients' models, in place of along their updates."""
        return False

    def is_mean(self, settings: Any) -> bool:
        """Whether every server step takes the plain mean of its updates, as a synchronous round does."""
        return False

    def check(self, settings: Any) -> None:
        rule = type(settings.aggregator).__name__
        if settings.sampling.over_selection or not settings.sampling.counted:
            allowed = "fixed or available with over_selection=0: clients are chosen as places become free"
            raise ConfigError("sampling", type(settings.sampling).__name__, allowed)
        if not settings.aggregator.linear and not self.is_mean(settings):
            raise ConfigError(
                "aggregator", rule, f"a rule of the mean update alone, where {type(self).__name__} weighs updates",
                "Use aggregator=fedavg, fedsb, fedsvd or rolora, or a plain mean: schedule=fedbuff "
                "schedule.weights=identical aggregator.staleness=constant.",
            )  # fmt: skip
        if self.size is not None:
            settings.aggregator.check_round(self.size)
        if self.mixes and settings.aggregator.stateful:
            allowed = f"delta: {rule} changes what tensors mean from version to version, so models don't mix"
            raise ConfigError("schedule.mode", "mix", allowed)
        if settings.evaluation.aggregation_error:
            allowed = f"false with {type(self).__name__}: updates of several versions have no common mean"
            raise ConfigError("evaluation.aggregation_error", True, allowed)

    def run(self, world: World) -> Iterator[Event]:
        tasks = Tasks(world, self.max_staleness)
        if world.wall is not None:
            tasks = WallTasks(world, world.wall, self.max_staleness, self.period)
        if world.kept is not None:
            tasks.restore(*world.kept)
            world.treatment.restore(world.kept[0], world.kept[1]["treatment"])
        elif self.period is not None:
            tasks.at(world.clock.now + self.period, "step")

        def keep() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            arrays, meta = tasks.parts()
            more, treatment = world.treatment.parts()
            return arrays | more, meta | {"treatment": treatment}

        world.keep = keep
        expected = self._expected(world, tasks)
        end = None if self.until_s is None else ticks(self.until_s)
        since = _Since()  # what has happened since the last server step
        while world.server.round < self.rounds:
            head = tasks.peek()
            if head is None or head > world.clock.now:  # this moment is over
                reason = world.guard.stopped()
                if reason is None:
                    self._give(world, tasks)
                # Work that is on its way is used to the end: it may be computed, and what it cost is spent.
                coming = bool(tasks.out) or (self.period is not None and bool(tasks.arrived))
                head = tasks.wait(end) if reason is None or coming else None
                if head is None:
                    reason = reason or "no client takes part any more"
                    tasks.arrived.clear()  # no step will use it
                    yield {
                        "event": "stop", "round": world.server.round, "virtual_s": world.clock.now_s, "reason": reason
                    }  # fmt: skip
                    return
            if end is not None and head > end:
                tasks.arrived.clear()
                world.clock.advance(end)
                return
            event = tasks.queue.pop()
            task = tasks.find(event.client, event.data)
            if event.priority == Priority.SERVER_TICK:
                if event.data == "step":
                    assert self.period is not None
                    tasks.at(event.time + self.period, "step")
                    yield self._step(world, tasks, expected, since)
                elif task is not None:
                    task.given_up = True
            elif task is None:
                continue
            elif event.priority == Priority.COMPUTE_DONE:
                tasks.upload(task)
            else:
                taken = tasks.take(task)
                since.note(task, taken)
                yield _client_event(world, task, taken)
                if isinstance(taken, Rejection):
                    if taken.reason == Reason.BUDGET:
                        tasks.retired.add(task.client)
                    self._check_hope(world, since, taken)
                elif self.size is not None and len(tasks.arrived) >= self.size:
                    yield self._step(world, tasks, expected, since)

    def _give(self, world: World, tasks: Tasks) -> None:
        """Give work to clients that are free, as far as places are."""
        now, period = world.clock.now, self.period
        if period is not None and now % period:
            return  # who is done waits for the server's next step
        room = world.per_round - sum(not t.given_up for t in tasks.out.values())
        if room <= 0:
            return
        most = self.participations()
        idle = [
            c for c in range(world.number)
            if c not in tasks.out and c not in tasks.retired and (most is None or tasks.jobs.get(c, 0) < most)
        ]  # fmt: skip
        ready = [c for c in idle if world.fleet.available(c, now)]
        chosen = ready
        if len(ready) > room:
            tasks.draws += 1
            chosen = world.sampling.sample(world.seed, tasks.draws, ready, world.number, room)
        for client in chosen:
            tasks.give(client, self._lr(world), self.deadline_s)
        if len(chosen) < room and period is None:
            later = [world.fleet.next_available(c, now + 1) for c in idle if c not in set(ready)]
            times = [t for t in later if t is not None]
            if times and not now < tasks.wake <= min(times):
                tasks.wake = min(times)
                tasks.at(tasks.wake, "wake")

    def _lr(self, world: World) -> float:
        """The clients' learning rate: by the steps done, or by the time that has passed where that ends the run."""
        round = world.server.round
        if self.until_s is not None:
            round = max(round, min(self.rounds - 1, int(self.rounds * world.clock.now_s / self.until_s)))
        return world.local.lr_at(round + 1, self.rounds)

    def _expected(self, world: World, tasks: Tasks) -> list[float] | None:
        """``q_i`` from the durations of jobs; None where they are not needed or are counted."""
        if self.weights == "identical" or self.rates == "observed":
            return None
        steady = world.network.steady and world.per_round == world.number
        durations = [tasks.duration(c) for c in range(world.number)] if steady else []
        known = [d for d in durations if d]
        if len(known) < world.number:
            raise ConfigError(
                "schedule.rates", "model",
                "observed, unless all clients are at work all the time, each taking its own time, above 0, for every "
                "job: no dropout, hours of availability, queue or chance in network, and no clients.per_round",
                "Set schedule.rates=observed.",
            )  # fmt: skip
        return self.contributions(known)

    def _step(self, world: World, tasks: Tasks, expected: list[float] | None, since: _Since) -> Event:
        """One server step with what has arrived; returns its event."""
        server, live = world.server, len(tasks.versions)
        updates = tasks.collect(self.size)
        round = server.round + 1
        staleness = [server.version - u.start_version for u in updates]
        new = server
        if updates:
            updates = world.guard.collect(server, updates, round, self._lr(world))
            updates = world.treatment.apply(server, updates)
            new = self._moved(world, tasks, expected, updates, staleness)
            new = world.accept(server, new)
        moved = float(np.linalg.norm(new.vector.astype(np.float64) - server.vector.astype(np.float64)))
        world.server = new.replace(round=round)
        return {
            "event": "round",
            "round": round,
            "version": world.server.version,
            "virtual_s": world.clock.now_s,
            **since.close(),
            "update_norm": moved,
            "bytes_once": 0,
            "aggregation_error": None,
            "epsilon": world.guard.epsilon,
            "staleness": float(np.mean(staleness)) if staleness else None,
            "live_versions": live,
            **world.treatment.numbers(),
        }

    def _moved(
        self, world: World, tasks: Tasks, expected: list[float] | None, updates: list[Update], staleness: list[int]
    ) -> ServerState:
        server, rule = world.server, self.rule(world.aggregator.staleness)
        factors = [rule.factor(u) for u in staleness]
        if self.weights == "identical":
            weights, total = factors, self.scale(world)
        else:
            counts = world.aggregator.counts(list(enumerate(world.sizes)))
            total = sum(counts)
            rates = [
                tasks.counts[u.client] / (server.round + 1) if expected is None else expected[u.client] for u in updates
            ]
            weights = [s * counts[u.client] / q for s, u, q in zip(factors, updates, rates, strict=True)]
        gain = self.step_size * sum(weights) / total
        if gain == 0:
            return server  # nobody here has any weight
        if self.mixes:
            updates = [replace(u, vector=u.vector - drift(server, u)) for u in updates]
        if gain != 1:
            updates = [replace(u, vector=u.vector.astype(np.float64) * gain) for u in updates]
        updates = [replace(u, weight=w) for u, w in zip(updates, weights, strict=True)]
        return world.aggregator.aggregate(server, updates, world.optimizer)

    def _check_hope(self, world: World, since: _Since, newest: Rejection) -> None:
        """Raise `RunStopped` where replies are rejected without end."""
        most = max(100, 10 * world.number)
        if self.size is not None and since.futile.total() >= most:
            raise RunStopped(
                f"The last {most} replies were all rejected: {dict(sorted(since.futile.items()))} (the newest: "
                f"{newest.detail}). The state of the last server step is in the checkpoint: `shoal run --resume DIR` "
                "goes on from there, with what was changed in DIR/config.yaml."
            )


class _Since:
    """What has happened since the last server step, for its event."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.futile: Counter[str] = Counter()  # rejected since one was accepted
        self.losses: list[float] = []
        self.accepted = 0

    def note(self, task: Task, taken: TrainReply | Rejection) -> None:
        self.totals.update(bytes_down=task.bytes_down, bytes_up=task.bytes_up)
        if isinstance(task.result, TrainReply):
            self.totals.update(client_steps=task.result.steps, tokens=task.result.tokens)
        if isinstance(taken, Rejection):
            self.rejected[taken.reason.value] += 1
            self.futile[taken.reason.value] += 1
            return
        self.accepted += 1
        self.futile.clear()
        self.losses += [] if taken.loss is None else [taken.loss]

    def close(self) -> dict[str, Any]:
        """The fields of the round's event; begins anew."""
        found = {
            "sampled": self.accepted + sum(self.rejected.values()),
            "accepted": self.accepted,
            "rejected": dict(sorted(self.rejected.items())),
            **{name: self.totals[name] for name in ("bytes_down", "bytes_up", "client_steps", "tokens")},
            "loss": float(np.mean(self.losses)) if self.losses else None,
        }
        self.__init__()  # type: ignore[misc]
        return found


def _client_event(world: World, task: Task, taken: TrainReply | Rejection) -> Event:
    known = world.wall is None
    return client_event(
        round=task.job, version=task.start.version, client=task.client, time=world.clock.now,
        staleness=world.server.version - task.start.version, bytes_down=task.bytes_down, bytes_up=task.bytes_up,
        reply=task.result, taken=taken,
        phases=(task.sent, task.began if known else None, task.done if known else None),
    )  # fmt: skip
