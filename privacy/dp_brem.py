"""DP-BREM: example-level privacy and robustness from clipped client momenta, with a trusted server that adds the noise.

    g_i = (1/b_i) sum_{x in Poisson(p)} clip_R(grad l(theta; x)),   b_i = p n_i           at the client, with
    phi_i <- beta phi_i + (1 - beta) g_i                                                  local=client_momentum
    phi <- phi + (1/|I|) [ sum_{i in I} clip_C(phi_i - phi) + N(0, (R sigma)^2 I) ]       here
    theta <- theta - eta phi                                                              aggregator=dp_brem

(Gu et al., arXiv 2306.12608; I are the clients heard in the round.) Whatever they send, one client's reply changes the
sum by at most 2 C, and all of them move phi by at most C. Clipping doesn't enlarge distances, so one example of client
i changes it by at most ``R/b_i`` times its share of the momentum; relative to that the noise is ``sigma b_i``. What
all rounds cost is `privacy.momentum.Momentum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from aggregators.base import in_client_order
from aggregators.dp_brem import CENTRE
from aggregators.dp_brem import DPBREM as Rule
from clients.local.client_momentum import ClientMomentum
from clients.local.private import Private
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import generator
from fl.state import ServerState, Update
from privacy import accounting, client_level, example_level
from privacy.accounting import ACCOUNTANTS, Mechanism
from privacy.base import Guard, Job, Privacy, Statement, check_target, noise_root
from privacy.ledger import Book, steps_within
from privacy.momentum import Momentum, RoundedMomentum

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings


@dataclass(frozen=True)
class DPBREM(Privacy):
    """Centred clipping of client momenta and Gaussian noise on their sum.

    ``epsilon`` is a target for each client at its own ``delta`` (null: 1/n_i). The noise is common, so the client that
    needs most, as a rule the one with the fewest examples, sets it, and the others spend less. ``noise_multiplier``
    sets the noise instead; with a target beside it a client stops when its next round would exceed it.
    """

    in_rounds: ClassVar[bool] = True

    unit: ClassVar[str | None] = "example"

    epsilon: float | None = setting(3.0, gt=0, help="target for each client; sets the noise, or where to stop")
    delta: float | None = setting(None, gt=0, lt=1, help="null: 1/n_i at a client with n_i examples")
    noise_multiplier: float | None = setting(
        None, gt=0, help="sigma: noise of the clients' sum in units of record_clip; null: calibrated to epsilon"
    )
    record_clip: float = setting(1.0, gt=0, help="R: L2 norm that each example's gradient is clipped to")
    client_clip: float | None = setting(
        0.5, gt=0, help="C: L2 norm that a momentum's distance from the centre is clipped to; null: not, a plain mean"
    )
    rate: float = setting(0.05, gt=0, le=1, help="p: probability that an example is in a round's batch")
    accountant: str = setting("rdp", choices=ACCOUNTANTS, help="prv and pld: only with local.beta=0")

    def __post_init__(self) -> None:
        check_target(self.epsilon, self.noise_multiplier, example=0.1)

    def check(self, settings: Settings) -> None:
        local, schedule = settings.local, settings.schedule
        if not isinstance(local, ClientMomentum):
            raise ConfigError("local", type(local).__name__, "client_momentum, where privacy=dp_brem")
        if not isinstance(settings.aggregator, Rule):
            raise ConfigError("aggregator", type(settings.aggregator).__name__, "dp_brem, where privacy=dp_brem")
        example_level.check(settings)
        self.check_secure(settings)
        if local.beta > 0 and self.accountant != "rdp":
            allowed = "rdp, where local.beta is above 0: the others know only rounds that are sampled by themselves"
            raise ConfigError("privacy.accountant", self.accountant, allowed)
        # A reply that is rejected for its norm would tell something of the examples, and no clip bounds how much.
        largest = local.lr * self.record_clip / self.rate
        if largest > schedule.max_update_norm:
            raise ConfigError(
                "schedule.max_update_norm", schedule.max_update_norm,
                f"at least lr R/p = {largest:g}, the largest norm of an honest reply: whether one is rejected must not "
                "depend on anybody's examples",
            )  # fmt: skip

    def check_secure(self, settings: Settings) -> None:
        """Raise `ConfigError` for a way of aggregating that this form can't use."""
        if settings.secure_aggregation.active:
            allowed = "none, where privacy=dp_brem: the server clips each client's momentum, so it has to see it"
            way_out = "Use privacy=dp_brem_plus with secure_aggregation=shares."
            raise ConfigError("secure_aggregation", type(settings.secure_aggregation).__name__, allowed, way_out)

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        return DPBREMGuard(self, settings, sizes)


class DPBREMGuard(example_level.ExampleGuard):
    """Poisson batches and clipped gradients at the clients; at the server the clipped sum, its noise, and the books."""

    def __init__(self, privacy: DPBREM, settings: Settings, sizes: Sequence[int]):
        assert isinstance(settings.local, ClientMomentum)
        self.privacy, self.sizes, self.beta = privacy, list(sizes), settings.local.beta
        most = settings.schedule.participations()
        assert most is not None  # `check` has refused a schedule without a bound
        self.most, p = most, privacy
        deltas = [example_level.delta_at(size, p.delta) for size in sizes]
        once = [example_level.start_release(settings.adapter.initialisation, size) for size in sizes]
        plans = list(zip(self.expected, deltas, once, strict=True))
        if p.noise_multiplier is None:
            assert p.epsilon is not None
            self.sigma = max(
                _calibrated(self.mechanism(1.0, expected), most, start, p.epsilon, delta, p.accountant) / expected
                for expected, delta, start in plans
            )
        else:
            self.sigma = p.noise_multiplier
        books = [self._book(*plan) for plan in plans]
        super().__init__(noise_root(settings), settings.local, [p.rate] * len(sizes), books)

    @property
    def expected(self) -> list[float]:
        """The public batch sizes ``b_i = p n_i``, which gradients are divided by."""
        return [self.privacy.rate * size for size in self.sizes]

    def mechanism(self, noise: float, expected: float) -> Momentum | RoundedMomentum:
        """A step of a client with the public batch ``expected``, with noise of ``noise`` times R/b_i."""
        return Momentum(noise, self.privacy.rate, self.beta)

    def _book(self, expected: float, delta: float, once: tuple[Mechanism, ...]) -> Book:
        p = self.privacy
        running = self.mechanism(self.sigma * expected, expected)
        limit = None
        if p.epsilon is not None:  # calibrated noise lasts through all rounds
            limit = self.most
            if p.noise_multiplier is not None:
                limit = steps_within(running, once, p.epsilon, delta, p.accountant, self.most)
        return Book(running, delta, p.accountant, once, limit)

    def job(self, client: int, round: int, fingerprint: str, examples: np.ndarray, memory: dict) -> Job | None:
        newest = self.books[client].newest
        if newest and newest["round"] == round and newest["fingerprint"] != fingerprint:
            raise ShoalError(
                f"client {client} is asked twice in round {round}, with different states: two continuations of one "
                "momentum are not accounted for. Start the run anew."
            )
        return super().job(client, round, fingerprint, examples, memory)

    def private(self, client: int, key: tuple[int | str, ...], memory: dict) -> Private:
        return Private(self.privacy.record_clip, 0.0, self.expected[client], key)  # the server adds the noise

    def collect(self, server: ServerState, updates: Sequence[Update], round: int, lr: float) -> list[Update]:
        """The step ``-lr phi`` along the new centre ``phi``, as the update of one; beside it, ``phi``."""
        if not updates:
            return []
        ordered = in_client_order(updates)
        # A longer momentum is no honest one; added as it is, an absurd one would swallow the noise in rounding.
        longest = self.privacy.record_clip / self.privacy.rate
        momenta = [clipped(update.vector / np.float64(-lr), longest) for update in ordered]  # (n,) each
        centre = server.extra.get(CENTRE, np.zeros(len(momenta[0])))
        # The same sum with other clients' replies gets other noise, or their difference would be free of it.
        content = hashlib.sha256(centre.tobytes())
        for update in ordered:
            content.update(f"{update.client}:".encode() + update.vector.tobytes())
        rng = generator(self.root, "dp_brem", round, content.hexdigest())
        noise = self.sigma * self.privacy.record_clip * rng.standard_normal(len(centre))
        phi = centred_mean(momenta, centre, self.privacy.client_clip, noise)
        last = max(update.arrived_ticks for update in ordered)
        first = ordered[0]
        return [
            Update(
                first.client, round, first.start_version, -lr * phi, 1, first.sent_ticks, last,
                extra={CENTRE: phi}, columns=first.columns, start=first.start,
            )
        ]  # fmt: skip

    def statement(self) -> Statement:
        p, rows = self.privacy, self.rows(self.sizes)
        clip = "not clipped" if p.client_clip is None else f"clipped to C = {p.client_clip:g} around the last mean"
        low, high = min(self.expected), max(self.expected)
        return example_level.statement(
            "DP-BREM: client momentum, centred clipping, noise at the server",
            rows,
            target=p.epsilon,
            sampling=f"Poisson, at rate {p.rate:g}, divisor the public batch p n_i ({low:.4g} to {high:.4g})",
            clipping=f"each example's gradient to L2 norm R = {p.record_clip:g} over all that trains; momenta {clip}",
            noise=f"Gaussian, {self.sigma:.4g} x R on each round's sum of momenta, drawn by the server from "
            f"{self.source('server')}: {self.sigma * low:.4g} to {self.sigma * high:.4g} times the R/b_i by which one "
            "example moves it",
            participation=f"up to {self.most} rounds of a client, with no amplification by who takes part",
            accountant=f"momentum (beta {self.beta:g})" if self.beta else accounting.named(p.accountant),
            against="other clients and whoever sees the models and the mean momentum, if they know neither "
            f"{self.source('server')} nor another client's momentum; the server, which sees them all without noise, is "
            "trusted",
        )


def clipped(vector: np.ndarray, norm: float | None) -> np.ndarray:
    """``v min(1, norm/|v|)`` as float64: the nearest point of the ball of radius ``norm`` (None: ``v`` as it is)."""
    return vector.astype(np.float64, copy=False) if norm is None else client_level.clipped(vector, norm)[0]


def centred_mean(
    momenta: Sequence[np.ndarray], centre: np.ndarray, norm: float | None, noise: np.ndarray | float = 0.0
) -> np.ndarray:
    """``centre + (1/n) [ sum_i clip(momenta_i - centre) + noise ]``, all ``(d,)`` float64."""
    total = np.zeros(len(centre))
    for momentum in momenta:
        total += clipped(momentum - centre, norm)
    return centre + (total + noise) / len(momenta)


@lru_cache(maxsize=4096)
def _calibrated(
    like: Momentum | RoundedMomentum,
    steps: int,
    once: tuple[Mechanism, ...],
    epsilon: float,
    delta: float,
    accountant: str,
) -> float:
    """The noise in units of R/b_i that ``steps`` rounds beside ``once`` need for the target."""
    return accounting.calibrate(
        lambda z: [*once, replace(like, noise_multiplier=z, steps=steps)], epsilon, delta, accountant
    )
