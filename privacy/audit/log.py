"""What the canaries of an audited run have seen so far, and the verdict on the ledger's claim.

A log keeps a score for each canary, not the releases: the log-likelihood ratio of `privacy.audit.evidence`, a sum over
releases. It is in the checkpoint, so a run that is resumed ends with the same verdict. What is released twice for one
and the same question counts once, as in the ledger.

The ledger's account of a mechanism claims an epsilon at every delta. It is tested at the one, of the ledger's own and
some smaller ones, where the audit could show most over the claim: with m canaries and a large delta it could show
nothing, since ``2 m delta`` of them may be given away at no epsilon. Which delta it is depends on the number of
canaries and on the claims, not on what was seen, so the bound keeps its confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.local.private import RAW
from fl.errors import ConfigError
from fl.keys import Part, generator
from fl.state import Update
from privacy.audit import evidence, one_run
from privacy.audit.client import direction, estimates
from privacy.audit.result import Bound
from privacy.ledger import Book, spent

if TYPE_CHECKING:
    from privacy.base import Guard

SPARE = 64  # directions that no canary has, on which each release's noise is measured
FEWEST = 32  # canaries: what fewer could show is next to nothing
DELTAS = tuple(10.0**-k for k in range(3, 13))  # at which a claim is tested where its own delta is larger


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
        text = f"Canaries at {self.holder}, {self.releases} releases seen. {self.bound.sentence(self.claimed)}"
        if self.unit == "client":
            fits = ["no finite value" if value is None else f"{value:.2f}" for value in (self.estimate, self.pooled)]
            text += f" Fitted normal distributions estimate {fits[0]}, or {fits[1]} with one deviation (no bounds)."
        return text

    def as_plain(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**asdict(self), "contradicts": self.contradicts, "sentence": self.sentence()}


class Log:
    """Scores of canaries that were put in by fair coins, the same ones in every release.

    ``rate`` is the probability with which a release takes a canary that is in; ``book`` is the claim's.
    """

    unit = "example"

    def __init__(self, seed: int, canaries: int, rate: float, holder: str, book: Book):
        self.seed, self.canaries, self.rate, self.holder, self.book = seed, canaries, rate, holder, book
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

    def verdict(self, confidence: float = 0.95) -> Verdict | None:
        """The bound beside what the book claims; None if nothing was released."""
        releases = self.releases + self.newest[1]
        if releases == 0:
            return None
        guesses = one_run.default_guesses(self.canaries, self.rate)
        delta, claimed = claim_to_test(self.book, self.canaries, guesses, confidence)
        bound = one_run.lower_bound(self.scores + self.newest[2], self.included, delta, confidence, guesses)
        return Verdict(self.unit, self.holder, self.canaries, releases, bound, claimed)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        name, releases, scores = self.newest
        return {
            "releases": self.releases, "scores": self.scores.tolist(),
            "newest": [name, releases, scores.tolist()],
        }  # fmt: skip

    def restore(self, state: dict[str, Any] | None) -> None:
        """Undo `state`. Raises `ConfigError` where there is none, or one of another number of canaries."""
        if state is None or len(state["scores"]) != self.canaries:
            before = 0 if state is None else len(state["scores"])
            raise ConfigError(
                "privacy.audit", f"{self.canaries} canaries", f"what the run began with: {before} canaries",
                "Put the settings back, or start the run anew.",
            )  # fmt: skip
        name, releases, scores = state["newest"]
        self.releases, self.scores = state["releases"], np.array(state["scores"])
        self.newest = (name, releases, np.array(scores))


class ExampleLog(Log):
    """The log of one client's jobs, whose canaries are examples beside its own."""

    def __init__(self, seed: int, canaries: int, rate: float, client: int, book: Book):
        super().__init__(seed, canaries, rate, f"client {client}", book)
        self.client = client


class ClientLog(Log):
    """The log of a trusted server, whose canaries are clients beside the ``clients`` there are.

    Each sends a random unit vector, `RAW` times as long as C, which the server clips as it clips any update. A canary
    that is in is asked in each round with probability ``rate``, or, where noise is a tree's (``most`` is given), in the
    first ``most`` rounds that are ``separation`` apart: as much as any client may. Tree noise is undone first: a round
    and the smaller nodes that it completes a node with add up to that node's own sum and noise, which no other has.
    """

    unit = "client"

    def __init__(
        self,
        seed: int,
        canaries: int,
        rate: float,
        clients: int,
        book: Book,
        most: int | None = None,
        separation: int = 1,
        adaptive: bool = False,
    ):
        super().__init__(seed, canaries, rate, "the server", book)
        self.clients, self.most, self.separation, self.adaptive = clients, most, separation, adaptive
        self.peak = np.full(canaries, -1.0)  # each canary's largest cosine with a release
        self.nodes: dict[int, tuple[int, np.ndarray]] = {}  # of a tree, by level: participations, and what was seen

    def updates(self, round: int, version: int, size: int, clip: float) -> list[Update]:
        """The canaries' updates ``(size,)`` of ``round``."""
        if not self._asked(round):
            return []
        taken = self.included & (generator(self.seed, "audit sampling", round).random(self.canaries) < self.rate)
        lengths = np.full(self.canaries, RAW * clip)
        if self.adaptive:
            lengths[::2] = 0.99 * clip  # half of them within C: their count leaves it where it is
        return [
            Update(self.clients + i, round, version, lengths[i] * self._direction(i, size).astype(np.float64), 1)
            for i in np.flatnonzero(taken).tolist()
        ]

    def see(self, round: int, release: np.ndarray, one: float) -> None:
        """Count the ``release`` ``(n,)`` of ``round``, which a canary moves by ``one`` along its direction."""
        along = np.array([self._direction(i, len(release)) @ release for i in range(self.canaries + SPARE)])
        count, row = self._node(int(self._asked(round)), along / one)
        if count:
            self.add((round,), row[None] / count)
        norm = float(np.linalg.norm(release))
        self.peak = np.maximum(self.peak, along[: self.canaries] / norm if norm else 0.0)

    def verdict(self, confidence: float = 0.95) -> Verdict | None:
        found = super().verdict(confidence)
        if found is None:
            return None
        estimate, pooled = estimates(self.peak, self.included, found.bound.delta)
        return replace(found, estimate=estimate, pooled=pooled)

    def _asked(self, round: int) -> bool:
        count, rest = divmod(round - 1, self.separation)
        return rest == 0 and (self.most is None or count < self.most)

    def _node(self, count: int, row: np.ndarray) -> tuple[int, np.ndarray]:
        """The newest round's participations and what it shows; of a tree, those of the node that it completes."""
        if self.most is None:
            return count, row
        leaf = self.book.steps
        level = (leaf & -leaf).bit_length() - 1
        for smaller in range(level):
            times, other = self.nodes.pop(smaller)
            count, row = count + times, row + other
        self.nodes[level] = (count, row)
        return count, row

    def _direction(self, i: int, size: int) -> np.ndarray:
        return direction(i, size, self.seed, "audit directions")

    def state(self) -> dict[str, Any]:
        nodes = {str(level): [times, row.tolist()] for level, (times, row) in self.nodes.items()}
        return {**super().state(), "peak": self.peak.tolist(), "nodes": nodes}

    def restore(self, state: dict[str, Any] | None) -> None:
        super().restore(state)
        assert state is not None
        self.peak = np.array(state["peak"])
        self.nodes = {int(level): (times, np.array(row)) for level, (times, row) in state["nodes"].items()}


def claim_to_test(
    book: Book, canaries: int, guesses: Sequence[one_run.Guesses], confidence: float
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
        allowed = f"false, where {dimension} scalars train: {FEWEST} canaries and {SPARE} spare ones need one each"
        raise ConfigError("privacy.audit", True, allowed, "Use an adapter with more trainable scalars.")
    return min(canaries, dimension - SPARE)


def log_of(guard: Guard) -> Log | None:
    """The log of an audited run; None where nothing is audited."""
    return getattr(guard, "audit", None)
