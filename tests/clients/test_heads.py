from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.heads import SoftmaxHead


def head(samples: int = 40, inputs: int = 7, classes: int = 3, bias: bool = True, l2: float = 0.05) -> SoftmaxHead:
    draws = np.random.default_rng(samples + inputs)
    features = draws.normal(size=(samples, inputs)) * np.linspace(0.2, 3, inputs) + 0.5
    return SoftmaxHead(features, draws.integers(0, classes, samples), classes, l2, bias)


def as_torch(problem: SoftmaxHead, point: torch.Tensor) -> torch.Tensor:
    """The objective by torch's own cross-entropy."""
    inputs = problem.features.shape[1]
    weight = point[: problem.classes * inputs].reshape(problem.classes, inputs)
    logits = torch.from_numpy(problem.features) @ weight.T
    if problem.bias:
        logits = logits + point[problem.classes * inputs :]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(problem.labels))
    return loss + problem.l2 / 2 * point.square().sum()


CASES = [(40, 7, 3, True), (40, 7, 3, False), (5, 20, 2, True), (1, 3, 4, True)]


@pytest.mark.parametrize(("samples", "inputs", "classes", "bias"), CASES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_loss_and_gradient_are_those_of_autograd(samples, inputs, classes, bias, scale):
    problem = head(samples, inputs, classes, bias)
    point = torch.from_numpy(np.random.default_rng(1).normal(size=problem.size) * scale).requires_grad_()
    loss = as_torch(problem, point)
    (gradient,) = torch.autograd.grad(loss, point)
    assert problem.loss(point.detach().numpy()) == pytest.approx(loss.item(), rel=1e-12)
    found = problem.gradient(point.detach().numpy())
    assert np.abs(found - gradient.numpy()).max() < 1e-12 * max(1.0, float(gradient.abs().max()))


@pytest.mark.parametrize(("samples", "inputs", "classes", "bias"), CASES)
def test_the_hessian_lies_between_the_two_curvatures(samples, inputs, classes, bias):
    problem = head(samples, inputs, classes, bias)
    bound = problem.smoothness()
    for scale in (0.0, 0.3, 3.0):
        point = torch.from_numpy(np.random.default_rng(2).normal(size=problem.size) * scale)
        hessian = torch.autograd.functional.hessian(lambda x: as_torch(problem, x), point)
        spectrum = torch.linalg.eigvalsh(hessian)
        assert float(spectrum[0]) >= problem.l2 * (1 - 1e-9) - 1e-12
        assert float(spectrum[-1]) <= bound * (1 + 1e-12)


def test_with_two_classes_the_bound_is_reached_at_zero():
    problem = head(classes=2)
    hessian = torch.autograd.functional.hessian(lambda x: as_torch(problem, x), torch.zeros(problem.size).double())
    assert float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(problem.smoothness(), rel=1e-12)
