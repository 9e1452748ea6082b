"""Central differential privacy at the level of clients: DP-FedAvg (McMahan et al., arXiv 1710.06963, algorithm 1).

A trusted server clips each client's update, adds up, and adds noise once a round:

    Delta = ( sum_i w_i u_i min(1, C/|u_i|) + N(0, (z C)^2 I) ) / m

with m the public size of a cohort, or its expectation. What a round costs depends on who is asked:

    sampling=poisson     each of N clients with probability q = m/N: the sampled Gaussian, add-remove
    sampling=fixed       m of N without replacement: neighbours are replaced, the sum moves by 2 C
    sampling=available   every round counts as if the client were in it

Adaptive clipping (Andrew et al., arXiv 1905.03871, algorithm 1): with ``b_i = 1`` where ``|u_i| <= C``,

    b = (1/m) [ sum_i (b_i - 1/2) + N(0, s_b^2) ] + 1/2,    C <- C exp(-eta (b - quantile))

The update's noise is drawn for the C that clipped it, with the multiplier ``(z^-2 - (2 s_b)^-2)^(-1/2)``, so that both
releases together cost what one of multiplier z does (theorem 1; where a client is replaced, both sensitivities double).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.sampling import Fixed, Poisson
from fl.state import Update
from privacy.accounting import FixedSizeGaussian, Mechanism, SampledGaussian
from privacy.base import Guard, Statement
from privacy.client_level import ServerGuard, TrustedServer, gaussian
from privacy.dp_sgd import gradient_noise

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings


@dataclass(frozen=True)
class Central(TrustedServer):
    """DP-FedAvg: the mean of clipped updates with Gaussian noise of the server."""

    adaptive: bool = setting(False, help="the clipping norm follows a quantile of the updates' norms, privately")
    first_clip: float = setting(0.1, gt=0, help="norm that adaptive clipping begins with, instead of clip")
    quantile: float = setting(0.5, gt=0, lt=1, help="quantile of the norms that adaptive clipping aims at")
    clip_rate: float = setting(0.2, gt=0, help="step size eta of adaptive clipping")
    count_noise: float | None = setting(None, gt=0, help="noise s_b of its count, in clients; null: a cohort's 1/20")

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if amplified(settings) and not settings.network.always_available:
            raise ConfigError(
                "network.availability", getattr(settings.network, "availability", "a trace"),
                "1 and network.rejoin_s=0, where the claim counts on sampling: who is available depends on how long "
                "earlier rounds took, and the rate is another one",
                "Use sampling=available, which claims nothing of the sampling, or privacy=dp_ftrl.",
            )  # fmt: skip

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        return CentralGuard(self, settings, sizes)


def amplified(settings: Settings) -> bool:
    """Whether the claim counts on who is asked being drawn."""
    return type(settings.sampling) in (Poisson, Fixed)


def mechanism(settings: Settings, clients: int) -> tuple[float, Callable[[float], Mechanism]]:
    """The rate at which a round asks a client, and what a round is, for a noise multiplier."""
    cohort, sampling = settings.clients.per_round or clients, settings.sampling
    if type(sampling) is Poisson:
        rate = sampling.rate(clients, cohort)
        return rate, lambda z: SampledGaussian(z, rate)
    rate = cohort / clients
    if type(sampling) is Fixed:
        return rate, lambda z: FixedSizeGaussian(z, rate)
    return rate, lambda z: SampledGaussian(z, 1.0)


class CentralGuard(ServerGuard):
    """Adds a round's noise, and lets C follow the norms where it adapts."""

    name = "Central differential privacy at the server (DP-FedAvg)"

    def __init__(self, privacy: Central, settings: Settings, sizes: Sequence[int]):
        self.rate, make = mechanism(settings, len(sizes))
        self.sampling, self.amplified = type(settings.sampling), amplified(settings)
        super().__init__(privacy, settings, sizes, privacy.book(make, settings.schedule.rounds, len(sizes)))
        self.privacy = privacy
        self.noise_multiplier = self.total_noise = self.book.running.noise_multiplier  # type: ignore[attr-defined]
        self.count_noise = self.cohort / 20 if privacy.count_noise is None else privacy.count_noise
        if privacy.adaptive:
            self.clip = privacy.first_clip
            if self.count_noise <= self.total_noise / 2:
                allowed = (
                    f"above {self.total_noise / 2:.4g}, half the noise multiplier: the count alone would cost more"
                )
                way_out = "Raise it, or clients.per_round, or privacy.epsilon."
                raise ConfigError("privacy.count_noise", self.count_noise, allowed, way_out)
            self.noise_multiplier = gradient_noise(self.total_noise, self.count_noise)

    def counted(self, updates: Sequence[Update], round: int) -> Sequence[Update]:
        if self.amplified and any(u.round != round for u in updates):
            raise ShoalError(
                f"Round {round} has an update that an earlier round asked for: the sampling that the claim counts on "
                "is this round's. Use sampling=available."
            )
        return updates

    def noise(self, size: int, round: int, digest: str) -> np.ndarray:
        return gaussian(size, self.noise_multiplier * self.clip, self.root, "central", round, digest)

    def finish(self, norms: Sequence[float], round: int, digest: str) -> None:
        p = self.privacy
        if not p.adaptive:
            return
        within = sum((norm <= self.clip) - 0.5 for norm in norms)
        noise = gaussian(1, self.count_noise, self.root, "central clip", round, digest)[0]
        share = (within + noise) / self.cohort + 0.5
        self.clip *= math.exp(-p.clip_rate * (share - p.quantile))

    def statement(self) -> Statement:
        p, n = self.privacy, f"{self.cohort} of {self.clients} clients"
        sampling = {
            Poisson: f"Poisson, each client at rate {self.rate:.4g} (expected {n}), divisor the expected cohort",
            Fixed: f"fixed size, {n} drawn without replacement, divisor their number",
        }.get(
            self.sampling, f"up to {n}, those available; no amplification by sampling is claimed, divisor {self.cohort}"
        )
        clipping = f"each client's whole update to L2 norm C = {p.clip:g}"
        if p.adaptive:
            clipping = (
                f"each client's whole update to an L2 norm C that begins at {p.first_clip:g} (now {self.clip:.4g}) and "
                f"follows the {p.quantile:g} quantile by a count with noise {self.count_noise:.4g}; its cost is in the "
                f"total multiplier {self.total_noise:.4g}"
            )
        noise = (
            f"Gaussian, {self.noise_multiplier:.4g} x C on the sum, drawn by the server from {self.source('server')}"
        )
        taken = f"up to all {self.rounds} rounds of a client; {self.book.steps} rounds taken"
        return self.claim(sampling, clipping, noise, taken, self.rate)

    def state(self) -> dict:
        return {**super().state(), "clip": self.clip}

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.clip = state["clip"]
