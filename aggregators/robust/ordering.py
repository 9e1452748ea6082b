"""Rows sorted column by column, for rules of coordinates.

A processor compares whole rows at once where a fixed network of exchanges sorts them: one exchange of rows a and b is
``min(a, b), max(a, b)``. Batcher's odd-even merge sort (1968) has 103 exchanges for 20 rows and 1,104 for 100; beyond
`_NETWORK` rows sorting each column by itself is faster.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

_NETWORK = 64  # rows


@cache
def network(n: int) -> tuple[tuple[int, int], ...]:
    """The exchanges (a, b), a < b, that sort ``n`` rows, the least first."""
    pairs, size = [], 1
    while size < n:
        step = size
        while step >= 1:
            for start in range(step % size, n - step, 2 * step):
                for i in range(start, min(start + step, n - step)):
                    if i // (2 * size) == (i + step) // (2 * size):
                        pairs.append((i, i + step))
            step //= 2
        size *= 2
    return tuple(pairs)


def ascending(block: Tensor) -> Tensor:
    """``block`` ``(k, c)`` with each column sorted, in its own type (bfloat16: float32).

    A column with a NaN ends in one.
    """
    if block.dtype == torch.bfloat16:
        block = block.to(torch.float32)
    if block.device.type != "cpu":
        return block.sort(dim=0).values
    if len(block) > _NETWORK:
        columns = block.T.clone(memory_format=torch.contiguous_format)
        columns.numpy().sort(axis=1)
        return columns.T
    rows = list(block.clone(memory_format=torch.contiguous_format).numpy())
    spare = np.empty_like(rows[0])
    for a, b in network(len(rows)):
        np.minimum(rows[a], rows[b], out=spare)
        np.maximum(rows[a], rows[b], out=rows[b])
        rows[a], spare = spare, rows[a]
    return torch.from_numpy(np.stack(rows))


def in_order(block: Tensor) -> tuple[Tensor, Tensor]:
    """Like `ascending`, and whose the sorted values are: rows ``(k, c)`` int64."""
    if block.dtype == torch.bfloat16:
        block = block.to(torch.float32)
    if block.device.type != "cpu":
        return block.sort(dim=0)
    columns = block.T.contiguous().numpy()
    owner = np.argsort(columns, axis=1)
    return torch.from_numpy(np.take_along_axis(columns, owner, axis=1)).T, torch.from_numpy(owner).T
