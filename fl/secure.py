"""Secure aggregation in a round: the stages before and after training, as Flower messages.

    keys     query   ->  advertisement                 (each client asked)
    shares   query: roster  ->  encrypted shares       (each that advertised)
    train    training request with its inbox  ->  ``masked``: the encoded update under masks, and nothing else
    unmask   query: which neighbours are in the sum  ->  shares of secrets

Each of these requests names the ``session``: bytes that the server draws whenever it opens a round. A round that is
tried again, by a server that was started anew among nodes that were not, is another session, with new keys and masks.

The cryptography is in `privacy.secure_aggregation.protocol`; here are the messages, their bytes and their time. A
client that does not answer a stage has dropped out of the round. What the server gets of an update is its masked form
(`TrainReply.update` is empty), and of the round the sum. Error replies name no number of a client's own either.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.errors import RunStopped, ShoalError
from fl.keys import generator
from fl.messages import MalformedMessage, Request, SecureRequest, TrainReply, TrainRequest, payload_bytes
from fl.state import ServerState, Update
from fl.validation import Validator
from privacy.secure_aggregation.codec import Codec
from privacy.secure_aggregation.protocol import Coordinator, Participant
from privacy.secure_aggregation.settings import SecAggPlus

if TYPE_CHECKING:
    from fl.schedules.base import World

KEYS, SHARES, UNMASK = "keys", "shares", "unmask"
MASKED, SESSION = "masked", "session"
SESSION_BYTES = 16
Codecs = Callable[[int], Codec]  # of a round
_WAY_OUT = "`shoal run --resume DIR` tries the round again, with what was changed in DIR/config.yaml."


def context(seed: int, round: int, session: bytes = b"") -> str:
    """What the messages of one round, in one session of it, are bound to."""
    of = f"round {round} of the run with seed {seed}"
    return f"{of}, session {_letters(session)}" if session else of


def _letters(session: bytes) -> str:
    """In letters: a number in a text that the server holds is one that a client must not have told it."""
    return session.hex().translate(str.maketrans("0123456789", "ghijklmnop"))


def summed(server: ServerState, round: int, heard: Sequence[int], mean: np.ndarray, updates: list[Update]) -> Update:
    """The one update that stands for the masked ``updates`` of the clients ``heard``: their ``mean`` ``(n,)``."""
    columns = server.space.columns(server.space.trains(round))
    return Update(
        min(heard), round, server.version, mean, len(updates),
        min(u.sent_ticks for u in updates), max(u.arrived_ticks for u in updates),
        steps=sum(u.steps for u in updates),
        columns=None if len(columns) == server.layout.size else columns, start=server.vector,
    )  # fmt: skip


class Plain:
    """A round's exchange without secure aggregation: every update as it came."""

    clients: Sequence[int]

    def __init__(self, clients: Sequence[int]):
        self.clients = clients
        self.costs: Counter[str] = Counter()

    def arrays(self, client: int) -> dict[str, np.ndarray]:
        """What a training request carries beside the state."""
        return {}

    def add(self, client: int, reply: TrainReply) -> None:
        """Take in an accepted reply. Raises `ShoalError` for one that can't be."""

    def close(self, updates: list[Update]) -> list[Update]:
        """The updates that the round gives."""
        return updates


@dataclass
class SecureRound(Plain):
    """One round's exchange. ``clients`` are those that training is asked of; ``costs`` the bytes of the stages."""

    world: World
    settings: SecAggPlus
    codec: Codec
    server: ServerState
    round: int
    costs: Counter[str] = field(default_factory=Counter)
    inboxes: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seed = self.world.seed
        draws = generator(seed, "secagg graph", self.round)
        self.session = np.frombuffer(secrets.token_bytes(SESSION_BYTES), np.uint8)
        name = context(seed, self.round, self.session.tobytes())
        self.coordinator = Coordinator(self.settings.topology, name, self.codec.length, self.codec.dtype, draws)

    def open(self, asked: Sequence[int]) -> None:
        """Keys and shares of the clients ``asked``. Raises `RunStopped` where too few answer."""
        try:
            rosters = self.coordinator.rosters(self._stage(KEYS, dict.fromkeys(asked, b"")))
            self.inboxes = self.coordinator.inboxes(self._stage(SHARES, rosters))
        except ShoalError as error:
            raise _lost(self.round, error) from error
        self.clients = sorted(self.inboxes)

    def arrays(self, client: int) -> dict[str, np.ndarray]:
        return {"inbox": np.frombuffer(self.inboxes[client], np.uint8), SESSION: self.session}

    def add(self, client: int, reply: TrainReply) -> None:
        self.coordinator.add(client, reply.arrays[MASKED].tobytes())

    def close(self, updates: list[Update]) -> list[Update]:
        there, least = len(self.coordinator.survivors), self.codec.least
        if there < least:
            raise RunStopped(
                f"Round {self.round} has {there} masked updates, and {least} are needed for the noise that is claimed: "
                "their sum is not opened. Ask more clients, or let each add more noise (a smaller privacy.min_cohort, "
                f"or null and a larger secure_aggregation.dropout). {_WAY_OUT}"
            )
        try:
            total = self.coordinator.total(self._stage(UNMASK, self.coordinator.requests()))
            mean = self.codec.decode(total, len(self.coordinator.survivors))
        except ShoalError as error:
            raise _lost(self.round, error) from error
        return [summed(self.server, self.round, self.coordinator.survivors, mean, updates)]

    def _stage(self, stage: str, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """Ask the clients of ``messages``; their answers. Takes as long as the slowest of those that answer."""
        world, server = self.world, self.server
        nothing = np.zeros(0, np.float32)
        requests = {
            c: SecureRequest(
                c, self.round, server.version, nothing, server.layout.hash, {"stage": stage},
                {"message": np.frombuffer(m, np.uint8), SESSION: self.session},
            )
            for c, m in messages.items()
        }  # fmt: skip
        replies, sent = world.ask(list(requests.values()))
        validator = Validator(server.layout.hash, 0, arrays=lambda _: {"message": ("uint8", -1)})
        answers: dict[int, bytes] = {}
        start = end = world.clock.now
        self.costs["bytes_down"] += sum(sent.values())
        for client, reply in replies:
            checked = validator.check(reply, requests[client])
            up = 0 if reply.has_error() else payload_bytes(reply.content)
            job = world.fleet.job(client, self.round, 0, sent[client], up, stage)
            if job.dropped_at is not None:
                continue
            self.costs["bytes_up"] += up
            if isinstance(checked, TrainReply):
                answers[client] = checked.arrays["message"].tobytes()
                end = max(end, start + job.total)
        world.clock.advance(end)
        return answers


def _lost(round: int, error: ShoalError) -> RunStopped:
    return RunStopped(f"Round {round} has no sum: {error} {_WAY_OUT}")


@dataclass
class _Part:
    """A client's part in one session of a round: what it has to keep between stages, and the secret that all its keys
    and masks come from, drawn for nothing else."""

    round: int
    session: bytes
    state: dict[str, bytes] = field(default_factory=dict)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    over: frozenset[bytes] = frozenset()  # the earlier sessions of the round


class SecureClients:
    """The client half, at a node: a `Participant` for each of its clients in the newest session of the newest round
    that it was asked in.

    Masks are the one thing in a run that is not drawn from its seed: a seed serves many runs and, after a resume, a
    round twice, and whoever holds two vectors under one mask knows their difference. A session that is left is not
    taken up again, and the next one has a secret that does not follow from what was kept. Masks cancel, so that no
    result depends on them.

    The sums of two sessions of one round are two sums: where other clients are in them, their difference is one of
    fewer updates. A server that keeps to the protocol tries a round again only where it has no sum of it.
    """

    def __init__(self, settings: SecAggPlus, seed: int, codecs: Codecs, weighted: bool, root: str = ""):
        self.settings, self.seed, self.codecs, self.weighted = settings, seed, codecs, weighted
        self.root = root  # of the keys of noise: `privacy.base.noise_root`
        self.parts: dict[int, _Part] = {}

    def _part(self, request: Request, opens: bool = False) -> _Part:
        """The client's part in the session of ``request``, which is new to it only where the request ``opens`` one."""
        client, round, session = request.client, request.round, _carried(request, SESSION)
        if len(session) != SESSION_BYTES:
            raise MalformedMessage("shape", f"a session is named by {SESSION_BYTES} bytes, not {len(session)}")
        part = self.parts.get(client)
        if part is not None and round < part.round:
            raise ShoalError(f"client {client} takes part in round {part.round}; round {round} is closed for it")
        same = part is not None and round == part.round
        if part is not None and same and session == part.session:
            return part
        if not opens or (part is not None and same and session in part.over):
            raise ShoalError(f"client {client} takes no part in session {_letters(session)} of round {round}")
        over = part.over | {part.session} if part is not None and same else frozenset()
        part = self.parts[client] = _Part(round, session, over=over)
        return part

    def _participant(self, client: int, part: _Part) -> Participant:
        name = context(self.seed, part.round, part.session)
        return Participant(self.settings.topology, client, name, part.secret, part.state)

    def answer(self, request: SecureRequest) -> dict[str, np.ndarray]:
        """A stage's answer. Raises `ShoalError` where the message is malformed or the participant refuses."""
        message, stage = _carried(request, "message"), request.extra.get("stage")
        part = self._part(request, opens=stage == KEYS)
        participant = self._participant(request.client, part)
        if stage == KEYS:
            out = participant.advertise()
        elif stage == SHARES:
            number, most = int.from_bytes(message[:4], "little"), self.codecs(request.round).most
            if number > most:
                raise ShoalError(f"a roster of {number} clients is not what the sum is planned for, {most} at most")
            out = participant.share(message)
        elif stage == UNMASK:
            out = participant.unmask(message)
        else:
            raise ShoalError(f"secure aggregation has no stage {stage!r:.40}")
        part.state = participant.state()
        return {"message": np.frombuffer(out, np.uint8)}

    def mask(self, request: TrainRequest, update: np.ndarray, examples: int) -> dict[str, np.ndarray]:
        """What a client with ``examples`` sends of its ``update`` ``(n,)``: integers under masks.

        Raises `ShoalError` where that can't be: the client then takes no part in the round.
        """
        client, round = request.client, request.round
        part, inbox = self._part(request), _carried(request, "inbox")
        participant = self._participant(client, part)
        codec = self.codecs(round)
        # The content is part of the key: another update never gets the same rounding and noise.
        content = hashlib.sha256(update.tobytes()).hexdigest()
        rng = generator(self.seed, self.root, "secagg encoding", client, round, content)
        try:
            encoded = codec.encode(update, examples if self.weighted else 1, rng, request.arrays)
        except ShoalError:  # its text may hold numbers of the update, and goes to the server
            raise ShoalError(
                f"client {client} takes no part in round {round}: its update or weight can't be encoded (numbers that "
                "are not finite, or larger than secure_aggregation.clip)"
            ) from None
        masked = participant.mask(encoded, inbox)
        part.state = participant.state()
        return {MASKED: np.frombuffer(masked, codec.dtype)}


def _carried(request: Request, name: str) -> bytes:
    found = request.arrays.get(name)
    if found is None or found.dtype != np.uint8:
        raise MalformedMessage("schema", f"a {request.kind} request of secure aggregation carries the bytes {name!r}")
    return found.tobytes()


def make_codecs(settings: Any, guard: Any, space: Any, clients: int, max_weight: int) -> Codecs:
    """Both halves' codec of a round: the guard's own where it has one, else fixed point."""

    @lru_cache(maxsize=4)
    def of(round: int) -> Codec:
        size = len(space.columns(space.trains(round)))
        made = guard.codec(size, round)
        return settings.codec(size, clients, max_weight) if made is None else made

    return of
