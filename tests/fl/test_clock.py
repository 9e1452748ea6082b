"""Virtual time is exact, events come in one order, and a checkpoint brings all of it back."""

import itertools
import json

import pytest

from fl.clock import Clock, Event, EventQueue, Priority, seconds, ticks
from fl.keys import generator


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, 0), (1, 1_000_000), (0.1, 100_000), (2.5e-6, 2), (3.5e-6, 4), (4e-7, 0), (0.01 * 3, 30_000), (1e9, 10**15)],
)
def test_seconds_round_to_the_nearest_tick(given, expected):
    assert ticks(given) == expected
    assert type(ticks(given)) is int


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_a_duration_is_finite_and_not_negative(bad):
    with pytest.raises(ValueError, match="duration"):
        ticks(bad)


def test_ticks_survive_a_trip_through_seconds():
    rng = generator(0, "ticks")
    for value in [0, 1, 2**51 - 1, *map(int, rng.integers(0, 2**51, 5000))]:
        assert ticks(seconds(value)) == value


def test_events_of_one_tick_have_one_order_however_they_were_planned():
    plan = [(5, p, c) for p in Priority for c in (-1, 0, 2)] + [(4, Priority.EVAL, 9), (6, Priority.ARRIVE, 0)]
    orders = [plan, plan[::-1], *itertools.islice(itertools.permutations(plan[:6]), 20)]
    for order in orders:
        queue = EventQueue()
        for time, priority, client in order:
            queue.push(time, priority, client)
        got = [(e.time, e.priority, e.client) for e in (queue.pop() for _ in range(len(queue)))]
        assert got == sorted(order)
    assert list(Priority) == sorted(Priority)
    assert [p.name for p in Priority] == ["ARRIVE", "COMPUTE_DONE", "EDGE", "SERVER_TICK", "EVAL"]


def test_equal_events_come_in_the_order_of_planning():
    queue = EventQueue()
    for data in ({"a": 1}, None, "b", [1]):  # values that can't be compared
        queue.push(3, Priority.ARRIVE, 1, data)
    assert [queue.pop().data for _ in range(4)] == [{"a": 1}, None, "b", [1]]


def test_an_arrival_counts_in_the_server_step_of_its_tick():
    queue = EventQueue()
    queue.push(ticks(0.3), Priority.SERVER_TICK)
    queue.push(ticks(0.1 * 3), Priority.ARRIVE, 1)  # 0.1 * 3 > 0.3 as floats
    assert queue.pop().priority is Priority.ARRIVE


def test_popping_moves_the_clock_and_the_past_is_closed():
    clock = Clock()
    queue = EventQueue(clock)
    queue.push(7, Priority.ARRIVE)
    queue.push(7, Priority.EVAL)
    assert (queue.peek().time, clock.now) == (7, 0)
    queue.pop()
    assert (clock.now, clock.now_s) == (7, 7e-6)
    queue.push(7, Priority.ARRIVE)  # now is not the past
    with pytest.raises(ValueError, match="past"):
        queue.push(6, Priority.ARRIVE)
    with pytest.raises(ValueError, match="go back"):
        clock.advance(6)


def test_nothing_planned():
    queue = EventQueue()
    assert (len(queue), queue.peek(), bool(queue)) == (0, None, False)
    with pytest.raises(IndexError):
        queue.pop()


def test_cancelled_events_do_not_happen():
    queue = EventQueue()
    names = [queue.push(t, Priority.ARRIVE, t) for t in range(5)]
    assert queue.cancel(names[0]) and queue.cancel(names[3])
    assert not queue.cancel(names[3])
    assert not queue.cancel(99)
    assert len(queue) == 3
    assert queue.peek().time == 1
    assert [queue.pop().time for _ in range(3)] == [1, 2, 4]
    assert not queue.cancel(names[1])
    assert len(queue) == 0 and queue.peek() is None


def test_a_restored_queue_goes_on_in_the_same_way():
    rng = generator(1, "queue")
    queue = EventQueue(Clock(10))
    for _ in range(200):
        name = queue.push(10 + int(rng.integers(20)), Priority(int(rng.integers(5))), int(rng.integers(4)), {"k": [1]})
        if rng.random() < 0.2:
            queue.cancel(name)
    for _ in range(30):
        queue.pop()
    state = json.loads(json.dumps(queue.state()))
    other = EventQueue.restore(state)
    assert other.state() == queue.state()
    assert other.clock.now == queue.clock.now > 10
    assert len(other) == len(queue)
    for q in (queue, other):
        q.push(100, Priority.ARRIVE, 0, "new")
    got = [[q.pop() for _ in range(len(q))] for q in (queue, other)]
    assert got[0] == got[1]
    assert all(isinstance(event, Event) and isinstance(event.priority, Priority) for event in got[1])
