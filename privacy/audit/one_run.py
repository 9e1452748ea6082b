"""A lower bound on epsilon from one training run with many canaries.

Each of ``m`` canaries is put into the training data if a fair coin says so. Whatever the run releases gives every
canary a score; the ``k_in`` highest are guessed to be in, the ``k_out`` lowest to be out, and the rest is left open.
For an (epsilon, delta)-DP run the number of right guesses among ``r = k_in + k_out`` obeys::

    P[right >= v] <= beta + 2 m delta alpha,    beta  = P[B >= v],    B ~ Binomial(r, e^epsilon / (1 + e^epsilon))
                                                alpha = max_{1 <= i <= v} P[v - i <= B < v] / i

(Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2 and appendix D). The neighbours are add-remove: a
canary is in, or it is not there. Scores may depend on the canaries and on all that was released, but not on the coins.

How many guesses to make is chosen by the scores' success only among a few pairs fixed by ``m``, each tested at an
equal share of the error (Bonferroni), so the bound holds after the choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from fl.errors import ShoalError
from fl.keys import Part, generator
from privacy.audit.result import Bound, check_level, checked

Guesses = tuple[int, int]
FEWEST = 4  # with fewer guesses, even right ones show next to nothing


def coins(canaries: int, *key: Part) -> np.ndarray:
    """Which canaries to include: ``(canaries,)`` fair and independent coins, drawn from ``key``."""
    return generator(*key).integers(2, size=canaries).astype(bool)


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of ``right`` or more right guesses under (``epsilon``, ``delta``)-DP."""
    q = 1 / (1 + np.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, q))
    if delta == 0 or right == 0:
        return beta
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, q))  # P[v - i <= B < v], i = 1..v
    alpha = float(np.max(below / np.arange(1, right + 1)))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def largest_epsilon(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon that ``right`` of ``guesses`` rejects with a p-value of at most ``error``; 0 if none.

    Found by bisection to 1e-6; what is returned is rejected itself.
    """

    def rejected(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) <= error

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def default_guesses(canaries: int, rate: float = 1.0) -> list[Guesses]:
    """The pairs ``(k_in, k_out)`` tried when none is given.

    Both sides for a leak that all canaries share; only the highest scores for one that shows some of them (one step
    without noise betrays the canaries of its batch, to which an included one belongs with probability ``rate``, and
    says little about the others). Guessing half of the canaries on each side would be wrong in part even for an attack
    that sees all, since how many are in varies: the largest numbers stay two standard deviations below the means.
    """
    most = canaries // 2 - math.isqrt(canaries)
    both = [(k, k) for k in (most, canaries // 4, canaries // 8)]
    taken = rate * canaries / 2
    highest = [(int(k), 0) for k in (canaries / 4, canaries / 16, taken - 2 * math.sqrt(taken))]
    pairs = [pair for pair in dict.fromkeys(both + highest) if sum(pair) >= FEWEST]
    return pairs or [(canaries // 2, canaries - canaries // 2)]


def lower_bound(
    scores: np.ndarray | Sequence[float],
    included: np.ndarray | Sequence[bool],
    delta: float,
    confidence: float = 0.95,
    guesses: Guesses | Sequence[Guesses] | None = None,
) -> Bound:
    """A valid lower bound on epsilon from ``(m,)`` scores, higher for "in", and the coins ``included`` ``(m,)``.

    ``guesses`` is one pair ``(k_in, k_out)`` or several, fixed before the scores are seen; `default_guesses` if None.
    Equal scores are put in an order drawn from a fixed key, so the order of the canaries tells nothing.

    Raises `ShoalError` for NaN scores, for pairs that need more than m guesses, and for coins that are not fair.
    """
    check_level(delta, confidence)
    scores = checked("scores", scores)
    included = np.asarray(included, dtype=bool)
    canaries = len(scores)
    pairs = _pairs(guesses, canaries)
    _check_coins(included, canaries)

    shuffled = generator("audit", "ties", canaries).permutation(canaries)
    order = shuffled[np.argsort(scores[shuffled], kind="stable")]
    truth = included[order]  # by score, lowest first
    error = (1 - confidence) / len(pairs)
    best, evidence = -1.0, ""
    for k_in, k_out in pairs:
        made = k_in + k_out
        right = int(truth[canaries - k_in :].sum() + (~truth[:k_out]).sum())
        epsilon = largest_epsilon(canaries, made, right, delta, error)
        if epsilon > best:
            best, evidence = epsilon, f"{canaries} canaries, {right} of {made} guesses right"
    if len(pairs) > 1:
        evidence += f", the best of {len(pairs)} numbers of guesses, corrected for the choice"
    return Bound(best, delta, confidence, ceiling(canaries, pairs, delta, confidence), "one-run audit", evidence)


def ceiling(canaries: int, guesses: Sequence[Guesses], delta: float, confidence: float = 0.95) -> float:
    """The bound of an attack that makes each of the numbers of ``guesses`` without a mistake."""
    error = (1 - confidence) / len(guesses)
    return max(largest_epsilon(canaries, sum(pair), sum(pair), delta, error) for pair in guesses)


def _pairs(guesses: Guesses | Sequence[Guesses] | None, canaries: int) -> list[Guesses]:
    pairs = default_guesses(canaries) if guesses is None else np.atleast_2d(np.asarray(guesses, dtype=int)).tolist()
    for k_in, k_out in pairs:
        if min(k_in, k_out) < 0 or not 1 <= k_in + k_out <= canaries:
            raise ShoalError(
                f"guesses={(k_in, k_out)} is not allowed: the numbers of in and out guesses are at least 0 and make "
                f"between 1 and {canaries} together (one for each canary). Guess less, or use more canaries."
            )
    return [(k_in, k_out) for k_in, k_out in pairs]


def _check_coins(included: np.ndarray, canaries: int) -> None:
    if included.shape != (canaries,):
        raise ShoalError(f"included has shape {included.shape}: {canaries} canaries need a coin each.")
    if stats.binomtest(int(included.sum()), canaries).pvalue < 1e-9:
        raise ShoalError(
            f"{int(included.sum())} of {canaries} canaries are included: fair coins do that once in 10^9 runs, and "
            "without fair coins the bound means nothing. Draw them with privacy.audit.one_run.coins."
        )
