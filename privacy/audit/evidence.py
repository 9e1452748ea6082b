"""Scores of canaries from everything that a run released, step by step.

A *Dirac canary* is an example whose clipped gradient is ``shift`` times a unit direction of its own. What a step
releases, projected on that direction, is noise of some scale ``s`` if the canary was not in the batch and ``shift``
plus noise if it was. With sampling rate ``q`` the log-likelihood ratio of "included" against "not", summed over steps::

    score_i = sum_t log(1 - q + q exp((2 x_ti shift - shift^2) / (2 s_t^2)))

is the most powerful score for the Gaussian mechanism (Neyman and Pearson). ``s_t`` is not the claimed noise: it is
measured in each step on directions that belong to no canary. So a step that went out with too little noise, or none,
outweighs all others: one such step among a hundred shows, where a sum or a maximum of the projections would drown it.
"""

from __future__ import annotations

import numpy as np

from fl.errors import ShoalError
from privacy.audit.result import checked

_EXACT = 1e-9  # spread of a release without noise, as a share of the shift: below float32's rounding

TRIAL_STATISTICS = (
    "sum of the projections",
    "largest projection against the noise around it",
    "smallest norm of a step",
    "steps that are exactly zero",
)


def log_likelihood_ratios(
    projections: np.ndarray, references: np.ndarray, shift: float, rate: float = 1.0
) -> np.ndarray:
    """The scores ``(m,)`` of canaries from ``projections`` ``(T, m)`` of T releases on their directions.

    ``references`` ``(T, k)`` are projections of the same releases on directions that no canary has, k at least 8;
    ``shift`` is what a canary adds to a release along its direction (the clip norm, over the batch size if the release
    is a mean), and ``rate`` the probability with which a step takes an included canary.
    """
    x, aside = checked("projections", projections, (2,)), checked("references", references, (2,))
    if len(x) != len(aside) or aside.shape[1] < 8:
        raise ShoalError(
            f"references has shape {aside.shape}: the noise of each of the {len(x)} releases is measured on at least 8 "
            "directions that no canary has."
        )
    if not (shift > 0 and 0 < rate <= 1):
        raise ShoalError(f"shift={shift!r}, rate={rate!r} are not allowed: a shift above 0 and a rate in (0, 1].")
    centre = np.median(aside, axis=1, keepdims=True)
    scale = np.sqrt(np.mean((aside - centre) ** 2, axis=1, keepdims=True))
    scale = np.maximum(scale, _EXACT * shift)
    ratio = (2 * (x - centre) * shift - shift**2) / (2 * scale**2)
    absent = np.log1p(-rate) if rate < 1 else -np.inf
    return np.logaddexp(absent, np.log(rate) + ratio).sum(axis=0)


def trial_statistics(releases: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Four statistics ``(4,)`` of one run's ``releases`` ``(T, d)`` and a canary's unit ``direction`` ``(d,)``, d >= 2.

    In the order of `TRIAL_STATISTICS`: ``sum_t <g_t, u>``; ``max_t <g_t, u> / s_t`` with ``s_t`` the root mean square
    of the release across the direction (one step without noise shows); ``min_t |g_t|``; the number of releases that
    are exactly zero (an empty batch that was skipped shows). For `privacy.audit.trials`, which picks one validly.
    """
    g, u = checked("releases", releases, (2,)), checked("direction", direction)
    along = g @ u  # (T,)
    across = np.linalg.norm(g - along[:, None] * u, axis=1) / np.sqrt(len(u) - 1)
    norms = np.linalg.norm(g, axis=1)
    # 1e-30: a release of zeros has ratio 0, and one along the direction alone a finite, huge one.
    peak = np.max(along / np.maximum(across, _EXACT * norms + 1e-30))
    return np.array([along.sum(), peak, norms.min(), np.sum(norms == 0)])
