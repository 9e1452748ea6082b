"""The stacked optimisers against torch.optim, one slot at a time."""

from __future__ import annotations

import pytest
import torch

from clients.local.optimizers import SGD, AdamW, Optimizer

STEPS, SLOTS, SIZE = 20, 3, 11
LRS = (0.1, 0.02, 0.5)

SGDS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.05},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05},
]
ADAMWS = [{}, {"weight_decay": 0.1}, {"beta1": 0.5, "beta2": 0.9}, {"eps": 1e-2}, {"beta1": 0.0, "weight_decay": 0.3}]


def theirs(mine: Optimizer, settings: dict, parameter: torch.Tensor, lr: float) -> torch.optim.Optimizer:
    if isinstance(mine, SGD):
        return torch.optim.SGD([parameter], lr=lr, **settings)
    betas = (settings.get("beta1", 0.9), settings.get("beta2", 0.999))
    rest = {k: v for k, v in settings.items() if not k.startswith("beta")}
    return torch.optim.AdamW([parameter], lr=lr, betas=betas, **{"weight_decay": 0.0, **rest})


def gradients(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """``(steps, slots, d)``, of very different sizes so that eps and bias corrections matter."""
    source = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-6, 1, SIZE, dtype=dtype)
    return torch.randn(STEPS, SLOTS, SIZE, generator=source, dtype=dtype) * scale


def start(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(SLOTS, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def run(optimizer: Optimizer, dtype: torch.dtype, slots: int = SLOTS, grads: torch.Tensor | None = None):
    params = start(dtype)[:slots].clone()
    state, lr = optimizer.init(params), torch.tensor(LRS, dtype=dtype)[:slots, None]
    for step, grad in enumerate(gradients(dtype) if grads is None else grads, start=1):
        optimizer.step(params, grad[:slots].clone(), state, step, lr)
    return params, state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((SGD, s) for s in SGDS), *((AdamW, s) for s in ADAMWS)],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_every_slot_goes_where_torch_takes_it(kind, settings, dtype):
    mine = kind(**settings)
    params, _ = run(mine, dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for slot, lr in enumerate(LRS):
        parameter = start(dtype)[slot].clone().requires_grad_()
        torch_optimizer = theirs(mine, settings, parameter, lr)
        for grad in gradients(dtype):
            parameter.grad = grad[slot].clone()
            torch_optimizer.step()
        torch.testing.assert_close(params[slot], parameter.detach(), rtol=tolerance, atol=tolerance)
        assert (params[slot] - start(dtype)[slot]).norm() > 1e-3


@pytest.mark.parametrize("mine", [SGD(), SGD(momentum=0.9, nesterov=True), AdamW(weight_decay=0.1)], ids=repr)
def test_what_one_slot_gets_changes_no_bit_of_another(mine):
    params, state = run(mine, torch.float32)
    other = gradients(torch.float32)
    other[:, 1] *= -3
    changed, changed_state = run(mine, torch.float32, grads=other)
    alone, _ = run(mine, torch.float32, slots=1)
    assert torch.equal(params[[0, 2]], changed[[0, 2]]) and not torch.equal(params[1], changed[1])
    assert torch.equal(params[0], alone[0])
    assert all(torch.equal(state[n][[0, 2]], changed_state[n][[0, 2]]) for n in mine.state_names)


@pytest.mark.parametrize("mine", [SGD(momentum=0.9, weight_decay=0.1), AdamW(weight_decay=0.1)], ids=repr)
def test_a_step_on_a_prefix_leaves_the_rest_as_it_is(mine):
    params, state = run(mine, torch.float32)
    before, before_state = params.clone(), {n: t.clone() for n, t in state.items()}
    lr = torch.tensor(LRS)[:, None]
    mine.step(params[:2], torch.ones(2, SIZE), {n: t[:2] for n, t in state.items()}, STEPS + 1, lr[:2])
    assert torch.equal(params[2], before[2]) and not torch.equal(params[:2], before[:2])
    for name in mine.state_names:
        assert torch.equal(state[name][2], before_state[name][2])
        assert not torch.equal(state[name][:2], before_state[name][:2])


@pytest.mark.parametrize(
    ("mine", "names"), [(SGD(), ()), (SGD(momentum=0.5), ("momentum",)), (AdamW(), ("first", "second"))], ids=str
)
def test_the_memory_has_the_shape_of_the_states_and_starts_at_zero(mine, names):
    state = mine.init(torch.ones(2, 5, dtype=torch.float64))
    assert tuple(state) == names
    assert all(t.shape == (2, 5) and t.dtype == torch.float64 and not t.any() for t in state.values())


def test_the_base_class_takes_no_step():
    with pytest.raises(TypeError, match="has no step"):
        Optimizer().step(torch.zeros(1, 1), torch.zeros(1, 1), {}, 1, torch.zeros(1, 1))
