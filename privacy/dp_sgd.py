"""DP-SGD at every client: example-level differential privacy, against the server and everybody who sees its models.

Per-sample clipping, noise before anything leaves the gradient, Poisson sampling (see `clients.local.private`): Abadi et
al., arXiv 1607.00133. What comes after, be it an optimiser, a proximal term, averaging, an SVD, is post-processing.

Client i with n_i examples samples at rate ``q_i = batch_size / n_i`` and takes part in every round in the worst case,
so its noise multiplier is calibrated for all steps that it can be asked for, once for the whole run, and one account
lasts through it. Calibrated noise therefore differs between clients: little data needs much noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from clients.local.private import CLIPPING, AdaptiveClip, Private
from clients.local.training import CLIP, LocalTraining
from fl.config import setting
from fl.errors import ConfigError
from privacy import accounting, example_level
from privacy.accounting import ACCOUNTANTS, Mechanism, SampledGaussian
from privacy.audit.log import ExampleLog, room
from privacy.base import Guard, Privacy, Statement, check_target, noise_root
from privacy.ledger import Book, spent, steps_within

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings

PAPERS = ("fed_sb", "fedsvd")


@dataclass(frozen=True)
class DPSGD(Privacy):
    """DP-SGD in every client's local training.

    ``epsilon`` is a target for each client at its own ``delta`` (null: 1/n_i), and sets the noise; ``noise_multiplier``
    sets the noise instead, and with a target beside it the client stops when its next step would exceed it.
    ``participations`` is how many rounds of a client the noise is calibrated for (null: all): fewer means less noise,
    and a client that has taken part so often takes part no more.
    """

    unit: ClassVar[str | None] = "example"

    epsilon: float | None = setting(3.0, gt=0, help="target for each client; sets the noise, or where to stop")
    delta: float | None = setting(None, gt=0, lt=1, help="null: 1/n_i at a client with n_i examples")
    noise_multiplier: float | None = setting(None, gt=0, help="noise in units of clip; null: calibrated to epsilon")
    clip: float = setting(1.0, gt=0, help="L2 norm that each example's gradient is clipped to (the first, if adaptive)")
    clipping: str = setting("flat", choices=CLIPPING, help="over all that trains, each tensor, or each adapted module")
    adaptive: bool = setting(False, help="the clipping norm follows a quantile of the gradients' norms, privately")
    quantile: float = setting(0.5, gt=0, lt=1, help="quantile of the norms that adaptive clipping aims at")
    clip_rate: float = setting(0.2, gt=0, help="step size eta of adaptive clipping")
    count_noise: float | None = setting(None, gt=0, help="noise s_b of its count, in examples; null: batch_size/20")
    participations: int | None = setting(None, ge=1, help="rounds of a client that the noise is for; null: all")
    accountant: str = setting("rdp", choices=ACCOUNTANTS, help="how steps are composed")
    paper: str | None = setting(None, choices=[None, *PAPERS], help="whose way of counting is printed beside ours")
    audit: bool = setting(False, help="plant canaries at one client and measure a lower bound on its epsilon")
    audit_canaries: int = setting(1000, ge=32, help="canaries of the audit, at most the trained scalars less 64")
    audit_client: int | None = setting(None, ge=0, help="client that is audited; null: one of the largest epsilon")

    def __post_init__(self) -> None:
        check_target(self.epsilon, self.noise_multiplier)
        if self.adaptive and self.clipping != "flat":
            raise ConfigError("privacy.clipping", self.clipping, "flat, where privacy.adaptive is true")

    def check(self, settings: Settings) -> None:
        example_level.check(settings)

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        guard = DPSGDGuard(self, settings, sizes)
        if self.audit:
            guard.audit = self._log(guard, settings, space)
        return guard

    def _log(self, guard: DPSGDGuard, settings: Settings, space: Space) -> ExampleLog:
        """The log of the client that is audited. Raises `ConfigError` where there is none, or no room for canaries."""
        client = self.audit_client
        if client is None:
            client = max(guard.books, key=lambda c: (guard.planned(c), -c))
        elif client not in guard.books:
            raise ConfigError("privacy.audit_client", client, f"one of the clients 0 to {len(guard.books) - 1}")
        rounds = range(1, settings.schedule.rounds + 1)
        canaries = room(self.audit_canaries, min(len(space.columns(space.trains(r), client)) for r in rounds))
        return ExampleLog(settings.seed, canaries, guard.rates[client], client, guard.books[client])


class DPSGDGuard(example_level.ExampleGuard):
    """Plans every client's noise, grants its steps, and states what they cost."""

    def __init__(self, privacy: DPSGD, settings: Settings, sizes: Sequence[int]):
        self.privacy, self.sizes = privacy, list(sizes)
        self.batch_size, self.rounds = settings.local.batch_size, settings.schedule.rounds
        most = settings.schedule.participations()
        assert most is not None  # `check` has refused a schedule without a bound
        self.participations = most if privacy.participations is None else min(most, privacy.participations)
        start = settings.adapter.initialisation
        rates, books = [], []
        for size in sizes:
            rate = min(1.0, self.batch_size / size)
            rates.append(rate)
            books.append(self._book(rate, size, settings.local, example_level.start_release(start, size)))
        super().__init__(noise_root(settings), settings.local, rates, books)
        if all(book.exhausted for book in books):
            allowed = f"one that lets some client take a step within privacy.epsilon={privacy.epsilon}"
            way_out = "Raise it, or set it to null: then it is calibrated."
            raise ConfigError("privacy.noise_multiplier", privacy.noise_multiplier, allowed, way_out)
        # Of the gradient alone, where clipping adapts: a part of the budget is the count's.
        self.noises = [self._gradient_noise(book) for book in books]

    def planned(self, client: int) -> float:
        """The epsilon that ``client`` comes to if it takes part as often as it may."""
        book = self.books[client]
        most = self.local.num_steps(self.sizes[client]) * self.participations
        steps = most if book.limit is None else min(most, book.limit)
        return spent((*book.once, book.running.of(steps)), book.delta, book.accountant)

    def _gradient_noise(self, book: Book) -> float:
        noise = _multiplier(book)
        return gradient_noise(noise, self.count_noise) if self.privacy.adaptive else noise

    @property
    def count_noise(self) -> float:
        return self.batch_size / 20 if self.privacy.count_noise is None else self.privacy.count_noise

    def _book(self, rate: float, size: int, local: LocalTraining, once: tuple[Mechanism, ...]) -> Book:
        p, most = self.privacy, local.num_steps(size) * self.participations
        delta = example_level.delta_at(size, p.delta)
        noise, limit = p.noise_multiplier, None if p.epsilon is None and p.participations is None else most
        if noise is None:
            assert p.epsilon is not None
            noise = _calibrated(rate, most, once, p.epsilon, delta, p.accountant)
        elif p.epsilon is not None:
            limit = steps_within(SampledGaussian(noise, rate, 1), once, p.epsilon, delta, p.accountant, most)
        return Book(SampledGaussian(noise, rate, 1), delta, p.accountant, once, limit)

    def private(self, client: int, key: tuple[int | str, ...], memory: dict) -> Private:
        p = self.privacy
        clip, adaptive = p.clip, None
        if p.adaptive:
            adaptive = AdaptiveClip(p.quantile, p.clip_rate, self.count_noise)
            clip = float(memory[CLIP][0]) if CLIP in memory else clip
        # The expected batch of a client with less data than a batch is all of it.
        expected = self.rates[client] * self.sizes[client]
        return Private(clip, self.noises[client], expected, key, p.clipping, adaptive)

    def statement(self) -> Statement:
        p, rows = self.privacy, self.rows(self.sizes)
        noises = sorted({_multiplier(book) for book in self.books.values()})
        rates = sorted({row["rate"] for row in rows})
        groups = {
            "flat": "all that trains",
            "per_layer": "each tensor (C over the root of their number)",
            "per_adapter": "each adapted module and the head (C over the root of their number)",
        }[p.clipping]
        adaptive = ""
        if p.adaptive:
            adaptive = f", C following the {p.quantile:g} quantile by a noisy count that the noise multiplier includes"
        return example_level.statement(
            "DP-SGD at every client",
            rows,
            target=p.epsilon,
            sampling=f"Poisson, at rate batch_size/n_i ({_range(rates)}), divisor the expected batch",
            clipping=f"each example's gradient to L2 norm C = {p.clip:g} over {groups}{adaptive}",
            noise=f"Gaussian, {_range(noises)} x C on the sum of a batch, drawn by the client from "
            f"{self.source('node')}",
            participation=f"up to {self.participations} of {self.rounds} rounds of a client; "
            f"{_range(sorted({row['steps'] for row in rows}))} steps taken",
            accountant=accounting.named(p.accountant),
            against=f"the server, other clients and whoever sees the models, if they do not know {self.source('node')}",
            also=[*self._as_paper(rows)],
        )

    def _as_paper(self, rows: Sequence[dict]) -> list[str]:
        """What the code of `DPSGD.paper` would print for the same noise."""
        if self.privacy.paper is None:
            return []
        row = example_level.worst(rows)
        book, size = self.books[row["client"]], row["examples"]
        if self.privacy.paper == "fed_sb":
            delta, steps = 1 / -(-size // self.batch_size), book.steps
            how = f"delta = 1/batches = {delta:.3g} (Fed-SB's code), which is no smaller than one example's share"
        else:
            delta, steps = book.delta, self.local.num_steps(size)
            how = "one round's steps alone (FedSVD's code starts a new account each round), which forgets the others"
        told = spent((book.running.of(min(steps, book.steps)),), delta, book.accountant)
        return [f"epsilon {told:.4g} by {how}"]


@lru_cache(maxsize=4096)
def _calibrated(
    rate: float, steps: int, once: tuple[Mechanism, ...], epsilon: float, delta: float, accountant: str
) -> float:
    """The noise multiplier that ``steps`` steps beside ``once`` need for the target."""
    return accounting.calibrate(lambda z: [*once, SampledGaussian(z, rate, steps)], epsilon, delta, accountant)


def gradient_noise(total: float, count: float) -> float:
    """The gradient's own noise multiplier where a count with noise s_b is released too: (z^-2 - (2 s_b)^-2)^-1/2.

    Andrew et al., arXiv 1905.03871, theorem 1. Raises `ConfigError` where the count alone costs more than z allows.
    """
    rest = total**-2 - (2 * count) ** -2
    if rest <= 0:
        allowed = f"above {total / 2:.4g}, half the noise multiplier {total:.4g}: the count alone would cost more"
        raise ConfigError("privacy.count_noise", count, allowed, "Raise it, or local.batch_size.")
    return rest**-0.5


def _multiplier(book: Book) -> float:
    assert isinstance(book.running, SampledGaussian)
    return book.running.noise_multiplier


def _range(values: Sequence[float]) -> str:
    low, high = f"{values[0]:.4g}", f"{values[-1]:.4g}"
    return low if low == high else f"{low} to {high}"
