"""What the canaries of an audited run have seen so far, and the verdict on the ledger's claim.

A log keeps a score for each canary, not the releases: the log-likelihood ratio of `privacy.audit.evidence`, a sum over
releases. It is in the checkpoint, so a run that is resumed ends with the same verdict. What is released twice for one
and the same question counts once, as in the ledger.

The ledger's account of a mechanism claims an epsilon at every delta. It is tested at the one, of the ledger's own and
some smaller ones, where the audit could show most over the claim: with m canaries and a large delta it could show
nothing, since ``2 m delta`` of them may be given away at no epsilon. Which delta it is depends on the number of canaries
and on the claims, not on what was seen, so the bound keeps its confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.errors import ConfigError
from fl.keys import Part
from privacy.audit import evidence, one_run
from privacy.audit.result import Bound
from privacy.ledger import Book, spent

if TYPE_CHECKING:
    from privacy.base import Guard

SPARE = 64  # directions that no canary has, on which each release's noise is measured
FEWEST = 32  # canaries: what fewer could show is next to nothing
DELTAS = (1e-3, 1e-4, 1e-5)  # at which a claim is tested where its own delta is larger


@dataclass(frozen=True)
class Verdict:
    """A valid lower bound beside what the ledger claims at the same delta.

    ``holder`` says whose data were audited, ``releases`` how many steps or rounds the canaries saw. ``estimate`` and
    ``pooled`` are `privacy.audit.client`'s, where the unit is a client; they are no bounds.
    """

    unit: str
    holder: str
    canaries: int
    releases: int
    bound: Bound
    claimed: float
    estimate: float | None = None
    pooled: float | None = None

    @property
    def contradicts(self) -> bool:
        """Whether what ran can't be what the ledger accounts for."""
        return self.bound.contradicts(self.claimed)

    def sentence(self) -> str:
        """The verdict for people."""
        return f"Canaries at {self.holder}, {self.releases} releases seen. {self.bound.sentence(self.claimed)}"

    def as_plain(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**asdict(self), "contradicts": self.contradicts, "sentence": self.sentence()}


class Log:
    """Scores of canaries that were put in by fair coins, the same ones in every release.

    ``rate`` is the probability with which a release takes a canary that is in.
    """

    unit = "example"

    def __init__(self, seed: int, canaries: int, rate: float, holder: str):
        self.seed, self.canaries, self.rate, self.holder = seed, canaries, rate, holder
        self.included = one_run.coins(canaries, seed, "audit coins")
        self.releases = 0
        self.scores = np.zeros(canaries)
        self.newest: tuple[str, int, np.ndarray] = ("", 0, np.zeros(canaries))  # the last job: it may come again

    def add(self, key: Sequence[Part], seen: np.ndarray) -> None:
        """Count the releases of the job that ``key`` names.

        ``seen`` ``(T, m + SPARE)`` are T releases along the directions of the canaries and the spare ones, in units of
        what a canary adds.
        """
        name = repr(tuple(key))
        if name != self.newest[0]:
            self.releases += self.newest[1]
            self.scores = self.scores + self.newest[2]
        m = self.canaries
        scores = evidence.log_likelihood_ratios(seen[:, :m], seen[:, m:], 1.0, self.rate)
        self.newest = (name, len(seen), scores)

    def verdict(self, book: Book) -> Verdict | None:
        """The bound beside what ``book`` claims; None if nothing was released."""
        releases = self.releases + self.newest[1]
        if releases == 0:
            return None
        guesses = one_run.default_guesses(self.canaries, self.rate)
        delta, claimed = tested_claim(book, self.canaries, guesses)
        bound = one_run.lower_bound(self.scores + self.newest[2], self.included, delta, guesses=guesses)
        return Verdict(self.unit, self.holder, self.canaries, releases, bound, claimed)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        name, releases, scores = self.newest
        return {
            "releases": self.releases, "scores": self.scores.tolist(),
            "newest": [name, releases, scores.tolist()],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        name, releases, scores = state["newest"]
        self.releases, self.scores = state["releases"], np.array(state["scores"])
        self.newest = (name, releases, np.array(scores))


class ExampleLog(Log):
    """The log of one client's jobs, whose canaries are examples beside its own."""

    def __init__(self, seed: int, canaries: int, rate: float, client: int):
        super().__init__(seed, canaries, rate, f"client {client}")
        self.client = client


def tested_claim(
    book: Book, canaries: int, guesses: Sequence[one_run.Guesses], confidence: float = 0.95
) -> tuple[float, float]:
    """The delta at which the claim of ``book`` is tested, and the epsilon that it claims there."""

    def claim(delta: float) -> float:
        return spent((*book.once, book.running.of(book.steps)), delta, book.accountant)

    deltas = [book.delta, *(delta for delta in DELTAS if delta < book.delta)]
    room = {delta: one_run.ceiling(canaries, guesses, delta, confidence) - claim(delta) for delta in deltas}
    delta = max(deltas, key=lambda delta: room[delta])
    return delta, claim(delta)


def room(canaries: int, dimension: int) -> int:
    """How many of ``canaries`` fit beside `SPARE` directions. Raises `ConfigError` where `FEWEST` don't."""
    if dimension < SPARE + FEWEST:
        allowed = f"false, where {dimension} scalars train: {FEWEST} canaries and {SPARE} spare directions need one each"
        raise ConfigError("privacy.audit", True, allowed, "Use an adapter with more trainable scalars.")
    return min(canaries, dimension - SPARE)


def log_of(guard: Guard) -> Log | None:
    """The log of an audited run; None where nothing is audited."""
    return getattr(guard, "audit", None)
