"""Sweeps: every combination of the lists on the command line, one run after another in one process.

The runs share the loaded base model and the tokenised data (`fl.experiment.Shared`), and the plan that was measured for
their shape. A run that fails is recorded and the sweep goes on; a sweep that is started again in the same folder skips
the runs that are complete and resumes one that was cut off.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fl.compose import SWEEP_DIR, compose, expand
from fl.errors import ConfigError, ShoalError
from fl.records import fresh_folder, read_run, write_atomically
from fl.report.load import plain


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
    common = [o for o in overrides if not o.startswith("hydra.") and _split(o)[0] not in axes]
    folder: Path | None = None
    for job in jobs:
        resolved, folders = compose(job)
        Settings.of(resolved)
        folder = folder or folders[SWEEP_DIR]
    assert folder is not None
    if any(word.lstrip("+").startswith(f"{SWEEP_DIR}=") for word in overrides):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = fresh_folder(folder)
    about = {"axes": _values(axes), "common": common}
    _same_sweep(folder, about)
    described = [
        {"dir": str(i), "overrides": {k: v for k, v in map(_split, job) if k in axes}} for i, job in enumerate(jobs)
    ]
    write_atomically(folder / "sweep.json", json.dumps({**about, "runs": described}, indent=1) + "\n")
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
        except KeyboardInterrupt as error:
            error.add_note(f"the same command with hydra.sweep.dir={folder} goes on")
            raise
        except Exception as error:  # whatever one run does, the others are still worth having
            failed.append(i)
            if not isinstance(error, ShoalError):
                traceback.print_exc()
            print(f"shoal: [{i + 1}/{len(jobs)}] {words}: failed: {error}", file=sys.stderr)
    runs_done = [load_run(folder / str(i)) for i in range(len(jobs)) if (folder / str(i) / "run.json").is_file()]
    if runs_done:
        write_summary_csv(runs_done, folder / "summary.csv")
        report = write_report([folder], folder / "report.html")
        if not quiet:
            console.print(comparison_table(runs_done))
            print(f"Summary  {folder / 'summary.csv'}\nReport   {report}")
    return 1 if failed else 0


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _values(axes: dict[str, list[str]]) -> dict[str, list]:
    return {key: [plain(v) for v in values] for key, values in axes.items()}


def _same_sweep(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another sweep: its numbered runs would be taken for this one's."""
    try:
        before = json.loads((folder / "sweep.json").read_text())
    except (OSError, ValueError):
        return
    if any(before.get(name) != value for name, value in about.items()):
        raise ConfigError("hydra.sweep.dir", str(folder), "it holds another sweep", "Choose another folder.")


def _say(console: Console, quiet: bool, text: str) -> None:
    if not quiet:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
