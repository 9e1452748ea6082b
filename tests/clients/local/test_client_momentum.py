"""Client momentum: what a client keeps from round to round, and what it sends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clients.local.client_momentum import MOMENTUM, ClientMomentum
from clients.local.optimizers import AdamW
from clients.local.training import Fit, Work
from clients.worker import Worker
from fl.errors import ConfigError
from tests.helpers import final, go, rounds, vector
from tests.oracles.models import token_set
from tests.oracles.quadratic import Quadratic

DATA = token_set("classification", 40)
CENTRES = Quadratic().centres.double().numpy()


def fit(works: list[Work], local: ClientMomentum) -> list[Fit]:
    return Worker(Quadratic(), {"train": DATA}, local, seed=0).fit(works)


def work(client: int, round: int, memory: dict | None = None, lr: float = 0.25) -> Work:
    rng = np.random.default_rng((client, round))
    batch = rng.choice(40, 4, replace=False)
    return Work(client, round, rng.normal(size=5).astype(np.float32), [batch], lr, memory or {})


def gradient(job: Work) -> np.ndarray:
    return (job.start - CENTRES[DATA.tokens[DATA.offsets[job.batches[0]]]]).mean(0)


def test_rounds_build_the_momentum_that_the_formula_says():
    local, memory, expected = ClientMomentum(beta=0.8), {}, np.zeros(5)
    for round in range(1, 5):
        job = work(0, round, memory, lr=0.1 * round)
        found = fit([job], local)[0]
        expected = 0.8 * expected + 0.2 * gradient(job)
        memory = found.memory
        np.testing.assert_allclose(memory[MOMENTUM], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.sent, -0.1 * round * expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.state, job.start + found.sent, rtol=1e-6)
        assert found.steps == 1


def test_beta_0_sends_the_gradient_and_a_job_changes_no_memory_that_it_was_given():
    jobs = [work(c, 1, {MOMENTUM: np.ones(5, np.float32), "other": np.arange(3)}) for c in range(3)]
    for found, job in zip(fit(jobs, ClientMomentum(beta=0.0)), jobs, strict=True):
        np.testing.assert_allclose(found.sent, -0.25 * gradient(job), rtol=1e-5, atol=1e-6)
        assert job.memory[MOMENTUM].tolist() == [1] * 5
        assert found.memory["other"].tolist() == [0, 1, 2]


def test_clients_of_a_cohort_are_each_alone():
    jobs = [work(c, 1, {MOMENTUM: np.full(5, c, np.float32)}, lr=0.1 + c) for c in range(3)]
    for found, job in zip(fit(jobs, ClientMomentum()), jobs, strict=True):
        alone = fit([job], ClientMomentum())[0]
        assert np.array_equal(found.sent, alone.sent)
        assert np.array_equal(found.memory[MOMENTUM], alone.memory[MOMENTUM])
        assert (found.client, found.tokens, found.loss) == (job.client, alone.tokens, alone.loss)


def test_clip_norm_bounds_the_gradient_before_it_joins_the_momentum():
    job = work(0, 1)
    fresh = fit([job], ClientMomentum(beta=0.5, clip_norm=0.1))[0].memory[MOMENTUM]
    assert np.linalg.norm(gradient(job)) > 0.2
    np.testing.assert_allclose(np.linalg.norm(fresh), 0.05, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"steps": 2}, "local.steps"),
        ({"steps": None}, "local.steps"),
        ({"epochs": 1.0}, "local.epochs"),
        ({"optimizer": AdamW()}, "local.optimizer"),
    ],
)
def test_more_than_one_gradient_or_another_optimiser_is_refused(settings, key):
    with pytest.raises(ConfigError) as error:
        ClientMomentum(**settings)
    assert error.value.key == key
    job = work(0, 1)
    with pytest.raises(ValueError, match="one batch"):
        fit([replace(job, batches=job.batches * 2)], ClientMomentum())


WORDS = ("local=client_momentum", "local.steps=1")


def test_an_adapter_that_alternates_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rolora"):
        go(tmp_path, *WORDS, "adapter=rolora", "aggregator=rolora")


def test_under_plain_averaging_beta_0_is_fedsgd_and_the_momentum_of_full_batches_is_the_mean_s(tmp_path):
    """With all examples in each batch, a run is that of one client that holds them all."""
    words = (*WORDS, "schedule.rounds=3", "local.batch_size=1000", "data.client_test_fraction=0")
    go(tmp_path / "four", *words)
    go(tmp_path / "one", *words, "clients.number=1")
    np.testing.assert_allclose(vector(tmp_path / "four"), vector(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    go(tmp_path / "fresh", *words, "local.beta=0")
    go(tmp_path / "sgd", *words, "local=sgd", "local.lr=0.1")
    np.testing.assert_allclose(vector(tmp_path / "fresh"), vector(tmp_path / "sgd"), rtol=1e-5, atol=1e-6)
    assert not np.allclose(vector(tmp_path / "fresh"), vector(tmp_path / "four"), atol=1e-5)
    assert [r["accepted"] for r in rounds(tmp_path / "four")] == [4] * 3
    assert final(tmp_path / "four")["client_steps"] == 12


def test_the_server_step_without_dp_brem_is_fedavg(tmp_path):
    words = (*WORDS, "partition=dirichlet", "partition.alpha=1")
    go(tmp_path / "plain", *words)
    go(tmp_path / "brem", *words, "aggregator=dp_brem")
    assert np.array_equal(vector(tmp_path / "plain"), vector(tmp_path / "brem"))
