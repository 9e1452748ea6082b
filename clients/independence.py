"""Refusing, before any training, what a cohort can't train exactly: samples or slots that see one another."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fl.errors import ConfigError
from fl.keys import torch_generator

if TYPE_CHECKING:
    from clients.cohort import Cohort

LENGTHS = ((4, 5), (3, 2))  # tokens of 2 samples in each of 2 slots
FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, LookupError, AttributeError)


def check(cohort: Cohort, trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise `ConfigError` unless the cohort's model runs and each sample's logits depend on that sample alone.

    Two passes have the first slot's state and its first sample in common and nothing else, so that sample's logits
    must agree, dropout included. They don't where something is shared over a batch (statistics, a mean over tokens as
    in Lily, routing to experts) or where an adapted layer has the batch on another axis than the first. Hooks on the
    gradients of ``trainable`` are refused too: a cohort's gradients never pass them.
    """
    if hooked := [n for n, p in trainable.items() if p._backward_hooks]:
        raise _refused(cohort, f"it changes gradients by hooks ({hooked[0]}), which a cohort's gradients don't pass")
    try:
        with warnings.catch_warnings():  # of vmap, about operations that it then refuses
            warnings.simplefilter("ignore")
            first, second = _first_sample(cohort, 1), _first_sample(cohort, 2)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise _refused(cohort, " ".join(str(error).split())[:200]) from error
    scale = float(first.abs().max())
    if not torch.allclose(first, second, rtol=0, atol=1e-4 * scale, equal_nan=True):
        raise _refused(cohort, "a sample's result depends on the other samples or clients of its batch")


def _first_sample(cohort: Cohort, attempt: int) -> Tensor:
    """Logits of the first sample of the first slot; all the rest differs from attempt to attempt."""
    from clients.cohort import CohortBatch

    common, other = torch_generator("independence"), torch_generator("independence", attempt)
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(5) < lengths[..., None]).long()  # (slots, samples, tokens)
    noise = torch.randn(2, cohort.layout.size, generator=other)
    noise[0] = torch.randn(cohort.layout.size, generator=common)
    ids = torch.randint(3, 8, mask.shape, generator=other)
    ids[0, 0] = torch.randint(3, 8, (5,), generator=common)
    dtypes = {p.dtype for p in cohort.model.parameters()}
    states = (cohort.initial + 0.1 * noise).to(cohort.device, torch.float64 if torch.float64 in dtypes else None)
    batch = CohortBatch(
        ids.to(cohort.device), mask.to(cohort.device), ids, torch.ones(2, 2), [2, 2],
        [("independence", 0), ("independence", attempt)],
    )  # fmt: skip
    with torch.no_grad():
        logits = cohort.logits(cohort.layout.views(states), batch)[0, 0]  # (classes,) or (tokens, vocabulary)
    return logits[: LENGTHS[0][0]] if cohort.task == "causal_lm" else logits


def _refused(cohort: Cohort, reason: str) -> ConfigError:
    configs = getattr(cohort.model, "peft_config", {}).values()
    return ConfigError(
        "adapter",
        ", ".join(str(c.peft_type.value) for c in configs),
        f"it can't be trained in cohorts on this model ({reason})",
        "Choose another adapter or other adapter.target_modules.",
    )
