"""LoRA-Pro's gradients: the step that they make of the weight, and the freedom that is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clients.adapters.bra import BRA
from clients.adapters.ffa import FFA
from clients.adapters.lora import LoRA
from clients.adapters.rolora import RoLoRA
from clients.adapters.sora import SoRA
from clients.cohort import CohortBatch
from clients.local.lora_pro import LoRAPro, equivalent
from clients.local.training import LocalTraining
from fl.errors import ConfigError
from tests.oracles.cohorts import states
from tests.oracles.models import batches
from tests.oracles.variants import merged, projection, spaced, trained_alone, weight_gradients

D, K, R, S = 11, 7, 3, 1.7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(a: Tensor, b: Tensor, gradient: Tensor, scale: float = S, rcond: float = 1e-3) -> tuple[Tensor, Tensor]:
    """gA*, gB* of one slot, from the weight's gradient."""
    scales = torch.full((1, 1, 1), scale, dtype=torch.float64)
    found = equivalent(a[None], b[None], scale * (b.T @ gradient)[None], scale * (gradient @ a.T)[None], scales, rcond)
    return found[0][0], found[1][0]


def moved(a: Tensor, b: Tensor, new: tuple[Tensor, Tensor], scale: float = S) -> Tensor:
    return scale * (b @ new[0] + new[1] @ a)


def deficient(kind: str) -> tuple[Tensor, Tensor]:
    """A and B, of which one or both lack a direction or all of them."""
    a, b = normal(R, K, seed=1), normal(D, R, seed=2)
    if kind == "zero":
        b = torch.zeros_like(b)
    if kind in ("column", "both"):
        b[:, 1] = 0
    if kind == "dependent":
        b[:, 2] = 2 * b[:, 0] - b[:, 1]
    if kind in ("rows", "both"):
        a[1] = 0
    return a, b


@pytest.mark.parametrize("kind", ["full", "zero", "column", "dependent", "rows", "both"])
def test_the_step_is_the_projection_of_the_gradient_on_the_tangent_space(kind):
    """No other change of the factors comes nearer to full fine-tuning's step."""
    a, b = deficient(kind)
    gradient = normal(D, K, seed=3)
    found = moved(a, b, step(a, b, gradient))
    torch.testing.assert_close(found, projection(a, b, gradient), rtol=1e-9, atol=1e-10)
    assert 0.1 < (found - gradient).norm() / gradient.norm() < 0.95


@pytest.mark.parametrize("kind", ["full", "column", "dependent", "both"])
def test_what_is_left_free_is_spent_on_staying_near_the_plain_gradients(kind):
    """The derivative of |gA* - gA|^2 + |gB* - gB|^2 along every X is zero."""
    a, b = deficient(kind)
    gradient = normal(D, K, seed=3)
    new_a, new_b = step(a, b, gradient)
    off_a, off_b = new_a - S * b.T @ gradient, new_b - S * gradient @ a.T
    slope = off_a @ a.T - b.T @ off_b
    assert slope.abs().max() <= 1e-9 * off_a.norm()
    nearest = off_a.norm() ** 2 + off_b.norm() ** 2
    for seed in range(5):
        x = 0.1 * normal(R, R, seed=seed)
        assert (off_a + x @ a).norm() ** 2 + (off_b - b @ x).norm() ** 2 > nearest


def test_at_b_zero_only_b_moves_and_only_preconditioned():
    a, b = deficient("zero")
    gradient = normal(D, K, seed=3)
    new_a, new_b = step(a, b, gradient)
    assert not new_a.any()
    torch.testing.assert_close(new_b, gradient @ a.T @ torch.linalg.inv(a @ a.T) / S)


def test_the_step_depends_neither_on_the_scale_nor_on_how_the_product_is_split():
    a, b = deficient("full")
    gradient, mix = normal(D, K, seed=3), normal(R, R, seed=4) + 3 * torch.eye(R, dtype=torch.float64)
    plain = moved(a, b, step(a, b, gradient))
    torch.testing.assert_close(moved(a, b, step(a, b, gradient, 0.25), 0.25), plain)
    other_a, other_b = torch.linalg.solve(mix, a), b @ mix
    torch.testing.assert_close(moved(other_a, other_b, step(other_a, other_b, gradient)), plain)


def test_a_direction_that_is_too_short_counts_as_absent():
    """Of a column 1e-5 as long as the others: its gradient stays bounded, and the step is still a projection."""
    a, b = deficient("full")
    b[:, 2] *= 1e-5
    gradient = normal(D, K, seed=3)
    cut, kept = step(a, b, gradient), step(a, b, gradient, rcond=1e-8)
    assert cut[0].norm() < 10 < 1e3 < kept[0].norm()
    torch.testing.assert_close(moved(a, b, kept), projection(a, b, gradient), rtol=1e-6, atol=1e-8)
    two = b.clone()
    two[:, 2] = 0
    torch.testing.assert_close(moved(a, b, cut), projection(a, two, gradient), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_in_a_cohort_it_is_the_projection_of_each_slots_own_weight_gradient(family):
    """Against dl/dW of the merged model; the slots' clients have different scales. A head's gradient is as it was."""
    alphas = [5.0, 2.0]
    cohort = spaced(family, LoRA(rank=[3, 3], alpha=alphas))
    at, both = states(cohort, 2), batches(cohort.task, [2, 3])
    with trained_alone(cohort, (0, 1)):
        _, grads = cohort.gradients(at, CohortBatch.of(both))
        found = LoRAPro(steps=1).direction(at, grads.clone(), at, cohort)
    heads = [n for n in cohort.layout.names if "classifier" in n]
    assert bool(heads) == (family == "bert")
    for name in heads:
        assert torch.equal(cohort.layout.views(found)[name], cohort.layout.views(grads)[name])
    for slot, alpha in enumerate(alphas):
        views, new = cohort.layout.views(at[slot]), cohort.layout.views(found[slot])
        other = spaced(family, LoRA(rank=3, alpha=alpha))
        expected = weight_gradients(merged(other, at[slot]), both[slot])
        for module in cohort.space.modules:
            a, b = views[module.a], views[module.b]
            step_of_weight = moved(a, b, (new[module.a], new[module.b]), alpha / 3)
            gradient = expected[module.name.removeprefix("base_model.model.")]
            torch.testing.assert_close(step_of_weight, projection(a, b, gradient), rtol=1e-7, atol=1e-9)


def test_the_rows_that_a_client_of_lower_rank_does_not_own_stay_zero():
    cohort = spaced("llama", LoRA(rank=[4, 2], alpha=4.0))
    at = states(cohort, 2)
    own = torch.zeros(cohort.layout.size, dtype=torch.bool)
    own[torch.from_numpy(cohort.space.columns(None, 1).copy())] = True
    at[1, ~own] = 0
    with trained_alone(cohort, (0, 1)):
        _, grads = cohort.gradients(at, CohortBatch.of(batches(cohort.task, [2, 3])))
        found = LoRAPro(steps=1).direction(at, grads, at, cohort)
    assert not found[1, ~own].any() and found[1, own].any() and found[0, ~own].all()


@pytest.mark.parametrize("adapter", [FFA(), RoLoRA(), BRA(), SoRA(), LoRA(dora=True)], ids=lambda a: type(a).__name__)
def test_it_needs_both_factors(adapter):
    LoRAPro(steps=1).check(LoRA())
    LocalTraining(steps=1).check(adapter)
    with pytest.raises(ConfigError, match=r"local='lora_pro'.*trains A and B together"):
        LoRAPro(steps=1).check(adapter)
