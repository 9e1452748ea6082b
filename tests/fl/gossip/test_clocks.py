from __future__ import annotations

import math

import numpy as np
import pytest

from fl.gossip.clocks import BLOCK, PoissonClock


def take(clock, number):
    return [clock.pop() for _ in range(number)]


def test_events_come_in_order_and_in_whole_ticks():
    times = [tick for tick, _ in take(PoissonClock([1.0], 1000, 0), 2000)]
    assert times == sorted(times) and all(isinstance(t, int) for t in times)


def test_peeking_takes_nothing():
    clock = PoissonClock([1.0, 2.0], 1000, 3)
    assert clock.peek() == clock.peek() == clock.pop()
    assert clock.rung == 1


@pytest.mark.parametrize("rate", [0.2, 1.0, 37.5])
def test_the_number_of_events_is_poisson(rate):
    clock, units = PoissonClock([rate], 10**6, "count", int(10 * rate)), 2000
    count = 0
    while clock.pop()[0] <= units * 10**6:
        count += 1
    assert abs(count - rate * units) < 4 * math.sqrt(rate * units)


def test_gaps_are_exponential():
    times = np.array([0] + [tick for tick, _ in take(PoissonClock([2.0], 10**6, 5), 20000)])
    gaps = np.diff(times) / 5e5
    assert abs(gaps.mean() - 1) < 4 / math.sqrt(len(gaps))
    assert abs((gaps > 1).mean() - math.exp(-1)) < 4 * 0.5 / math.sqrt(len(gaps))


def test_each_process_has_its_share_and_one_of_rate_zero_never_rings():
    which = np.array([w for _, w in take(PoissonClock([1.0, 0.0, 3.0, 0.0], 1000, 7), 8000)])
    assert set(which) == {0, 2}
    assert abs((which == 2).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 8000)


@pytest.mark.parametrize("after", [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
def test_a_clock_goes_on_from_its_state(after):
    clock = PoissonClock([1.0, 2.0], 1000, "a", 1)
    take(clock, after)
    again = PoissonClock([1.0, 2.0], 1000, "a", 1)
    again.restore(clock.state())
    assert take(again, 600) == take(clock, 600)


def test_clocks_of_other_keys_are_independent():
    one, other = (take(PoissonClock([1.0], 1000, "a", k), 500) for k in (0, 1))
    assert len({t for t, _ in one} & {t for t, _ in other}) < 50
