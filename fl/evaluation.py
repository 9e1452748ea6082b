"""Evaluation: when it happens, and its numbers from the scores of the examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clients.worker import Scores
from fl import metrics
from fl.clock import ticks
from fl.config import setting


@dataclass(frozen=True)
class Evaluation:
    """The ``evaluation=`` group. Evaluating never moves a random stream or the clock."""

    every: int = setting(
        1, ge=0, help="rounds between evaluations on the central test set; 0: only before the first and after the last"
    )
    every_s: float | None = setting(
        None, gt=0, help="virtual seconds between such evaluations, beside those by rounds; null: none by time"
    )
    clients: str = setting("final", choices=["never", "final", "always"], help="evaluate each client's own test set")
    peers: str = setting(
        "final", choices=["never", "final", "always"], help="evaluate each peer's own model on the central test set"
    )
    batch_size: int = setting(64, ge=1, help="examples in one forward pass")
    aggregation_error: bool = setting(
        False, help="record each round how far the server's weight change is from the mean of the clients'"
    )

    def central(self, round: int, last: bool, before: int = 0, now: int = 0) -> bool:
        """Whether the central test set is due after ``round`` (0: before training).

        ``before`` and ``now`` are the ticks of the last evaluation and of this moment: one is due where a multiple of
        ``every_s`` lies between them.
        """
        by_time = self.every_s is not None and before // ticks(self.every_s) < now // ticks(self.every_s)
        return last or round == 0 or by_time or (self.every > 0 and round % self.every == 0)

    def per_client(self, central: bool, last: bool) -> bool:
        """Whether the clients' own test sets are due, where the central one is or is not."""
        return (self.clients == "always" and central) or (self.clients == "final" and last)

    def of_peers(self, central: bool, last: bool) -> bool:
        """Whether the peers' own models are due, where the central evaluation is or is not."""
        return (self.peers == "always" and central) or (self.peers == "final" and last)


def numbers(scores: Scores, labels: np.ndarray | None) -> dict[str, Any]:
    """Loss per target, and accuracy and macro-F1, or perplexity where ``labels`` is None (causal LM)."""
    targets = int(scores.targets.sum())
    loss = float(scores.loss.sum() / targets) if targets else None
    if labels is None:
        return {"loss": loss, "perplexity": metrics.perplexity(loss)}
    return {
        "loss": loss,
        "accuracy": metrics.accuracy(scores.predicted, labels),
        "macro_f1": metrics.macro_f1(scores.predicted, labels),
    }
