"""Sweeps: the jobs of `fl.variants.plan` (lists on the command line, a preset's variants), one after another.

All in one process: the runs share the loaded base model and the tokenised data (`fl.experiment.Shared`), and the plan
that was measured for their shape. A run that fails is recorded and the sweep goes on; a sweep that is started again in
the same folder skips the runs that are complete and resumes one that was cut off. A sweep of variants also leaves
``comparison.json`` and ``comparison.md`` (`fl.comparison`).
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fl.compose import SWEEP_DIR, compose
from fl.errors import ConfigError, ShoalError
from fl.records import fresh_folder, read_run, write_atomically
from fl.variants import Plan, named, plan


def sweep(overrides: Sequence[str], quiet: bool = False, console: Console | None = None) -> int:
    """Run the sweep; returns 0, or 1 where a run failed. Every job's settings are checked before the first one runs."""
    from fl import run as runs
    from fl.experiment import Shared

    console = console or Console()
    overrides = [o for o in overrides if not o.startswith("hydra.run.dir=")] + [
        o.replace("hydra.run.dir=", "hydra.sweep.dir=", 1) for o in overrides if o.startswith("hydra.run.dir=")
    ]
    planned = plan(overrides)
    jobs = planned.jobs
    folder = _checked(planned)
    if any(word.lstrip("+").startswith(f"{SWEEP_DIR}=") for word in overrides):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = fresh_folder(folder)
    _same_sweep(folder, planned.about)
    described = [{"dir": str(i), "variant": job.variant, "overrides": job.varied} for i, job in enumerate(jobs)]
    write_atomically(folder / "sweep.json", json.dumps({**planned.about, "runs": described}, indent=1) + "\n")
    shared, failed = Shared(), []
    for i, job in enumerate(jobs):
        place = folder / str(i)
        words = job.label
        before = read_run(place)
        if before is not None and before.get("status") == "completed":
            _say(console, quiet, f"[{i + 1}/{len(jobs)}] {words}: complete already")
            continue
        try:
            if before is not None and (place / "checkpoint").is_dir() and (place / "config.yaml").is_file():
                done = runs.resume(place, quiet=True, shared=shared)
            else:
                done = runs.run(job.words, folder=place, shared=shared, quiet=True)
            final = done.run["final"]
            shown = "  ".join(
                f"{n} {final[n]:.4g}" for n in ("accuracy", "perplexity", "loss") if final.get(n) is not None
            )
            _say(console, quiet, f"[{i + 1}/{len(jobs)}] {words}: {shown}  ({final['wall_s']:.0f} s)")
        except KeyboardInterrupt as error:
            error.add_note(f"the same command with hydra.sweep.dir={folder} goes on")
            raise
        except Exception as error:  # whatever one run does, the others are still worth having
            failed.append(i)
            if not isinstance(error, ShoalError):
                traceback.print_exc()
            print(f"shoal: [{i + 1}/{len(jobs)}] {words}: failed: {error}", file=sys.stderr)
    if any((folder / str(i) / "run.json").is_file() for i in range(len(jobs))):
        _conclude(folder, planned, quiet, console)
    return 1 if failed else 0


def _checked(planned: Plan) -> Path:
    """The sweep's folder, once the settings of every job have been found to be allowed."""
    from fl.experiment import Settings

    folder: Path | None = None
    for job in planned.jobs:
        try:
            resolved, folders = compose(job.words)
            settings = Settings.of(resolved)
            if planned.about.get("tune"):
                _can_be_tuned(settings)
        except ConfigError as error:
            raise named(error, job) from error
        folder = folder or folders[SWEEP_DIR]
    assert folder is not None
    return folder


def _can_be_tuned(settings: Any) -> None:
    """Refuse what would leave nothing to choose the tuned setting by: clients' own test sets at the end."""
    by = "the sweep chooses by the clients' own test sets"
    if settings.evaluation.clients == "never":
        raise ConfigError("evaluation.clients", "never", by, "Use final.")
    if settings.data.client_test_fraction == 0:
        raise ConfigError("data.client_test_fraction", 0.0, by, "Let each client hold some of its samples out.")


def _conclude(folder: Path, planned: Plan, quiet: bool, console: Console) -> None:
    """Write what the runs together say: summary.csv, report.html, and of variants their comparison."""
    from fl.report.html import write_report
    from fl.report.load import load_all
    from fl.report.tables import comparison_table, write_summary_csv

    found = load_all([folder])
    made = [("Summary", write_summary_csv(found.runs, folder / "summary.csv"))]
    table = comparison_table(found.runs)
    if planned.compares_variants:
        from fl.comparison import compare
        from fl.report.variant_tables import terminal_table, write_comparison

        comparison = compare(found)
        made.append(("Compared", write_comparison(comparison, folder)))
        table = terminal_table(comparison)
    made.append(("Report", write_report([folder], folder / "report.html")))
    if not quiet:
        console.print(table)
        for name, path in made:
            print(f"{name:<8} {path}")


def _same_sweep(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another sweep: its numbered runs would be taken for this one's.

    The target is only read off the runs, so another one may be asked about the same runs.
    """
    try:
        before = json.loads((folder / "sweep.json").read_text())
    except (OSError, ValueError):
        return
    names = {name for name in (*before, *about) if name not in ("runs", "target")}
    if any(before.get(name) != about.get(name) for name in names):
        raise ConfigError("hydra.sweep.dir", str(folder), "it holds another sweep", "Choose another folder.")


def _say(console: Console, quiet: bool, text: str) -> None:
    if not quiet:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
