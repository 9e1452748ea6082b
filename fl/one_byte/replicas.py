"""The peers' own replicas, at their nodes: catch up with the log, probe, answer with bytes.

A request is at a version, the number of rounds that its replica shall have applied before anything else::

    state        where to begin: the state after round ``extra.first`` - 1, theta_0 or a snapshot (empty: as it is)
    arrays.log   the packed rounds from ``extra.first`` on (`fl.one_byte.log`); those that were applied are skipped

Then the replica is what it is at that version, and the answer has what was asked for in ``extra``: ``probe``, the bytes
``scalars`` of the next round; ``hash``, SHA-256 of the replica's raw bytes; ``snapshot``, all of its ``state``.

Every peer has an array of its own, which nothing but its own steps ever changes. The direction of a step is drawn once
for all the replicas that take it: it depends on the key alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clients.behaviours.base import ReplyFields
from clients.local.training import LocalTraining
from fl.errors import ShoalError
from fl.messages import BUDGET, MalformedMessage, PeerRequest, TrainReply
from fl.one_byte.codec import encode
from fl.one_byte.log import Entry, Rule, unpack
from fl.one_byte.losses import Losses
from fl.one_byte.probes import Probe, Probed, probe
from privacy.base import BudgetSpent, Guard

Asked = tuple[PeerRequest, list[Entry]]
NOTHING = np.zeros(0, np.uint8)


def fingerprint(state: np.ndarray) -> np.ndarray:
    """SHA-256 of the raw bytes of ``state``: ``(32,)`` uint8."""
    return np.frombuffer(hashlib.sha256(state.tobytes()).digest(), np.uint8)


@dataclass(eq=False)
class Replica:
    """A peer's state ``(d,)`` float32 after ``version`` rounds."""

    state: np.ndarray
    version: int = 0


class Replicas:
    """The replicas of one node's peers (a `fl.schedules.base.PeerPart`), which hold the samples ``parts`` of
    ``lengths`` tokens. ``size`` is d."""

    def __init__(
        self,
        losses: Losses,
        lengths: np.ndarray,
        size: int,
        parts: Sequence[np.ndarray],
        local: LocalTraining,
        guard: Guard,
        rule: Rule,
        eps: float,
    ):
        self.losses, self.lengths, self.size = losses, lengths, size
        self.parts, self.local, self.guard = parts, local, guard
        self.rule, self.eps = rule, eps
        self.replicas: dict[int, Replica] = {}

    def answer(self, requests: Sequence[PeerRequest]) -> list[TrainReply | MalformedMessage]:
        """A reply to each request, or why there is none."""
        read: list[Asked | MalformedMessage] = []
        for request in requests:
            try:
                read.append((request, self._read(request)))
            except ShoalError as error:
                read.append(MalformedMessage("schema", str(error)))
        self._catch_up([found for found in read if isinstance(found, tuple)])
        probes: dict[int, Probe] = {}
        for place, found in enumerate(read):
            if isinstance(found, tuple) and found[0].extra.get("probe"):
                try:
                    probes[place] = self._probe(found[0])
                except BudgetSpent as error:
                    read[place] = MalformedMessage("schema", f"{BUDGET}: {error}")
                except ShoalError as error:
                    read[place] = MalformedMessage("schema", str(error))
        done = probe(self.losses, list(probes.values()), self.rule.columns, self.eps, self.rule.seed)
        probed = dict(zip(probes, done, strict=True))
        out: list[TrainReply | MalformedMessage] = []
        for place, found in enumerate(read):
            try:
                out.append(
                    found
                    if isinstance(found, MalformedMessage)
                    else self._reply(found[0], probes.get(place), probed.get(place))
                )
            except ShoalError as error:
                out.append(MalformedMessage("schema", str(error)))
        return out

    def _read(self, request: PeerRequest) -> list[Entry]:
        """The rounds that ``request`` asks its peer to apply; puts a snapshot in place. Raises `ShoalError`."""
        rule, peer = self.rule, request.client
        first, log = request.extra.get("first", request.version + 1), request.arrays.get("log", NOTHING)
        if not isinstance(first, int) or first < 1 or log.dtype != np.uint8:
            raise ShoalError("a request to a replica names the first round of its log, which is bytes")
        if len(request.state) not in (0, self.size):
            raise ShoalError(f"a replica has {self.size} numbers, not {len(request.state)}")
        entries = unpack(log.tobytes(), first, len(self.parts), rule.quantiser)
        if first + len(entries) != request.version + 1 or request.version > len(rule.lrs):
            raise ShoalError(f"the rounds from {first} on are {len(entries)}, which don't lead to {request.version}")
        for entry in entries:
            rule.steps(entry)  # refuses bytes that stand for nothing, before any is applied
        if len(request.state):
            self.replicas[peer] = Replica(request.state.copy(), first - 1)
        elif peer not in self.replicas:
            raise ShoalError(f"peer {peer} has no replica to go on from")
        have = self.replicas[peer].version
        if not first - 1 <= have <= request.version:
            raise ShoalError(f"peer {peer} has applied {have} rounds; the request is for {first} to {request.version}")
        return entries[have - first + 1 :]

    def _catch_up(self, asked: Sequence[Asked]) -> None:
        """Apply to every peer's replica the rounds that it lacks; a direction is drawn once for all of them."""
        lacking: dict[Entry, set[int]] = {}  # a request that came twice is one
        for request, entries in asked:
            for entry in entries:
                lacking.setdefault(entry, set()).add(request.client)
        for entry in sorted(lacking, key=lambda e: e.round):
            replicas = [self.replicas[peer] for peer in sorted(lacking[entry])]
            self.rule.apply([own.state for own in replicas], entry)
            for own in replicas:
                own.version = entry.round

    def _probe(self, request: PeerRequest) -> Probe:
        peer, round, state = request.client, request.version + 1, self.replicas[request.client].state
        examples = self.parts[peer]
        job = self.guard.job(peer, round, fingerprint(state).tobytes().hex()[:32], examples, {})
        batches = self.local.batches(self.rule.seed, peer, round, examples) if job is None else job.batches
        return Probe(peer, round, state, batches, None if job is None else job.private)

    def _reply(self, request: PeerRequest, asked: Probe | None, done: Probed | None) -> TrainReply:
        own = self.replicas[request.client]
        arrays: dict[str, np.ndarray] = {}
        steps, tokens, loss = 0, 0, None
        if asked is not None and done is not None:
            arrays["scalars"] = encode(done.scalars, self.rule.quantiser)
            steps, tokens = len(asked.batches), sum(int(self.lengths[batch].sum()) for batch in asked.batches)
            loss = done.loss if np.isfinite(done.loss) else None
            said = self.guard.release(
                ReplyFields(
                    request.client, asked.round, request.version, request.layout, done.scalars, len(self.parts), steps,
                    tokens, loss,
                ),
                self.rule.columns,
            )  # fmt: skip
            tokens, loss = said.tokens, said.loss
        if request.extra.get("hash"):
            arrays["hash"] = fingerprint(own.state)
        if request.extra.get("snapshot"):
            arrays["state"] = own.state.copy()
        return TrainReply(
            request.client, request.round, request.version, request.layout, np.zeros(0, np.float32), 1, steps, tokens,
            loss, arrays=arrays,
        )  # fmt: skip

    def arrays(self, client: int | None = None) -> dict[str, np.ndarray]:
        """The replicas of all peers, or of ``client``, as named arrays, for a checkpoint."""
        return {f"replica/{p}/{own.version}": own.state for p, own in self.replicas.items() if client in (None, p)}

    def restore(self, arrays: Mapping[str, np.ndarray], client: int | None = None) -> None:
        """Undo `arrays`; others are ignored."""
        for one in [*self.replicas] if client is None else [client]:
            self.replicas.pop(one, None)
        for name, array in arrays.items():
            if name.startswith("replica/"):
                _, peer, version = name.split("/")
                self.replicas[int(peer)] = Replica(np.array(array, np.float32), int(version))
