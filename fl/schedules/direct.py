"""Rounds of peers whose models go from node to node (``engine.peers=direct``): the server's side of them.

The server says when a round begins, who takes part, and where everybody's neighbours live; it hears how each peer fared
(`fl.peer_rounds`). Models come to it only when they are to be evaluated or saved: then it asks every peer for its state
and takes the mean. In other rounds the mean and the consensus distance are not known.

A round lasts to the last reply. A peer waits for its neighbours for ``deadline_s`` from when it got its request; the
server waits twice that for the peers' replies.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.clock import ticks
from fl.errors import ConfigError, RunStopped
from fl.messages import PeerRequest, TrainReply, freeze
from fl.mixing import Mixing
from fl.peers import Peers, ask_all
from fl.schedules.base import Event, World, client_event, demand
from fl.schedules.peer_events import answered_at, check_heard, gather, round_event
from fl.transport.base import Address
from fl.validation import Reason, Rejection

if TYPE_CHECKING:
    from fl.schedules.gossip import Gossip

EXPECTED = {
    "round": {"missed": ("uint32", -1), "sent": ("uint64", -1), "received": ("uint64", -1)},
    "state": {"state": ("float32", -1)},
}


def is_direct(settings: Any) -> bool:
    """Whether models go from node to node."""
    return getattr(settings.engine, "peers", "relay") == "direct"


def check_direct(schedule: Gossip, settings: Any) -> None:
    """Raise `ConfigError` for what does not go with models that never pass the server."""
    need, s, name = demand("with engine.peers=direct"), settings, type(schedule).__name__
    relay = "Use engine.peers=relay."
    need("schedule", name, schedule.travels, "dpsgd: what other schedules send is known to relays only", relay)
    need("privacy", s.privacy, s.privacy.unit is None, "none: no claim is kept there", relay)
    need("attack", s.attack, type(s.attack).__name__ == "Honest", "none", relay)
    start = s.adapter.initialisation
    kept = start is None or not start.changes_base
    need("adapter/init", start, kept, "one that leaves the base as it is", relay)
    waits = "how long a peer waits for its neighbours, training included"
    need("schedule.deadline_s", schedule.deadline_s, schedule.deadline_s is not None, waits, "Try 60.")


class Direct:
    """One run's rounds. ``begun`` are the peers that are known to hold a state of this start of the run."""

    def __init__(self, schedule: Gossip, world: World, peers: Peers):
        self.schedule, self.world, self.peers = schedule, world, peers
        self.run = (time.time_ns().to_bytes(8, "big") + os.urandom(8)).hex()  # rises with every start
        self.begun: set[int] = set()
        self.known = world.server.round  # the round after which the peers' states were asked for

    def round(self, number: int) -> Iterator[Event]:
        """Round ``number``: its events, the last of which is the round's own."""
        world, peers, schedule = self.world, self.peers, self.schedule
        began, present = gather(world, peers, number)
        absent = frozenset(range(len(peers))) - set(present)
        mixing = Mixing(peers.graph(number), absent)
        book, limit = self._book(), schedule.deadline_s or 0.0
        tells: dict[int, list[int]] = {p: [] for p in present}
        for p in present:
            for j in mixing.heard(p).tolist():
                tells[j].append(p)
        requests = [self._request(number, p, mixing, tells[p], book) for p in present]
        until = int(began.max()) + ticks(2 * limit)
        outcomes = dict(zip(present, ask_all(world, requests, until), strict=True))
        outcomes = {p: self._checked(o, mixing, tells[p]) for p, o in outcomes.items()}
        world.validator.forget(number + 1)
        check_heard(number, outcomes.values())
        for p, outcome in outcomes.items():
            peers.ready[p] = answered_at(world, p, outcome, until)
        heard, sent = self._heard(mixing, tells, outcomes)
        before, after = world.server, world.server.replace(version=world.server.version + 1, round=number)
        self.begun = {p for p, o in outcomes.items() if isinstance(o, TrainReply)}
        size = 0
        if world.due(number) or number == schedule.rounds:
            asked = [p for p, o in outcomes.items() if isinstance(o, TrainReply) or o.reason != Reason.LATE]
            vector, given = self._gathered(number, asked, limit)
            after, size = after.replace(vector=vector), 4 * after.layout.size * given
        world.server = after
        world.clock.advance(max(world.now(), int(peers.ready.max())))
        for p, outcome in outcomes.items():
            yield client_event(
                round=number, version=before.version, client=p, time=int(peers.ready[p]), staleness=0,
                bytes_down=int(sent[:, p].sum()), bytes_up=int(sent[p].sum()), reply=outcome, taken=outcome,
                phases=(int(began[p]), None, None),
            )  # fmt: skip
        yield {
            **self._event(outcomes, heard, int(sent.sum()), after.vector - before.vector),
            "bytes_states": size,
        }

    def _book(self) -> Mapping[int, Address]:
        """Where each client's node listens. Raises `ConfigError` where one does not."""
        book = self.world.book()
        homeless = [c for c in range(len(self.peers)) if c not in book]
        if homeless:
            allowed = f"relay: the node of client {homeless[0]} does not listen for other nodes"
            raise ConfigError("engine.peers", "direct", allowed, "Run `shoal node --listen HOST:PORT` there.")
        return book

    def _request(
        self, number: int, peer: int, mixing: Mixing, tells: list[int], book: Mapping[int, Address]
    ) -> PeerRequest:
        world, hears = self.world, mixing.heard(peer).tolist()
        known = peer in self.begun
        state = np.zeros(0, np.float32) if known else freeze(self.peers.states[peer])
        extra = {
            "stage": "round", "run": self.run, "lr": world.local.lr_at(number, self.schedule.rounds),
            "deadline_s": float(self.schedule.deadline_s or 0.0), "order": getattr(self.schedule, "order", ""),
            "book": json.dumps({c: list(book[c]) for c in sorted({*hears, *tells})}),
        }  # fmt: skip
        arrays = {
            "hears": np.array(hears, np.uint32),
            "tells": np.array(tells, np.uint32),
            "weights": mixing.row(peer, [*hears, peer]),
        }
        return PeerRequest(peer, number, world.server.version, state, world.server.layout.hash, extra, arrays)

    def _checked(self, outcome: TrainReply | Rejection, mixing: Mixing, tells: list[int]) -> TrainReply | Rejection:
        """``outcome``, unless what it reports is about others than its peer's neighbours."""
        if isinstance(outcome, Rejection):
            return outcome
        hears, arrays = mixing.heard(outcome.client).tolist(), outcome.arrays
        fits = len(arrays["sent"]) == len(tells) and len(arrays["received"]) == len(hears)
        if fits and set(arrays["missed"].tolist()) <= set(hears):
            return outcome
        return Rejection(Reason.SCHEMA, "it reports other links than its peer has")

    def _heard(
        self, mixing: Mixing, tells: Mapping[int, list[int]], outcomes: Mapping[int, TrainReply | Rejection]
    ) -> tuple[np.ndarray, np.ndarray]:
        """``(n, n)``: 1 where a peer (row) has heard another, -1 where it has missed it, 0 where nothing is known; and
        the bytes from row to column."""
        n = len(self.peers)
        heard, sent = np.zeros((n, n), np.int8), np.zeros((n, n), np.int64)
        for p, outcome in outcomes.items():
            if isinstance(outcome, TrainReply):
                heard[p, mixing.heard(p)] = 1
                heard[p, outcome.arrays["missed"].astype(np.int64)] = -1
                sent[p, tells[p]] = outcome.arrays["sent"].astype(np.int64)
        self.peers.traffic += sent
        return heard, sent

    def _gathered(self, number: int, there: list[int], limit_s: float) -> tuple[np.ndarray, int]:
        """The mean of all states after round ``number``, for which those that are there are asked, and how many gave
        theirs. Of the others it takes the newest that is known."""
        world, peers = self.world, self.peers
        empty, layout = np.zeros(0, np.float32), world.server.layout
        extra = {"stage": "state", "run": self.run}
        asked = [PeerRequest(p, number, world.server.version, empty, layout.hash, extra) for p in there]
        answers = ask_all(world, asked, world.now() + ticks(2 * limit_s))
        world.validator.forget(number + 1)
        states = peers.states.copy()
        given = 0
        for p, answer in zip(there, answers, strict=True):
            if isinstance(answer, TrainReply):
                state = answer.arrays["state"]
                if len(state) == layout.size and np.isfinite(state).all():
                    states[p], given = state, given + 1
        if not given:
            raise RunStopped(f"After round {number} no peer gave its state, so there is nothing to evaluate or save.")
        peers.states, self.known = states, number
        return peers.mean().astype(world.server.vector.dtype), given

    def _event(
        self, outcomes: Mapping[int, TrainReply | Rejection], heard: np.ndarray, size: int, step: np.ndarray
    ) -> Event:
        """``missed`` are messages that did not come in time, ``uneven`` those of them whose sender has heard the
        receiver, so that the mean is not kept; ``step`` is the mean's, since it was known last."""
        world, good = self.world, [o for o in outcomes.values() if isinstance(o, TrainReply)]
        refused: Counter[str] = Counter()
        for reason in (Reason.TOO_LARGE.value, Reason.NOT_FINITE.value):
            refused[reason] = sum(_whole(o.extra.get(reason)) for o in good)
        dropped: Counter[str] = Counter()
        for o in good:
            dropped += Counter({k.partition(".")[2]: _whole(v) for k, v in o.extra.items() if k.startswith("dropped.")})
        fresh = self.known == world.server.round
        return {
            **round_event(world, list(outcomes.values()), +refused, size),
            "update_norm": float(np.linalg.norm(step)) if fresh else None,
            "consensus": self.peers.consensus() if fresh else None,
            "heard_too_few": sum(_whole(o.extra.get("short")) for o in good),
            "missed": int((heard < 0).sum()),
            "uneven": int(((heard < 0) & (heard.T > 0)).sum()),
            "dropped": dict(sorted(dropped.items())),
        }


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0
