"""Membership inference from losses: how well an attacker tells training examples from others.

Three scores, higher for "member":

* loss threshold (Yeom et al. 2018, arXiv 1709.01604): ``-loss``;
* calibrated by difficulty (Watson et al. 2022, arXiv 2111.08440): ``mean of the reference models' losses - loss``;
* likelihood ratio without shadow members (LiRA offline, Carlini et al. 2022, arXiv 2112.03570):
  ``(logit - mean_k logit_k) / std_k logit_k`` with ``logit = log(p / (1 - p))``, ``p = e^-loss``.

Reference models have not been trained on the examples that are scored. An attack is judged by its ROC: the area under
it, and the share of members it finds at the false positive rates that would hurt (1 % and 0.1 %), since an average
over examples hides the few that are exposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from fl.errors import ShoalError
from privacy.audit import trials
from privacy.audit.result import Rate, check_level, checked, clopper_pearson, rounded_down

LOW_RATES = (0.01, 0.001)


@dataclass(frozen=True)
class Membership:
    """How well the attack ``score`` tells ``members`` from ``others``; rates by false positive rate.

    ``epsilon`` is the lower bound of `privacy.audit.trials` if examples were independent trials. One run does not make
    them so: it is an indication. The bound that holds for one run is `privacy.audit.one_run`'s, with members drawn by
    coins.
    """

    score: str
    members: int
    others: int
    confidence: float
    auc: Rate
    found: dict[float, Rate]
    delta: float
    epsilon: float

    def sentence(self) -> str:
        """The result for people."""
        text = f"Membership inference by {self.score}, {self.members} members against {self.others} others: "
        text += f"AUC {_rate(self.auc, 3)}"
        for rate, found in self.found.items():
            note = f" ({found.note})" if found.note else ""
            text += f"; finds {_rate(found, 3)} of the members at {rate * 100:g} % false positives{note}"
        text += f". Intervals hold with {self.confidence * 100:g} % confidence; guessing has AUC 0.5. "
        text += f"Were the examples independent trials, epsilon would be at least {rounded_down(self.epsilon)}"
        return f"{text} at delta {self.delta:g} (an indication, not a bound)."

    def as_plain(self) -> dict[str, Any]:
        """The fields, for JSON; the false positive rates become text."""
        plain = asdict(self)
        plain["found"] = {f"{rate:g}": value for rate, value in plain["found"].items()}
        return plain


def threshold_scores(losses: np.ndarray) -> np.ndarray:
    """``-losses`` ``(n,)``: a member's loss is lower."""
    return -checked("losses", losses)


def calibrated_scores(losses: np.ndarray, reference_losses: np.ndarray) -> np.ndarray:
    """How far each of ``losses`` ``(n,)`` is below the mean of the ``reference_losses`` ``(k, n)`` or ``(n,)``."""
    losses, reference = _references(losses, reference_losses, 1)
    return reference.mean(axis=0) - losses


def likelihood_ratio_scores(losses: np.ndarray, reference_losses: np.ndarray) -> np.ndarray:
    """Standardised logits ``(n,)`` of the right answer, against k >= 2 ``reference_losses`` ``(k, n)``.

    For losses that are ``-log p``. One standard deviation is used for all examples while k < 16, since that of a few
    models is mostly noise.
    """
    losses, reference = _references(losses, reference_losses, 2)
    logits = _logits(reference)
    deviation = logits.std(axis=0, ddof=1) if len(reference) >= 16 else np.sqrt(logits.var(axis=0, ddof=1).mean())
    return (_logits(losses) - logits.mean(axis=0)) / np.maximum(deviation, 1e-6)


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of "score >= t" for every t from above all scores down to the lowest."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    rates = [1 - np.searchsorted(np.sort(s), thresholds) / len(s) for s in (others, members)]
    return np.append(0.0, rates[0]), np.append(0.0, rates[1])


def auc(members: np.ndarray, others: np.ndarray, confidence: float = 0.95) -> Rate:
    """The probability that a member's score is higher than another's (ties count half), with its interval.

    The interval is DeLong's (1988), on the logit scale. Where it has no width since every pair is right (or wrong), the
    ``min(m, n)`` pairs that share no example are independent trials without an error: Clopper-Pearson.
    """
    members, others = checked("members", members), checked("others", others)
    if min(len(members), len(others)) < 2:
        raise ShoalError("An interval for the AUC needs at least 2 members and 2 others.")
    rank = stats.rankdata(np.concatenate([members, others]))
    m, n = len(members), len(others)
    of_member = (rank[:m] - stats.rankdata(members)) / n  # share of the others that each member beats
    of_other = 1 - (rank[m:] - stats.rankdata(others)) / m  # share of the members that beat each other example
    value = float(of_member.mean())
    error = (1 - confidence) / 2
    if value in (0.0, 1.0):
        low, high = clopper_pearson(int(value) * min(m, n), min(m, n), error)
        return Rate(value, float(low), float(high))
    spread = np.sqrt(of_member.var(ddof=1) / m + of_other.var(ddof=1) / n)
    half = stats.norm.isf(error) * spread / (value * (1 - value))
    centre = np.log(value / (1 - value))
    low, high = 1 / (1 + np.exp(-(centre + np.array([-half, half]))))
    return Rate(value, float(low), float(high))


def found_at(members: np.ndarray, others: np.ndarray, rate: float, confidence: float = 0.95) -> Rate:
    """The share of ``members`` above the lowest threshold that at most ``rate`` of the ``others`` are above.

    The interval is Clopper-Pearson's for that threshold. Fewer than ``1 / rate`` others can't show such a rate: the
    threshold is then the highest of their scores, and the note says so.
    """
    members, others = checked("members", members), checked("others", others)
    allowed = int(np.floor(rate * len(others) + 1e-9))
    threshold = np.sort(others)[::-1][min(allowed, len(others) - 1)]
    hits = int(np.sum(members > threshold))
    low, high = clopper_pearson(hits, len(members), (1 - confidence) / 2)
    note = ""
    if allowed == 0:
        bound = clopper_pearson(0, len(others), 1 - confidence)[1]
        note = (
            f"too few to say: {len(others)} others, where {round(1 / rate)} are needed; "
            f"no false positive among them, a rate below {float(bound):.2g}"
        )
    return Rate(hits / len(members), float(low), float(high), note)


def attack(
    members: np.ndarray | Sequence[float],
    others: np.ndarray | Sequence[float],
    delta: float,
    confidence: float = 0.95,
    score: str = "loss threshold",
) -> Membership:
    """All of the above for the scores of ``members`` ``(m,)`` and ``others`` ``(n,)``.

    Both in an order that does not depend on their scores, at least 8 of each. Raises `ShoalError`, also for NaN.
    """
    check_level(delta, confidence)
    members, others = checked("members", members), checked("others", others)
    return Membership(
        score=score,
        members=len(members),
        others=len(others),
        confidence=confidence,
        auc=auc(members, others, confidence),
        found={rate: found_at(members, others, rate, confidence) for rate in LOW_RATES},
        delta=delta,
        epsilon=trials.lower_bound(members, others, delta, confidence).epsilon,
    )


def _logits(losses: np.ndarray) -> np.ndarray:
    """``log(p / (1 - p))`` of ``p = e^-loss``, i.e. ``-log(e^loss - 1)``, for losses kept within [1e-12, 700]."""
    return -np.log(np.expm1(np.clip(losses, 1e-12, 700)))


def _references(losses: np.ndarray, reference_losses: np.ndarray, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    losses, reference = checked("losses", losses), np.atleast_2d(checked("reference_losses", reference_losses, (1, 2)))
    if reference.shape[1] != len(losses) or len(reference) < fewest:
        raise ShoalError(
            f"reference_losses has shape {reference.shape}: the score needs the losses of at least {fewest} reference "
            f"model(s) on each of the {len(losses)} examples."
        )
    return losses, reference


def _rate(rate: Rate, digits: int) -> str:
    return f"{rate.value:.{digits}f} [{rate.low:.{digits}f}, {rate.high:.{digits}f}]"
