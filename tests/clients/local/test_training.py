"""The loop of local training: who trains how long, on which batches, at what rate."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from clients.local.optimizers import SGD, AdamW
from clients.local.training import Fit, LocalTraining, Work, clip_rows
from clients.worker import Worker
from fl.errors import ConfigError, ShoalError
from tests.oracles.models import token_set
from tests.oracles.quadratic import Quadratic

DATA = token_set("classification", 40)


def work(client: int, steps: int, lr: float = 0.1, size: int = 4) -> Work:
    rng = np.random.default_rng(client)
    batches = [rng.choice(40, size, replace=False) for _ in range(steps)]
    return Work(client, 1, rng.normal(size=5).astype(np.float32), batches, lr)


def fit(works: list[Work], local: LocalTraining | None = None) -> list[Fit]:
    return Worker(Quadratic(), {"train": DATA}, local or LocalTraining(steps=1), seed=0).fit(works)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), AdamW(weight_decay=0.1)], ids=lambda o: type(o).__name__)
def test_a_slot_that_has_ended_is_bit_identical_to_training_alone(optimizer):
    local = LocalTraining(steps=1, optimizer=optimizer, clip_norm=1.0)
    works = [work(0, 5), work(1, 3), work(2, 1)]
    together = fit(works, local)
    assert [f.steps for f in together] == [5, 3, 1]
    for mine, job in zip(together, works, strict=True):
        alone = fit([job], local)[0]
        assert np.array_equal(mine.state, alone.state)
        assert (mine.client, mine.tokens, mine.loss) == (alone.client, alone.tokens, alone.loss)
        assert not np.array_equal(mine.state, job.start)


def test_plain_sgd_is_what_the_formula_says():
    job = work(3, 4, lr=0.25)
    centres, theta, losses = Quadratic().centres.double().numpy(), job.start.astype(np.float64), []
    for batch in job.batches:
        gaps = theta - centres[DATA.tokens[DATA.offsets[batch]]]
        losses.append((gaps**2).sum(1).mean() / 2)
        theta = theta - 0.25 * gaps.mean(0)
    found = fit([job], LocalTraining(steps=4, optimizer=SGD()))[0]
    np.testing.assert_allclose(found.state, theta, rtol=1e-5, atol=1e-6)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.tokens == sum(int(DATA.lengths[b].sum()) for b in job.batches)


def test_every_slot_has_its_own_learning_rate():
    jobs = [work(0, 1, lr=0.1), work(0, 1, lr=0.3)]
    first, second = fit(jobs, LocalTraining(steps=1, optimizer=SGD()))
    np.testing.assert_allclose(second.state - jobs[1].start, 3 * (first.state - jobs[0].start), rtol=1e-4)


def test_slots_with_smaller_batches_lose_nothing():
    small, large = work(0, 2, size=1), work(1, 2, size=6)
    together = fit([small, large])
    for found, job in zip(together, (small, large), strict=True):
        np.testing.assert_allclose(found.state, fit([job])[0].state, rtol=1e-6)
        assert found.tokens == sum(int(DATA.lengths[b].sum()) for b in job.batches)


def test_the_start_states_are_left_as_they_are_and_memory_comes_back():
    jobs = [work(0, 2), work(1, 2)]
    jobs[1].memory = {"kept": np.arange(3)}
    before = [j.start.copy() for j in jobs]
    found = fit(jobs)
    assert all(np.array_equal(j.start, b) for j, b in zip(jobs, before, strict=True))
    assert found[0].memory == {} and found[1].memory["kept"].tolist() == [0, 1, 2]
    found[0].state += 1  # results do not share memory
    assert not np.array_equal(found[0].state, fit(jobs)[0].state)


def test_the_optimiser_counts_the_steps_from_one_and_starts_afresh_with_each_job(monkeypatch):
    counted, step = [], AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda *a: (counted.append((a[4], bool(a[3]["first"].any()))), step(*a))[1])
    worker = Worker(Quadratic(), {"train": DATA}, LocalTraining(steps=1), seed=0)
    for _ in range(2):
        worker.fit([work(0, 3)])
    assert counted == [(1, False), (2, True), (3, True)] * 2


def test_jobs_out_of_order_are_refused():
    with pytest.raises(ValueError, match="falling number of steps"):
        fit([work(0, 1), work(1, 2)])


def test_accumulation_is_the_cohorts():
    worker = Worker(Quadratic(), {"train": DATA}, LocalTraining(steps=1, accumulation=3), seed=0)
    worker.fit([work(0, 2)])
    assert worker.cohort.accumulated == [3, 3]


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({"steps": 5}, 3, 5),
        ({"epochs": 1}, 10, 3),
        ({"epochs": 2}, 10, 6),  # two epochs of batches of 4, 4 and 2
        ({"epochs": 3}, 8, 6),
        ({"epochs": 2}, 1, 2),
        ({"epochs": 0.5}, 10, 2),
        ({"epochs": 0.01}, 10, 1),
        ({"epochs": 1.5}, 10, 5),
        ({"epochs": 0.1 + 0.2}, 40, 3),  # 0.30000000000000004 x 40 / 4
    ],
)
def test_the_number_of_steps(settings, examples, steps):
    assert LocalTraining(batch_size=4, **settings).num_steps(examples) == steps
    assert len(LocalTraining(batch_size=4, **settings).batches(0, 0, 1, np.arange(examples))) == steps


def test_steps_or_epochs_have_to_be_given():
    with pytest.raises(ConfigError, match=r"local\.steps or local\.epochs has to be given"):
        LocalTraining()


def test_epochs_replace_steps():
    assert LocalTraining(steps=7, epochs=1.0, batch_size=4).num_steps(10) == 3


@pytest.mark.parametrize(("examples", "size"), [(10, 4), (12, 4), (3, 4), (5, 1)])
def test_every_epoch_visits_every_example_once(examples, size):
    mine = np.arange(100, 100 + examples)
    batches = LocalTraining(epochs=3.0, batch_size=size).batches(0, 0, 1, mine)
    each = -(-examples // size)
    epochs = [np.concatenate(batches[i * each : (i + 1) * each]) for i in range(3)]
    assert all(sorted(e) == list(mine) for e in epochs)
    assert examples == 3 or any(not np.array_equal(epochs[0], e) for e in epochs[1:])
    assert all(len(b) <= size for b in batches)


def test_steps_go_on_into_further_epochs():
    batches = LocalTraining(steps=7, batch_size=4).batches(0, 0, 1, np.arange(10))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    counts = Counter(np.concatenate(batches).tolist())
    assert set(counts.values()) == {2, 3} and sum(counts.values()) == 24


def test_batches_come_from_the_key_alone():
    local, mine = LocalTraining(steps=3, batch_size=4), np.arange(30)

    def drawn(*key: int) -> list:
        return np.concatenate(local.batches(*key, mine)).tolist()

    assert drawn(0, 0, 1) == drawn(0, 0, 1)
    assert len({tuple(drawn(*key)) for key in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]}) == 4


def test_a_client_without_examples_is_an_error_and_not_an_endless_loop():
    with pytest.raises(ShoalError, match="client 4 has no examples"):
        LocalTraining(steps=3).batches(0, 4, 1, np.zeros(0, dtype=np.int64))


def rates(rounds: int = 5, **settings) -> list[float]:
    local = LocalTraining(steps=1, lr=0.8, **settings)
    return [local.lr_at(r, rounds) for r in range(1, rounds + 1)]


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({}, [0.8] * 5),
        ({"lr_schedule": "linear"}, [0.8, 0.64, 0.48, 0.32, 0.16]),
        ({"lr_schedule": "linear", "lr_final": 0.5}, [0.8, 0.72, 0.64, 0.56, 0.48]),
        ({"lr_schedule": "cosine"}, [0.4 * (1 + math.cos(math.pi * x)) for x in (0, 0.2, 0.4, 0.6, 0.8)]),
        ({"lr_schedule": "cosine", "lr_final": 0.25}, [0.2 + 0.3 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]),
        ({"lr_schedule": "step", "lr_step_rounds": 2, "lr_gamma": 0.1}, [0.8, 0.8, 0.08, 0.08, 0.008]),
        ({"lr_warmup_rounds": 3}, [0.2, 0.4, 0.6, 0.8, 0.8]),
        ({"lr_warmup_rounds": 1, "lr_schedule": "linear"}, [0.4, 0.8, 0.6, 0.4, 0.2]),
    ],
    ids=str,
)
def test_the_learning_rate_of_each_round(settings, values):
    assert rates(**settings) == pytest.approx(values, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_a_single_round_and_rounds_past_the_end_have_a_rate(schedule):
    assert rates(1, lr_schedule=schedule) == pytest.approx([0.8])
    local = LocalTraining(steps=1, lr=0.8, lr_schedule=schedule, lr_final=0.1)
    assert 0 < local.lr_at(9, 5) <= 0.8


def test_each_row_is_clipped_as_torch_clips_a_gradient():
    grads = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads *= torch.tensor([[1e-3], [0.5], [3.0], [100.0]])
    clipped = clip_rows(grads, 1.5)
    for row, mine in zip(grads, clipped, strict=True):
        parameter = torch.zeros(9, dtype=torch.float64, requires_grad=True)
        parameter.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 1.5)
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-14, atol=0)
    assert torch.equal(clipped[0], grads[0]) and clipped[3].norm() == pytest.approx(1.5, rel=1e-6)


def test_a_clipped_step_is_no_longer_than_the_bound():
    job = work(0, 1, lr=1.0)
    free = fit([job], LocalTraining(steps=1, optimizer=SGD()))[0]
    held = fit([job], LocalTraining(steps=1, optimizer=SGD(), clip_norm=0.01))[0]
    assert np.linalg.norm(free.state - job.start) > 0.1
    assert np.linalg.norm(held.state - job.start) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_shows_in_that_slots_state_alone():
    jobs = [work(0, 2), work(1, 2)]
    jobs[0].start[2] = np.inf
    broken, fine = fit(jobs, LocalTraining(steps=1, clip_norm=1.0))
    assert not np.isfinite(broken.state).all() and np.isfinite(fine.state).all()
