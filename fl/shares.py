"""Secret-shared sums in a round: what a client sends to each server, and how the servers make the sum of it.

    train    training request  ->  ``share0``, ``share1``, ...: a share and its proof for each server, encrypted for it

The Flower server is one of the servers, and passes the others' messages on; they exchange openings, a few kilobytes for
each client, which are not sent through Flower (see `privacy.secure_aggregation.shares`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fl.errors import ShoalError
from fl.keys import generator, key_bytes
from fl.messages import SecureRequest, TrainReply, TrainRequest
from fl.secure import Codecs, Plain, context, summed
from fl.state import ServerState, Update
from privacy.secure_aggregation import field
from privacy.secure_aggregation.norm_check import NormCheck
from privacy.secure_aggregation.primitives import public_key
from privacy.secure_aggregation.shares import Aggregator, ProofCodec, SecretShares, messages

if TYPE_CHECKING:
    from fl.schedules.base import World


def names(servers: int) -> list[str]:
    """The arrays of a reply."""
    return [f"share{s}" for s in range(servers)]


def server_secret(seed: int, index: int) -> bytes:
    """A server's long-term key; in a simulation it comes from the seed."""
    return key_bytes(seed, "aggregator", index)


class SharedRound(Plain):
    """One round's exchange: proofs are checked as replies come, and the sum is opened at the end."""

    def __init__(
        self, world: World, settings: SecretShares, codec: ProofCodec, server: ServerState, round: int,
        asked: Sequence[int],
    ):  # fmt: skip
        super().__init__(asked)
        self.world, self.settings, self.codec, self.server, self.round = world, settings, codec, server, round
        self.check = NormCheck(codec.length, codec.bound, settings.servers)
        name = context(world.seed, round)
        self.servers = [Aggregator(s, self.check, server_secret(world.seed, s), name) for s in range(settings.servers)]
        self.heard: list[int] = []
        self.costs: Counter[str] = Counter()

    def add(self, client: int, reply: TrainReply) -> None:
        """Check a client's proof and count its vector. Raises `ShoalError` where the norm is not proved."""
        if client in self.heard:
            raise ShoalError(f"client {client} is in the sum of round {self.round} already")
        sent = [reply.arrays[name].tobytes() for name in names(len(self.servers))]
        # Drawn after the client has sent: a proof must not know the point that it is checked at.
        content = hashlib.sha256(b"".join(sent)).hexdigest()
        query = key_bytes(self.world.seed, "query", self.round, client, content)
        try:
            openings = [s.open(client, m, query) for s, m in zip(self.servers, sent, strict=True)]
            accepted = self.check.accept(openings)
        except ShoalError:
            for server in self.servers:
                server.close(client, False)
            raise
        for server in self.servers:
            server.close(client, accepted)
        if not accepted:
            raise ShoalError(f"client {client} did not prove that its update's norm is within the bound")
        self.heard.append(client)

    def close(self, updates: list[Update]) -> list[Update]:
        parts = np.stack([server.total(self.codec.noise) for server in self.servers])
        mean = self.codec.decode(field.decode(field.total(parts)), len(self.heard))
        return [summed(self.server, self.round, self.heard, mean, updates)]


class SharedClients:
    """The client half, at a node."""

    def __init__(self, settings: SecretShares, seed: int, codecs: Codecs):
        self.settings, self.seed, self.codecs = settings, seed, codecs
        self.publics = [public_key(server_secret(seed, s)) for s in range(settings.servers)]

    def answer(self, request: SecureRequest) -> dict[str, np.ndarray]:
        """Raises `ShoalError`: there are no stages beside training."""
        raise ShoalError("secret shares have no stages")

    def mask(self, request: TrainRequest, update: np.ndarray, examples: int) -> dict[str, np.ndarray]:
        """What a client sends of its ``update`` ``(n,)``: a share and a proof for each server.

        Raises `ShoalError` where that can't be: the client then takes no part in the round.
        """
        client, round, servers = request.client, request.round, self.settings.servers
        codec = self.codecs(round)
        assert isinstance(codec, ProofCodec)
        # The server gets the text of an error: it must hold no number of the update.
        refusal = ShoalError(f"client {client} takes no part in round {round}: its update can't be encoded")
        try:
            integers = codec.encode(update, 1, generator(self.seed, "share encoding", client, round), request.arrays)
        except ShoalError:
            raise refusal from None
        check, name = NormCheck(codec.length, codec.bound, servers), context(self.seed, round)
        # Another vector never gets the same shares: two vectors under one mask show their difference.
        content = f"{hashlib.sha256(integers.tobytes()).hexdigest()} {check}"
        for attempt in range(3):  # an honest proof fails once in 2^40
            secret = key_bytes(self.seed, "shares", client, round, content, attempt)
            with contextlib.suppress(ShoalError):
                sent = messages(check, integers, secret, self.publics, name, client)
                return {n: np.frombuffer(m, np.uint8) for n, m in zip(names(servers), sent, strict=True)}
        raise refusal
