"""The book of one holder: what is granted, what it costs, and a checkpoint of it."""

from __future__ import annotations

import json

import pytest

from fl.errors import ConfigError, ShoalError
from privacy.accounting import SampledGaussian, epsilon
from privacy.ledger import Book, spent, steps_within

RUNNING, START = SampledGaussian(1.1, 0.1, 1), SampledGaussian(4.0, 0.5, 1)


def book(limit: int | None = None, once: tuple = ()) -> Book:
    return Book(RUNNING, 1e-3, "rdp", once, limit)


def test_steps_are_booked_when_they_are_granted():
    mine = book(7)
    assert [mine.grant(r, "a", 3) for r in (1, 2, 3, 4)] == [3, 3, 1, 0]
    assert mine.steps == 7 and mine.exhausted
    assert mine.grant(3, "a", 3) == 1  # the newest job again: a refused one is no job
    assert mine.steps == 7


def test_a_job_is_the_same_if_round_and_content_are():
    mine = book()
    assert mine.grant(1, "a", 3) == mine.grant(1, "a", 3) == 3 and mine.steps == 3
    assert mine.attempt == 0
    mine.grant(1, "b", 3)
    assert (mine.steps, mine.attempt) == (6, 1)
    mine.grant(1, "c", 3)
    assert (mine.steps, mine.attempt) == (9, 2)
    mine.grant(2, "a", 3)
    assert (mine.steps, mine.attempt) == (12, 0) and not mine.exhausted


def test_a_job_that_another_one_of_its_round_came_after_is_refused():
    """A message that is delivered again would be charged once more, and answered with other noise."""
    mine = book()
    for content in ("a", "b", "c"):
        mine.grant(1, content, 3)
        fresh = book()
        fresh.restore(json.loads(json.dumps(mine.state())))
        mine = fresh
    for content in ("a", "b"):
        with pytest.raises(ShoalError, match="round 1 has had another job since"):
            mine.grant(1, content, 3)
    assert mine.grant(1, "c", 3) == 3 and mine.steps == 9
    assert mine.grant(2, "a", 3) == 3 and mine.newest == {"round": 2, "fingerprint": "a", "steps": 3, "attempt": 0}


def test_a_job_of_an_older_round_is_refused():
    mine = book()
    mine.grant(3, "a", 1)
    with pytest.raises(ShoalError, match="round 2 is older"):
        mine.grant(2, "a", 1)
    assert mine.steps == 1


def test_epsilon_is_the_accountants_for_the_steps_taken_beside_what_was_released_once():
    mine = book(once=(START,))
    assert mine.epsilon == epsilon([START], 1e-3) > 0
    seen = [mine.epsilon]
    for round in range(1, 5):
        mine.grant(round, "a", 10)
        seen.append(mine.epsilon)
        assert mine.epsilon == epsilon([START, RUNNING.of(10 * round)], 1e-3)
    assert seen == sorted(set(seen))
    assert seen[-1] == spent((START, RUNNING.of(40)), 1e-3, "rdp")
    assert book().epsilon == 0


def test_a_checkpoint_holds_the_steps_and_the_newest_job():
    whole, first = book(50, (START,)), book(50, (START,))
    for round in range(1, 4):
        whole.grant(round, "a", 4)
        first.grant(round, "a", 4)
    again = book(50, (START,))
    again.restore(json.loads(json.dumps(first.state())))
    assert again == first and again.epsilon == whole.epsilon
    assert again.grant(3, "a", 4) == 4 and again.steps == 12  # asked again after the resume
    whole.grant(4, "a", 4)
    again.grant(4, "a", 4)
    assert again == whole and again.epsilon == whole.epsilon


@pytest.mark.parametrize(
    "other",
    [
        Book(SampledGaussian(1.2, 0.1, 1), 1e-3, "rdp", (START,), 50),
        Book(SampledGaussian(1.1, 0.2, 1), 1e-3, "rdp", (START,), 50),
        Book(RUNNING, 1e-4, "rdp", (START,), 50),
        Book(RUNNING, 1e-3, "prv", (START,), 50),
        Book(RUNNING, 1e-3, "rdp", (), 50),
        Book(RUNNING, 1e-3, "rdp", (START,), 51),
    ],
    ids=["noise", "rate", "delta", "accountant", "start", "limit"],
)
def test_a_checkpoint_of_other_settings_is_refused(other):
    with pytest.raises(ConfigError, match="the settings that the budget was spent under"):
        other.restore(book(50, (START,)).state())


def test_the_limit_is_the_last_step_within_the_target():
    limit = steps_within(RUNNING, (START,), 2.0, 1e-3, "rdp", 10_000)
    assert epsilon([START, RUNNING.of(limit)], 1e-3) <= 2.0 < epsilon([START, RUNNING.of(limit + 1)], 1e-3)
    assert steps_within(RUNNING, (START,), 2.0, 1e-3, "rdp", 3) == 3
    assert steps_within(RUNNING, (START,), 0.01, 1e-3, "rdp", 10) == 0
