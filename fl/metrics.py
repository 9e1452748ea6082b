"""What a model is judged by: accuracy, macro-F1, perplexity, and how unevenly clients fare. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """The share of ``predicted`` ``(n,)`` labels that equal ``true`` ``(n,)``; None for no samples."""
    predicted, true = _labels(predicted, true)
    return float((predicted == true).mean()) if len(true) else None


def macro_f1(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """The unweighted mean of F1 over the classes that occur in ``predicted`` or ``true``, both ``(n,)``; None for none.

    ``F1_c = 2 TP / (2 TP + FP + FN)``. A class that is never true but was predicted counts, with 0; one that occurs in
    neither does not count. So a client that holds two of ten classes is judged on those two (and on its confusions).
    The same as ``sklearn.metrics.f1_score(true, predicted, average="macro", zero_division=0)``.
    """
    predicted, true = _labels(predicted, true)
    if not len(true):
        return None
    classes, codes = np.unique(np.concatenate([predicted, true]), return_inverse=True)
    guessed, actual = codes[: len(true)], codes[len(true) :]
    hits = np.bincount(actual[guessed == actual], minlength=len(classes))
    # 2 TP + FP + FN: how often the class was predicted plus how often it was true; never 0, as each class occurs
    occurrences = np.bincount(guessed, minlength=len(classes)) + np.bincount(actual, minlength=len(classes))
    return float((2 * hits / occurrences).mean())


def perplexity(mean_nll: float | None) -> float | None:
    """``exp(mean negative log-likelihood of a token, in nats)``.

    Infinity where that exceeds the largest float (a loss above 709), None for None or NaN.
    """
    if mean_nll is None or math.isnan(mean_nll):
        return None
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


class Spread(NamedTuple):
    """How a metric is spread over clients; all None where no client has a value."""

    mean: float | None
    std: float | None
    worst_decile: float | None


def spread(values: Iterable[float | None], higher_is_better: bool = True) -> Spread:
    """Mean, standard deviation and worst-decile mean of a metric over clients that have it (None and NaN are left out).

    The standard deviation divides by n (these are all the clients, not a sample of more). The worst decile is the mean
    of the n // 10 worst clients, at least one: the lowest, or with ``higher_is_better=False`` (loss, perplexity) the
    highest. Infinite values stay in and make the mean infinite and the deviation None.
    """
    kept = np.array([v for v in values if v is not None and not math.isnan(v)], dtype=np.float64)
    if not len(kept):
        return Spread(None, None, None)
    ordered = np.sort(kept) if higher_is_better else np.sort(kept)[::-1]
    worst = float(ordered[: max(1, len(kept) // 10)].mean())
    std = float(kept.std()) if np.isfinite(kept).all() else None
    return Spread(float(kept.mean()), std, worst)


def _labels(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape or true.ndim != 1:
        raise ValueError(f"predictions {predicted.shape} and labels {true.shape} have to be two vectors of one length")
    return predicted, true
