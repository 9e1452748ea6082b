"""What a whole `shoal run` keeps of the cohort's speed, aggregation, evaluation and records counted.

    python -m benchmarks.run                                     # the quickstart with one local epoch a round
    python -m benchmarks.run experiment=quickstart               # any settings of `shoal run`

Two things are timed in one process and under one plan: the jobs of a round given straight to the trainer (`cohort`),
and the run's own loop from the end of the first evaluation to the end of the last (`run`). Their client-steps a second
and the ratio are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from clients.local.training import Work
from fl.compose import compose
from fl.experiment import Experiment, Settings, Shared
from fl.records import read_events
from fl.run import run

DEFAULT = ["experiment=quickstart", "local.epochs=1", "schedule.rounds=2", "evaluation.every=1"]


def trainer_rate(overrides: list[str], shared: Shared, repeats: int) -> float:
    """Client-steps a second of a round's jobs given straight to the trainer."""
    settings = Settings.of(compose(overrides)[0])
    experiment = Experiment(settings, shared, print)
    trainer, data, s = experiment.trainer, experiment.data, settings
    start = trainer.worker.cohort.initial.numpy()
    rates = []
    for repeat in range(repeats):
        works = [
            Work(c, repeat, start, s.local.batches(s.seed, c, repeat, part), s.local.lr)
            for c, part in enumerate(data.parts[: experiment.per_round])
        ]
        began = time.perf_counter()
        fits = trainer.train(works)
        rates.append(sum(f.steps for f in fits) / (time.perf_counter() - began))
    experiment.close()
    return statistics.median(rates)


def run_rate(overrides: list[str], shared: Shared) -> float:
    """Client-steps a second of the run's loop, everything counted."""
    with tempfile.TemporaryDirectory() as folder:
        done = run([*overrides, "report=false"], folder=Path(folder) / "run", shared=shared, quiet=True)
        events = read_events(done.folder)
        began = next(e["wall_s"] for e in events if e["event"] == "eval")
        ended = max(e["wall_s"] for e in events)
        return done.run["final"]["client_steps"] / (ended - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    overrides = options.settings or DEFAULT
    torch.set_num_threads(1)
    shared = Shared()
    before = trainer_rate(overrides, shared, options.repeats)
    whole = run_rate(overrides, shared)
    after = trainer_rate(overrides, shared, options.repeats)
    cohort = (before + after) / 2
    print(f"cohort  {before:8.2f} and {after:.2f} client-steps/s (before and after the run)")
    print(f"run     {whole:8.2f} client-steps/s, aggregation, evaluation and records counted")
    print(f"ratio   {whole / cohort:8.2f}")
    if options.out:
        result = {"settings": overrides, "cohort": [before, after], "run": whole, "ratio": whole / cohort}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
