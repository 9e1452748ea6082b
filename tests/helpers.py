"""Small experiments for tests: tiny models and data, in this process, under a given plan (nothing is measured)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fl.experiment import Shared
from fl.records import read_events, read_run, without_wall
from fl.run import Outcome, run

# One thread, float32: the plan that a measurement would otherwise choose.
FIXED = (
    "engine.device=cpu",
    "engine.dtype=float32",
    "engine.attention=sdpa",
    "engine.cohort_size=4",
    "engine.workers=1",
    "engine.threads=1",
)
_TINY = (
    "data=tiny",
    "partition=iid",
    "clients.number=4",
    "schedule.rounds=2",
    "local.steps=2",
    "local.batch_size=8",
    "report=false",
    *FIXED,
)
ENCODER = ("model=tiny-encoder", *_TINY)
DECODER = ("model=tiny-decoder", *_TINY)

# What the tests of one process share: the tiny models and the tokenised sentences.
SHARED = Shared()


def go(folder: Path, *more: str, base: tuple[str, ...] = ENCODER, shared: Shared | None = SHARED) -> Outcome:
    """Run the tiny experiment with further settings, without a word, in ``folder``."""
    return run([*base, *more], folder=folder, shared=shared, quiet=True)


def weights(folder: Path) -> bytes:
    """The bytes of the adapter that a run left."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def vector(folder: Path) -> np.ndarray:
    """The adapter that a run left, as one vector in the order of its tensors' names."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, without the wall clock."""
    return [without_wall(event) for event in read_events(folder)]


def metric_bytes(folder: Path) -> list[bytes]:
    """The lines of metrics.jsonl with the wall clock cut out of their text, so that they compare byte for byte."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return [line[: line.rindex(b',"wall_s":')] + line[-2:] for line in lines]


def same_metrics(folder: Path, other: Path) -> bool:
    """Whether two runs wrote the same lines but for the wall clock; says where they first differ.

    pytest would compare lists of long lines for minutes to show how they differ.
    """
    mine, theirs = metric_bytes(folder), metric_bytes(other)
    for a, b in zip(mine, theirs):
        if a != b:
            print(f"{folder.name}: {a!r}\n{other.name}: {b!r}")
            return False
    return len(mine) == len(theirs)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [e for e in metrics(folder) if e["event"] == "round"]


def clients(folder: Path, round: int | None = None) -> list[dict[str, Any]]:
    return [e for e in metrics(folder) if e["event"] == "client" and round in (None, e["round"])]


def evaluations(folder: Path, split: str = "test") -> list[dict[str, Any]]:
    return [e for e in metrics(folder) if e["event"] == "eval" and e["split"] == split]


def final(folder: Path) -> dict[str, Any]:
    found = read_run(folder)
    assert found is not None
    return found["final"]
