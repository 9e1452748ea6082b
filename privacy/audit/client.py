"""Auditing client-level privacy in one run: clients that send a random direction.

A canary client's update is a random unit vector times the clip norm. In d dimensions independent directions are nearly
orthogonal, so each canary shows only in the cosine of its own direction with what the server releases. Two statistics:
the cosine with the change of the model over the whole run (an observer of the final model), and the largest of the
cosines with each round's aggregate (an observer of every round). Andrew et al. (2023, arXiv 2302.03098) fit a normal
distribution to the canaries that took part and one to directions that did not; the epsilon between the two is an
*estimate*, right in the limit for the Gaussian mechanism, and no bound. Beside it stands the valid lower bound of
`privacy.audit.one_run` from the same statistics, for which coins decide which canaries take part.

At a small delta the estimate hangs on the ratio of the two fitted deviations, whose sampling error draws it upward:
for the Gaussian mechanism with epsilon 4.38 at delta 1e-5 its median is 6.4 with 200 canaries, 5.3 with 1,000 and 4.6
with 10,000. `ClientAudit.pooled` fits one deviation to both samples, which the Gaussian mechanism has.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fl.errors import ShoalError
from fl.keys import Part, generator
from privacy.audit import one_run
from privacy.audit.gaussians import gaussian_epsilon
from privacy.audit.result import Bound, check_level, checked


@dataclass(frozen=True)
class ClientAudit:
    """Estimates of epsilon and the valid lower bound.

    ``estimate`` fits a deviation to each sample, as the paper does, ``pooled`` one to both; None where a sample has no
    spread, so that no finite epsilon is large enough.
    """

    estimate: float | None
    pooled: float | None
    bound: Bound

    def sentence(self, claimed: float | None = None) -> str:
        """Both for people, beside the ``claimed`` epsilon if there is one."""
        both = ["no finite value" if value is None else f"{value:.2f}" for value in (self.estimate, self.pooled)]
        return (
            f"{self.bound.sentence(claimed)} Two fitted normal distributions put epsilon at {both[0]}, or {both[1]} "
            f"with one deviation for both, at delta {self.bound.delta:g} (estimates, not bounds)."
        )

    def as_plain(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def directions(canaries: int, dimension: int, *key: Part) -> np.ndarray:
    """Unit vectors ``(canaries, dimension)`` float32, uniform on the sphere; row i is drawn from ``(*key, i)``."""
    rows = np.empty((canaries, dimension), dtype=np.float32)
    for i in range(canaries):
        rows[i] = direction(i, dimension, *key)
    return rows


def direction(canary: int, dimension: int, *key: Part) -> np.ndarray:
    """Row ``canary`` of `directions`: ``(dimension,)`` float32."""
    row = generator(*key, canary).standard_normal(dimension, dtype=np.float32)
    unit: np.ndarray = row / np.linalg.norm(row)
    return unit


def cosines(releases: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Cosines ``(T, m)`` of each release ``(T, d)`` with each unit vector ``(m, d)``; 0 for a release of zeros."""
    norms = np.linalg.norm(releases, axis=1, keepdims=True)
    return (releases @ unit.T) / np.where(norms > 0, norms, 1.0)


def audit(cosines_by_round: np.ndarray, included: np.ndarray, delta: float, confidence: float = 0.95) -> ClientAudit:
    """The audit from cosines ``(T, m)`` (T = 1: the change of the model over the run) and the coins ``(m,)``.

    ``delta`` is above 0. Raises `ShoalError` for fewer than 8 canaries that took part or did not.
    """
    check_level(delta, confidence)
    scores = checked("cosines_by_round", cosines_by_round, (2,)).max(axis=0)
    bound = one_run.lower_bound(scores, included, delta, confidence)
    return ClientAudit(*estimates(scores, included, delta), bound)


def estimates(scores: np.ndarray, included: np.ndarray, delta: float) -> tuple[float | None, float | None]:
    """``estimate`` and ``pooled`` of `ClientAudit` from each canary's score ``(m,)`` and the coins ``(m,)``."""
    scores, included = checked("scores", scores), np.asarray(included, dtype=bool)
    seen, unseen = scores[included], scores[~included]
    if min(len(seen), len(unseen)) < 8:
        raise ShoalError(
            f"{len(seen)} canaries took part and {len(unseen)} did not: a fit needs at least 8 of "
            "each. Use more canaries."
        )
    spread, other = float(seen.std(ddof=1)), float(unseen.std(ddof=1))
    pooled = float(np.sqrt(((len(seen) - 1) * spread**2 + (len(unseen) - 1) * other**2) / (len(scores) - 2)))
    means = float(seen.mean()), float(unseen.mean())
    return _epsilon(means, (spread, other), delta), _epsilon(means, (pooled, pooled), delta)


def _epsilon(means: tuple[float, float], deviations: tuple[float, float], delta: float) -> float | None:
    if min(deviations) > 0:
        return gaussian_epsilon(means[0], deviations[0], means[1], deviations[1], delta)
    return 0.0 if deviations[0] == deviations[1] and means[0] == means[1] else None
