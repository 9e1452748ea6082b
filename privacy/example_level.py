"""What mechanisms at the level of examples share: Poisson batches, budgets of data holders, and what must be refused.

The unit is one training example of one client, neighbours by adding or removing it; clients hold disjoint data, so a
holder's own account is the guarantee of each of its examples, and the run's is the largest of all holders'. The number
of a client's examples, and with it the sampling rate, is taken as public, as DP-SGD always does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from clients.adapters.initial.base import DataDriven, Initialisation
from clients.behaviours.base import ReplyFields
from clients.data.at_nodes import held
from clients.local.dylora import DyLoRA
from clients.local.private import Canaries, Private
from clients.local.training import LocalTraining
from fl.errors import ConfigError
from fl.keys import generator
from privacy.accounting import Mechanism, SampledGaussian
from privacy.audit.log import SPARE, ExampleLog
from privacy.base import BudgetSpent, Guard, Job, Statement
from privacy.ledger import Book

if TYPE_CHECKING:
    from fl.experiment import Settings


def check(settings: Settings) -> None:
    """Raise `ConfigError` for what no mechanism of examples accounts for."""
    check_bounded(settings)
    check_start(settings.adapter.initialisation, "private")
    local = type(settings.local)
    usual = local.fit is LocalTraining.fit and local.gradient in (LocalTraining.gradient, DyLoRA.gradient)
    if not usual and not getattr(local, "keeps_private", False):
        raise ConfigError(
            "local", local.__name__, "a local algorithm whose every use of data passes the private gradient",
            "Choose local=sgd, momentum, adamw, fedprox, lora_pro, sora or dylora.",
        )  # fmt: skip


def check_bounded(settings: Settings) -> None:
    """Refuse a schedule that does not bound how often a client takes part."""
    if settings.schedule.participations() is None:
        raise ConfigError(
            "schedule", type(settings.schedule).__name__,
            "a schedule that bounds how often a client takes part: without a bound there is no worst case",
            "Choose another schedule, or privacy=none.",
        )  # fmt: skip


def delta_at(size: int, given: float | None) -> float:
    """The delta of a client with ``size`` examples: ``given``, or 1/size. Raises `ConfigError` where that is 1."""
    delta = 1 / size if given is None else given
    if delta >= 1:
        allowed = "below 1: a client with one example has no delta = 1/n"
        raise ConfigError("privacy.delta", delta, allowed, "Give privacy.delta, or raise partition.min_size.")
    return delta


def check_start(start: Initialisation | None, private: str | None) -> None:
    """Refuse an adapter's start that looks at clients' data outside the claim. ``private`` is the source that the
    claim covers; None: only public data."""
    if not isinstance(start, DataDriven) or start.source in ("public", private):
        return
    allowed = "public" if private is None else f"public or {private}"
    raise ConfigError(
        "adapter.init.source", start.source,
        f"{allowed}: a start made from clients' data without noise is outside every privacy claim",
        "Set adapter.init.source=public data.public=200, or start without data (adapter=lora_xs).",
    )  # fmt: skip


def check_disjoint(parts: Sequence[np.ndarray]) -> None:
    """Raise `ConfigError` unless no example is in two of ``parts``, the examples of each client.

    A client's account holds for its own examples; one that two clients hold would cost what both spend together.
    Parts that lie at other nodes can't be looked into.
    """
    here = held(parts)
    if not here:
        return
    examples, times = np.unique(np.concatenate(here), return_counts=True)
    if np.any(times > 1):
        raise ConfigError(
            "partition", f"{int(np.sum(times > 1))} examples dealt twice, {int(examples[times > 1][0])} among them",
            "one that deals each example to one client: an example's budget is its only holder's",
        )  # fmt: skip


def start_release(start: Initialisation | None, size: int) -> tuple[Mechanism, ...]:
    """What a private start has cost a client with ``size`` examples: one sampled Gaussian release."""
    if not isinstance(start, DataDriven) or start.source != "private":
        return ()
    return (SampledGaussian(start.noise, min(1.0, start.examples / size), 1),)


def poisson_batches(steps: int, rate: float, examples: np.ndarray, *key: int | str) -> list[np.ndarray]:
    """Each example in each step's batch by itself with probability ``rate``; a batch may be empty."""
    rng = generator(*key, "poisson")
    return [examples[rng.random(len(examples)) < rate] for _ in range(steps)]


def charge(book: Book, round: int, fingerprint: str, steps: int) -> None:
    """Book the ``steps`` of a job that is done elsewhere, from requests as they are sent.

    They may arrive in another order, so what `Book.grant` would refuse as old is charged too. What was charged in the
    newest round is not charged again.
    """
    if book.newest and round < book.newest["round"]:
        book.steps += steps if book.limit is None else max(0, min(steps, book.limit - book.steps))
    elif not book.replaced(round, fingerprint):
        book.grant(round, fingerprint, steps)


class ExampleGuard(Guard, ABC):
    """Poisson batches and one `Book` for each client; subclasses say how a gradient is made private.

    ``audit`` is the log of an audited run: one client's jobs then have canaries, sampled as its examples are.
    """

    audit: ExampleLog | None = None

    def __init__(self, root: str, local: LocalTraining, rates: Sequence[float], books: Sequence[Book]):
        self.root, self.local, self.rates = root, local, list(rates)
        self.books = dict(enumerate(books))

    @abstractmethod
    def private(self, client: int, key: tuple[int | str, ...], memory: dict) -> Private:
        """What the gradients of a job of ``client`` pass; ``key`` names its noise."""

    def job(self, client: int, round: int, fingerprint: str, examples: np.ndarray, memory: dict) -> Job | None:
        book = self.books[client]
        granted = book.grant(round, fingerprint, self.local.num_steps(len(examples)))
        if granted == 0:
            raise BudgetSpent(f"client {client} has taken all {book.limit} steps that its budget allows")
        # Two different questions never get the same noise. Which of a round's it is says so, not its content: states
        # that differ by rounding, as those of two cohort sizes do, shall not differ by all their noise.
        key: tuple[int | str, ...] = (self.root, "private", client, round, book.attempt)
        batches = poisson_batches(granted, self.rates[client], examples, *key)
        private = self.private(client, key, memory)
        if self.audit is not None and client == self.audit.client:
            planted = np.flatnonzero(self.audit.included)
            taken = poisson_batches(granted, self.rates[client], planted, *key, "canaries")
            private.canaries = Canaries(self.audit.canaries, SPARE, taken, (self.root, "audit coordinates"))
        return Job(batches, private)

    def release(self, reply: ReplyFields, columns: np.ndarray) -> ReplyFields:
        # Loss and tokens come from the drawn examples without noise. The number of examples is public here.
        return replace(reply, loss=None, tokens=0)

    def stopped(self) -> str | None:
        if all(book.exhausted for book in self.books.values()):
            return "every client has spent its privacy budget"
        return None

    def state(self) -> dict:
        books = {str(client): book.state() for client, book in self.books.items()}
        return books if self.audit is None else {**books, "audit": self.audit.state()}

    def restore(self, state: dict) -> None:
        for client, book in self.books.items():
            book.restore(state[str(client)])
        if self.audit is not None:
            self.audit.restore(state.get("audit"))

    @property
    def epsilon(self) -> float | None:
        return max(book.epsilon for book in self.books.values())

    def mirror(self, client: int, round: int, fingerprint: str, examples: int) -> None:
        charge(self.books[client], round, fingerprint, self.local.num_steps(examples))

    def client_state(self, client: int) -> dict:
        return self.books[client].state()

    def restore_client(self, client: int, state: dict) -> None:
        if state:
            self.books[client].restore(state)

    def rows(self, sizes: Sequence[int]) -> list[dict]:
        """A row of the statement for each client: what it spent, and what that is made of."""
        return [
            {
                "client": client, "examples": sizes[client], "rate": self.rates[client], "steps": book.steps,
                "limit": book.limit, "delta": book.delta,
                "mechanism": "; ".join(m.describe() for m in (*book.once, book.running.of(book.steps))),
                "epsilon": book.epsilon,
            }
            for client, book in self.books.items()
        ]  # fmt: skip


def worst(rows: Sequence[dict]) -> dict:
    """The row of the largest epsilon; of equal ones that of the largest delta."""
    return max(rows, key=lambda row: (row["epsilon"], row["delta"]))


UNCOVERED = [
    "evaluations on clients' own held-out examples, whose results are sent as they are",
    "the choice of hyper-parameters by looking at results",
    "the number of examples of each client, which counts as public",
    "who takes part when, and how long it takes",
]


def statement(mechanism: str, rows: list[dict], **parts) -> Statement:
    """The claim of the worst holder, with all holders' rows."""
    top, delta = worst(rows), max(row["delta"] for row in rows)
    uncovered = list(UNCOVERED)
    if any(row["delta"] * row["examples"] > 1 + 1e-9 for row in rows):
        uncovered.append(f"delta = {delta:.3g} is above 1/n_i for some client: it allows giving an example away whole")
    return Statement(
        mechanism, "example of one client", "adding or removing it", epsilon=top["epsilon"], delta=delta,
        holders=rows, uncovered=uncovered, **parts,
    )  # fmt: skip
