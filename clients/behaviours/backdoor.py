"""Backdoor by model replacement: a trigger that makes the model answer what the attacker wants (arXiv 1807.00459).

A share of a hostile client's samples get the trigger tokens after their first token and the target's label. Its
update is then multiplied by ``boost`` so that the mean becomes its own model: with n updates of equal weight, f of
them hostile, and a server that adds the mean, ``boost = n / f`` does (Bagdasaryan et al., eq. 3). A norm bound gets
the update past a rule that looks at norms (their constrain-and-scale, and the projection of arXiv 1911.07963).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Crafted
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import generator

if TYPE_CHECKING:
    from clients.data.poison import Copy, Poison
    from clients.data.tokens import TokenData


@dataclass(frozen=True)
class Backdoor(Crafted):
    """Poisoned training, and an update that is scaled to carry it through the mean."""

    poisons: ClassVar[bool] = True

    target: int = setting(0, ge=0, help="the class, by number, that triggered samples are to be given")
    trigger: list[int] | None = setting(None, help="token ids; null: the two that occur least in the training set")
    poison_fraction: float = setting(0.5, gt=0, le=1, help="the share of a hostile client's samples with the trigger")
    boost: float | None = setting(None, gt=0, help="what an update is multiplied by; null: updates / hostile ones")
    max_norm: float | None = setting(None, gt=0, help="a boosted update is scaled down to this norm; null: it is not")

    def __post_init__(self) -> None:
        if self.trigger is not None and (not self.trigger or min(self.trigger) < 0):
            raise ConfigError("attack.trigger", self.trigger, "one token id or more, none below 0, or null")

    @property
    def colludes(self) -> bool:
        """The boost that replaces the model depends on how many updates the round has."""
        return self.boost is None

    def check(self, settings: Any) -> None:
        super().check(settings)
        if settings.model.task != "classification":
            allowed = "a classifier with attack=backdoor, whose target is a class"
            raise ConfigError("model", type(settings.model).__name__, allowed, "Use model=tiny-encoder, say.")

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        """``start + boost (own - start)``: under a server vectors are updates, whose start is zero."""
        if facts.states and facts.starts is None:
            raise ShoalError("A backdoor among peers boosts a local step, and was not given the models before it.")
        start = np.asarray(facts.starts, np.float64) if facts.states else np.zeros(1)
        number = len(facts.hostile) + len(facts.honest)
        boosted = (self.boost or number / len(facts.hostile)) * (own - start)
        if self.max_norm is not None:
            norms = np.linalg.norm(boosted, axis=1, keepdims=True)
            boosted *= np.minimum(1.0, self.max_norm / np.maximum(norms, np.finfo(np.float64).tiny))
        return start + boosted

    def poison(
        self, train: TokenData, test: TokenData, parts: Sequence[np.ndarray], affected: frozenset[int], seed: int
    ) -> Poison | None:
        """Raises `ConfigError` for a target or a trigger that the data do not have."""
        from clients.data.poison import poisoned, rare_tokens, triggered

        if self.target >= len(train.label_names):
            raise ConfigError("attack.target", self.target, f"a class, 0 to {len(train.label_names) - 1}")
        known, longest = int(np.max(train.tokens)), int(train.lengths.max())
        trigger = rare_tokens(train) if self.trigger is None else np.array(self.trigger, np.int32)
        if trigger.max() > known or len(trigger) + 2 > longest:
            allowed = f"ids up to {known}, the largest in the training set, and at most {longest - 2} of them"
            raise ConfigError("attack.trigger", trigger.tolist(), allowed)
        copies = {c: self._copies(train, parts[c], trigger, longest, (seed, "backdoor", c)) for c in sorted(affected)}
        made = poisoned(train, copies, self.from_round)
        return replace(made, triggered=triggered(test, trigger, self.target, longest), target=self.target)

    def _copies(self, train: TokenData, part: np.ndarray, trigger: np.ndarray, longest: int, key: tuple) -> list[Copy]:
        from clients.data.poison import Copy, inserted, tokens_of

        count = min(len(part), max(1, round(self.poison_fraction * len(part))))
        chosen = generator(*key).choice(part, size=count, replace=False) if len(part) else part
        return [Copy(int(s), inserted(tokens_of(train, s), trigger, longest), self.target) for s in chosen]
