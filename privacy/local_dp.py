"""Local differential privacy at the level of clients: each client makes its own update private before it leaves.

    v_i = u_i min(1, C/|u_i|) + N(0, (z C)^2 I)

The server is not trusted: it sees v_i. Neighbours are any two data sets of the client, so the update moves by up to
2 C and a release costs ``2 alpha/z^2`` in Renyi terms: the Gaussian mechanism of multiplier z/2. Nobody else's noise
helps, and that a client was asked is no secret from the server, so there is no amplification. The mean of m such
updates has noise of standard deviation ``z C/sqrt(m)``, where a trusted server adds ``z C/m``.

Each client has a book; the noise is planned for as many rounds as it can be asked in. All that the server does is
post-processing, any aggregation rule included.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from clients.behaviours.base import ReplyFields
from fl.config import setting
from fl.errors import ConfigError
from privacy import accounting
from privacy.accounting import FixedSizeGaussian
from privacy.base import BudgetSpent, Guard, Job, Statement, noise_root
from privacy.client_level import RELATIONS, UNCOVERED, ClientLevel, clipped, gaussian
from privacy.example_level import charge
from privacy.ledger import Book

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings


@dataclass(frozen=True)
class LocalDP(ClientLevel):
    """Clipping and Gaussian noise at every client.

    ``participations`` is how many rounds of a client the noise is calibrated for (null: all); a client that has
    answered so often takes part no more.
    """

    in_rounds: ClassVar[bool] = False  # a client's noise covers each of its jobs by itself

    participations: int | None = setting(None, ge=1, help="rounds of a client that the noise is for; null: all")

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if settings.aggregator.weights == "examples":
            raise ConfigError(
                "aggregator.weights", "examples", "uniform or a list: how many examples a client has is its secret",
                "Set aggregator.weights=uniform.",
            )  # fmt: skip
        if settings.local.epochs is not None:
            allowed = "null: the number of steps, which the server sees, would tell the number of examples"
            raise ConfigError("local.epochs", settings.local.epochs, allowed, "Set local.steps.")

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        return LocalGuard(self, settings, len(sizes), space)


class LocalGuard(Guard):
    """Noise in every reply, and a book for each client."""

    def __init__(self, privacy: LocalDP, settings: Settings, clients: int, space: Space):
        most = settings.schedule.participations()
        assert most is not None  # `check` has refused a schedule without a bound
        self.privacy, self.root, self.rounds = privacy, noise_root(settings), settings.schedule.rounds
        self.most = most if privacy.participations is None else min(most, privacy.participations)
        plan = privacy.book(FixedSizeGaussian, self.most, clients)
        limit = self.most if plan.limit is None else plan.limit
        self.books = [Book(plan.running, plan.delta, plan.accountant, (), limit) for _ in range(clients)]
        self.std = plan.running.noise_multiplier * privacy.clip  # type: ignore[attr-defined]
        # The norm of the noise exceeds std (sqrt(d) + 8) with a probability below exp(-32).
        norm = privacy.clip + self.std * (math.sqrt(space.trainable) + 8)
        if norm > settings.schedule.max_update_norm:
            allowed = f"at least {norm:.4g}, the size of an update with its noise"
            raise ConfigError("schedule.max_update_norm", settings.schedule.max_update_norm, allowed)

    def job(self, client: int, round: int, fingerprint: str, examples: np.ndarray, memory: dict) -> Job | None:
        if self.books[client].grant(round, fingerprint, 1) == 0:
            raise BudgetSpent(f"client {client} has answered in all {self.books[client].limit} rounds that it may")
        return None

    def release(self, reply: ReplyFields, columns: np.ndarray) -> ReplyFields:
        vector, _ = clipped(reply.update, self.privacy.clip)
        # By the request that was granted: asked for again, the answer has the same noise, even if it is rounded
        # otherwise beside other clients.
        newest = self.books[reply.client].newest
        content = hashlib.sha256(vector.tobytes()).hexdigest()[:32]
        if newest.get("round") == reply.round:
            content = str(newest["fingerprint"])
        vector += gaussian(len(vector), self.std, self.root, "local", reply.client, reply.round, reply.version, content)
        return replace(reply, update=vector.astype(reply.update.dtype), examples=1, tokens=0, loss=None)

    def mirror(self, client: int, round: int, fingerprint: str, examples: int) -> None:
        charge(self.books[client], round, fingerprint, 1)

    def client_state(self, client: int) -> dict:
        return self.books[client].state()

    def restore_client(self, client: int, state: dict) -> None:
        if state:
            self.books[client].restore(state)

    def stopped(self) -> str | None:
        if all(book.exhausted for book in self.books):
            return "every client has answered in as many rounds as its privacy budget allows"
        return None

    @property
    def epsilon(self) -> float | None:
        return max(self.books, key=lambda book: book.steps).epsilon

    def statement(self) -> Statement:
        worst = max(self.books, key=lambda book: book.steps)
        steps = sorted(book.steps for book in self.books)
        rows = [
            {
                "client": client, "rate": 1.0, "steps": book.steps, "limit": book.limit,
                "mechanism": book.running.of(book.steps).describe(), "delta": book.delta, "epsilon": book.epsilon,
            }
            for client, book in enumerate(self.books)
        ]  # fmt: skip
        return Statement(
            "Local differential privacy at every client",
            "client",
            RELATIONS[worst.running.relation],
            sampling="none is assumed: the server knows whom it asked",
            clipping=f"each client's whole update to L2 norm C = {self.privacy.clip:g}",
            noise=f"Gaussian, {self.std / self.privacy.clip:.4g} x C on each update, drawn at the client from "
            f"{self.source('node')}",
            participation=f"up to {self.most} of {self.rounds} rounds of a client; {steps[0]} to {steps[-1]} taken",
            accountant=accounting.named(worst.accountant),
            epsilon=worst.epsilon,
            delta=worst.delta,
            target=self.privacy.epsilon,
            against=f"the server, other clients and whoever sees the models, if they do not know {self.source('node')}",
            uncovered=UNCOVERED,
            holders=rows,
        )

    def state(self) -> dict:
        return {str(client): book.state() for client, book in enumerate(self.books)}

    def restore(self, state: dict) -> None:
        for client, book in enumerate(self.books):
            book.restore(state[str(client)])
