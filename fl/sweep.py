"""Sweeps: every combination of the lists on the command line, one run after another in one process.

The runs share the loaded base model and the tokenised data (`fl.experiment.Shared`), and the plan that was measured for
their shape. A run that fails is recorded and the sweep goes on; a sweep that is started again in the same folder skips
the runs that are complete and resumes one that was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from fl.compose import SWEEP_DIR, compose, expand
from fl.errors import ConfigError, ShoalError
from fl.records import read_run, write_atomically


def sweep(overrides: Sequence[str], quiet: bool = False, console: Console | None = None) -> int:
    """Run the sweep; returns 0, or 1 where a run failed. Every job's settings are checked before the first one runs."""
    from fl import run as runs
    from fl.experiment import Settings, Shared
    from fl.report.html import write_report
    from fl.report.load import load_run
    from fl.report.tables import comparison_table, write_summary_csv

    console = console or Console()
    overrides = [o for o in overrides if not o.startswith("hydra.run.dir=")] + [
        o.replace("hydra.run.dir=", "hydra.sweep.dir=", 1) for o in overrides if o.startswith("hydra.run.dir=")
    ]
    axes, jobs = expand(overrides)
    folder: Path | None = None
    for job in jobs:
        resolved, folders = compose(job)
        Settings.of(resolved)
        folder = folder or folders[SWEEP_DIR]
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    _same_sweep(folder, axes)
    described = [
        {"dir": str(i), "overrides": {k: v for k, v in map(_split, job) if k in axes}} for i, job in enumerate(jobs)
    ]
    write_atomically(folder / "sweep.json", json.dumps({"axes": _values(axes), "runs": described}, indent=1) + "\n")
    shared, failed = Shared(), []
    for i, job in enumerate(jobs):
        place = folder / str(i)
        words = "  ".join(f"{k}={v}" for k, v in map(_split, job) if k in axes)
        before = read_run(place)
        if before is not None and before.get("status") == "completed":
            _say(console, quiet, f"[{i + 1}/{len(jobs)}] {words}: complete already")
            continue
        try:
            if before is not None and (place / "checkpoint").is_dir() and (place / "config.yaml").is_file():
                done = runs.resume(place, quiet=True, shared=shared)
            else:
                done = runs.run(job, folder=place, shared=shared, quiet=True)
            final = done.run["final"]
            shown = "  ".join(
                f"{n} {final[n]:.4g}" for n in ("accuracy", "perplexity", "loss") if final.get(n) is not None
            )
            _say(console, quiet, f"[{i + 1}/{len(jobs)}] {words}: {shown}  ({final['wall_s']:.0f} s)")
        except ShoalError as error:
            failed.append(i)
            _say(console, quiet, f"[{i + 1}/{len(jobs)}] {words}: failed: {error}")
    runs_done = [load_run(folder / str(i)) for i in range(len(jobs)) if (folder / str(i) / "run.json").is_file()]
    if runs_done:
        write_summary_csv(runs_done, folder / "summary.csv")
        report = write_report([folder], folder / "report.html")
        if not quiet:
            console.print(comparison_table(runs_done))
            console.print(f"Summary  {folder / 'summary.csv'}\nReport   {report}", highlight=False)
    return 1 if failed else 0


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _values(axes: dict[str, list[str]]) -> dict[str, list]:
    return {key: [yaml.safe_load(v) for v in values] for key, values in axes.items()}


def _same_sweep(folder: Path, axes: dict[str, list[str]]) -> None:
    """Refuse a folder that holds another sweep: its numbered runs would be taken for this one's."""
    try:
        before = json.loads((folder / "sweep.json").read_text())["axes"]
    except (OSError, ValueError, KeyError):
        return
    if before != _values(axes):
        raise ConfigError("hydra.sweep.dir", str(folder), "it holds another sweep", "Choose another folder.")


def _say(console: Console, quiet: bool, text: str) -> None:
    if not quiet:
        console.print(text, highlight=False)
