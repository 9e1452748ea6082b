"""Client-steps a second of asynchronous runs beside a synchronous one of as many client jobs, in one process.

    python -m benchmarks.asynchronous                            # minilm, 20 clients of F-80
    python -m benchmarks.asynchronous --model tiny-encoder --jobs 200 --set local.steps=5

Asynchronous work is computed when the first of its results is due, with all that is outstanding, so it should cost what
a synchronous round's does. Three runs of the same clients, jobs, plan and local steps are timed in turn, ``--repeats``
times over, and the medians and their ratios to the synchronous run are printed:

* ``synchronous``: rounds of all clients;
* ``fedbuff``: a server step with every 10 updates;
* ``fedasync``: a server step with every update.

Timed is the run's own loop, from the end of the first evaluation to the end of the last round, with aggregation,
records and checkpoints (one for every 20 updates), and without evaluation. ``--adapter`` may have a frozen factor.
An asynchronous run computes some jobs that arrive after its end: what it trained is counted, not what arrived.
``cohorts`` are the jobs of one training call of the node and of one cohort, in the mean; ``in training`` is the share
of the time that the trainer takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from clients.trainer import Trainer
from fl import environment
from fl.experiment import Shared
from fl.records import read_events
from fl.run import run

CLIENTS, BUFFER = 20, 10


class Watch:
    """Counts what the trainer is given while a run goes on, and how long it takes."""

    def __init__(self) -> None:
        self.calls = self.jobs = self.steps = self.cohorts = 0
        self.seconds = 0.0
        self._train = Trainer.train

    def __enter__(self) -> Watch:
        watch, train = self, self._train

        def watched(trainer: Trainer, works: Any) -> Any:
            on_cohort = trainer.on_cohort

            def counted(fits: Any) -> None:
                watch.cohorts += 1
                on_cohort(fits)

            trainer.on_cohort = counted
            began = time.perf_counter()
            fits = train(trainer, works)
            watch.seconds += time.perf_counter() - began
            trainer.on_cohort = on_cohort
            watch.calls += 1
            watch.jobs += len(works)
            watch.steps += sum(f.steps for f in fits)
            return fits

        Trainer.train = watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Trainer.train = self._train  # type: ignore[method-assign]


def schedules(jobs: int) -> dict[str, list[str]]:
    """The settings of each run of about ``jobs`` client jobs."""
    return {
        "synchronous": [f"schedule.rounds={jobs // CLIENTS}"],
        "fedbuff": [
            "schedule=fedbuff", f"schedule.buffer={BUFFER}", f"schedule.rounds={jobs // BUFFER}",
            f"checkpoint_every={CLIENTS // BUFFER}",
        ],
        "fedasync": ["schedule=fedasync", f"schedule.rounds={jobs}", f"checkpoint_every={CLIENTS}"],
    }  # fmt: skip


def timed(settings: list[str], shared: Shared) -> dict[str, float]:
    """Client-steps a second of one run, and what it was made of."""
    with tempfile.TemporaryDirectory() as folder, Watch() as watch:
        done = run([*settings, "report=false"], folder=Path(folder) / "run", shared=shared, quiet=True)
        events = read_events(done.folder)
    began = next(e["wall_s"] for e in events if e["event"] == "eval")
    ended = max(e["wall_s"] for e in events if e["event"] == "round")
    return {
        "client_steps_per_s": watch.steps / (ended - began),
        "trainer_steps_per_s": watch.steps / watch.seconds,
        "in_training": watch.seconds / (ended - began),
        "jobs_trained": watch.jobs,
        "jobs_used": sum(e["accepted"] for e in events if e["event"] == "round"),
        "jobs_a_call": watch.jobs / watch.calls,
        "jobs_a_cohort": watch.jobs / watch.cohorts,
        "other_ms_a_job": 1e3 * (ended - began - watch.seconds) / watch.jobs,
    }


def measure(settings: list[str], jobs: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of each schedule's runs, taken in turn; a first turn warms up and is not counted."""
    shared = Shared()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in schedules(jobs)}
    for repeat in range(repeats + 1):
        for name, words in schedules(jobs if repeat else 2 * CLIENTS).items():
            one = timed([*settings, *words], shared)
            if repeat:
                found[name].append(one)
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in found.items():
        rows[name] = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        ratios = [
            one["client_steps_per_s"] / other["client_steps_per_s"]
            for one, other in zip(runs, found["synchronous"], strict=True)
        ]
        rows[name] |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    head = (
        f"{'':14}{'steps/s':>10}{'ratio':>8}{'trainer/s':>11}{'in training':>13}{'cohorts':>14}{'other ms a job':>16}"
    )
    lines = [head]
    for name, row in rows.items():
        cohorts = f"{row['jobs_a_call']:.1f}, {row['jobs_a_cohort']:.1f}"
        lines.append(
            f"{name:14}{row['client_steps_per_s']:10.2f}{row['ratio']:8.2f}{row['trainer_steps_per_s']:11.2f}"
            f"{row['in_training']:13.2f}{cohorts:>14}{row['other_ms_a_job']:16.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, tiny-encoder, ...")
    parser.add_argument("--adapter", default="lora")
    parser.add_argument("--jobs", type=int, default=80, help="client jobs of a run; a multiple of 20")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="further settings of all runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.jobs % CLIENTS:
        parser.error(f"--jobs must be a multiple of {CLIENTS}")
    torch.set_num_threads(1)
    data = ["data=tiny"] if options.model.startswith("tiny") else []
    settings = [
        f"model={options.model}", f"adapter={options.adapter}", *data, "partition=iid", f"clients.number={CLIENTS}",
        "network=linear", "network.spread=0.8", "network.latency_s=0", "network.down_mbps=null",
        "network.up_mbps=null", "local.steps=5", "local.batch_size=16", "evaluation.every=0",
        "evaluation.clients=never", *options.set,
    ]  # fmt: skip
    rows = measure(settings, options.jobs, options.repeats)
    machine = environment.device_name()
    print(f"{options.model}, {options.adapter}, {CLIENTS} clients, {options.jobs} jobs; {machine}\n\n{table(rows)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "settings": settings, "jobs": options.jobs, "schedules": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
