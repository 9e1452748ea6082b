"""When peers that go in rounds are there and done, on a virtual clock or in real time, and the event of their round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from fl.clock import ticks
from fl.errors import RunStopped
from fl.messages import TrainReply
from fl.peers import Peers, Trained
from fl.schedules.base import Event, World, outcome_fields
from fl.validation import Reason, Rejection

Outcome = TrainReply | Rejection


def gather(world: World, peers: Peers, number: int) -> tuple[np.ndarray, list[int]]:
    """The ticks ``(n,)`` at which the peers begin round ``number``, and the peers that are there.

    In real time all begin now. Raises `RunStopped` where nobody is there, or ever will be.
    """
    everyone, now = range(len(peers)), world.now()
    if world.wall is not None:
        peers.ready[:] = now
    began = peers.ready.copy()
    present = [p for p in everyone if world.fleet.available(p, int(began[p]))]
    if not present:
        windows = [world.fleet.next_available(p, int(began[p])) for p in everyone]
        opens = [tick for tick in windows if tick is not None]
        if not opens:
            raise RunStopped(f"No peer is available from round {number} on. Raise network.availability.")
        if world.wall is not None:
            world.pass_to(min(opens))
        began = np.maximum(began, min(opens))
        present = [p for p in everyone if world.fleet.available(p, int(began[p]))]
    return began, present


def planned(world: World, trained: Sequence[Trained], began: np.ndarray) -> tuple[np.ndarray, dict[int, Outcome]]:
    """When each peer is done on the virtual clock ``(n,)``, and what comes of its job, which may be lost."""
    done, outcomes = began.copy(), dict[int, Outcome]()
    for t in trained:
        peer, steps = t.job.peer, t.outcome.steps if isinstance(t.outcome, TrainReply) else 0
        times = world.fleet.job(peer, t.job.job, steps, 0, 0)
        lost = times.dropped_at is not None
        if times.dropped_at is not None and world.network.rejoin_s:
            world.fleet.away[peer] = int(began[peer]) + times.dropped_at + ticks(world.network.rejoin_s)
        done[peer] += times.dropped_at if times.dropped_at is not None else times.compute
        outcomes[peer] = Rejection(Reason.ERROR, "its work was lost on the way") if lost else t.outcome
    return done, outcomes


def heard(
    world: World, trained: Sequence[Trained], began: np.ndarray, until: int | None
) -> tuple[np.ndarray, dict[int, Outcome]]:
    """When each peer's answer was found in real time ``(n,)``, or the round went on without it, and what it is."""
    done, outcomes = began.copy(), {t.job.peer: t.outcome for t in trained}
    for peer, outcome in outcomes.items():
        done[peer] = answered_at(world, peer, outcome, until)
    return done, outcomes


def answered_at(world: World, peer: int, outcome: Outcome, until: int | None) -> int:
    """The tick at which the answer of ``peer`` was found, or at which nobody waited for it any more."""
    if world.wall is None:
        return world.clock.now
    late = isinstance(outcome, Rejection) and outcome.reason == Reason.LATE
    if late or peer not in world.wall.arrived:
        return world.now() if until is None else min(world.now(), until)
    return world.wall.arrived[peer]


def check_heard(number: int, outcomes: Collection[Outcome]) -> None:
    """Raise `RunStopped` where no peer has an answer that counts, or has spent its budget."""
    if not any(isinstance(o, TrainReply) or o.reason == Reason.BUDGET for o in outcomes):
        first = next((f" (the first: {o.reason.value}, {o.detail})" for o in outcomes if isinstance(o, Rejection)), "")
        raise RunStopped(
            f"Round {number} has no peer that trained, of {len(outcomes)} asked{first}. The state before this round is "
            "in the checkpoint: `shoal run --resume DIR` tries the round again."
        )


def round_event(world: World, outcomes: Collection[Outcome], unheard: Counter[str], size: int) -> Event:
    """The event of the round that ``world.server`` has finished, in which links carried ``size`` bytes."""
    return {
        "event": "round",
        "round": world.server.round,
        "version": world.server.version,
        "virtual_s": world.clock.now_s,
        **outcome_fields(outcomes, unheard),
        "bytes_down": size,
        "bytes_up": size,
        "update_norm": None,
        "bytes_once": 0,
        "aggregation_error": None,
        "epsilon": world.guard.epsilon,
        "staleness": None,
        "live_versions": 1,
        "consensus": None,
        "bytes_links": size,
        "heard_too_few": 0,
    }
