"""What mechanisms at the level of clients share: clipping of whole updates, one budget, and what must be refused.

The unit is one client: neighbours differ in all data of one client. Where the server is trusted (`TrustedServer`), it
gives the aggregation rule one update in place of the clients',

    ( sum_i w_i u_i min(1, C/|u_i|) + noise ) / m        0 <= w_i <= 1

with ``|u_i|`` the L2 norm over all that trains and m the public number of clients that a round expects. Who answered
is secret, so m is never counted from the answers, and a round that nobody answers is noise (McMahan et al., arXiv
1710.06963, algorithm 1, the estimator with a fixed denominator). One client moves the sum by C at most, by 2 C where
its data are replaced.

What a client's own data decide about its own update - that it is late, rejected, or zero - changes its own part of the
sum alone, within the bound; so a deadline is allowed. What they decide about other clients' updates is not bounded by
C: the first k answers (``over_selection``), a round that is called off (``min_clients``), and a clock that decides who
is available next.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from clients.behaviours.base import ReplyFields
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import Part, generator
from fl.state import ServerState, Update
from privacy import accounting
from privacy.accounting import ACCOUNTANTS, Mechanism
from privacy.audit.log import ClientLog
from privacy.base import Guard, Privacy, Statement, check_target, noise_root
from privacy.example_level import check_bounded, check_start
from privacy.ledger import Book, steps_within

if TYPE_CHECKING:
    from fl.experiment import Settings

RELATIONS = {
    "add-remove": "adding or removing all of its data (without them its updates are zero)",
    "replace-one": "replacing all of its data by others",
}
UNCOVERED = [
    "evaluations on clients' own held-out examples, whose results are kept as they are",
    "the choice of hyper-parameters by looking at results",
    "what the run's records say of single clients: who took part when, how long it took, how many steps it made",
]


@dataclass(frozen=True)
class ClientLevel(Privacy):
    """The settings that all mechanisms at the level of clients have.

    ``epsilon`` is a target at ``delta`` (null: 1/clients), and sets the noise; ``noise_multiplier`` sets the noise
    instead, and with a target beside it training stops before the target would be exceeded.
    """

    unit: ClassVar[str | None] = "client"
    in_rounds: ClassVar[bool] = True

    epsilon: float | None = setting(3.0, gt=0, help="target; sets the noise, or where to stop")
    delta: float | None = setting(None, gt=0, lt=1, help="null: 1/clients")
    noise_multiplier: float | None = setting(None, gt=0, help="noise in units of clip; null: calibrated to epsilon")
    clip: float = setting(1.0, gt=0, help="L2 norm C that each client's whole update is clipped to")
    accountant: str = setting("rdp", choices=ACCOUNTANTS, help="how rounds are composed")

    def __post_init__(self) -> None:
        check_target(self.epsilon, self.noise_multiplier)

    def check(self, settings: Settings) -> None:
        check_bounded(settings)
        check_start(settings.adapter.initialisation, None)

    def book(self, make: Callable[[float], Mechanism], steps: int, clients: int) -> Book:
        """The book of the mechanism ``make(z)``, with z calibrated for ``steps`` steps where only a target is given."""
        delta = 1 / clients if self.delta is None else self.delta
        if delta >= 1:
            raise ConfigError("privacy.delta", delta, "below 1: one client has no 1/clients", "Set privacy.delta.")
        noise, limit = self.noise_multiplier, None
        if noise is None:
            assert self.epsilon is not None
            noise = accounting.calibrate(lambda z: [make(z).of(steps)], self.epsilon, delta, self.accountant)
        if self.epsilon is not None:
            limit = steps_within(make(noise), (), self.epsilon, delta, self.accountant, steps)
        return Book(make(noise), delta, self.accountant, (), limit)


@dataclass(frozen=True)
class TrustedServer(ClientLevel):
    """Mechanisms whose server sees single updates, and bounds and noises them before anybody else sees anything."""

    weight_cap: int | None = setting(None, ge=1, help="weights=examples: w = min(examples/cap, 1); null: refused")
    audit: bool = setting(False, help="add canary clients and measure a lower bound on epsilon")
    audit_canaries: int = setting(500, ge=64, help="canary clients of the audit; a fair coin puts each in or not")

    def check(self, settings: Settings) -> None:
        super().check(settings)
        rule, name = settings.aggregator, type(settings.aggregator).__name__
        if rule.weights == "examples" and self.weight_cap is None:
            raise ConfigError(
                "aggregator.weights", "examples", "uniform or a list: numbers of examples have no bound",
                "Set aggregator.weights=uniform, or bound them: privacy.weight_cap=100.",
            )  # fmt: skip
        if rule.weights != "examples" and self.weight_cap is not None:
            raise ConfigError("privacy.weight_cap", self.weight_cap, "null unless aggregator.weights=examples")
        if not rule.linear:
            raise ConfigError(
                "aggregator", name, "a rule of the mean update alone: there is one noisy update, and no client's own",
                "Use aggregator=fedavg, fedsb, fedsvd or rolora.",
            )  # fmt: skip
        if settings.adapter.mixed_ranks:
            allowed = "one rank for all clients: a sum with noise is over equal columns"
            raise ConfigError("adapter.rank", getattr(settings.adapter, "rank", None), allowed)
        if getattr(getattr(settings, "secure_aggregation", None), "active", False):
            allowed = "none: this server has to clip each client's update, which secure aggregation hides from it"
            raise ConfigError("secure_aggregation", "secagg", allowed)
        if settings.sampling.over_selection:
            allowed = "0: which answers are the first k depends on all clients asked, and one displaces another"
            raise ConfigError("sampling.over_selection", settings.sampling.over_selection, allowed)
        least = getattr(settings.schedule, "min_clients", 1)
        if least > 1:
            allowed = "1: how many answered is secret, so a run must not stop over it"
            raise ConfigError("schedule.min_clients", least, allowed)
        if settings.local.epochs is not None and not settings.network.always_available:
            raise ConfigError(
                "local.epochs", settings.local.epochs,
                "null where clients come and go: a client's data would decide how long a round is, and so who is "
                "available for the next",
                "Set local.steps, or network.availability=1.",
            )  # fmt: skip


def clipped(vector: np.ndarray, norm: float) -> tuple[np.ndarray, float]:
    """``u min(1, C/|u|)`` as float64 ``(n,)`` for C = ``norm``, and ``|u|``. A zero update stays zero."""
    vector = vector.astype(np.float64)
    size = float(np.linalg.norm(vector))
    return (vector * (norm / size) if size > norm else vector), size


def gaussian(size: int, std: float, *key: Part) -> np.ndarray:
    """``(size,)`` float64 of N(0, std^2), from ``key``."""
    return generator(*key).normal(0.0, std, size)


class RunGuard(Guard):
    """One ``book`` for the whole run, a step a round, and its ``target``."""

    def __init__(self, book: Book, target: float | None, rounds: int):
        self.book, self.target, self.rounds = book, target, rounds

    def stopped(self) -> str | None:
        if self.book.exhausted and self.book.steps < self.rounds:
            return f"the next round would exceed the privacy budget, epsilon {self.target:g}"
        return None

    @property
    def epsilon(self) -> float | None:
        return self.book.epsilon

    def state(self) -> dict:
        return {"book": self.book.state()}

    def restore(self, state: dict) -> None:
        self.book.restore(state["book"])


class ServerGuard(RunGuard, ABC):
    """One noisy update in place of the clients', and one book for the run; subclasses say what the noise is.

    ``clip`` is the C of the next round. The noise's key names what it is added to: other content never gets the same.
    """

    counts_secret: ClassVar[bool] = True  # how many answered must not decide how the run goes on
    name: ClassVar[str]

    def __init__(self, privacy: TrustedServer, settings: Settings, sizes: Sequence[int], book: Book):
        super().__init__(book, privacy.epsilon, settings.schedule.rounds)
        self.cap, self.clip = privacy.weight_cap, privacy.clip
        self.root = noise_root(settings)
        self.seed, self.clients = settings.seed, len(sizes)
        self.cohort = settings.clients.per_round or len(sizes)
        given = settings.aggregator.weights
        self.weights = None if isinstance(given, str) else [w / max(given) for w in given]
        self.divisor = self.cohort * (1.0 if self.weights is None else float(np.mean(self.weights)))
        self.audit = self._log(privacy) if privacy.audit else None

    def _log(self, privacy: TrustedServer) -> ClientLog:
        running = self.book.running
        if running.relation != "add-remove":
            allowed = "false with sampling=fixed: canaries are added or left out, and its claim is about replacing"
            raise ConfigError("privacy.audit", True, allowed, "Use sampling=poisson or sampling=available.")
        rate = getattr(running, "sampling_rate", 1.0)
        most, separation = getattr(running, "participations", None), getattr(running, "min_separation", 1)
        adaptive = getattr(privacy, "adaptive", False)
        return ClientLog(self.seed, privacy.audit_canaries, rate, self.clients, self.book, most, separation, adaptive)

    def release(self, reply: ReplyFields, columns: np.ndarray) -> ReplyFields:
        # The number of examples leaves only as far as it weighs.
        return replace(reply, loss=None, tokens=0, examples=1 if self.cap is None else min(reply.examples, self.cap))

    def collect(self, server: ServerState, updates: Sequence[Update], round: int, lr: float) -> list[Update]:
        columns = server.space.columns(server.space.trains(round))
        if self.audit is not None:
            updates = [*updates, *self.audit.updates(round, server.version, len(columns), self.clip)]
        updates = sorted(updates, key=lambda u: u.client)
        if len({u.client for u in updates}) < len(updates):
            raise ShoalError(f"Round {round} has two updates of one client; what is accounted for is one a round.")
        if self.book.exhausted or round <= self.book.newest.get("round", 0):
            raise ShoalError(f"Round {round} can't be summed: it has been already, or the privacy budget is spent.")
        counted = self.counted(updates, round)
        total, norms = np.zeros(len(columns)), []
        for update in counted:
            part, norm = clipped(update.vector, self.clip)
            total += self.weight(update) * part
            norms.append(norm)
        content = hashlib.sha256(total.tobytes())
        content.update(repr((round, server.version, self.clip, norms)).encode())
        digest = content.hexdigest()[:32]
        self.book.grant(round, digest, 1)
        mean = (total + self.noise(len(total), round, digest)) / self.divisor
        if self.audit is not None:
            self.audit.see(round, mean, self.clip / self.divisor)
        self.finish(norms, round, digest)
        part_of = None if len(columns) == server.layout.size else columns
        return [Update(0, round, server.version, mean, 1, columns=part_of, start=server.vector)]

    def weight(self, update: Update) -> float:
        """w_i in [0, 1]."""
        if update.client >= self.clients:
            return 1.0  # a canary: the largest there may be
        if self.weights is not None:
            return self.weights[update.client]
        return 1.0 if self.cap is None else min(update.examples / self.cap, 1.0)

    def counted(self, updates: Sequence[Update], round: int) -> Sequence[Update]:
        """Those of ``updates`` that are summed. Raises `ShoalError` for what is not accounted for."""
        return updates

    @abstractmethod
    def noise(self, size: int, round: int, digest: str) -> np.ndarray:
        """``(size,)`` float64: what is added to the sum, which ``digest`` names."""

    def finish(self, norms: Sequence[float], round: int, digest: str) -> None:
        """After a round whose counted updates had ``norms`` before clipping."""

    def claim(self, sampling: str, clipping: str, noise: str, participation: str, rate: float) -> Statement:
        """The claim as far as the run has come."""
        book = self.book
        made = book.running.of(book.steps).describe()
        row = {"clients": self.clients, "rate": rate, "steps": book.steps, "limit": book.limit, "mechanism": made}
        bounded = {True: "uniform weights", False: "weights w_i/max w"}[self.weights is None]
        if self.cap is not None:
            bounded = f"weights min(n_i/{self.cap}, 1)"
        return Statement(
            self.name, "client", RELATIONS[book.running.relation], sampling, f"{clipping}; {bounded}", noise,
            participation, accounting.named(book.accountant), book.epsilon, book.delta, self.target,
            against=f"clients and whoever sees the models, if they do not know {self.source('server')}; the server is "
            "trusted",
            uncovered=UNCOVERED, holders=[{**row, "delta": book.delta, "epsilon": book.epsilon}],
        )  # fmt: skip

    def state(self) -> dict:
        return super().state() | ({} if self.audit is None else {"audit": self.audit.state()})

    def restore(self, state: dict) -> None:
        super().restore(state)
        if self.audit is not None:
            self.audit.restore(state.get("audit"))
