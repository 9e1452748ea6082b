"""When the master ends a round: at ``1 + mu`` times its fastest answer, or later where that breaks the assumed pattern.

Krishnan et al., arXiv 2211.13802: who has not answered by ``(1 + mu) min_i t_i`` is a
straggler of the round. If the pattern of stragglers would no longer conform to the model that the scheme is built
for, the master waits ``longer``, for one more answer after the other until it conforms, or for ``all`` (the authors'
program). So the model is never broken, at a cost in time, unless an answer is lost for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fl.coding.stragglers import Model

WAITING = ("longer", "all")


@dataclass(frozen=True)
class Cut:
    """How a round ended: ``end`` in ticks after its start, who was ``late`` ``(n,)``, whether they ``conform``."""

    end: int
    late: np.ndarray
    conforms: bool


def cut(times: Sequence[int | None], mu: float, past: np.ndarray, model: Model, waiting: str = "longer") -> Cut:
    """The end of a round whose workers answer after ``times`` ticks (None: never; 0: one that has no work).

    ``past`` ``(rounds, n)`` are the last rounds' stragglers. The round ends with its last answer if that is before the
    cut.
    """
    lost = np.array([t is None for t in times])
    answers = np.array([0 if t is None else t for t in times], dtype=np.int64)
    working = answers[~lost & (answers > 0)]
    if not len(working):
        return Cut(0, lost, model.admits(past, lost))
    limit = int((1 + mu) * int(working.min()))
    last = int(working.max())
    # The moments at which one could stop: the cut, and every later answer.
    moments = [limit, *sorted({int(t) for t in working if t > limit})]
    for moment in moments if waiting == "longer" else [limit, last]:
        late = lost | (answers > moment)
        if model.admits(past, late):
            return Cut(min(moment, last) if not late.any() else moment, late, True)
    return Cut(last, lost, False)
