"""A round of Just One Byte among all its peers: who is there, who catches up and from whom, and what everybody applies.

The driver relays what peers send each other. It keeps the log, and a replica of its own that sends nothing: the state
that is evaluated and saved, regenerated apart from the peers' replicas, against whose hash theirs are held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fl.errors import RunStopped, ShoalError
from fl.messages import PeerRequest, TrainReply
from fl.one_byte.log import Entry, Rule, unpack
from fl.one_byte.replicas import fingerprint
from fl.peers import Peers, mean_and_consensus
from fl.schedules.base import Event, Parts, World, client_event, outcome_fields
from fl.topology.links import Links
from fl.validation import Reason, Rejection

if TYPE_CHECKING:
    from fl.schedules.just_one_byte import JustOneByte

_NOTHING = np.zeros(0, np.float32)
Outcome = TrainReply | Rejection


@dataclass(eq=False)
class _Round:
    """What is known of a round while it goes on, by peer: ticks, bytes and outcomes."""

    start: int
    links: Links
    ready: dict[int, int]
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    sent: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)
    payload: int = 0
    catch_up: int = 0


class Mesh:
    """The peers of one run. ``held`` is how many rounds each has heard of, ``applied`` how many its replica has applied
    for certain; ``doubted`` are those whose replica was found to differ."""

    def __init__(self, settings: JustOneByte, world: World, rule: Rule):
        assert world.peers is not None
        self.settings, self.world, self.rule = settings, world, rule
        self.peers: Peers = world.peers
        self.membership = settings.membership
        self.membership.check(len(self.peers))
        self.start = world.server.vector.copy()
        self.peers.states[:] = self.start
        self.log: list[Entry] = []
        self.held, self.applied = [0] * len(self.peers), [-1] * len(self.peers)
        self.doubted: set[int] = set()
        self.private = world.guard.epsilon is not None

    def round(self, number: int) -> Iterator[Event]:
        """Round ``number``: its events, the last of which is the round's own."""
        world, every = self.world, self.settings.hash_every
        members = self._members(number)
        now = world.clock.now
        links = Links(self.peers.topology, world.network, world.seed, len(self.peers))
        found = _Round(now, links, dict.fromkeys(members, now))
        yield from self._catch_up(number, members, found)
        hashed = number > 1 and (number - 1) % every == 0
        self._ask(number, members, found, {"probe": 1} | ({"hash": 1} if hashed else {}))
        for peer in members:
            self._work(number, peer, found)
        if hashed:
            yield self._compare(number - 1, found.outcomes)
        self._exchange(number, found)
        entry = Entry.of(
            number, {k: o.arrays["scalars"] for k, o in found.outcomes.items() if isinstance(o, TrainReply)}
        )
        moved = self._apply(entry)
        if number == self.settings.rounds:
            yield self.finish(number)
        yield from self._events(number, found, moved)

    def _members(self, number: int) -> list[int]:
        """The peers of the round that are available, once there is one; moves the clock to that moment."""
        world = self.world
        there = self.membership.at(number, len(self.peers))
        times = {p: world.fleet.next_available(p, world.clock.now) for p in there}
        known = [t for t in times.values() if t is not None]
        if not known:
            raise RunStopped(f"No peer is available in round {number}, now or later. Raise network.availability.")
        world.clock.advance(min(known))
        return [p for p in there if times[p] is not None and times[p] <= world.clock.now]  # type: ignore[operator]

    def _catch_up(self, number: int, members: list[int], found: _Round) -> Iterator[Event]:
        """Bring those who have missed rounds what they lack; what that sends and how long it takes."""
        version = number - 1
        behind = [p for p in members if self.held[p] < version or p in self.doubted]
        if not behind:
            return
        donors = [p for p in range(len(self.peers)) if self.held[p] == version and p not in self.doubted]
        # One that is here if there is any; a peer that has just left hands over what nobody else has.
        donor = min(donors, key=lambda p: (p not in members, p), default=None)
        if donor is None:
            raise RunStopped(f"No peer has a right replica and all of the log in round {number}; nobody can go on.")
        ways = {p: self._way(p, number) for p in behind}
        state = None
        if "snapshot" in ways.values() and donor in members:
            answers = self._query(version, [donor], {"snapshot": 1, "hash": 1}, {})
            yield self._compare(version, answers)
            if donor in self.doubted:  # another one, for it as well
                yield from self._catch_up(number, members, found)
                return
            answer = answers[donor]
            state = answer.arrays["state"] if isinstance(answer, TrainReply) else None
        sizes = {}
        for peer in behind:
            if ways[peer] == "snapshot" and state is not None:
                found.snapshots[peer] = state
                sizes[peer] = self._size({"state": ("float32", len(state))})
            else:
                ways[peer] = "replay"
                since = 0 if peer in self.doubted else self.held[peer]
                sizes[peer] = self._size({"log": ("uint8", len(self._packed(since + 1, version)))})
        arrived = found.links.send([(donor, p, found.start, sizes[p]) for p in behind])
        for peer in behind:
            found.ready[peer] = arrived[donor, peer]
            found.catch_up += sizes[peer]
            self._count(donor, peer, sizes[peer], found)
            yield {
                "event": "catch_up", "round": number, "virtual_s": self.world.clock.now_s, "client": peer,
                "donor": donor, "how": ways[peer], "rounds": version - self.held[peer], "bytes": sizes[peer],
            }  # fmt: skip

    def _way(self, peer: int, number: int) -> str:
        if peer in self.doubted:
            return "snapshot"
        return self.membership.how(peer, self.held[peer], number) or self.settings.catch_up

    def _packed(self, first: int, last: int) -> bytes:
        """The rounds ``first`` to ``last`` of the log as they travel."""
        number, quantiser = len(self.peers), self.rule.quantiser
        return b"".join(entry.pack(number, quantiser) for entry in self.log[first - 1 : last])

    def _query(
        self, version: int, peers: list[int], extra: Mapping[str, int], snapshots: Mapping[int, np.ndarray]
    ) -> dict[int, Outcome]:
        """What ``peers`` answer once their replicas have applied ``version`` rounds."""
        requests = []
        for p in peers:
            state, first = _NOTHING, self.applied[p] + 1
            if p in snapshots:
                state, first = snapshots[p], version + 1
            elif self.applied[p] < 0 or p in self.doubted:  # everybody can make theta_0, and begins there
                state, first = self.start, 1
            log = np.frombuffer(self._packed(first, version), np.uint8)
            request = PeerRequest(
                p, version + 1, version, state, self.world.server.layout.hash, {"first": first, **extra}, {"log": log}
            )
            requests.append(request)
        answers = self.world.query(requests)
        self.world.validator.clear()  # nothing is out any more
        for p, answer in zip(peers, answers, strict=True):
            if isinstance(answer, TrainReply):
                self.applied[p] = version
                self.doubted.discard(p)
        return dict(zip(peers, answers, strict=True))

    def _ask(self, number: int, members: list[int], found: _Round, extra: Mapping[str, int]) -> None:
        found.outcomes = {
            p: self._checked(answer) for p, answer in self._query(number - 1, members, extra, found.snapshots).items()
        }

    def _checked(self, answer: Outcome) -> Outcome:
        """``answer``, unless its bytes are no scalars that can be applied."""
        if isinstance(answer, Rejection):
            return answer
        payload, steps = answer.arrays["scalars"], self.world.local.steps
        try:
            number = len(self.rule.values(payload))
        except ShoalError as error:
            return Rejection(Reason.SCHEMA, str(error))
        # A privacy budget may allow a peer fewer than the others.
        if number != steps and not (self.private and 0 < number < (steps or 0)):
            return Rejection(Reason.SHAPE, f"{number} scalars, not {steps}")
        return answer

    def _work(self, number: int, peer: int, found: _Round) -> None:
        """When ``peer`` is done with its probes, and whether it was lost meanwhile."""
        outcome = found.outcomes[peer]
        times = self.world.fleet.job(peer, number, outcome.steps if isinstance(outcome, TrainReply) else 0, 0, 0)
        lost = times.dropped_at is not None
        found.done[peer] = found.ready[peer] + (times.compute if times.dropped_at is None else times.dropped_at)
        if lost:
            found.outcomes[peer] = Rejection(Reason.ERROR, "its work was lost on the way")

    def _compare(self, version: int, outcomes: dict[int, Outcome]) -> Event:
        """Hold the hashes after round ``version`` against the right one. Raises `RunStopped` where one differs."""
        right = fingerprint(self.world.server.vector)
        good = {p: o for p, o in outcomes.items() if isinstance(o, TrainReply)}
        differing = [p for p, o in good.items() if not np.array_equal(o.arrays["hash"], right)]
        if differing and self.settings.differing == "stop":
            hashes = ", ".join(f"peer {p} {good[p].arrays['hash'].tobytes().hex()[:16]}" for p in differing)
            raise RunStopped(
                f"After round {version} the replicas are no longer equal: the log gives {right.tobytes().hex()[:16]}, "
                f"{hashes}. They all applied the same scalars, so memory or arithmetic differs there. "
                "schedule.differing=rejoin has such a peer begin again from a snapshot."
            )
        for p in differing:
            self.doubted.add(p)
            outcomes[p] = Rejection(Reason.ERROR, "its replica differs from the others")
        return {
            "event": "replicas", "round": version, "virtual_s": self.world.clock.now_s, "compared": len(good),
            "differing": differing, "hash": right.tobytes().hex(),
        }  # fmt: skip

    def _exchange(self, number: int, found: _Round) -> None:
        """Everybody's scalars to everybody: bytes, times, and the end of the round."""
        good = {p: o for p, o in found.outcomes.items() if isinstance(o, TrainReply)}
        messages = []
        for p, o in good.items():
            size = self._size({name: (array.dtype.name, len(array)) for name, array in o.arrays.items()})
            for other in good:
                if other != p:
                    messages.append((p, other, found.done[p], size))
                    self._count(p, other, size, found)
                    found.payload += len(o.arrays["scalars"])
        arrived = found.links.send(messages)
        for (source, _), when in arrived.items():
            found.done[source] = max(found.done[source], when)
        self.world.clock.advance(max(found.done.values()))
        for p in range(len(self.peers)):
            # A round of which nothing was heard leaves nothing to miss.
            if p in good or (not good and self.held[p] == number - 1):
                self.held[p] = number

    def _apply(self, entry: Entry) -> float:
        """Put ``entry`` into the log and the driver's own replica; how far that moved."""
        world, server = self.world, self.world.server
        vector = server.vector.copy()
        self.rule.apply([vector], entry)
        if not np.isfinite(vector).all():
            raise RunStopped(
                f"The replicas are no longer finite after round {entry.round}: the steps grew without bound. Lower "
                "local.lr, or bound the scalars (schedule.clip_g)."
            )
        self.log.append(entry)
        world.server = server.replace(vector=vector, version=server.version + 1, round=entry.round)
        for p, held in enumerate(self.held):
            if held == entry.round:
                self.peers.states[p] = vector
        return float(np.linalg.norm(vector.astype(np.float64) - server.vector))

    def finish(self, number: int) -> Event:
        """After the last round ``number``: everybody who heard it applies it, and all hashes are compared."""
        current = [p for p in self.membership.at(number, len(self.peers)) if self.held[p] == number]
        return self._compare(number, self._query(number, current, {"hash": 1}, {}))

    def _size(self, arrays: Mapping[str, tuple[str, int]]) -> int:
        return self.peers.size(self.world.server.layout.hash, arrays)

    def _count(self, source: int, target: int, size: int, found: _Round) -> None:
        self.peers.traffic[source, target] += size
        found.sent[source] += size
        found.received[target] += size

    def _events(self, number: int, found: _Round, moved: float) -> Iterator[Event]:
        world = self.world
        for p, outcome in found.outcomes.items():
            yield client_event(
                round=number, version=number - 1, client=p, time=found.done[p], staleness=0,
                bytes_down=found.received[p], bytes_up=found.sent[p], reply=outcome, taken=outcome,
                phases=(found.start, found.ready[p], None),
            )  # fmt: skip
        total = found.sent.total()
        yield {
            "event": "round",
            "round": number,
            "version": world.server.version,
            "virtual_s": world.clock.now_s,
            **outcome_fields(found.outcomes.values()),
            "bytes_down": total,
            "bytes_up": total,
            "update_norm": moved,
            "bytes_once": 0,
            "aggregation_error": None,
            "epsilon": world.guard.epsilon,
            "staleness": 0.0,
            "live_versions": len(set(self.held)),
            "consensus": mean_and_consensus(self.peers.states[sorted(found.ready)])[1],
            "bytes_links": total,
            "bytes_scalars": found.payload,
            "bytes_catch_up": found.catch_up,
        }

    def parts(self) -> Parts:
        """What goes on after a round, as arrays and plain values; undone by `restore`."""
        log = np.frombuffer(self._packed(1, len(self.log)), np.uint8)
        arrays = {"one_byte/log": log, "one_byte/start": self.start}
        return self.peers.arrays() | arrays, {
            "held": self.held, "applied": self.applied, "doubted": sorted(self.doubted)
        }  # fmt: skip

    def restore(self, kept: Parts) -> None:
        """Undo `parts`."""
        arrays, meta = kept
        self.peers.restore(arrays)
        self.start = np.array(arrays["one_byte/start"])
        self.log = unpack(arrays["one_byte/log"].tobytes(), 1, len(self.peers), self.rule.quantiser)
        self.held, self.applied, self.doubted = list(meta["held"]), list(meta["applied"]), set(meta["doubted"])
