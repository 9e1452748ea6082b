"""The wait rule: as short as it may be, and never at the price of the assumed pattern."""

import numpy as np
import pytest

from fl.coding.stragglers import Bursty
from fl.coding.wait import cut
from fl.keys import generator
from tests.oracles import coding

NONE = np.zeros((0, 4), dtype=bool)
TWO = Bursty(W=1, lam=2, B=1)


def test_cuts_at_a_multiple_of_the_fastest():
    found = cut([100, 119, 120, 121], 0.2, NONE, TWO)
    assert (found.end, found.late.tolist(), found.conforms) == (120, [False, False, False, True], True)


def test_ends_with_the_last_answer_if_that_is_sooner():
    assert cut([100, 101, 102, 103], 0.2, NONE, TWO).end == 103


def test_waits_longer_where_the_pattern_would_break():
    found = cut([100, 300, 200, 400], 0.5, NONE, TWO)
    assert (found.end, found.late.tolist()) == (200, [False, True, False, True])
    found = cut([100, 300, 200, 400], 0.5, NONE, TWO, waiting="all")
    assert (found.end, found.late.any(), found.conforms) == (400, False, True)


def test_uncoded_waits_for_all():
    found = cut([100, 300, 200, 400], 0.5, NONE, Bursty(W=1, lam=0, B=1))
    assert (found.end, found.late.any()) == (400, False)


def test_the_past_counts():
    past = np.array([[False, False, False, True]])
    model = Bursty(W=2, lam=1, B=1)
    assert cut([10, 10, 10, 90], 0.1, NONE, model).end == 11
    assert cut([10, 10, 10, 90], 0.1, past, model).end == 90  # a burst of two
    assert cut([10, 10, 90, 10], 0.1, past, model).end == 90  # a second straggler in two rounds


def test_lost_answers_are_late_and_a_broken_pattern_is_said():
    found = cut([10, None, 90, 10], 0.1, NONE, Bursty(W=1, lam=1, B=1))
    assert (found.end, found.late.tolist(), found.conforms) == (90, [False, True, False, False], True)
    found = cut([10, None, None, 90], 0.1, NONE, Bursty(W=1, lam=1, B=1))
    assert (found.end, found.late.tolist(), found.conforms) == (90, [False, True, True, False], False)


def test_workers_without_work_are_not_the_fastest():
    found = cut([0, 0, 100, 150], 0.2, NONE, TWO)
    assert (found.end, found.late.tolist()) == (120, [False, False, False, True])
    assert cut([0, 0, 0, 0], 0.2, NONE, TWO).end == 0


@pytest.mark.parametrize("seed", range(200))
def test_the_first_moment_that_conforms(seed):
    rng = generator(seed, "wait")
    model = Bursty(W=3, lam=2, B=2)
    past = model.draw(5, 4, rng)
    times = [int(t) for t in rng.integers(5, 40, 5)]
    found, right = cut(times, 0.3, past, model), coding.cut(times, 0.3, past, model.admits)
    assert right is not None
    assert tuple(found.late.tolist()) == right[1]
    assert found.end == (right[0] if any(right[1]) else max(times))
    assert found.conforms and model.conforms(np.concatenate([past, found.late[None]]))
