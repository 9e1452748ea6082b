"""Slow twins of the client-side variants of LoRA: whole weights' gradients, projections, PEFT models of each rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.adapters.base import Adapter
from clients.cohort import Cohort
from clients.data.batch import Batch
from clients.local.training import Work
from tests.oracles.models import tiny
from tests.oracles.peft_loop import sample_loss


def spaced(family: str, adapter: Adapter, seed: int = 1, **model: int) -> Cohort:
    """A float64 cohort over ``tiny(family)`` that knows what its tensors are."""
    base, targets = tiny(family, dtype=torch.float64, **model)
    attached = adapter.attach(base, targets, seed).double()
    return Cohort(attached, base.task, space=adapter.space(attached))


def work(client: int = 0, examples: int = 3, steps: int = 1, round: int = 1) -> Work:
    """A job whose start is of no matter."""
    batches = [np.arange(examples) + 10 * step for step in range(steps)]
    return Work(client, round, np.zeros(1, np.float32), batches, 0.1)


@contextlib.contextmanager
def trained_alone(cohort: Cohort, clients: tuple[int, ...] = (0,), round: int = 1) -> Iterator[Cohort]:
    """Inside the block the cohort holds what trains in ``round``, as a worker would have it."""
    with cohort.training(cohort.space.trains(round), cohort.initial.double(), clients):
        yield cohort


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the linear layers, by the layers' names."""
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def out_in(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """``weight`` of the layer ``name`` as ``(out, in)``: GPT-2's Conv1D has it the other way."""
    return weight.T if isinstance(model.get_submodule(name), Conv1D) else weight


def merged(cohort: Cohort, state: Tensor) -> nn.Module:
    """The plain model, without PEFT, whose weights are those that ``state`` ``(d,)`` stands for."""
    return cohort.unstacked(state).merge_and_unload()  # type: ignore[operator]


def weight_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """dl/dW ``(out, in)`` of the plain ``model``, sample by sample: of the mean loss of the batch."""
    named = weights(model)
    for weight in named.values():
        weight.requires_grad_()
    loss = torch.stack([sample_loss(model, batch, row) for row in range(len(batch))]).mean()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: out_in(model, n, g) for n, g in zip(named, grads, strict=True) if g is not None}


def projection(a: Tensor, b: Tensor, gradient: Tensor) -> Tensor:
    """The matrix of the form ``B Y + Z A`` nearest to ``gradient`` ``(d, k)``, by least squares over all its entries.

    A's rows or B's columns may be dependent.
    """
    d, k = gradient.shape
    # vec(B Y) = (B x I_k) vec(Y), vec(Z A) = (I_d x A^T) vec(Z), with rows one after another.
    system = torch.cat(
        [torch.kron(b, torch.eye(k, dtype=b.dtype)), torch.kron(torch.eye(d, dtype=b.dtype), a.T.contiguous())], dim=1
    )
    found = torch.linalg.lstsq(system, gradient.reshape(-1, 1), driver="gelsd").solution
    return (system @ found).reshape(d, k)


def of_rank(
    family: str, targets: list[str], factors: dict[str, tuple[Tensor, Tensor]], alpha: float, batch: Batch
) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Loss and gradients of a PEFT LoRA of just the ranks of ``factors`` (A, B by module), at the same ``alpha``."""
    base = tiny(family, dtype=torch.float64)[0].module
    ranks = {name.removeprefix("base_model.model."): len(a) for name, (a, _) in factors.items()}
    config = LoraConfig(r=1, lora_alpha=alpha, target_modules=targets, rank_pattern=ranks)  # type: ignore[arg-type]
    model = get_peft_model(base, config).double().eval()  # type: ignore[arg-type]
    layers = {name: model.get_submodule(name) for name in factors}
    pairs = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}  # type: ignore
    with torch.no_grad():
        for name, (a, b) in factors.items():
            pairs[name][0].copy_(a)
            pairs[name][1].copy_(b)
    loss = torch.stack([sample_loss(model, batch, row) for row in range(len(batch))]).mean()
    loss.backward()
    return loss.item(), {n: (a.grad, b.grad) for n, (a, b) in pairs.items()}
