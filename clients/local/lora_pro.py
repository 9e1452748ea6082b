"""LoRA-Pro: gradients of A and B whose joint step is as near as can be to full fine-tuning's (arXiv 2407.18242).

A step ``dA, dB`` changes the weight by ``s (B dA + dB A)`` to first order. With G the gradient of the weight, so that
``gA = s B^T G`` and ``gB = s G A^T``, the step nearest to G in the Frobenius norm is (Wang et al.)

    gA* = 1/s^2 (B^T B)^+ gA + X A
    gB* = 1/s^2 (I - P_B) gB (A A^T)^+ - B X                  P_B = B (B^T B)^+ B^T
    s (B gA* + gB* A) = P_B G + (I - P_B) G P_A               P_A = A^T (A A^T)^+ A

for any X ``(r, r)``: the projection of G on the tangent space of the matrices ``s B A``, whatever s and however the
product is split into factors. X is the one that keeps gA* and gB* nearest to gA and gB:

    B^T B X + X A A^T = -1/s^2 (B^T B)^+ gA A^T,

a Sylvester equation in two symmetric matrices, solved in their eigenvectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.cohort import Cohort
from clients.local.training import LocalTraining
from fl.config import setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from clients.adapters.base import Adapter


@dataclass(frozen=True)
class LoRAPro(LocalTraining):
    """`LocalTraining` on the gradients gA*, gB*; a head's gradient stays as it is. For adapters that train A and B.

    The paper's inverses need factors of full rank, which B is not at the start (zero), nor after a step on few tokens.
    Here they are pseudo-inverses: a direction of a factor that is shorter than ``rcond`` times its longest counts as
    absent. The step is then the projection on the tangent space of what is left: with B = 0, ``gA* = 0`` and
    ``gB* = 1/s^2 gB (A A^T)^+``, the authors' first step.
    """

    rcond: float = setting(
        1e-3, gt=0, lt=1, help="a direction of a factor shorter than this share of its longest counts as absent"
    )

    def direction(self, params: Tensor, grads: Tensor, start: Tensor, cohort: Cohort) -> Tensor:
        state, out = cohort.layout.views(params), cohort.layout.views(grads)
        for module in cohort.space.modules:
            scale = torch.full((len(params), 1, 1), module.scale, dtype=params.dtype, device=params.device)
            gain = cohort.gains.get(module.scaled)
            if gain is not None:
                scale = scale * gain[: len(params)]
            a, b, ga, gb = state[module.a], state[module.b], out[module.a], out[module.b]
            new_a, new_b = equivalent(a, b, ga, gb, scale, self.rcond)
            ga.copy_(new_a)
            gb.copy_(new_b)
        return grads

    def check(self, adapter: Adapter) -> None:
        if adapter.form != "lora":
            allowed = "with an adapter that trains A and B together (adapter=lora)"
            raise ConfigError("local", "lora_pro", allowed, "Or choose local=sgd.")


def equivalent(a: Tensor, b: Tensor, ga: Tensor, gb: Tensor, scale: Tensor, rcond: float) -> tuple[Tensor, Tensor]:
    """``gA* (S, r, in)`` and ``gB* (S, out, r)`` of A ``(S, r, in)``, B ``(S, out, r)``, their gradients, and the
    scales ``(S, 1, 1)``.

    The ``(r, r)`` matrices are made in float64: the square of a factor has the square of its condition.
    """
    left, vb, inverse_b = _spectrum(b.mT.double() @ b.double(), rcond)
    right, va, inverse_a = _spectrum(a.double() @ a.double().mT, rcond)
    wide = scale.double() ** -2
    bb, aa = (vb * inverse_b.unsqueeze(-2)) @ vb.mT, (va * inverse_a.unsqueeze(-2)) @ va.mT  # the pseudo-inverses
    across = -wide * bb @ (ga @ a.mT).double()
    sums = left.unsqueeze(-1) + right.unsqueeze(-2)
    x = vb.mT @ across @ va
    # Where both eigenvalues are nothing X is free, and zero is the smallest.
    x = vb @ torch.where(sums > 0, x / sums, 0.0) @ va.mT
    new_a = (wide * bb).to(ga) @ ga + x.to(a) @ a
    rest = gb - b @ (bb @ (b.mT @ gb).double()).to(gb)
    return new_a, rest @ (wide * aa).to(gb) - b @ x.to(b)


def _spectrum(gram: Tensor, rcond: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues ``(S, r)`` and eigenvectors of a Gram matrix, and the pseudo-inverse's eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > rcond**2 * values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
    values = torch.where(kept, values, 0.0)
    return values, vectors, torch.where(kept, 1 / values, 0.0)
