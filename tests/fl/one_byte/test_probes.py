"""A scalar is the slope of a peer's loss along a direction; private ones are clipped and noised."""

import numpy as np
import pytest
import torch

from clients.local.private import Private
from clients.worker import Worker
from fl.compose import compose
from fl.experiment import Experiment, Settings
from fl.one_byte.directions import direction
from fl.one_byte.losses import OfHead, OfModel, losses_of
from fl.one_byte.probes import Probe, private_mean, probe
from tests.fl.one_byte.quadratics import SIZE, Quadratics, samples
from tests.helpers import ENCODER, SHARED

COLUMNS = np.arange(SIZE)


def test_the_mean_of_slope_times_direction_is_the_gradient():
    """E[g z] = grad, with a variance of (d + 1) |grad|^2 / n for n directions."""
    trainer, theta = Quadratics(samples(1)), np.full(SIZE, 0.3, np.float32)
    probes = [Probe(0, t, theta, [np.arange(12)] * 50) for t in range(1, 81)]
    found = probe(trainer, probes, COLUMNS, 1e-2, 0)
    estimate = np.mean([
        g * direction(SIZE, 0, t, 0, s) for t, one in enumerate(found, 1) for s, g in enumerate(one.scalars)
    ], axis=0)  # fmt: skip
    gradient = theta - trainer.samples.mean(0)
    error = np.linalg.norm(estimate - gradient) / np.linalg.norm(gradient)
    assert error < 2 * np.sqrt((SIZE + 1) / 4000)
    assert trainer.evaluations == 2 * 4000


def test_of_a_quadratic_a_slope_is_exact():
    """The central difference has no error there, whatever eps."""
    trainer, theta = Quadratics(samples(2)), np.linspace(-1, 1, SIZE).astype(np.float32)
    mine = [np.arange(12, 16), np.arange(16, 24)]
    (found,) = probe(trainer, [Probe(1, 3, theta, mine)], COLUMNS, 0.5, 9)
    slopes = [(theta - trainer.samples[b].mean(0)) @ direction(SIZE, 9, 3, 1, s) for s, b in enumerate(mine)]
    assert found.scalars == pytest.approx(slopes, rel=1e-5)


def test_only_the_columns_that_train_are_moved():
    trainer, theta = Quadratics(samples(1)), np.ones(SIZE, np.float32)
    columns = np.array([2, 7])
    (found,) = probe(trainer, [Probe(0, 1, theta, [np.arange(12)])], columns, 1e-2, 0)
    slope = (theta - trainer.samples.mean(0))[columns] @ direction(2, 0, 1, 0, 0)
    assert found.scalars == pytest.approx([slope], rel=1e-3)


def test_a_probe_leaves_the_state_and_the_generators_as_they_are():
    theta = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    before, torchs = theta.tobytes(), torch.random.get_rng_state()
    probe(Quadratics(samples(1)), [Probe(0, 1, theta, [np.arange(12)])], COLUMNS, 0.1, 0)
    assert theta.tobytes() == before and torch.equal(torch.random.get_rng_state(), torchs)


def test_many_perturbed_states_go_in_parts(monkeypatch):
    trainer, theta = Quadratics(samples(2)), np.ones(SIZE, np.float32)
    probes = [Probe(k, 1, theta, [np.arange(12 * k, 12 * k + 4)] * 3) for k in range(2)]
    whole = probe(trainer, probes, COLUMNS, 1e-2, 0)
    monkeypatch.setattr("fl.one_byte.probes.HELD", 2 * SIZE)
    parts = probe(trainer, probes, COLUMNS, 1e-2, 0)
    assert [p.scalars.tolist() for p in whole] == [p.scalars.tolist() for p in parts]


@pytest.fixture(scope="module", params=["lora", "head"])
def trainer(request):
    words = ["schedule=just_one_byte", "local=sgd", "model.head_std=0.1", f"adapter={request.param}"]
    experiment = Experiment(Settings.of(compose([*ENCODER, *words])[0]), SHARED)
    yield experiment.trainer
    experiment.close()


def start(trainer) -> np.ndarray:
    space = trainer.worker.cohort.space
    noise = np.random.default_rng(0).standard_normal(space.layout.size)
    return (trainer.worker.cohort.initial.numpy() + 0.05 * noise).astype(np.float32)


def test_of_a_model_it_is_the_directional_derivative(trainer):
    """Against the cohort's own gradients, by backward passes."""
    worker: Worker = trainer.worker
    space, examples, state = worker.cohort.space, np.arange(10), start(trainer)
    columns = space.columns(space.trains(1))
    (found,) = probe(losses_of(trainer), [Probe(2, 4, state, [examples] * 3)], columns, 1e-3, 0)
    ((losses, grads),) = trainer.gradients([(state, [examples], [("key",)])])
    slopes = [float(grads[0] @ direction(len(columns), 0, 4, 2, s)) for s in range(3)]
    assert found.scalars == pytest.approx(slopes, rel=5e-3, abs=1e-3)
    assert found.loss == pytest.approx(float(losses[0]), rel=1e-4)
    assert max(abs(s) for s in slopes) > 0.05


def test_a_head_s_losses_are_those_of_the_whole_network(trainer):
    states, examples = [start(trainer), 2 * start(trainer)], [np.array([7, 3, 50]), np.arange(20, 60)]
    mine = losses_of(trainer)
    found = mine(states, examples)
    assert isinstance(mine, OfHead) == (len(trainer.worker.cohort.swaps) == 1)
    assert [len(own) for own in found] == [3, 40]
    for own, right in zip(found, OfModel(trainer)(states, examples), strict=True):
        assert own == pytest.approx(right, rel=1e-4)
    assert mine([], []) == []


def test_a_private_scalar_is_the_clipped_sum_with_its_noise():
    slopes = np.array([5.0, -0.2, 0.1, -7.0, np.nan, np.inf])
    quiet = Private(0.5, 0.0, 4.0, ("key",))
    assert private_mean(slopes, quiet, 0) == pytest.approx((0.5 - 0.2 + 0.1 - 0.5) / 4)
    draws = np.array(
        [private_mean(slopes, Private(0.5, 3.0, 4.0, ("key", n)), s) for n in range(500) for s in range(4)]
    )
    assert draws.std() == pytest.approx(3.0 * 0.5 / 4, rel=0.05)
    assert draws.mean() == pytest.approx(-0.1 / 4, abs=4 * 0.375 / np.sqrt(2000))
    assert len(set(draws)) == 2000


def test_one_sample_more_moves_the_sum_by_the_clip_at_most():
    rng = np.random.default_rng(3)
    for _ in range(50):
        slopes, more = rng.standard_normal(9) * 4, rng.standard_normal() * 100
        job = Private(0.7, 1.0, 8.0, ("key",))
        gap = private_mean(np.append(slopes, more), job, 0) - private_mean(slopes, job, 0)
        assert abs(gap) <= 0.7 / 8 + 1e-12


def test_an_empty_batch_gives_noise_alone():
    trainer, job = Quadratics(samples(1)), Private(1.0, 2.0, 4.0, ("key",))
    empty = np.zeros(0, np.int64)
    (found,) = probe(trainer, [Probe(0, 1, np.ones(SIZE, np.float32), [empty, np.arange(3)], job)], COLUMNS, 1e-2, 0)
    assert found.scalars[0] == private_mean(np.zeros(0), job, 0) != 0
    assert trainer.evaluations == 2
