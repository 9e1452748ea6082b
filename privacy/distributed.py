"""Distributed differential privacy: discrete noise from every client, summed under secure aggregation.

No server is trusted with a single update, and none has to add noise: each client clips its update to C, rotates and
rounds it to integers, adds its share of discrete noise, and masks it. The server learns

    sum_i round(s R clip_C(u_i)) + sum_i noise_i  mod 2^b,    noise_i of variance (s z C)^2 / m

(`privacy.discrete`; Kairouz, Liu and Steinke, arXiv 2102.06387; Agarwal, Kairouz and Liu, arXiv 2110.04995). The noise
is planned for the ``min_cohort`` m honest clients that a sum has at least; a round with fewer is not opened. An update
that is not finite counts as zero: a client that dropped out for it would show something of its data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from clients.behaviours.base import ReplyFields
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.state import ServerState, Update
from privacy import accounting
from privacy.accounting import Mechanism
from privacy.base import Guard, Statement
from privacy.client_level import UNCOVERED, ClientLevel, RunGuard
from privacy.discrete import DiscreteNoise
from privacy.secure_aggregation.codec import Codec, not_a_sum
from privacy.secure_aggregation.settings import SecAggPlus

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings

RELATION = "setting all updates of one client to zero, while it still adds its noise (who takes part is public)"


@dataclass(frozen=True)
class Distributed(ClientLevel):
    """Client-level privacy against the server too, by noise shares under ``secure_aggregation=secagg``.

    ``min_cohort`` (null: what is left of a round's clients without those that ``secure_aggregation`` lets collude and
    drop out) is how many clients' noise the claim counts on. ``resolution`` is the integers of the clipping norm C.
    """

    kind: str = setting("skellam", choices=("skellam", "discrete_gaussian"), help="law of a client's share of noise")
    min_cohort: int | None = setting(None, ge=1, help="fewest honest clients in a sum; null: by secure_aggregation")
    resolution: float = setting(2.0**16, ge=16, help="integer steps of the clipping norm")
    rotate: bool = setting(True, help="random rotation before rounding, so that no coordinate is large")

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if not settings.secure_aggregation.active:
            raise ConfigError(
                "secure_aggregation", "none", "secagg: a client's share of the noise alone hides nothing",
                "Set secure_aggregation=secagg, or use privacy=local or central.",
            )  # fmt: skip
        if settings.aggregator.weights != "uniform":
            allowed = "uniform: noise shares are equal, and numbers of examples are a client's secret"
            raise ConfigError("aggregator.weights", settings.aggregator.weights, allowed)
        if self.accountant != "rdp":
            raise ConfigError("privacy.accountant", self.accountant, "rdp for discrete noise")

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        return DistributedGuard(self, settings, sizes, space)


class DistributedGuard(RunGuard):
    """The codec of a round's sum, and the book of the sums that were opened."""

    def __init__(self, privacy: Distributed, settings: Settings, sizes: Sequence[int], space: Space):
        secure = settings.secure_aggregation
        assert isinstance(secure, SecAggPlus)
        self.privacy, self.secure, self.seed, self.clients = privacy, secure, settings.seed, len(sizes)
        self.asked = min(len(sizes), settings.sampling.asked(settings.clients.per_round or len(sizes)))
        self.colluding, dropped = secure.topology.missing(self.asked)
        left = self.asked - self.colluding
        self.min_cohort = max(1, left - dropped) if privacy.min_cohort is None else privacy.min_cohort
        if self.min_cohort > left:
            raise ConfigError(
                "privacy.min_cohort", self.min_cohort,
                f"at most {left}: {self.asked} clients are asked, and {self.colluding} of them may collude",
            )  # fmt: skip
        # The largest phase has the largest sensitivity after rounding, so it prices every round.
        self.size = max(len(space.columns(phase)) for phase in space.phases)
        multipliers: dict[Mechanism, float] = {}

        def release(noise: float) -> Mechanism:
            made = self._plan(noise, self.size).release()
            multipliers[made] = noise
            return made

        rounds = settings.schedule.rounds
        super().__init__(privacy.book(release, rounds, len(sizes)), privacy.epsilon, rounds)
        self.noise_multiplier = multipliers[self.book.running]

    def _plan(self, noise: float, size: int) -> DiscreteNoise:
        p = self.privacy
        try:
            return DiscreteNoise(
                size, p.clip, noise, p.resolution / p.clip, self.asked, self.min_cohort, self.secure.modulus_bits,
                p.kind, p.rotate,  # type: ignore[arg-type]
            )  # fmt: skip
        except ConfigError as error:  # in the names that a user knows
            if error.key == "privacy.scale":
                raise ConfigError("privacy.resolution", p.resolution, "below 2^31") from error
            if error.key == "privacy.modulus_bits":
                way_out = "Lower privacy.resolution, or set secure_aggregation.modulus_bits=64."
                bits = self.secure.modulus_bits
                raise ConfigError("secure_aggregation.modulus_bits", bits, error.allowed, way_out) from error
            raise

    def codec(self, size: int, round: int) -> Codec | None:
        return NoisySum(self._plan(self.noise_multiplier, size), self.colluding, (self.seed, "rotation", round))

    def release(self, reply: ReplyFields, columns: np.ndarray) -> ReplyFields:
        return replace(reply, loss=None, tokens=0, examples=1)

    def collect(self, server: ServerState, updates: Sequence[Update], round: int, lr: float) -> list[Update]:
        if updates and not self.book.grant(round, str(server.version), 1):
            raise ShoalError(f"Round {round} can't be counted: the privacy budget is spent.")
        return list(updates)

    def statement(self) -> Statement:
        p, book = self.privacy, self.book
        plan = self._plan(self.noise_multiplier, self.size)
        what = {"skellam": "Skellam", "discrete_gaussian": "discrete Gaussian"}[p.kind]
        row = {
            "clients": self.clients, "steps": book.steps, "limit": book.limit,
            "mechanism": book.running.of(book.steps).describe(), "delta": book.delta, "epsilon": book.epsilon,
        }  # fmt: skip
        return Statement(
            "Distributed differential privacy (noise shares under secure aggregation)", "client",
            RELATION, f"{self.asked} clients a round; no amplification by sampling is claimed",
            f"each client's whole update to L2 norm C = {p.clip:g}, rounded to steps of C/{p.resolution:g}, which "
            f"makes it {math.sqrt(plan.squared_l2) / p.resolution:.4g} C at most",
            f"{what}, {self.noise_multiplier:.4g} x C in the sum of {self.min_cohort} honest clients, each of whom "
            f"adds its share, drawn from {self.source('node')}",
            f"every round; {book.steps} sums opened", accounting.named(book.accountant), book.epsilon, book.delta,
            p.epsilon,
            against=f"the server with up to {self.colluding} clients of a round, other clients, and whoever sees the "
            f"models, if they keep to the protocol and do not know {self.source('node')}",
            uncovered=UNCOVERED, holders=[row],
        )  # fmt: skip


class NoisySum(Codec):
    """The mean of clipped updates with the noise of all who are in the sum."""

    def __init__(self, plan: DiscreteNoise, colluding: int, public: tuple[int | str, ...]):
        self.plan, self.colluding, self.public = plan, colluding, public
        self.least = plan.min_cohort + colluding  # with fewer, the sum would have less noise than is claimed
        self.most, self.length, self.dtype = plan.clients, plan.padded, np.dtype(f"<u{plan.modulus_bits // 8}")

    def encode(
        self, update: np.ndarray, weight: int, rng: np.random.Generator, arrays: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        finite = np.isfinite(update).all()
        return self.plan.encode(update if finite else np.zeros_like(update), rng, *self.public)

    def decode(self, total: np.ndarray, clients: int) -> np.ndarray:
        plan = self.plan
        added = plan.decode(total, clients, *self.public, colluding=self.colluding)
        # Beyond its mean the norm of d normal numbers goes by 20 of their deviations with probability below 1e-80.
        noise = math.sqrt(clients * plan.share_variance) * (2 * math.sqrt(plan.padded) + 20)
        if np.linalg.norm(added) > (clients * math.sqrt(plan.squared_l2) + noise) / plan.scale:
            raise not_a_sum(clients)
        return added / clients
