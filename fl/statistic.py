"""What a holder of data sends where an adapter's start needs a statistic: a sum over some of its examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clients.adapters import statistics
from clients.adapters.initial.base import DataDriven
from clients.trainer import Trainer
from fl.keys import generator, torch_generator


def sums(
    init: DataDriven, trainer: Trainer, name: str, holders: Sequence[tuple[int, np.ndarray]], seed: int
) -> list[tuple[int, np.ndarray]]:
    """For each holder (its number, its examples in the set ``name``): how many examples it used, and what it sends.

    With ``source=private`` each example is clipped and the holder adds its own noise; the count is then the public
    expectation, since the true one would tell.
    """
    private = init.source == "private"
    picked = [examples[init.sample(len(examples), generator(seed, "statistic", who))] for who, examples in holders]
    shapes = statistics.shapes(trainer.worker.cohort)
    size = statistics.layout(shapes, init.statistic).size
    whole = iter(
        trainer.statistics(init.statistic, name, [p for p in picked if len(p)], init.clip if private else None)
    )
    out = []
    for (who, examples), mine in zip(holders, picked, strict=True):
        vector = next(whole) if len(mine) else np.zeros(size)
        count = len(mine)
        if private:
            key = torch_generator(seed, "statistic-noise", who)
            vector = statistics.privatise(torch.from_numpy(vector), init.clip, init.noise, key).numpy()
            count = min(init.examples, len(examples))
        out.append((count, vector))
    return out
