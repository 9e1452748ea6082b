"""What holders of data have spent: a book for each, of mechanisms and of the steps really taken.

A holder's budget is (epsilon, delta) under one unit, one neighbour relation and one accountant. Its book has releases
that happen once (a private start) and one mechanism that is run again and again; it tells what these cost together and
how many further steps stay within the target. The settings of every mechanism are fixed before training, so stopping
at a preset number of steps depends on nothing secret, and no privacy filter for adaptive settings is needed (Rogers et
al., arXiv 1605.08294, treat those).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fl.errors import ConfigError, ShoalError
from privacy import accounting
from privacy.accounting import Mechanism


@dataclass
class Book:
    """One holder's account. ``running`` is the mechanism of its steps, ``once`` what is released beside it.

    ``limit`` is the most steps it will ever take (None: no limit), which `steps_within` finds from a target.
    """

    running: Mechanism
    delta: float
    accountant: str
    once: tuple[Mechanism, ...] = ()
    limit: int | None = None
    steps: int = 0
    newest: dict[str, Any] = field(default_factory=dict)  # the last job: its round, fingerprint, attempt, steps granted

    def grant(self, round: int, fingerprint: str, steps: int) -> int:
        """How many of the ``steps`` of a job the budget allows; books them. 0: none is left.

        The same job, asked for again, is granted what it was granted, and costs nothing more: its randomness is the
        same, so its answer is.
        """
        job = {"round": round, "fingerprint": fingerprint}
        if self.newest and {k: self.newest[k] for k in job} == job:
            return int(self.newest["steps"])
        if self.newest and round < self.newest["round"]:
            raise ShoalError(f"round {round} is older than the client's newest job: its books are closed")
        if self.replaced(round, fingerprint):
            raise ShoalError(f"round {round} has had another job since this one: its books are closed")
        granted = steps if self.limit is None else max(0, min(steps, self.limit - self.steps))
        if granted:
            again = bool(self.newest) and self.newest["round"] == round
            before = [*self.newest.get("before", []), self.newest["fingerprint"]] if again else []
            self.newest = {**job, "steps": granted, "attempt": self.attempt + 1 if again else 0}
            if before:
                self.newest["before"] = before
            self.steps += granted
        return granted

    def replaced(self, round: int, fingerprint: str) -> bool:
        """Whether the newest job's round had this one before it: delivered once more, it is not done again."""
        return bool(self.newest) and self.newest["round"] == round and fingerprint in self.newest.get("before", [])

    @property
    def attempt(self) -> int:
        """How many jobs with other content the newest one's round had before it: two never get the same noise."""
        return int(self.newest.get("attempt", 0))

    @property
    def epsilon(self) -> float:
        """What has been spent."""
        return spent((*self.once, self.running.of(self.steps)), self.delta, self.accountant)

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and self.steps >= self.limit

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; the mechanisms go along, since steps mean nothing without them."""
        return {"steps": self.steps, "newest": self.newest, "plan": self._plan()}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`. Raises `ConfigError` where the steps were taken under other settings."""
        if state["plan"] != self._plan():
            raise ConfigError(
                "privacy", state["plan"], f"the settings that the budget was spent under (now {self._plan()})",
                "Put the settings back, or start the run anew.",
            )  # fmt: skip
        self.steps, self.newest = state["steps"], state["newest"]

    def _plan(self) -> str:
        once = ", ".join(m.describe() for m in self.once)
        return f"{self.running.of(1)!r}; {once}; delta {self.delta!r}, {self.accountant}, limit {self.limit}"


def steps_within(
    running: Mechanism, once: Sequence[Mechanism], epsilon: float, delta: float, accountant: str, most: int
) -> int:
    """The most steps of ``running``, up to ``most``, that stay within ``epsilon`` beside ``once``."""
    return min(most, accounting.steps_left(running, list(once), epsilon, delta, accountant))


@lru_cache(maxsize=4096)
def spent(mechanisms: tuple[Mechanism, ...], delta: float, accountant: str) -> float:
    """`privacy.accounting.epsilon`, remembered: many holders are alike, and it is asked after every round."""
    return accounting.epsilon(list(mechanisms), delta, accountant)
