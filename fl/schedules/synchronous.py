"""Synchronous rounds (McMahan et al., arXiv 1602.05629, algorithm 1).

A round asks some clients, waits for them, and aggregates. It lasts as long as its slowest client that is waited for:
with ``over_selection`` until the first k have answered, with ``deadline_s`` at most that long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from aggregators.factored import relative_error
from fl.clock import Clock, EventQueue, Priority, ticks
from fl.config import setting
from fl.errors import RunStopped, ShoalError
from fl.fleet import Job
from fl.messages import TrainReply, payload_bytes
from fl.schedules.base import Event, Schedule, World, client_event
from fl.state import Update
from fl.validation import Reason, Rejection

_WAY_OUT = (
    "The state before this round is in the checkpoint: `shoal run --resume DIR` tries the round again, with what was "
    "changed in DIR/config.yaml."
)


@dataclass(frozen=True)
class Synchronous(Schedule):
    """Rounds of sampled clients that all start from the newest version."""

    deadline_s: float | None = setting(None, gt=0, help="virtual seconds after which a round ends; null: none")
    min_clients: int = setting(1, ge=1, help="accepted updates that a round needs; with fewer the run stops")

    in_rounds = True

    def participations(self) -> int | None:
        return self.rounds

    def run(self, world: World) -> Iterator[Event]:
        if world.wall is not None:
            world.wall.check_resumed(world.guard, world.apart)
        for round in range(world.server.round + 1, self.rounds + 1):
            reason = world.guard.stopped()
            if reason is not None:
                yield {"event": "stop", "round": world.server.round, "virtual_s": world.clock.now_s, "reason": reason}
                return
            yield from self._round(world, round)

    def _round(self, world: World, round: int) -> Iterator[Event]:
        server = world.server
        asked = self._sample(world, round)
        exchange = world.exchange(server, round, asked)
        asked, start = list(exchange.clients), world.now()
        until = None if self.deadline_s is None else start + ticks(self.deadline_s)
        quota = world.sampling.quota(world.per_round)
        lr = world.local.lr_at(round, self.rounds)
        requests = {c: world.train_request(c, round, lr, server, exchange.arrays(c)) for c in asked}
        answers: list[tuple[int, TrainReply | Rejection, Message]] = []

        def enough(client: int, reply: Message) -> bool:
            answers.append((client, world.validator.check(reply, requests[client]), reply))
            world.doubt(client, reply)
            return quota is not None and sum(isinstance(k, TrainReply) for _, k, _ in answers) >= quota

        _, down = world.ask(list(requests.values()), until, enough)
        queue = EventQueue(Clock(start))
        heard: set[int] = set()
        acknowledged: list[int] = []
        ups = [0 if reply.has_error() else payload_bytes(reply.content) for _, _, reply in answers]
        once = {c: (c, round, _steps(k, reply), down[c], up) for (c, k, reply), up in reversed([*zip(answers, ups)])}
        jobs = dict(zip(once, world.fleet.jobs(start, list(once.values())), strict=True))
        for (client, checked, _), up in zip(answers, ups, strict=True):
            job = jobs[client]
            if job.dropped_at is not None:
                checked, up = Rejection(Reason.ERROR, "its work was lost on the way"), 0
            if isinstance(checked, TrainReply):
                acknowledged.append(client)
            when = job.arrived if job.dropped_at is None else job.dropped_at
            down_once = 0 if client in heard else down[client]
            queue.push(when, Priority.ARRIVE, client, _Arrival(checked, up, down_once, start, job))
            heard.add(client)
        late = [c for c in asked if c not in heard]  # in real time a round ends without them
        if late:
            assert world.wall is not None
            now = world.wall.now(world.clock)
            now = now if until is None else min(now, until)
            missed, job = Rejection(Reason.LATE, "no reply before the round was over"), Job(start, now, None, now)
            for client in late:
                queue.push(now, Priority.ARRIVE, client, _Arrival(missed, 0, down[client], start, job))
        trained = server.space.trains(round)
        first_contact = sum(world.downlink.once(server, c, trained, requests[c].extra) for c in asked)
        for client in acknowledged:
            world.downlink.heard(client, server.version)
        if until is not None:
            queue.push(until, Priority.SERVER_TICK)
        updates: list[Update] = []
        rejected: Counter[str] = Counter()
        first = ""  # why the first rejected reply was
        totals: Counter[str] = Counter()
        over, waiting, end = False, len(answers) + len(late), start
        while queue:
            event = queue.pop()
            if event.priority == Priority.SERVER_TICK:
                end = event.time if waiting and not over else end
                over = True
                continue
            waiting -= 1
            arrival: _Arrival = event.data
            checked = arrival.checked
            if over and isinstance(checked, TrainReply):
                checked = Rejection(Reason.LATE, "the round was over")
            if isinstance(checked, TrainReply):
                try:
                    exchange.add(event.client, checked)
                except ShoalError as refusal:
                    checked = Rejection(Reason.PROOF, str(refusal))
            end = end if over else event.time
            totals["bytes_down"] += arrival.bytes_down
            totals["bytes_up"] += arrival.bytes_up
            done = arrival.checked if isinstance(arrival.checked, TrainReply) else None
            totals["steps"] += done.steps if done else 0
            totals["tokens"] += done.tokens if done else 0
            if isinstance(checked, TrainReply):
                updates.append(world.update(checked, server, start, event.time))
            else:
                rejected[checked.reason.value] += 1
                first = first or f" (the first: {checked.detail})"
            known = world.wall is None
            yield _client_event(round, server.version, event.client, event.time, checked, arrival, known)
            over = over or (quota is not None and len(updates) >= quota)
        world.clock.advance(end)
        world.validator.forget(round)
        # Clients that have spent their budgets are not missing: those of another round may have some left.
        counted = len(updates) + rejected[Reason.BUDGET.value]
        if asked and counted < self.min_clients and not world.guard.counts_secret:
            raise RunStopped(
                f"Round {round} has {len(updates)} accepted updates of {len(asked)} clients asked; "
                f"schedule.min_clients is {self.min_clients}. Rejected: "
                f"{dict(sorted(rejected.items())) or 'none'}{first}. "
                f"{_WAY_OUT}"
            )
        new, error = server, None
        losses = [u.loss for u in updates if u.loss is not None]
        accepted = len(updates)
        if updates:
            updates = exchange.close(updates)
        totals.update(exchange.costs)
        collected = world.guard.collect(server, updates, round, lr)
        if collected:
            clients = collected
            if world.root is not None:
                collected = [world.root(server, round, lr), *collected]
            new = world.aggregator.aggregate(server, collected, world.optimizer)
            if world.measure_error and clients == updates:
                error = relative_error(server, updates, world.aggregator.shares(updates), new)
            new = world.accept(server, new)
        moved = float(np.linalg.norm(new.vector.astype(np.float64) - server.vector.astype(np.float64)))
        world.server = new.replace(round=round)
        yield {
            "event": "round",
            "round": round,
            "version": world.server.version,
            "virtual_s": world.clock.now_s,
            "sampled": len(asked),
            "accepted": accepted,
            "rejected": dict(sorted(rejected.items())),
            "bytes_down": totals["bytes_down"],
            "bytes_up": totals["bytes_up"],
            "client_steps": totals["steps"],
            "tokens": totals["tokens"],
            "loss": float(np.mean(losses)) if losses else None,
            "update_norm": moved,
            "bytes_once": first_contact,
            "aggregation_error": error,
            "epsilon": world.guard.epsilon,
            "staleness": 0.0 if accepted else None,
            "live_versions": 1,
        }

    def _sample(self, world: World, round: int) -> list[int]:
        """Sampled clients, once enough are available; moves the clock to that moment."""
        everyone, begun, cycle = range(world.number), world.clock.now, world.fleet.cycle
        needed = world.sampling.needed(world.number, world.per_round)
        while True:
            now = world.now()
            ready = [c for c in everyone if world.fleet.available(c, now)]
            if len(ready) >= needed:
                return world.sampling.sample(world.seed, round, ready, world.number, world.per_round)
            later = [world.fleet.next_available(c, now + 1) for c in everyone if c not in set(ready)]
            times = [t for t in later if t is not None]
            if not times or (cycle is not None and min(times) > begun + cycle):
                raise RunStopped(
                    f"Round {round} needs {needed} clients that are available at once, and there will never be that "
                    f"many. Lower clients.per_round, raise network.availability, or use sampling=available. {_WAY_OUT}"
                )
            world.pass_to(min(times))


@dataclass(frozen=True)
class _Arrival:
    checked: TrainReply | Rejection
    bytes_up: int
    bytes_down: int
    sent: int  # ticks
    job: Job


def _steps(checked: TrainReply | Rejection, reply: Message) -> int:
    """Local steps behind a reply: of a rejected one what it claims, since its client was at work all the same."""
    if isinstance(checked, TrainReply) or reply.has_error():
        return checked.steps if isinstance(checked, TrainReply) else 0
    try:
        claimed = TrainReply.from_record(reply.content).steps
    except Exception:  # the sender decides what is in it, so anything may break
        return 0
    return claimed if 0 <= claimed < 2**31 else 0


def _client_event(
    round: int, version: int, client: int, time: int, checked: TrainReply | Rejection, arrival: _Arrival, known: bool
) -> Event:
    job = arrival.job
    return client_event(
        round=round, version=version, client=client, time=time, staleness=0, bytes_down=arrival.bytes_down,
        bytes_up=arrival.bytes_up, reply=arrival.checked, taken=checked,
        phases=(arrival.sent, min(job.began, time) if known else None, min(job.done, time) if known else None),
    )  # fmt: skip
