"""Canaries pass the code that makes real samples' gradients private, and many runs of a step bound its epsilon."""

import math

import numpy as np
import pytest
import torch

from clients.adapters.bra import BRA
from clients.adapters.ffa import FFA
from clients.adapters.lora import LoRA
from clients.cohort import Cohort, CohortBatch
from clients.local import private
from clients.local.private import CLIPPING, RAW, AdaptiveClip, Canaries, Private, clipping_groups
from clients.local.training import Work, audited
from fl.keys import generator
from privacy.accounting import SampledGaussian, epsilon
from privacy.audit import trials
from tests.clients.local.test_private import nothing
from tests.oracles.cohorts import build, states
from tests.oracles.models import batches
from tests.oracles.variants import spaced, trained_alone
from tests.privacy.audit.faults import plant

SPARE = 8


def planted(number: int, *taken: list[int]) -> Canaries:
    return Canaries(number, SPARE, [np.array(t, dtype=int) for t in taken], ("coordinates",))


def work(job: Private, client: int = 0) -> Work:
    steps = 1 if job.canaries is None else len(job.canaries.taken)
    return Work(client, 1, np.zeros(1, np.float32), [np.arange(1)] * steps, 0.1, private=job)


def step(cohort: Cohort, job: Private, real: int = 0, at: int = 0) -> torch.Tensor:
    """The gradient of one step over ``real`` samples and the job's canaries."""
    batch = batches(cohort.task, [max(1, real)])[0]
    data = CohortBatch.of([batch if real else nothing(batch)])
    return private.gradients(cohort, states(cohort, 1), data, [work(job)], at)[1][0]


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("adapter", [LoRA(rank=3), FFA(rank=3), BRA(rank=3)], ids=["lora", "ffa", "lora_sb"])
def test_a_canary_is_clipped_summed_and_divided_as_a_sample_is(adapter, clipping):
    cohort = build("bert", adapter)
    groups = len(clipping_groups(cohort, clipping))
    made = planted(10, [1, 4, 9])
    with_canaries = step(cohort, Private(0.5, 0.0, 4.0, ("k",), clipping, canaries=made), 3)
    without = step(cohort, Private(0.5, 0.0, 4.0, ("k",), clipping), 3)
    own = made.coordinates(np.arange(cohort.layout.size))
    expected = torch.zeros_like(without)
    expected[own[[1, 4, 9]]] = 0.5 / math.sqrt(groups) / 4
    assert torch.allclose(with_canaries - without, expected, atol=1e-12)
    # What is recorded is the release at their coordinates, in units of what one adds.
    unit = 0.5 / math.sqrt(groups) / 4
    assert np.allclose(made.seen[0], (with_canaries[own] / unit).numpy())
    assert len(set(own.tolist())) == 10 + SPARE


def test_noise_is_in_what_is_recorded():
    cohort = build("bert")
    made = planted(10, [])
    grad = step(cohort, Private(2.0, 3.0, 4.0, ("k",), canaries=made))
    own = made.coordinates(np.arange(cohort.layout.size))
    assert np.allclose(made.seen[0], (grad[own] * 4 / 2).numpy())
    assert np.std(made.seen[0]) > 1


def test_the_pieces_of_many_canaries_are_those_of_all(monkeypatch):
    cohort = build("bert")
    whole, parts = planted(10, [0, 1, 2, 5, 7]), planted(10, [0, 1, 2, 5, 7])
    expected = step(cohort, Private(0.5, 0.0, 4.0, ("k",), canaries=whole), 2)
    monkeypatch.setattr(private, "SAMPLE_SCALARS", 2 * cohort.layout.size)
    assert torch.allclose(step(cohort, Private(0.5, 0.0, 4.0, ("k",), canaries=parts), 2), expected, atol=1e-14)


def test_each_step_has_its_own_batch_of_canaries():
    cohort = build("bert")
    made = planted(10, [3], [])
    job = Private(0.5, 0.0, 4.0, ("k",), canaries=made)
    for at in (0, 1):
        step(cohort, job, at=at)
    assert np.allclose(np.stack(made.seen)[:, :10], [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0], [0] * 10])
    assert audited(work(job)).shape == (2, 10 + SPARE)
    assert audited(work(Private(0.5, 0.0, 4.0, ("k",)))) is None


def test_half_of_the_canaries_are_within_a_norm_that_adapts():
    cohort, adaptive = build("bert"), AdaptiveClip(0.5, 0.2, 1e-9)
    made = planted(10, [0, 1, 2, 3])
    job = Private(0.5, 0.0, 4.0, ("k",), adaptive=adaptive, canaries=made)
    step(cohort, job)
    assert np.allclose(made.seen[0][:5], [0.99, 1, 0.99, 1, 0])
    assert job.clip == pytest.approx(0.5)  # two within, two not: half, as the quantile asks
    assert RAW > 1


def test_a_client_of_a_lower_rank_has_canaries_among_its_own_columns():
    cohort = spaced("bert", LoRA(rank=[1, 3]))
    with trained_alone(cohort, (0,)) as alone:
        own = private._owned(alone, 0)
        assert len(own) < alone.layout.size
        made = planted(10, list(range(10)))
        step(alone, Private(0.5, 0.0, 4.0, ("k",), canaries=made))
        assert np.allclose(made.seen[0], [1] * 10 + [0] * SPARE)


# Many runs of a few steps, the canary alone in the data: what an empty batch gives shows.

STEPS, RATE, DELTA = 4, 0.5, 1e-5


def released(cohort: Cohort, present: bool, run: int, noise: float) -> np.ndarray:
    """All that a job of `STEPS` releases where the only example is the canary, or there is none."""
    taken = generator("taken", present, run).random(STEPS) < RATE
    made = planted(1, *[[0] if present and t else [] for t in taken])
    job = Private(1.0, noise, 1.0, ("noise", present, run), canaries=made)
    return np.stack([step(cohort, job, at=at).numpy() for at in range(STEPS)])


@pytest.mark.parametrize("fault", ["", "empty batches skipped", "noise dropped"])
def test_an_empty_step_that_is_skipped_shows_and_the_mechanism_does_not(monkeypatch, fault):
    cohort, noise = build("bert", BRA(rank=3)), 6.0
    plant(monkeypatch, fault)
    direction = np.zeros(cohort.layout.size)
    direction[planted(1).coordinates(np.arange(cohort.layout.size))[0]] = 1
    claimed = epsilon([SampledGaussian(noise, RATE, STEPS)], DELTA)
    runs: dict[tuple, np.ndarray] = {}

    def release(present: bool, run: int) -> np.ndarray:
        if (present, run) not in runs:
            runs[present, run] = released(cohort, present, run, noise)
        return runs[present, run]

    found = trials.audit_release(release, direction, DELTA, 60)
    assert found.ceiling > claimed
    assert found.contradicts(claimed) == bool(fault)
    # The mechanism is contradicted at this level with probability 1e-7.
    assert fault or not trials.audit_release(release, direction, DELTA, 60, 1 - 1e-7).contradicts(claimed)
