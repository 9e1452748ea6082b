"""DP-BREM+: DP-BREM without a trusted server. Shares, a proved norm, and discrete noise of every server.

    client i:    u_i = clip_C(phi_i - phi),    x_i = round(s u_i),   shares of x_i for S servers, and a proof |x_i| <= B
    servers:     check the proofs on the shares; open   sum_{i accepted} x_i + sum_k n_k,    n_k discrete Gaussian
    server:      phi <- phi + (1/|I|) (that sum) / s,    theta <- theta - eta phi

(Gu et al., arXiv 2306.12608, section on DP-BREM+.) The centre phi is public and is broadcast, so clients clip by
themselves; what keeps a hostile one to it is the proof (`privacy.secure_aggregation.norm_check`), with
``B = s C + sqrt(d)/2`` for the rounding. The paper samples one Gaussian jointly; here each of the S servers adds noise
of the full standard deviation ``R sigma s`` in integer steps, drawn exactly (`privacy.discrete.discrete_gaussian`), so
the sum is covered as long as one server is honest, and has sqrt(S) times the noise that is claimed. Noise that is
sampled coarsely and scaled up would leave the low-order bits of the sum bare; this has the resolution of the ring.

In step t, one example that has taken part moves x_i by at most ``s (R/b_i) (m_t + e)`` integer steps: each coordinate
is rounded once, and the client's momentum is float32. `DPBREMPlusGuard.mechanism` bounds e, and
`privacy.momentum.RoundedMomentum` is the cost. Derivation: docs/methods/dp_brem_plus.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from aggregators.dp_brem import CENTRE
from fl.errors import ConfigError, ShoalError
from fl.state import ServerState, Update
from privacy import accounting
from privacy.base import Guard, Statement
from privacy.dp_brem import DPBREM, DPBREMGuard
from privacy.momentum import RoundedMomentum
from privacy.secure_aggregation.codec import Codec
from privacy.secure_aggregation.shares import ProofCodec, SecretShares

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings

_LARGEST = 2.0**32  # deviation of noise that `discrete_gaussian` draws


@dataclass(frozen=True)
class DPBREMPlus(DPBREM):
    """DP-BREM under ``secure_aggregation=shares``; settings as `DPBREM`."""

    def check_secure(self, settings: Settings) -> None:
        if not isinstance(settings.secure_aggregation, SecretShares):
            allowed = "shares, where privacy=dp_brem_plus: the norm of what clients send is proved on shares"
            raise ConfigError(
                "secure_aggregation", type(settings.secure_aggregation).__name__, allowed,
                "Set secure_aggregation=shares, or use privacy=dp_brem with a trusted server.",
            )  # fmt: skip
        if self.client_clip is None:
            allowed = "a number: it is the norm that clients prove"
            raise ConfigError("privacy.client_clip", None, allowed, "Set privacy.client_clip=0.5, say.")
        if self.accountant != "rdp":
            raise ConfigError(
                "privacy.accountant", self.accountant, "rdp, where privacy=dp_brem_plus: noise is discrete"
            )

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        return DPBREMPlusGuard(self, settings, sizes, space)


class DPBREMPlusGuard(DPBREMGuard):
    """The centre's broadcast, the codec of the shares, the sum as a step, and the books."""

    def __init__(self, privacy: DPBREMPlus, settings: Settings, sizes: Sequence[int], space: Space):
        assert isinstance(settings.secure_aggregation, SecretShares) and privacy.client_clip is not None
        self.size, self.clip = len(space.columns(space.trains(1))), privacy.client_clip
        self.clients, self.servers = len(sizes), settings.secure_aggregation.servers
        self.scale = ProofCodec(self.size, self.clip, self.clients).scale  # s
        super().__init__(privacy, settings, sizes)
        if self.noise > _LARGEST:
            allowed = f"not so small: noise of {self.sigma:.4g} x R would be more than 2^32 steps of C/{self.steps:g}"
            raise ConfigError("privacy.client_clip", self.clip, allowed, "Raise it, or lower the noise.")

    @property
    def noise(self) -> float:
        """Deviation of each server's noise, in integer steps."""
        return self.sigma * self.privacy.record_clip * self.scale

    @property
    def steps(self) -> float:
        """Integer steps in C."""
        return self.scale * self.clip

    def mechanism(self, noise: float, expected: float) -> RoundedMomentum:
        """A step of a client with the public batch ``expected`` b = p n, with noise of ``noise`` times R/b.

            e <= sqrt(d) / (s R/b) + 8 n 2^-24 / (1 - beta)

        The first part is rounding to integers, half a step on each side and coordinate. The second is the float32 of
        the momentum and of ``-lr phi``, for |phi| <= R/p. The gradient itself counts as computed without error.
        """
        rounding = math.sqrt(self.size) * expected / (self.privacy.record_clip * self.scale)
        floats = 8 * (expected / self.privacy.rate) * 2.0**-24 / (1 - self.beta)
        return RoundedMomentum(noise, self.privacy.rate, self.beta, rounding + floats)

    def broadcast(self, server: ServerState) -> dict[str, np.ndarray]:
        return {CENTRE: self._centre(server).astype(np.float32)}

    def _centre(self, server: ServerState) -> np.ndarray:
        # Rounded to what is sent, so that clients and server clip around the same.
        return server.extra.get(CENTRE, np.zeros(self.size)).astype(np.float32).astype(np.float64)

    def codec(self, size: int, round: int) -> Codec | None:
        return CentredCodec(size, self.clip, self.clients, self.noise, self.local.lr_at(round, self.most))

    def collect(self, server: ServerState, updates: Sequence[Update], round: int, lr: float) -> list[Update]:
        if not updates:
            return []
        (one,) = updates
        phi = self._centre(server) + one.vector
        return [
            Update(
                one.client, round, one.start_version, -lr * phi, 1, one.sent_ticks, one.arrived_ticks,
                extra={CENTRE: phi}, columns=one.columns, start=one.start,
            )
        ]  # fmt: skip

    def statement(self) -> Statement:
        low, high = min(self.expected), max(self.expected)
        return replace(
            super().statement(),
            mechanism="DP-BREM+: client momentum, centred clipping proved on shares, discrete noise of every server",
            noise=f"discrete Gaussian in steps of C/{self.steps:g}, "
            f"{self.sigma:.4g} x R from each of {self.servers} servers on each round's sum (one is counted): "
            f"{self.sigma * low:.4g} to {self.sigma * high:.4g} times the R/b_i by which one example moves it; drawn "
            "from the run's seed",
            accountant=f"Renyi bound of a rounded momentum (beta {self.beta:g}), {accounting.named('rdp')}",
            against=f"{self.servers - 1} of the {self.servers} servers together, other clients, and whoever sees the "
            "models, if the servers keep to the protocol and nobody knows the run's seed",
        )


class CentredCodec(ProofCodec):
    """``clip_C(phi_i - phi)`` from a reply ``-lr phi_i`` and the broadcast centre phi."""

    def __init__(self, size: int, clip: float, clients: int, noise: float, lr: float):
        super().__init__(size, clip, clients, noise)
        self.lr = lr

    def inside(self, update: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        centre = arrays.get(CENTRE)
        if centre is None or centre.shape != update.shape or not np.isfinite(centre).all():
            raise ShoalError("a training request of DP-BREM+ carries the centre")
        return super().inside(update / np.float64(-self.lr) - centre.astype(np.float64), arrays)
