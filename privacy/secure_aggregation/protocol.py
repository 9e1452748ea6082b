"""SecAgg+: the sum of clients' vectors in Z_{2^b}, with dropouts, from messages that hide every single vector.

A client i and its neighbours j in a graph (`privacy.secure_aggregation.graph`), with signs by the order of their ids:

    y_i = x_i + PRG(b_i) + sum_{j in N(i), j > i} PRG(s_ij) - sum_{j in N(i), j < i} PRG(s_ij)   mod 2^b

(Bell et al. 2020, eprint 2020/704, over Bonawitz et al. 2017, eprint 2017/281). ``s_ij`` comes from a key agreement;
the seed ``b_i`` and the mask key behind all ``s_ij`` are given to the neighbours as Shamir shares. In each stage a
client sends one message and is sent one:

    advertise  two public keys and a hash of b_i      ->  the neighbours' keys
    share      shares for each neighbour, encrypted   ->  the shares from the neighbours
    mask       y_i                                    ->  which neighbours' y arrived
    unmask     a share of b_j of those whose y arrived, of the mask key of the others  ->  (the sum)

The masks of two clients in the sum cancel. The server rebuilds ``b_i`` of those in the sum, and the mask key of those
that dropped out after sharing. It never gets both for one client: a `Participant` gives one share for each neighbour,
answers a stage once, and only if at least t neighbours are in the sum. So a vector that arrives too late, after the
client's mask key was rebuilt, stays hidden by ``b_i``.

Honest but curious: everybody keeps to the protocol, and the server may pool what it sees with up to t - 1 neighbours of
each client, as long as the graph of the others in the sum is connected. A server that lies (other sets to different
clients, keys of its own) is outside; so are clients that do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl.errors import ConfigError, ShoalError
from privacy.secure_aggregation import shamir
from privacy.secure_aggregation.graph import Plan, Topology, neighbours
from privacy.secure_aggregation.primitives import KEY_BYTES, add_mask, agree, decrypt, derive, encrypt, pack, unpack
from privacy.secure_aggregation.primitives import public_key as public

IN_SUM, DROPPED = b"\1", b"\0"
T = TypeVar("T")


class TooFewClients(ShoalError):
    """So many clients dropped out that the sum can't be unmasked. Nothing about any vector was learned."""


class Participant:
    """A client in one round: ``advertise``, ``share``, ``mask``, ``unmask``, in this order.

    ``context`` names the run and the round; messages of another one are refused. ``secret`` is 32 bytes that nobody
    else knows and that serve one round; all that the client draws comes from it, so a round replays. A stage may be
    asked again with the same message, and gives the same answer; with another one, or out of order, it raises
    `ShoalError`, as two answers could uncover the vector.

    The whole memory between stages is `state`, so a client need not live as long as its round.
    """

    def __init__(
        self, topology: Topology, client: int, context: str, secret: bytes, state: Mapping[str, bytes] | None = None
    ):
        if len(secret) != KEY_BYTES:
            raise ShoalError(f"A participant's secret has {len(secret)} bytes; it must have {KEY_BYTES}.")
        self.topology, self.client, self.context = topology, client, context
        self._secret = secret
        self._state = dict(state or {})

    def state(self) -> dict[str, bytes]:
        """What the client has to keep between stages, besides the arguments it was made with; the last one restores."""
        return dict(self._state)

    def advertise(self) -> bytes:
        """96 bytes: the public keys for shares and for masks, and the hash of the seed of the client's own mask."""
        return public(self._own("share key")) + public(self._own("mask key")) + _hash(self._own("own mask"))

    def share(self, roster: bytes) -> bytes:
        """For each neighbour in ``roster``, its encrypted shares of the mask key and of the seed of the own mask."""
        keys, plan = self._read_roster(roster)
        self._once("roster", roster)
        digest = hashlib.sha256(roster).digest()
        secrets = [self._own("mask key"), self._own("own mask")]
        rows = [
            shamir.split(secret, plan.threshold, plan.degree, derive(self._secret, "coefficients", k) + digest)
            for k, secret in enumerate(secrets)
        ]
        private = X25519PrivateKey.from_private_bytes(self._own("share key"))
        out = {}
        for at, peer in enumerate(sorted(keys)):
            key = agree(private, keys[peer][:KEY_BYTES], "share", self.context, self.client, peer)
            nonce = hashlib.sha256(derive(self._secret, "nonce", peer) + digest).digest()[:12]
            out[peer] = encrypt(key, nonce, rows[0][at] + rows[1][at])
        return pack(out)

    def mask(self, vector: np.ndarray, inbox: bytes) -> bytes:
        """``vector`` (uint32 or uint64 ``(d,)``) under all masks, little-endian; ``inbox`` holds neighbours' shares.

        The neighbours in ``inbox`` are those that the client shares a mask with; there must be at least t.
        """
        if vector.dtype not in (np.dtype("<u4"), np.dtype("<u8")) or vector.ndim != 1:
            raise ShoalError(f"A vector {vector.dtype}{vector.shape} to be masked must be (d,) of uint32 or uint64.")
        keys, plan = self._read_roster(self._before("roster"))
        ciphertexts = unpack(inbox)
        self._require(ciphertexts, keys, plan, "sent shares")
        held = self._open(ciphertexts, keys)
        self._once("vector", hashlib.sha256(vector.dtype.str.encode() + vector.tobytes()).digest())
        self._once("shares", pack(held))
        masked = vector.copy()
        add_mask(masked, self._own("own mask"))
        private = X25519PrivateKey.from_private_bytes(self._own("mask key"))
        for peer in ciphertexts:
            add_mask(masked, _pair_seed(private, keys[peer], self.context, self.client, peer), _sign(self.client, peer))
        return masked.tobytes()

    def unmask(self, request: bytes) -> bytes:
        """One share for each neighbour in ``request``: of its own mask if its vector is in the sum, else its mask key.

        Refused if fewer than t neighbours are in the sum.
        """
        keys, plan = self._read_roster(self._before("roster"))
        held = unpack(self._before("shares"))
        fates = unpack(request, 1)
        unknown = sorted(set(fates) - set(held))
        if unknown or not set(fates.values()) <= {IN_SUM, DROPPED}:
            raise ShoalError(
                f"Client {self.client} is asked for what it can't give: clients {unknown} are no neighbours."
            )
        self._require([peer for peer, fate in fates.items() if fate == IN_SUM], keys, plan, "are in the sum")
        self._once("request", request)
        size = shamir.SHARE_BYTES
        return pack({peer: held[peer][size:] if fate == IN_SUM else held[peer][:size] for peer, fate in fates.items()})

    def _own(self, name: str) -> bytes:
        return derive(self._secret, name, self.context, self.client)

    def _once(self, key: str, value: bytes) -> None:
        if self._state.setdefault(key, value) != value:
            raise ShoalError(f"Client {self.client} has answered another {key} in {self.context}; it answers one only.")

    def _before(self, key: str) -> bytes:
        if key not in self._state:
            raise ShoalError(f"Client {self.client} is asked out of order: it has seen no {key} in {self.context}.")
        return self._state[key]

    def _read_roster(self, roster: bytes) -> tuple[dict[int, bytes], Plan]:
        """The neighbours' keys, and the plan that the client works out itself from the number of clients."""
        keys = unpack(roster[4:], 2 * KEY_BYTES)
        plan = self.topology.plan(int.from_bytes(roster[:4], "little"))
        if len(keys) != plan.degree or self.client in keys:
            raise ShoalError(
                f"Client {self.client} is given {len(keys)} neighbours; of {plan.clients} clients it must have "
                f"{plan.degree} others."
            )
        return keys, plan

    def _require(self, peers: Iterable[int], keys: Mapping[int, bytes], plan: Plan, what: str) -> None:
        known = set(peers)
        if len(known) < plan.threshold or not known <= set(keys):
            raise ShoalError(
                f"Client {self.client} refuses: {len(known & set(keys))} of its neighbours {what}, and the threshold "
                f"is {plan.threshold}; {len(known - set(keys))} others are no neighbours."
            )

    def _open(self, ciphertexts: Mapping[int, bytes], keys: Mapping[int, bytes]) -> dict[int, bytes]:
        """By neighbour: the shares of its mask key and of the seed of its own mask, one behind the other."""
        private = X25519PrivateKey.from_private_bytes(self._own("share key"))
        held = {}
        for peer, ciphertext in ciphertexts.items():
            key = agree(private, keys[peer][:KEY_BYTES], "share", self.context, peer, self.client)
            held[peer] = _exactly(decrypt(key, ciphertext), 2 * shamir.SHARE_BYTES)
        return held


class Coordinator:
    """The server in one round: `rosters`, `inboxes`, `add`, `requests`, `total`; the sum is ``(length,)`` of ``dtype``.

    Whoever does not answer a stage has dropped out. So has, with the reason in ``refused``, whoever sends what can't be
    read. ``generator`` draws the graph and must not depend on who colludes or drops out. Raises `TooFewClients`.
    """

    def __init__(
        self, topology: Topology, context: str, length: int, dtype: np.dtype | type, generator: np.random.Generator
    ):
        self.topology, self.context = topology, context
        self.refused: dict[int, str] = {}
        self._generator = generator
        self._sum = np.zeros(length, np.dtype(dtype).newbyteorder("<"))
        self._keys: dict[int, bytes] = {}
        self._neighbours: dict[int, tuple[int, ...]] = {}
        self._sharing: set[int] = set()
        self._in_sum: set[int] = set()
        self._open = False

    @property
    def survivors(self) -> tuple[int, ...]:
        """The clients whose vectors are in the sum."""
        return tuple(sorted(self._in_sum))

    def rosters(self, advertisements: Mapping[int, bytes]) -> dict[int, bytes]:
        """For each client that advertised: how many did, and the public keys of its neighbours, for `share`."""
        self._keys = self._read(advertisements, lambda _, message: _exactly(message, 3 * KEY_BYTES))
        try:
            self._plan = self.topology.plan(len(self._keys))
        except ConfigError as error:
            raise TooFewClients(f"{len(self._keys)} clients advertised in {self.context}: {error}") from error
        self._neighbours = neighbours(self._plan, self._keys, self._generator)
        count = len(self._keys).to_bytes(4, "little")
        return {
            i: count + pack({j: self._keys[j][: 2 * KEY_BYTES] for j in around})
            for i, around in self._neighbours.items()
        }

    def inboxes(self, shares: Mapping[int, bytes]) -> dict[int, bytes]:
        """For each client that shared: the ciphertexts of its neighbours, for `mask`."""
        outgoing = self._read(shares, self._addressed)
        self._sharing = set(outgoing)
        inboxes = {i: {j: outgoing[j][i] for j in self._neighbours[i] if j in outgoing} for i in outgoing}
        for client, inbox in inboxes.items():
            self._enough(client, len(inbox), "sent shares")
        self._open = True
        return {i: pack(inbox) for i, inbox in inboxes.items()}

    def add(self, client: int, masked: bytes) -> None:
        """Add a client's masked vector to the sum. Raises `ShoalError` if it is too late or not what it should be."""
        if not self._open or client not in self._sharing or client in self._in_sum:
            raise ShoalError(
                f"Client {client}'s masked vector comes too late, or twice, or from a client without shares."
            )
        self._sum += np.frombuffer(_exactly(masked, self._sum.nbytes), self._sum.dtype)
        self._in_sum.add(client)

    def requests(self) -> dict[int, bytes]:
        """Close the sum. For each client in it: which of its neighbours are in the sum or dropped out, for `unmask`."""
        self._open = False
        if not self._in_sum:
            raise TooFewClients(f"No masked vector arrived in {self.context}: there is no sum.")
        for client in self._secrets():
            self._enough(client, len(self._in_sum.intersection(self._neighbours[client])), "are in the sum")
        return {i: pack({j: self._fate(j) for j in self._neighbours[i] if j in self._sharing}) for i in self.survivors}

    def total(self, answers: Mapping[int, bytes]) -> np.ndarray:
        """``(length,)``: the sum mod 2^b over `survivors`, from their answers to `requests`."""
        held = self._read({i: m for i, m in answers.items() if i in self._in_sum}, self._held)
        secrets = {}
        for client in self._secrets():
            shares = {at + 1: held[j][client] for at, j in enumerate(self._neighbours[client]) if j in held}
            self._enough(client, len(shares), "gave their shares of its secrets")
            secrets[client] = shamir.combine(shares, self._plan.threshold)
            right = _hash(secrets[client]) == self._keys[client][2 * KEY_BYTES :]
            if client not in self._in_sum:
                right = public(secrets[client]) == self._keys[client][KEY_BYTES : 2 * KEY_BYTES]
            if not right:
                raise ShoalError(f"A share of client {client}'s secrets was altered: the sum can't be unmasked.")
        total = self._sum.copy()
        for client, secret in secrets.items():
            if client in self._in_sum:
                add_mask(total, secret, -1)
                continue
            private = X25519PrivateKey.from_private_bytes(secret)
            for peer in self._in_sum.intersection(self._neighbours[client]):
                add_mask(total, _pair_seed(private, self._keys[peer], self.context, client, peer), _sign(client, peer))
        return total

    def _secrets(self) -> list[int]:
        """The clients of which a secret is needed: all in the sum, and the dropped ones that share masks with them."""
        return [i for i in sorted(self._sharing) if i in self._in_sum or self._in_sum.intersection(self._neighbours[i])]

    def _fate(self, client: int) -> bytes:
        return IN_SUM if client in self._in_sum else DROPPED

    def _enough(self, client: int, count: int, what: str) -> None:
        if count < self._plan.threshold:
            raise TooFewClients(
                f"{count} neighbours of client {client} {what} in {self.context}; {self._plan.threshold} of "
                f"{self._plan.degree} are needed. Ask more clients, or plan for more dropouts (`dropout`)."
            )

    def _addressed(self, client: int, message: bytes) -> dict[int, bytes]:
        parts = unpack(message)
        if tuple(parts) != self._neighbours.get(client):
            raise ShoalError(f"Client {client}'s shares are not for its neighbours.")
        return parts

    def _held(self, client: int, message: bytes) -> dict[int, bytes]:
        parts = unpack(message, shamir.SHARE_BYTES)
        if set(parts) != self._sharing.intersection(self._neighbours[client]):
            raise ShoalError(f"Client {client} did not give one share for each neighbour.")
        return parts

    def _read(self, messages: Mapping[int, bytes], reader: Callable[[int, bytes], T]) -> dict[int, T]:
        out = {}
        for client in sorted(messages):
            try:
                out[client] = reader(client, messages[client])
            except ShoalError as error:
                self.refused[client] = str(error)
        return out


def _pair_seed(private: X25519PrivateKey, keys: bytes, context: str, i: int, j: int) -> bytes:
    """The seed of the mask that clients i and j share; ``keys`` are the other's public ones."""
    return agree(private, keys[KEY_BYTES : 2 * KEY_BYTES], "mask", context, min(i, j), max(i, j))


def _sign(client: int, peer: int) -> int:
    return 1 if client < peer else -1


def _hash(seed: bytes) -> bytes:
    return hashlib.sha256(b"own mask" + seed).digest()


def _exactly(message: bytes, size: int) -> bytes:
    if len(message) != size:
        raise ShoalError(f"A message has {len(message)} bytes; {size} were expected.")
    return message
