"""What an audit reports: a lower bound on epsilon with its confidence, and rates with their intervals.

An audit rejects "the mechanism is (epsilon, delta)-DP" for every epsilon below its bound. It never shows that a
mechanism is private: a bound of 0 means that this attack, with this much data, found nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from fl.errors import ShoalError


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon at ``delta`` that is wrong with probability at most ``1 - confidence``.

    ``ceiling`` is the bound that the same audit reports when the attack makes no mistake: a claim above it can't be
    contradicted, whatever the mechanism does. ``method`` and ``evidence`` say in words how it was found.
    """

    epsilon: float
    delta: float
    confidence: float
    ceiling: float
    method: str
    evidence: str

    def contradicts(self, claimed: float) -> bool:
        """Whether the mechanism can't have the ``claimed`` epsilon, at this confidence."""
        return bool(self.epsilon > claimed)

    def sentence(self, claimed: float | None = None) -> str:
        """The bound for people, beside the ``claimed`` epsilon if there is one."""
        at = f" at delta {self.delta:g}" if self.delta else ""
        text = f"With {self.confidence * 100:g} % confidence, epsilon is at least {rounded_down(self.epsilon)}{at}"
        text += f" ({self.method}, {self.evidence})"
        if claimed is None:
            return f"{text}; this audit could have shown at most {rounded_down(self.ceiling)}."
        text += f"; the ledger claims at most {claimed:.4g}."
        if self.contradicts(claimed):
            return f"{text} The claim fails: at this confidence, what ran is not the mechanism in the ledger."
        text += f" This audit could have shown at most {rounded_down(self.ceiling)}"
        return f"{text}, so it can't test that claim." if self.ceiling <= claimed else f"{text}."

    def as_plain(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Rate:
    """A share with an interval that holds it with the confidence asked for; ``note`` says what to beware of."""

    value: float
    low: float
    high: float
    note: str = ""


def clopper_pearson(hits: np.ndarray | int, runs: int, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits of a binomial proportion, each wrong with probability at most ``error``.

    ``low = Beta^-1(error; hits, runs - hits + 1)`` and ``high = Beta^-1(1 - error; hits + 1, runs - hits)``
    (Clopper and Pearson 1934); 0 and 1 where ``hits`` is 0 or ``runs``. ``hits`` may be an array.
    """
    hits = np.asarray(hits)
    with np.errstate(invalid="ignore"):
        low = np.where(hits == 0, 0.0, stats.beta.ppf(error, hits, runs - hits + 1))
        high = np.where(hits == runs, 1.0, stats.beta.ppf(1 - error, hits + 1, runs - hits))
    return low, high


def checked(name: str, values: Any, dimensions: tuple[int, ...] = (1,)) -> np.ndarray:
    """``values`` as a float64 array that has one of the given numbers of ``dimensions``, is not empty and has no NaN.

    Raises `ShoalError`: a missing score would have to be guessed, and a guess about it could be made either way.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in dimensions or array.size == 0:
        allowed = " or ".join(map(str, dimensions))
        raise ShoalError(f"{name} has shape {array.shape}: an audit needs a non-empty array of {allowed} dimensions.")
    if np.isnan(array).any():
        raise ShoalError(
            f"{name} has {int(np.isnan(array).sum())} values that are not numbers: an audit needs a number for each. "
            "Did the run diverge?"
        )
    return array


def check_level(delta: float, confidence: float) -> None:
    """Raise `ShoalError` unless ``0 <= delta < 1`` and ``0 < confidence < 1``."""
    if not 0 <= delta < 1:
        raise ShoalError(f"delta={delta!r} is not allowed: an audit needs 0 <= delta < 1. Use the ledger's delta.")
    if not 0 < confidence < 1:
        raise ShoalError(f"confidence={confidence!r} is not allowed: it is a probability, such as 0.95.")


def rounded_down(epsilon: float) -> str:
    """Two decimals, rounded down: rounding a lower bound up would claim more than was shown."""
    return f"{math.floor(epsilon * 100) / 100:.2f}"
