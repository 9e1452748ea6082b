"""A run's folder, read back: ``run.json`` (what it was and how it ended) and ``metrics.jsonl`` (what happened).

Reading forgives what a killed run leaves: a torn last line is skipped, a missing ``run.json`` or ``final`` is made up
for from the events, and the run's status is then ``unfinished``. A folder that holds neither file is no run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fl.errors import ShoalError

Event = dict[str, Any]


@dataclass
class Run:
    """One run: ``info`` is run.json; ``rounds``, ``clients``, ``tests`` and ``client_tests`` are its events in order.

    ``axes`` holds what a sweep set for this run (empty outside a sweep), ``variant`` which of the sweep's variants it
    is (None where there are none); ``skipped_lines`` counts unreadable lines.
    """

    folder: Path
    info: dict[str, Any]
    rounds: list[Event] = field(default_factory=list)
    clients: list[Event] = field(default_factory=list)
    tests: list[Event] = field(default_factory=list)
    client_tests: list[Event] = field(default_factory=list)
    axes: dict[str, Any] = field(default_factory=dict)
    skipped_lines: int = 0
    variant: str | None = None

    @property
    def experiment(self) -> str:
        return str(self.info.get("experiment") or self.info.get("name") or self.folder.name)

    @property
    def seed(self) -> Any:
        return self.info.get("seed", self.settings.get("seed"))

    @property
    def status(self) -> str:
        return str(self.info.get("status") or "unfinished")

    @property
    def completed(self) -> bool:
        return self.status == "completed"

    @property
    def settings(self) -> dict[str, Any]:
        return _mapping(self.info.get("settings"))

    @property
    def overrides(self) -> dict[str, Any]:
        """What was given on the command line, as key -> value."""
        given = self.info.get("overrides") or []
        pairs = (str(item).lstrip("+~").partition("=") for item in given if isinstance(item, str))
        return {key: plain(value) for key, sign, value in pairs if sign}

    @property
    def partition(self) -> dict[str, Any]:
        return _mapping(self.info.get("partition"))

    @cached_property
    def metric(self) -> str:
        """``accuracy`` or ``perplexity``: what this run's evaluations measure beside the loss."""
        for event in [self.final, *self.tests]:
            for name in ("accuracy", "perplexity"):
                if number(event.get(name)) is not None:
                    return name
        named = next((e["metric"] for e in self.client_tests if isinstance(e.get("metric"), str)), None)
        return named or ("perplexity" if self.info.get("task") == "causal_lm" else "accuracy")

    @cached_property
    def final(self) -> dict[str, Any]:
        """run.json's ``final``; what it lacks is filled from the events."""
        found: dict[str, Any] = {}
        if self.tests:
            last = self.tests[-1]
            found.update({k: last[k] for k in ("loss", "accuracy", "perplexity", "macro_f1") if k in last})
        if self.rounds:
            last = self.rounds[-1]
            found["rounds"] = last.get("round")
            found["bytes_up"], found["bytes_down"] = last.get("bytes_up_total"), last.get("bytes_down_total")
            found["client_steps"] = last.get("client_steps_total")
            found["virtual_s"], found["wall_s"] = last.get("virtual_s"), last.get("wall_s")
            found["epsilon"] = last.get("epsilon")
            rejected: Counter[str] = Counter()
            for event in self.rounds:
                rejected.update({k: int(v) for k, v in _mapping(event.get("rejected")).items() if number(v)})
            found["rejected"], found["rejected_updates"] = dict(rejected), sum(rejected.values())
        given = _mapping(self.info.get("final"))
        return found | {k: v for k, v in given.items() if v is not None or k not in found}

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Every final number, the spread over clients of their own metric, and the run's pace (`fl.report.pace`)."""
        from fl.report.pace import pace_numbers

        numbers = {k: v for k, v in ((k, number(v)) for k, v in self.final.items()) if v is not None}
        if self.client_tests:
            last = self.client_tests[-1]
            for name in ("mean", "std", "worst_decile"):
                value = number(last.get(name))
                if value is not None:
                    numbers[f"client_{self.metric}_{name}"] = value
        return numbers | pace_numbers(self)

    @property
    def rejected(self) -> dict[str, int]:
        """Number of refused updates by reason, most frequent first."""
        counts = {str(k): int(v) for k, v in _mapping(self.final.get("rejected")).items() if number(v)}
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass
class Collection:
    """Several runs read together; ``missing`` names folders of a sweep that hold no run, with the reason.

    ``about`` is what sweep.json says of the sweep; it has ``variants`` where the sweep compares variants.
    """

    title: str
    runs: list[Run]
    sweep: Path | None = None
    missing: list[tuple[str, str]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -float("inf") < value < float("inf") else None


def plain(value: Any) -> Any:
    """A number for text that reads as one (``"0.1"`` -> 0.1), anything else as it is."""
    if not isinstance(value, str):
        return value
    for convert in (int, float):
        try:
            found = convert(value)
        except ValueError:
            continue
        return found if number(found) is not None else value
    return value


def load_run(folder: Path | str) -> Run:
    """Read one run's folder. Raises `ShoalError` if it is none, or if its run.json can't be read."""
    folder = Path(folder)
    if not is_run(folder):
        raise ShoalError(
            f"{folder} is not a run's folder: it has neither run.json nor metrics.jsonl. "
            "Give the folder that `shoal run` printed (outputs/EXPERIMENT/DATE-TIME)."
        )
    info = _read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    run = Run(folder, info)
    if (folder / "metrics.jsonl").is_file():
        _read_events(run, folder / "metrics.jsonl")
    return run


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a run (finished or not)."""
    return (folder / "run.json").is_file() or (folder / "metrics.jsonl").is_file()


def load_all(folders: Sequence[Path | str]) -> Collection:
    """Read run folders, sweep folders and folders of runs together, each run once.

    Raises `ShoalError` if a folder is none of these or nothing is left to report.
    """
    if not folders:
        raise ShoalError("No folder was given. Use `shoal report DIR...` with the folders of runs or of a sweep.")
    runs: list[Run] = []
    missing: list[tuple[str, str]] = []
    sweep: Path | None = None
    about: dict[str, Any] = {}
    for folder in (Path(f) for f in folders):
        if (folder / "sweep.json").is_file():
            content = _read_json(folder / "sweep.json")
            if len(folders) == 1:
                sweep, about = folder, {k: v for k, v in content.items() if k != "runs"}
            _load_sweep(folder, content, runs, missing)
        elif is_run(folder):
            runs.append(load_run(folder))
        else:
            inside = sorted(p for p in folder.iterdir() if p.is_dir() and is_run(p)) if folder.is_dir() else []
            if not inside:
                load_run(folder)  # raises, and says what was looked for
            runs.extend(load_run(p) for p in inside)
    unique = list({run.folder.resolve(): run for run in runs}.values())
    if not unique:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing)
        raise ShoalError(f"{folders[0]} holds no run to report ({reasons or 'it is empty'}).")
    names = list(dict.fromkeys(run.experiment for run in unique))
    return Collection(" / ".join(names[:4]) + (" ..." if len(names) > 4 else ""), unique, sweep, missing, about)


def _load_sweep(folder: Path, content: dict[str, Any], runs: list[Run], missing: list[tuple[str, str]]) -> None:
    for job in content.get("runs") or []:
        name = str(_mapping(job).get("dir", ""))
        try:
            run = load_run(folder / name)
        except ShoalError:
            which = [job["variant"]] if job.get("variant") else []
            which += [f"{k}={v}" for k, v in _mapping(job.get("overrides")).items()]
            shown = f" ({', '.join(which)})" if which else ""
            missing.append((name, f"it left no run.json and no metrics.jsonl{shown}"))
            continue
        run.axes = {str(k): plain(v) for k, v in _mapping(job.get("overrides")).items()}
        if isinstance(job.get("variant"), str):
            run.variant = job["variant"]
            run.axes = {"variant": run.variant, **run.axes}
        runs.append(run)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShoalError(f"{path} can't be read as JSON ({error}). Delete it to report from metrics.jsonl.") from error
    if not isinstance(content, dict):
        raise ShoalError(f"{path} holds {type(content).__name__}, not the object that a run writes.")
    return content


def _read_events(run: Run, path: Path) -> None:
    kept: dict[str, dict[Any, Event]] = {"round": {}, "test": {}, "clients": {}}
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            run.skipped_lines += 1
            continue
        if not isinstance(event, dict):
            run.skipped_lines += 1
        elif event.get("event") == "client":
            run.clients.append(event)
        elif event.get("event") == "round":
            kept["round"][event.get("round")] = event
        elif event.get("event") == "eval" and event.get("split") in kept:
            # Evaluations at fixed times may see one version more than once.
            kept[event["split"]][event.get("round"), event.get("virtual_s")] = event
    # A resumed run may have written a round twice; the later line is the one that its end grew from.
    run.rounds = _in_order(kept["round"].values())
    run.tests = _in_order(kept["test"].values())
    run.client_tests = _in_order(kept["clients"].values())


def _in_order(events: Iterable[Event]) -> list[Event]:
    return sorted((e for e in events if number(e.get("round")) is not None), key=lambda e: e["round"])


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
