"""Factorisations with signs that don't depend on the machine, in float64.

Singular vectors are unique up to sign (where singular values differ), and libraries and processors choose it
differently. Here the largest entry of each left vector is positive; among entries equal to rounding, the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-6  # entries whose magnitudes differ by less, relatively, count as equal


def signs(columns: Tensor) -> Tensor:
    """``(r,)`` of 1 and -1: the sign of the largest entry of each column of ``(d, r)``."""
    size = columns.abs()
    first = (size >= size.amax(0) * (1 - TIE)).int().argmax(0)
    return torch.where(columns.gather(0, first[None])[0] < 0, -1.0, 1.0).to(columns.dtype)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U (d, m), S (m,), V^T (m, k)`` with ``U diag(S) V^T = matrix``, m = min(d, k), S descending."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    sign = signs(u)
    return u * sign, s, vh * sign[:, None]


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``Q (d, m), R (m, k)`` with ``Q R = matrix`` and no negative number on R's diagonal."""
    q, r = torch.linalg.qr(matrix)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(matrix.dtype)
    return q * sign, r * sign[:, None]


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """``(rows, columns)`` with orthonormal rows, uniform over such matrices; rows <= columns.

    The Q of a Gaussian matrix whose R has a positive diagonal (Mezzadri, arXiv math-ph/0609050).
    """
    return qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))[0].T
