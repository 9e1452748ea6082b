"""EVA: A spans the directions in which the layer's inputs vary most; ``B = 0``.

With ``M = sum over tokens of x x^T``, A's rows are the r leading eigenvectors of M, that is, the r leading right
singular vectors of the matrix of all inputs. Paischer et al., EVA (arXiv 2410.07170). M adds up over
clients, so a federation finds what one holder of all the data would.

Differences from PEFT's ``eva``. Ranks are not redistributed among modules (its rho = 1), since the layout of a state
would then depend on the data. PEFT runs an incremental PCA, which subtracts the mean input; M is taken about zero, so
the mean itself is a direction. PEFT stops when the directions settle, here the sample is used once and exactly. PEFT
skips the tokens of a prompt (label -100), here every real token counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clients.adapters.initial.base import DataDriven, Start, check_rank, needed
from clients.adapters.initial.factors import signs


@dataclass(frozen=True)
class EVA(DataDriven):
    """A orthonormal, of the r largest eigenvalues of the inputs' second moment; B zero. Needs rank <= k.

    Noise can make some eigenvalues of a private moment negative; the largest ones are taken. Where fewer than r
    directions were seen, the rest of A is orthonormal to them and otherwise arbitrary.
    """

    statistic: ClassVar[str] = "moment"

    def start(
        self,
        weight: Tensor,
        statistic: Tensor | None,
        rank: int,
        scale: float,
        generator: torch.Generator,
        count: int = 1,
    ) -> Start:
        d, k = weight.shape
        check_rank(rank, k, "the inputs of each adapted weight")
        vectors = torch.linalg.eigh(needed(statistic, (k, k)))[1].flip(1)[:, :rank]  # (k, r), descending
        return Start.of(weight, (vectors * signs(vectors)).T, torch.zeros(d, rank))
