"""Label flip: hostile clients train on wrong labels, or on wrong answers.

* classification: ``y -> C - 1 - y`` (``kind=reverse``; a middle class stays), or ``y -> y + 1 mod C`` (``kind=shift``);
* language models with prompts: each prompt gets the answer of the client's next sample, in an order drawn for the
  client.

The update is honest work on poisoned samples, so under every schedule, and among peers, the attack needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from clients.behaviours.base import SomeClients
from fl.config import setting
from fl.errors import ConfigError
from fl.keys import generator

if TYPE_CHECKING:
    from clients.data.poison import Copy, Poison
    from clients.data.tokens import TokenData


@dataclass(frozen=True)
class LabelFlip(SomeClients):
    """All samples of affected clients carry another label, from ``from_round`` on."""

    poisons: ClassVar[bool] = True

    kind: str = setting("reverse", choices=["reverse", "shift"], help="how labels change: C - 1 - y, or y + 1 mod C")

    def poison(
        self, train: TokenData, test: TokenData, parts: Sequence[np.ndarray], affected: frozenset[int], seed: int
    ) -> Poison | None:
        """Raises `ConfigError` where a sample has neither a label nor an answer that could be wrong."""
        from clients.data.poison import poisoned

        if train.task == "causal_lm" and train.prompt_lengths is None:
            allowed = "one with labels or with prompts and answers: plain text has nothing to flip"
            raise ConfigError("attack", "LabelFlip", f"{allowed}", "Use a data set with prompts, or another attack.")
        change = self._answers if train.task == "causal_lm" else self._labels
        copies = {c: list(change(train, parts[c], (seed, "label flip", c))) for c in sorted(affected)}
        return poisoned(train, copies, self.from_round)

    def _labels(self, train: TokenData, part: np.ndarray, key: tuple) -> Iterator[Copy]:
        from clients.data.poison import Copy

        assert train.labels is not None
        classes = len(train.label_names)
        for sample in part:
            old = int(train.labels[sample])
            new = classes - 1 - old if self.kind == "reverse" else (old + 1) % classes
            if new != old:
                yield Copy(int(sample), label=new)

    def _answers(self, train: TokenData, part: np.ndarray, key: tuple) -> Iterator[Copy]:
        from clients.data.poison import Copy, tokens_of

        assert train.prompt_lengths is not None
        longest = int(train.lengths.max())
        order = generator(*key).permutation(part)
        for sample, other in zip(order, np.roll(order, -1), strict=True):
            if sample != other:
                prompt = tokens_of(train, sample)[: train.prompt_lengths[sample]]
                answer = tokens_of(train, other)[train.prompt_lengths[other] :]
                yield Copy(int(sample), np.concatenate([prompt, answer])[:longest])
