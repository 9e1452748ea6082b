"""Many jobs as cohorts, in one process or several: what is grouped, and that nothing else changes the result."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from clients.adapters.lora import LoRA
from clients.local.optimizers import SGD, AdamW
from clients.local.training import LocalTraining, Work
from clients.pool import available
from clients.trainer import Plan, Trainer, cohorts
from clients.worker import Worker
from tests.oracles import federated_loop
from tests.oracles.cohorts import apart, build, states
from tests.oracles.models import token_set

SIZES = (12, 7, 9, 5, 16)
needs_fork = pytest.mark.skipif(not available(), reason="needs fork")


def some_works(number: int, seed: int, examples: int = 50) -> list[Work]:
    rng = np.random.default_rng(seed)
    return [
        Work(c, 1, np.zeros(1, dtype=np.float32), [rng.choice(examples, 4) for _ in range(rng.integers(1, 4))], 0.1)
        for c in rng.permutation(number)
    ]


LENGTHS = np.random.default_rng(0).integers(3, 60, 50)


@pytest.mark.parametrize("number", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("workers", [1, 2, 3])
class TestCohorts:
    def test_every_job_is_in_one_cohort(self, number, size, workers):
        groups = cohorts(some_works(number, 1), LENGTHS, size, workers)
        assert sorted(i for group in groups for i in group) == list(range(number))

    def test_cohorts_are_of_like_size_within_the_bound_and_spread_over_the_workers(self, number, size, workers):
        sizes = [len(g) for g in cohorts(some_works(number, 2), LENGTHS, size, workers)]
        assert min(sizes) >= 1 and max(sizes) <= size and max(sizes) - min(sizes) <= 1
        assert len(sizes) % workers == 0 or len(sizes) == number

    def test_steps_fall_within_a_cohort_and_like_lengths_go_together(self, number, size, workers):
        works = some_works(number, 3)
        groups = cohorts(works, LENGTHS, size, workers)
        order = [(-len(works[i].batches), -LENGTHS[np.concatenate(works[i].batches)].mean()) for g in groups for i in g]
        assert order == sorted(order)

    def test_the_cohorts_do_not_depend_on_the_order_of_the_jobs(self, number, size, workers):
        works = some_works(number, 4)
        groups = [[works[i].client for i in g] for g in cohorts(works, LENGTHS, size, workers)]
        assert groups == [[works[::-1][i].client for i in g] for g in cohorts(works[::-1], LENGTHS, size, workers)]


def test_no_jobs_make_no_cohorts():
    assert cohorts([], LENGTHS, 8, 2) == []


def worker(family: str = "bert", local: LocalTraining | None = None, **model) -> Worker:
    cohort = build(family, LoRA(rank=3, alpha=6.0), torch.float32, **model)
    sets = {name: token_set(cohort.task, sum(SIZES), seed) for seed, name in enumerate(("train", "test"))}
    return Worker(cohort, sets, local or LocalTraining(epochs=1.0, batch_size=4, lr=0.01), seed=5)


def parts() -> list[np.ndarray]:
    return np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])


def jobs(mine: Worker, round: int = 1, state: np.ndarray | None = None) -> list[Work]:
    start = mine.cohort.initial.numpy() if state is None else state
    return [
        Work(c, round, start, mine.local.batches(mine.seed, c, round, part), mine.local.lr)
        for c, part in enumerate(parts())
    ]


def trained(mine: Worker, works: list[Work], **plan) -> list[np.ndarray]:
    trainer = Trainer(mine, Plan(**plan))
    try:
        fits = trainer.train(works)
    finally:
        trainer.close()
    assert [f.client for f in fits] == [w.client for w in works]
    return [f.state for f in fits]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_cohort_size_changes_rounding_only(family, dropout):
    mine = worker(family, dropout=dropout)
    works = jobs(mine)
    alone = trained(mine, works, cohort_size=1)
    for size in (2, 8):
        for found, expected, work in zip(trained(mine, works, cohort_size=size), alone, works, strict=True):
            moved = expected - work.start
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(moved)


@needs_fork
def test_two_workers_give_the_bits_of_one_with_the_same_cohorts():
    mine = worker()
    works = jobs(mine)[:4]
    one = trained(mine, works, cohort_size=2, workers=1)
    two = trained(mine, works, cohort_size=2, workers=2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@needs_fork
def test_two_threads_work_in_a_child_and_leave_this_process_alone():
    mine = worker()
    trainer = Trainer(mine, Plan(threads=2))
    try:
        assert trainer.pool is not None and torch.get_num_threads() == 1
        found = [f.state for f in trainer.train(jobs(mine))]
    finally:
        trainer.close()
    assert trainer.pool is None
    for a, b in zip(found, trained(mine, jobs(mine)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_single_worker_with_one_thread_stays_in_this_process():
    trainer = Trainer(worker(), Plan())
    assert trainer.pool is None
    trainer.close()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=needs_fork)])
def test_each_cohort_is_told_once_as_it_ends(workers):
    mine, told = worker(), []
    trainer = Trainer(mine, Plan(cohort_size=2, workers=workers))
    trainer.on_cohort = lambda fits: told.append([f.client for f in fits])
    try:
        trainer.train(jobs(mine))
    finally:
        trainer.close()
    expected = cohorts(jobs(mine), mine.sets["train"].lengths, 2, workers)
    assert sorted(told) == sorted(expected)


def test_no_jobs_give_no_results():
    assert trained(worker(), []) == []


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_evaluation_gives_each_example_its_own_score_whatever_the_batches_and_workers(family):
    mine = worker(family)
    state = states(mine.cohort, 1)[0].numpy()
    examples = np.random.default_rng(0).permutation(sum(SIZES))
    alone = [mine.evaluate(state, "test", examples[i : i + 1]) for i in range(len(examples))]
    for plan, size in ((Plan(), 16), (Plan(), 5), (Plan(workers=2), 5) if available() else (Plan(), 7)):
        trainer = Trainer(mine, plan)
        try:
            scores = trainer.evaluate(state, "test", examples, size)
        finally:
            trainer.close()
        np.testing.assert_allclose(scores.loss, [s.loss[0] for s in alone], rtol=1e-5)
        assert scores.targets.tolist() == [s.targets[0] for s in alone]
        assert scores.predicted.tolist() == [s.predicted[0] for s in alone]


@needs_fork
def test_evaluation_has_the_same_bits_for_any_number_of_workers():
    mine = worker()
    state, found = mine.cohort.initial.numpy(), []
    for workers in (1, 2):
        trainer = Trainer(mine, Plan(workers=workers))
        try:
            found.append(trainer.evaluate(state, "test", np.arange(30), 8).loss)
        finally:
            trainer.close()
    assert np.array_equal(*found)


def test_evaluating_nothing_gives_nothing():
    scores = Trainer(worker(), Plan()).evaluate(np.zeros(1, dtype=np.float32), "test", np.zeros(0), 8)
    assert len(scores.loss) == len(scores.targets) == len(scores.predicted) == 0


def test_batches_of_evaluation_are_of_like_length_and_the_longest_go_first(monkeypatch):
    mine, seen = worker(), []
    evaluate = mine.evaluate
    monkeypatch.setattr(
        mine, "evaluate", lambda s, n, e, b: (seen.append(mine.sets[n].lengths[e]), evaluate(s, n, e, b))[1]
    )
    Trainer(mine, Plan()).evaluate(mine.cohort.initial.numpy(), "test", np.arange(sum(SIZES)), 8)
    assert [len(s) for s in seen] == [8, 8, 8, 8, 8, 8, 1]
    assert (np.diff(np.concatenate(seen)) <= 0).all()


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (AdamW(weight_decay=0.1), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
        (SGD(momentum=0.9), partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    ],
    ids=["adamw", "momentum"],
)
def test_two_rounds_of_federated_averaging_match_plain_peft_and_torch(family, optimizer, make):
    """The end-to-end oracle: ragged clients, cohorts, the optimiser, the weighted mean."""
    local = LocalTraining(epochs=1.0, batch_size=4, lr=make.keywords["lr"], optimizer=optimizer)
    mine = worker(family, local)
    assert len({local.num_steps(n) for n in SIZES}) > 1
    trainer, state = Trainer(mine, Plan(cohort_size=3)), mine.cohort.initial.double().numpy()
    for round in (1, 2):
        works = jobs(mine, round, state.astype(np.float32))
        updates = np.stack(
            [f.state.astype(np.float64) - w.start for f, w in zip(trainer.train(works), works, strict=True)]
        )
        state = works[0].start + np.average(updates, axis=0, weights=SIZES)
    theirs = federated_loop.fedavg(
        mine.cohort.unstacked(mine.cohort.initial), mine.cohort.layout, mine.cohort.initial, mine.sets["train"],
        SIZES, 2, lambda c, r: local.batches(mine.seed, c, r, parts()[c]), make,
    )  # fmt: skip
    mine.cohort.restack()
    begun = mine.cohort.initial.double()
    # Of the distance moved, not of the state: most of that is A's random start.
    assert apart(torch.from_numpy(state) - begun, theirs - begun) <= 1e-5
