"""A lower bound on epsilon from many runs with a canary and many without it.

For every event E, an (epsilon, delta)-DP mechanism has ``P_with[E] <= e^epsilon P_without[E] + delta``, and the same
with the two exchanged. With a lower Clopper-Pearson limit for the first probability and an upper one for the second,
each wrong with probability at most half the error::

    epsilon >= log((low - delta) / high)

(Jagielski, Ullman and Oprea 2020, arXiv 2006.07709). The event is "this statistic is at least (below) this threshold":
statistic, threshold, side and direction are chosen on every other run, and the limits are computed on the rest, so
the choice costs half of the runs and no validity. A statistic may be 0 or 1: "the release is exactly zero", say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fl.errors import ShoalError
from privacy.audit import evidence
from privacy.audit.result import Bound, check_level, checked, clopper_pearson


def event_epsilon(
    hits: np.ndarray | int,
    runs: int,
    other_hits: np.ndarray | int,
    other_runs: int,
    delta: float,
    confidence: float,
) -> np.ndarray:
    """The bound from an event fixed beforehand, seen in ``hits`` of ``runs`` and ``other_hits`` of ``other_runs``.

    ``max(0, log((low(hits / runs) - delta) / high(other_hits / other_runs)))``; counts may be arrays of one shape.
    """
    error = (1 - confidence) / 2
    low = clopper_pearson(hits, runs, error)[0] - delta
    high = clopper_pearson(other_hits, other_runs, error)[1]
    return np.maximum(0.0, np.log(np.maximum(low, 1e-300) / high))


@dataclass(frozen=True)
class _Event:
    """``statistic[column] >= threshold`` (or below it), likelier with the canary (or without it)."""

    column: int
    threshold: float
    above: bool
    likelier_with: bool

    def count(self, statistics: np.ndarray) -> int:
        at_least = statistics[:, self.column] >= self.threshold
        return int(np.sum(at_least if self.above else ~at_least))


def audit_release(
    release: Callable[[bool, int], np.ndarray], direction: np.ndarray, delta: float, runs: int, confidence: float = 0.95
) -> Bound:
    """The bound from ``runs`` runs of a mechanism with a canary and as many without it.

    ``release(present, run)`` gives all that run ``run`` releases, ``(T, d)``, with randomness of its own; ``direction``
    ``(d,)`` is the canary's. The events are those of `evidence.trial_statistics`, a release of exact zeros among them.
    """
    table = [
        [evidence.trial_statistics(release(present, run), direction) for run in range(runs)]
        for present in (True, False)
    ]
    return lower_bound(np.array(table[0]), np.array(table[1]), delta, confidence, evidence.TRIAL_STATISTICS)


def lower_bound(
    with_canary: np.ndarray,
    without: np.ndarray,
    delta: float,
    confidence: float = 0.95,
    names: Sequence[str] = (),
) -> Bound:
    """A valid lower bound on epsilon from statistics of independent runs.

    ``with_canary`` ``(n,)`` or ``(n, k)`` and ``without`` ``(n',)`` or ``(n', k)`` hold k statistics of each run, in
    an order that does not depend on them; ``names`` ``(k,)`` are for the report. Raises `ShoalError` for fewer than 8
    runs of a kind, and for NaN.
    """
    check_level(delta, confidence)
    present, absent = _table("with_canary", with_canary), _table("without", without)
    if present.shape[1] != absent.shape[1]:
        raise ShoalError(f"{present.shape[1]} statistics with the canary and {absent.shape[1]} without: not the same.")

    event = max(_candidates(present[::2], absent[::2], delta, confidence), key=lambda candidate: candidate[0])[1]
    confirm = (present[1::2], absent[1::2])
    seen, unseen = (event.count(runs) for runs in confirm)
    n, n_other = map(len, confirm)
    if event.likelier_with:
        epsilon = float(event_epsilon(seen, n, unseen, n_other, delta, confidence))
    else:
        epsilon = float(event_epsilon(unseen, n_other, seen, n, delta, confidence))
    ceiling = max(
        float(event_epsilon(n, n, 0, n_other, delta, confidence)),
        float(event_epsilon(n_other, n_other, 0, n, delta, confidence)),
    )
    name = names[event.column] if names else f"statistic {event.column + 1}"
    evidence = (
        f"{name} {'at least' if event.above else 'below'} {event.threshold:.4g} in {seen} of {n} runs with the canary "
        f"and {unseen} of {n_other} without, the event chosen on as many other runs"
    )
    return Bound(epsilon, delta, confidence, ceiling, "many-run audit", evidence)


def _candidates(
    present: np.ndarray, absent: np.ndarray, delta: float, confidence: float
) -> Iterator[tuple[float, _Event]]:
    """For each statistic, side and direction the best threshold on these runs, with the bound that it would give."""
    n, n_other = len(present), len(absent)
    for column in range(present.shape[1]):
        seen, unseen = np.sort(present[:, column]), np.sort(absent[:, column])
        values = np.unique(np.concatenate([seen, unseen]))
        # Halfway between neighbouring values: a threshold on a value would cut off new runs just beside it.
        thresholds = np.append(values[:-1] + (values[1:] - values[:-1]) / 2, values[-1])
        below = np.searchsorted(seen, thresholds), np.searchsorted(unseen, thresholds)
        for above in (True, False):
            hits = (n - below[0], n_other - below[1]) if above else below
            for likelier_with in (True, False):
                if likelier_with:
                    bounds = event_epsilon(hits[0], n, hits[1], n_other, delta, confidence)
                else:
                    bounds = event_epsilon(hits[1], n_other, hits[0], n, delta, confidence)
                best = int(np.argmax(bounds))
                yield float(bounds[best]), _Event(column, float(thresholds[best]), above, likelier_with)


def _table(name: str, statistics: np.ndarray) -> np.ndarray:
    table = checked(name, statistics, (1, 2))
    table = table[:, None] if table.ndim == 1 else table
    if len(table) < 8 or not np.isfinite(table).all():
        raise ShoalError(f"{name} has {len(table)} runs: the audit needs at least 8, with finite statistics.")
    return table
