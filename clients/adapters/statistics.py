"""Statistics of a sample that an initialisation needs, one for each adapted linear module, as sums that can be sent.

With x the inputs ``(tokens, k)`` of a module ``y = W x`` for one sample, and g ``(tokens, d)`` the gradient of the
sample's own loss with respect to its outputs:

    gradient   G = sum over samples of g^T x      (d, k): d loss / d W of the summed losses
    moment     M = sum over samples of x^T x      (k, k): over real tokens, not padding

Both are sums over samples, so clients' statistics add up to the pooled one. Clipped, a sample's statistic z (all
modules together) counts as ``min(1, C / |z|) z``, so that a sample more or less moves the sum by C at most. That takes
no ``(d, k)`` matrix for each sample:

    |g^T x|_F^2 = sum over tokens t, u of (g_t . g_u) (x_t . x_u)     (Li et al., arXiv 2110.05679)

On the wire the modules lie in one flat vector. A moment is symmetric, so its upper triangle is sent, off the diagonal
times sqrt(2): the vector's norm is then the matrices' Frobenius norm, and noise made for one is right for the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clients.cohort import Cohort, CohortBatch
from clients.layout import Layout
from fl.errors import ConfigError

KINDS = ("gradient", "moment")
Shapes = Mapping[str, tuple[int, int]]  # (d, k) of each module


def layers(cohort: Cohort) -> dict[str, nn.Module]:
    """The frozen linear layer below each adapted module of ``cohort``, by the module's path in ``cohort.model``.

    Heads, which train themselves, are left out. Raises `ConfigError` for an adapter of any other layer.
    """
    from transformers.pytorch_utils import Conv1D

    stacked = {id(layer) for _, _, layer in cohort.swaps}
    found: dict[str, nn.Module] = {}
    for path, module in cohort.model.named_modules():
        if id(module) not in stacked or not hasattr(module.layer, "base_layer"):
            continue
        layer = getattr(module, "base_layer", None)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise ConfigError("adapter.init", path, "for adapters B A or B R A of linear layers alone")
        found[path] = layer
    if not found:
        raise ConfigError("adapter.init", "no module", "for an adapter of at least one linear layer")
    return found


def weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight as ``(out, in)``; GPT-2's ``Conv1D`` stores it the other way."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T


def shapes(cohort: Cohort) -> dict[str, tuple[int, int]]:
    """``(d, k)`` of each adapted module, in the model's order."""
    return {path: (*weight(layer).shape,) for path, layer in layers(cohort).items()}


def collect(
    cohort: Cohort, batch: CohortBatch, kind: str, clip: float | None = None, state: Tensor | None = None
) -> dict[str, Tensor]:
    """The statistic ``kind`` of the samples in ``batch``, by module: summed, in float64, on the CPU.

    ``batch`` has one slot; its padding samples and padding tokens count for nothing, and dropout is off. ``state``
    ``(d,)`` is where the model stands (None: the cohort's initial state); with an adapter whose change is zero there,
    the statistics are W0's. ``clip`` bounds each sample's norm over all modules together. Takes one forward pass, and
    one backward pass for gradients, whose memory grows with samples x tokens x modules: sum over small batches. Raises
    `ConfigError` for a module whose inputs are not one row a token.
    """
    if kind not in KINDS or batch.input_ids.shape[0] != 1:
        raise ValueError(f"kind {kind!r} of {batch.input_ids.shape[0]} slots: one of {', '.join(KINDS)}, of one slot")
    found = layers(cohort)
    batch = dataclasses.replace(batch, keys=None)
    mask = batch.attention_mask[0].double() * (batch.weights[0] > 0)[:, None]  # (samples, tokens)
    inputs, gradients = _pass(cohort, found, batch, cohort.initial if state is None else state, kind == "gradient")

    def factors(path: str) -> tuple[Tensor, Tensor]:  # one module at a time in float64
        x = _rows(path, inputs[path], mask, kind == "moment")
        return (_rows(path, gradients[path], mask, False) if kind == "gradient" else x), x

    scale = torch.ones_like(mask[:, 0])
    if clip is not None:
        squares = torch.zeros_like(scale)
        for path in found:
            left, right = factors(path)
            squares += ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
        scale = clip / squares.clamp(min=0).sqrt().clamp(min=clip)
    total = {}
    for path in found:
        left, right = factors(path)
        total[path] = ((left * scale[:, None, None]).flatten(0, 1).T @ right.flatten(0, 1)).cpu()
    return total


Calls = dict[str, list[Tensor]]  # one tensor for each time that a module was called


def _pass(
    cohort: Cohort, found: Mapping[str, nn.Module], batch: CohortBatch, state: Tensor, backward: bool
) -> tuple[Calls, Calls]:
    """Inputs of the layers ``found`` and, after a backward pass, the gradients with respect to their outputs."""
    wide = torch.float64 if torch.float64 in {p.dtype for p in cohort.model.parameters()} else None
    tensors = cohort.layout.views(state.detach().to(cohort.device, wide)[None])
    inputs: Calls = {path: [] for path in found}
    outputs: Calls = {path: [] for path in found}
    with _hooked(found, inputs, outputs), torch.set_grad_enabled(backward):
        losses = cohort.sample_losses(tensors, batch)[0]  # (samples,)
        if not backward:
            return inputs, {}
        # The sum, never the mean: what one sample adds must not depend on how many others there are.
        loss = (losses * (batch.weights[0] > 0)).sum()
    flat = [y for path in found for y in outputs[path]]
    grads = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    gradients: Calls = {}
    for path in found:
        mine = zip(outputs[path], grads, strict=False)
        gradients[path] = [torch.zeros_like(y) if g is None else g for y, g in mine]
    return inputs, gradients


@contextmanager
def _hooked(found: Mapping[str, nn.Module], inputs: Calls, outputs: Calls) -> Iterator[None]:
    """Inside the block every call of a layer of ``found`` leaves its input and output."""

    def hook(path: str):
        def keep(_layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[path].append(args[0].detach())
            if torch.is_grad_enabled():
                # The first layer's output comes from frozen tensors alone: from here on there is a graph.
                outputs[path].append(out if out.requires_grad else out.requires_grad_())

        return keep

    handles = [layer.register_forward_hook(hook(path)) for path, layer in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(path: str, calls: Sequence[Tensor], mask: Tensor, masked: bool) -> Tensor:
    """``calls`` as one ``(samples, rows, features)`` in float64; zero, where ``masked``, at padding.

    A call has a row for each token, ``(samples, tokens, features)`` with the first two axes perhaps as one, or one for
    each sample (a pooled one, whose token is real).
    """
    samples, tokens = mask.shape
    parts = []
    for call in calls:
        if call.dim() == 2 and call.shape[0] in (samples * tokens, samples):
            call = call.reshape(samples, -1, call.shape[-1])
        if call.dim() != 3 or call.shape[0] != samples or call.shape[1] not in (tokens, 1):
            size = tuple(call.shape)
            allowed = f"for layers with a row for each token: this one saw {size} for {samples} samples x {tokens}"
            raise ConfigError("adapter.init", path, allowed)
        rows = call.double()
        if masked:
            rows = rows * (mask if call.shape[1] == tokens else mask.amax(1, keepdim=True))[..., None]
        parts.append(rows)
    return torch.cat(parts, dim=1)


def total(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of statistics, of batches or of clients, module by module."""
    return {path: torch.stack([part[path] for part in parts]).sum(0) for path in parts[0]}


def layout(shapes: Shapes, kind: str) -> Layout:
    """How the statistics of modules of ``shapes`` lie in one vector: d k or k (k + 1) / 2 scalars a module."""
    sizes = [(d * k if kind == "gradient" else k * (k + 1) // 2,) for d, k in shapes.values()]
    return Layout(tuple(shapes), tuple(sizes))


def pack(statistic: Mapping[str, Tensor], kind: str) -> Tensor:
    """One float64 vector of all modules; its norm is the Frobenius norm of all of them together."""
    return torch.cat([m.flatten() if kind == "gradient" else _triangle(m) for m in statistic.values()])


def unpack(flat: Tensor, shapes: Shapes, kind: str) -> dict[str, Tensor]:
    """The statistics that `pack` laid into ``flat``, in float64. Raises ValueError for a vector of another size."""
    views = layout(shapes, kind).views(flat.double())
    if kind == "gradient":
        return {path: view.reshape(shapes[path]) for path, view in views.items()}
    return {path: _symmetric(view, shapes[path][1]) for path, view in views.items()}


def _triangle(moment: Tensor) -> Tensor:
    row, column = torch.triu_indices(*moment.shape)
    return moment[row, column] * _weights(row, column)


def _symmetric(flat: Tensor, size: int) -> Tensor:
    row, column = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[row, column] = matrix[column, row] = flat / _weights(row, column)
    return matrix


def _weights(row: Tensor, column: Tensor) -> Tensor:
    """1 on the diagonal and sqrt(2) off it, where an entry stands for two."""
    return (1.0 + (row != column).double()).sqrt()


def privatise(flat: Tensor, clip: float, noise: float, generator: torch.Generator) -> Tensor:
    """``flat + N(0, (noise clip)^2 I)``: what a client sends of a sum over samples that were clipped to ``clip``."""
    return flat + noise * clip * torch.randn(flat.shape, generator=generator, dtype=torch.float64)
