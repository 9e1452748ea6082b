"""Sums of vectors that are secret-shared among several servers, each vector with a proof of its norm.

Where the masks of SecAgg+ hide a vector so well that nothing about it can be checked, additive shares among two or more
servers that don't collude let them check, together and on shares alone, that its L2 norm is within a bound
(`privacy.secure_aggregation.norm_check`). A client that can't prove it is left out. Each server may add noise of its
own to its share of the sum, so the sum that is opened is noisy as long as one server is honest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import generator
from privacy.client_level import clipped
from privacy.discrete import discrete_gaussian
from privacy.secure_aggregation import field
from privacy.secure_aggregation.codec import Codec
from privacy.secure_aggregation.norm_check import NormCheck
from privacy.secure_aggregation.primitives import KEY_BYTES, agree, decrypt, derive, encrypt, public_key
from privacy.secure_aggregation.settings import SecureAggregation

if TYPE_CHECKING:
    from fl.experiment import Settings


class ProofCodec(Codec):
    """Integers (int64) of L2 norm at most ``bound``, which the client proves; ``noise`` is what each server adds.

    ``encode`` rounds ``scale`` times what `inside` makes of an update, to the nearest; ``noise`` is a deviation
    in integer steps (0: none).
    """

    dtype = np.dtype(np.int64)

    def __init__(self, size: int, clip: float, clients: int, noise: float = 0.0):
        self.length, self.clip, self.most, self.noise = size, clip, clients, noise
        self.scale = finest_steps(size, clip) / clip
        self.bound = norm_bound(size, self.scale * clip)

    def inside(self, update: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """``update`` clipped to L2 norm ``clip``, in float64. Raises `ShoalError` where that can't be."""
        return clipped(update, self.clip)[0]

    def encode(
        self, update: np.ndarray, weight: int, rng: np.random.Generator, arrays: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        if update.shape != (self.length,) or not np.isfinite(update).all():
            raise ShoalError(f"an update must be {self.length} finite numbers")
        return np.rint(self.inside(update, arrays) * self.scale).astype(np.int64)

    def decode(self, total: np.ndarray, clients: int) -> np.ndarray:
        return total.astype(np.float64) / (self.scale * clients)


def norm_bound(size: int, steps: float) -> int:
    """The largest norm of a rounded vector ``(size,)`` that had norm ``steps``: half a step more in each coordinate."""
    return math.ceil(steps + math.sqrt(size) / 2)


def finest_steps(size: int, clip: float) -> float:
    """The largest power of two of integer steps for the norm ``clip`` whose proof `NormCheck` can make."""
    for exponent in range(40, 3, -1):
        try:
            NormCheck(size, norm_bound(size, 2.0**exponent))
        except ConfigError:
            continue
        return 2.0**exponent
    raise ConfigError("privacy.client_clip", clip, f"for fewer numbers than {size}: their norm can't be proved")


@dataclass(frozen=True)
class SecretShares(SecureAggregation):
    """Additive shares among ``servers``, and a proof that each update's L2 norm is at most ``clip``.

    A mechanism with a codec of its own (``privacy=dp_brem_plus``) sets the norm instead.
    """

    active: ClassVar[bool] = True

    servers: int = setting(2, ge=2, le=8, help="servers that hold shares; all but one may collude")
    clip: float = setting(1.0, gt=0, help="L2 norm that an update is clipped to, which its client proves")

    def codec(self, size: int, clients: int, max_weight: int) -> Codec:
        """The codec for updates of ``size`` numbers."""
        return ProofCodec(size, self.clip, clients)

    def check(self, settings: Settings) -> None:
        from privacy.distributed import Distributed
        from privacy.dp_brem_plus import DPBREMPlus

        if isinstance(settings.privacy, Distributed):
            allowed = "secagg, where privacy=distributed: its noise is that of clients, under masks"
            raise ConfigError("secure_aggregation", "shares", allowed, "Or use privacy=dp_brem_plus.")
        self.check_sums(settings, "shares")
        if settings.aggregator.weights != "uniform" and not isinstance(settings.privacy, DPBREMPlus):
            allowed = "uniform with secure_aggregation=shares: a weight would change the norm that is proved"
            raise ConfigError("aggregator.weights", settings.aggregator.weights, allowed)

    def statement(self) -> str:
        return (
            f"Secret shares among {self.servers} servers: each saw uniform numbers in place of an update, and together "
            "they opened the sum of those whose norm was proved, if they keep to the protocol and not all collude."
        )


class Aggregator:
    """One of the servers in one round: opens its share of a client's message, and adds up what was accepted.

    ``secret`` is its key, 32 bytes, which its noise comes from too; ``context`` names the run and the round.
    """

    def __init__(self, index: int, check: NormCheck, secret: bytes, context: str):
        self.index, self.check, self.context = index, check, context
        self._secret, self._private = secret, X25519PrivateKey.from_private_bytes(secret)
        self._pending: dict[int, np.ndarray] = {}
        self._sum = np.zeros(check.length, np.uint64)

    def open(self, client: int, message: bytes, query: bytes) -> bytes:
        """What this server tells the others about a client's message. Raises `ShoalError` for what is no proof."""
        key = agree(self._private, message[:KEY_BYTES], "shares", self.context, client, self.index)
        text = decrypt(key, message[KEY_BYTES:])
        self._pending[client], opening = self.check.open(self.index, text, self.context, client, query)
        return opening

    def close(self, client: int, accepted: bool) -> None:
        """Add an accepted client's share to the sum; forget it otherwise."""
        share = self._pending.pop(client, None)
        if accepted and share is not None:
            self._sum = field.reduce(self._sum + share)

    def total(self, noise: float) -> np.ndarray:
        """``(length,)``: its share of the sum, with discrete Gaussian noise of its own where ``noise`` is above 0.

        The same share gets the same noise, so that a round that is opened again tells nothing new; shares are uniform,
        so another sum has another share, and gets other noise.
        """
        if not noise:
            return self._sum
        content = hashlib.sha256(self._sum.tobytes()).hexdigest()
        rng = generator("share noise", derive(self._secret, "noise", self.context, repr(noise), content).hex())
        return field.reduce(self._sum + field.encode(discrete_gaussian(rng, noise, self.check.length)))


def messages(
    check: NormCheck, integers: np.ndarray, secret: bytes, publics: list[bytes], context: str, client: int
) -> list[bytes]:
    """A client's message for each server, encrypted for it; ``secret`` serves one vector only."""
    own = derive(secret, "key", context, client)
    private = X25519PrivateKey.from_private_bytes(own)
    out = []
    for index, text in enumerate(check.prove(integers, derive(secret, "proof", context, client), context, client)):
        key = agree(private, publics[index], "shares", context, client, index)
        out.append(public_key(own) + encrypt(key, bytes(12), text))  # the key serves this text alone
    return out
