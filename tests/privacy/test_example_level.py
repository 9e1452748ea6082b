"""What mechanisms of examples share: Poisson batches, what they refuse, and jobs that are asked for twice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import chi2

from clients.behaviours.base import ReplyFields
from clients.local.private import Private
from clients.local.training import LocalTraining
from fl.compose import compose
from fl.errors import ConfigError
from fl.experiment import Settings
from fl.schedules.synchronous import Synchronous
from privacy.accounting import SampledGaussian, epsilon
from privacy.base import BudgetSpent
from privacy.example_level import (
    ExampleGuard,
    check,
    check_disjoint,
    check_start,
    poisson_batches,
    start_release,
    statement,
    worst,
)
from privacy.ledger import Book
from tests.helpers import ENCODER

FALSE_ALARM = 1e-8
HEAD = "model.head_std=0.02"


def settings(*more: str) -> Settings:
    return Settings.of(compose([*ENCODER, *more])[0])


@dataclass(frozen=True)
class Unbounded(Synchronous):
    def participations(self) -> int | None:
        return None


@dataclass(frozen=True)
class Bypass(LocalTraining):
    def fit(self, cohort, works, make_batch):
        return []


@dataclass(frozen=True)
class OtherGradient(LocalTraining):
    def gradient(self, cohort, params, batch, works, step):
        return cohort.gradients(params, batch)


@dataclass(frozen=True)
class Declared(OtherGradient):
    keeps_private = True


# Refusals


def test_a_schedule_without_a_bound_on_participation_is_refused():
    with pytest.raises(ConfigError, match=r"schedule='Unbounded'.*bounds how often"):
        check(replace(settings(), schedule=Unbounded()))


@pytest.mark.parametrize("local", [Bypass(steps=1), OtherGradient(steps=1)], ids=lambda a: type(a).__name__)
def test_a_local_algorithm_with_a_gradient_of_its_own_is_refused(local):
    with pytest.raises(ConfigError, match=f"local='{type(local).__name__}'.*passes the private gradient"):
        check(replace(settings(), local=local))
    check(replace(settings(), local=Declared(steps=1)))


@pytest.mark.parametrize("local", ["sgd", "momentum", "adamw", "fedprox", "lora_pro", "dylora", "sora"])
def test_every_local_algorithm_with_the_usual_gradient_is_accepted(local):
    more = ("adapter=sora",) if local == "sora" else ()
    check(settings(f"local={local}", "privacy=dp_sgd", *more))


@pytest.mark.parametrize("source", ["client", "clients"])
def test_a_start_from_clients_data_without_noise_is_refused(source):
    with pytest.raises(ConfigError, match=rf"adapter\.init\.source='{source}'.*public or private.*outside every"):
        settings("adapter=lora_sb", f"adapter.init.source={source}", "privacy=dp_sgd")


@pytest.mark.parametrize("source", ["public", "private"])
def test_a_public_start_and_a_private_one_are_accepted(source):
    found = settings("adapter=lora_sb", f"adapter.init.source={source}", "data.public=50", "privacy=dp_sgd", HEAD)
    start = found.adapter.initialisation
    if source == "private":
        with pytest.raises(ConfigError, match="public: a start"):
            check_start(start, None)
    else:
        check_start(start, None)


def test_examples_that_two_clients_hold_are_refused():
    check_disjoint([np.array([3, 1]), np.array([], dtype=int), np.array([2])])
    with pytest.raises(ConfigError, match=r"partition='1 examples dealt twice, 7 among them'"):
        check_disjoint([np.array([7, 1]), np.array([2, 7])])
    with pytest.raises(ConfigError, match="dealt twice"):
        check_disjoint([np.array([4, 4]), np.array([2])])


# A private start


def test_a_private_start_is_one_release_at_its_own_rate_and_others_cost_nothing():
    private = settings("adapter=lora_sb", "adapter.init.source=private", "adapter.init.noise=2", "privacy=dp_sgd", HEAD)
    start = private.adapter.initialisation
    assert start_release(start, 256) == (SampledGaussian(2.0, start.examples / 256, 1),)
    assert start_release(start, 10) == (SampledGaussian(2.0, 1.0, 1),)
    public = settings("adapter=lora_sb", "adapter.init.source=public", "data.public=50", HEAD)
    assert start_release(public.adapter.initialisation, 256) == start_release(None, 256) == ()


# Poisson sampling


def test_every_example_is_in_a_batch_with_the_same_probability_by_itself():
    """Chi-square of the examples' counts, of the batch sizes, and of how often two neighbours are drawn together."""
    n, steps, rate = 60, 4000, 0.1
    batches = poisson_batches(steps, rate, np.arange(100, 100 + n), 1, "test")
    drawn = np.zeros((steps, n))
    for step, batch in enumerate(batches):
        drawn[step, batch - 100] = 1
    assert len(batches) == steps
    spread = steps * rate * (1 - rate)
    low, high = chi2.ppf(FALSE_ALARM / 2, n), chi2.isf(FALSE_ALARM / 2, n)
    assert low < ((drawn.sum(0) - steps * rate) ** 2 / spread).sum() < high
    sizes = drawn.sum(1)
    assert (
        low_high(steps - 1)[0] < ((sizes - sizes.mean()) ** 2).sum() / (n * rate * (1 - rate)) < low_high(steps - 1)[1]
    )
    together = (drawn[:, 1:] * drawn[:, :-1]).sum()
    expected = (n - 1) * steps * rate**2
    assert abs(together - expected) < 6 * np.sqrt(expected)
    consecutive = (drawn[1:] * drawn[:-1]).sum()  # one step tells nothing about the next
    assert abs(consecutive - n * (steps - 1) * rate**2) < 6 * np.sqrt(expected)
    assert min(sizes) == 0 or rate * n > 5  # batches may be empty


def low_high(freedom: int) -> tuple[float, float]:
    return chi2.ppf(FALSE_ALARM / 2, freedom), chi2.isf(FALSE_ALARM / 2, freedom)


def test_a_batch_may_be_empty_and_at_rate_one_is_everything():
    assert min(len(b) for b in poisson_batches(200, 0.01, np.arange(20), "few")) == 0
    assert all(np.array_equal(b, np.arange(5)) for b in poisson_batches(3, 1.0, np.arange(5), "all"))


def test_the_draw_depends_on_its_key_alone():
    first = poisson_batches(5, 0.3, np.arange(50), 1, 2)
    again = poisson_batches(5, 0.3, np.arange(50), 1, 2)
    other = poisson_batches(5, 0.3, np.arange(50), 1, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


# The guard


class Plain(ExampleGuard):
    def private(self, client, key, memory):
        return Private(1.0, 1.0, 4.0, key)


def guard(limit: int | None = 5, clients: int = 2, seed: int = 0) -> Plain:
    books = [Book(SampledGaussian(1.0, 0.2, 1), 1e-3, "rdp", limit=limit) for _ in range(clients)]
    return Plain(seed, LocalTraining(steps=2), [0.2] * clients, books)


EXAMPLES = np.arange(40)


def test_the_same_job_twice_is_the_same_job_and_costs_nothing_more():
    mine = guard()
    first, again = (mine.job(0, 1, "a", EXAMPLES, {}) for _ in range(2))
    assert first.private.key == again.private.key
    assert all(np.array_equal(a, b) for a, b in zip(first.batches, again.batches, strict=True))
    assert (mine.books[0].steps, mine.books[1].steps) == (2, 0)


def test_a_job_with_other_content_client_round_or_seed_has_other_noise():
    mine = guard(limit=None)
    keys = {mine.job(*job, EXAMPLES, {}).private.key for job in ((0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 1, "a"))}
    keys.add(guard(seed=1).job(0, 1, "a", EXAMPLES, {}).private.key)
    assert len(keys) == 5
    assert mine.books[0].steps == 6


def test_the_noise_does_not_depend_on_the_bits_of_the_state():
    """Cohorts of other sizes round differently."""
    first, other = guard().job(0, 1, "a", EXAMPLES, {}), guard().job(0, 1, "b", EXAMPLES, {})
    assert first.private.key == other.private.key
    assert all(np.array_equal(a, b) for a, b in zip(first.batches, other.batches, strict=True))


def test_the_last_job_is_cut_to_the_budget_and_then_there_are_none():
    mine = guard(limit=5)
    assert [len(mine.job(0, r, "a", EXAMPLES, {}).batches) for r in (1, 2, 3)] == [2, 2, 1]
    with pytest.raises(BudgetSpent, match="client 0 has taken all 5 steps"):
        mine.job(0, 4, "a", EXAMPLES, {})
    assert mine.stopped() is None
    for r in (1, 2, 3):
        mine.job(1, r, "a", EXAMPLES, {})
    assert mine.stopped() == "every client has spent its privacy budget"


def test_loss_and_tokens_stay_with_the_client():
    reply = ReplyFields(1, 2, 3, "layout", np.ones(2, np.float32), 40, 2, 900, 0.7)
    out = guard().release(reply, np.arange(2))
    assert out.loss is None and out.tokens == 0
    assert out.examples == 40 and out.steps == 2 and np.array_equal(out.update, reply.update)


def test_the_claim_is_that_of_the_worst_holder():
    mine = guard()
    mine.job(1, 1, "a", EXAMPLES, {})
    rows = mine.rows([40, 40])
    alone = epsilon([SampledGaussian(1.0, 0.2, 2)], 1e-3)
    assert worst(rows)["client"] == 1 and mine.epsilon == rows[1]["epsilon"] == alone > rows[0]["epsilon"] == 0
    made = statement("test", rows, against="the server")
    assert (made.epsilon, made.delta, made.relation) == (alone, 1e-3, "adding or removing it")
    assert rows[1]["mechanism"].startswith("2 steps of the Gaussian mechanism (Poisson sampling at rate 0.2")
    assert not any("above 1/n_i" in said for said in made.uncovered)
    loose = statement("test", mine.rows([2000, 2000]))
    assert any("delta = 0.001 is above 1/n_i" in said for said in loose.uncovered)
