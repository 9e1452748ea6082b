"""Weighted means of updates, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aggregators.base import normalised
from fl.state import Update

# Columns that are summed at a time: the float64 sum and one product stay in a core's cache (2 x 256 KiB).
_COLUMNS = 32_768


def weighted_mean(updates: np.ndarray | Sequence[np.ndarray], weights: np.ndarray | Sequence[float]) -> np.ndarray:
    """``sum_i w_i u_i / sum_i w_i`` as float64 ``(d,)``, of ``updates`` ``(n, d)`` and ``weights`` ``(n,)``.

    Summed in float64 in the order of the rows, whatever the type of ``updates``; takes ``2 d`` float64 of memory at
    most, never ``n d``. The division comes last, so that n equal float32 updates give exactly that update.
    Raises `RunStopped` unless the weights are finite, not negative and not all zero.
    """
    if len(weights) != len(updates):
        raise ValueError(f"{len(updates)} updates have {len(weights)} weights")
    normalised(weights)  # refuses what can't make a mean
    scale = np.asarray(weights, dtype=np.float64)  # (n,)
    total = scale.sum()
    mean = np.zeros(len(updates[0]), dtype=np.float64)  # (d,)
    product = np.empty(min(_COLUMNS, len(mean)), dtype=np.float64)
    for start in range(0, len(mean), _COLUMNS):
        part = mean[start : start + _COLUMNS]
        for weight, row in zip(scale, updates, strict=True):
            # dtype: a float32 row would otherwise be multiplied in float32
            part += np.multiply(row[start : start + _COLUMNS], weight, out=product[: len(part)], dtype=np.float64)
    mean /= total
    return mean


def combined(updates: Sequence[Update], shares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean of updates that may cover different columns: ``sum_i p_i u_i`` with zeros where a client has no column.

    Returns it ``(n,)`` float64 and its columns ``(n,)``, the union of the clients' (None: all).
    """
    first = updates[0].columns
    if all(u.columns is first for u in updates):
        return weighted_mean([u.vector for u in updates], shares), first
    assert first is not None
    owned = [u.columns for u in updates if u.columns is not None]
    columns = np.unique(np.concatenate(list({id(c): c for c in owned}.values())))
    mean = np.zeros(len(columns))
    for share, update, mine in zip(shares, updates, owned, strict=True):
        mean[np.searchsorted(columns, mine)] += share * update.vector.astype(np.float64)
    return mean, columns
