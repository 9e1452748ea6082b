"""One run from its words on the command line to its folder: what `shoal run` does."""

from __future__ import annotations

import copy
import datetime
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console

from clients.adapters.initial.base import DataDriven
from fl import environment
from fl.compose import RUN_DIR, compose, flat
from fl.engine.settings import Carried, SuperLink
from fl.errors import ShoalError
from fl.experiment import Experiment, Settings, Shared
from fl.progress import Progress, header
from fl.records import RunFolder, fresh_folder, read_run
from fl.state import ServerState
from fl.trackers.tracking import Tracking
from privacy.base import Statement

if TYPE_CHECKING:
    from flwr.serverapp import Grid


@dataclass
class Outcome:
    """What became of a run: its folder and run.json."""

    folder: Path
    run: dict[str, Any]


def run(
    overrides: Sequence[str],
    *,
    folder: Path | None = None,
    shared: Shared | None = None,
    quiet: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Compose, check and run one experiment. Raises `ShoalError` (its checkpoint and records are kept)."""
    resolved, folders = compose(overrides)
    settings = Settings.of(resolved)
    named = any(word.lstrip("+").startswith(f"{RUN_DIR}=") for word in overrides)
    if isinstance(settings.engine, SuperLink):
        from fl.engine.submit import submit

        place = folder or folders[RUN_DIR]
        return submit(settings.engine, resolved, list(overrides), place, False, console or Console())
    where = folder or (folders[RUN_DIR] if named else fresh_folder(folders[RUN_DIR]))
    return go(settings, resolved, list(overrides), RunFolder(where), False, shared, quiet, console)


def resume(
    folder: Path, *, shared: Shared | None = None, quiet: bool = False, console: Console | None = None
) -> Outcome:
    """Go on with the run in ``folder`` from its last checkpoint, to the same end as if it had never stopped."""
    if (read_run(folder) or {}).get("status") == "completed":
        raise ShoalError(f"The run in {folder} is complete; there is nothing to resume.")
    config = folder / "config.yaml"
    try:
        resolved = yaml.safe_load(config.read_text(encoding="utf-8"))
    except OSError as error:
        way_out = "Give the folder that `shoal run` printed, or start the run anew."
        raise ShoalError(f"{folder} holds no run to resume: it has no config.yaml. {way_out}") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ShoalError(f"{config} is damaged ({reason}). Put it back, or start the run anew.") from error
    if not isinstance(resolved, dict):
        raise ShoalError(f"{config} is damaged: it holds no settings. Put it back, or start the run anew.")
    settings = Settings.of(resolved)
    if isinstance(settings.engine, SuperLink):
        from fl.engine.submit import submit

        return submit(settings.engine, resolved, None, folder, True, console or Console())
    return go(settings, resolved, None, RunFolder(folder, resume=True), True, shared, quiet, console)


def go(
    settings: Settings,
    resolved: dict[str, Any],
    overrides: list[str] | None,
    folder: RunFolder,
    resuming: bool,
    shared: Shared | None = None,
    quiet: bool = False,
    console: Console | None = None,
    grid: Grid | None = None,
) -> Outcome:
    """Run, or with ``resuming`` go on with, what ``folder`` is for. ``grid`` is Flower's, where Flower has started this
    process as its server."""
    # Flower is imported by what follows; a wrong setting has been refused before.
    from clients.data.summary import format_summary
    from fl.engine.flower import quiet_flower
    from fl.server_app import Server

    quiet_flower()
    # Before anything is computed: a process that has started a thread pool of its own can't fork workers safely.
    torch.set_num_threads(1)
    console = console or Console()

    def say(text: str) -> None:
        if not quiet:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    record = _started(settings, resolved, overrides, folder)
    folder.write_config(resolved)
    folder.write_run(record)
    carried = Carried(copy.deepcopy(resolved), record["id"], folder.path, grid)
    experiment = Experiment(settings, shared, say)
    tracking = Tracking(settings.tracker, record, folder)
    server: Server | None = None
    final: dict[str, Any] | None = None
    try:
        say(f"Loading {record['model']} and {record['data']} ...")
        carry = settings.engine.connect(experiment, carried)
        summary = experiment.data.summary()
        if not quiet:
            console.print(format_summary(summary))
        plan = experiment.choose_plan()
        if not settings.engine.remote:  # else it is this machine's, and not the nodes'
            resolved["engine"] |= plan.settings()
        record |= _described(experiment, summary)
        record |= _claim(experiment)
        record["settings"] = flat(resolved)
        folder.write_config(resolved)
        folder.write_run(record)
        if not quiet:
            console.print(header(_shown(record, settings, str(folder.path))))
        with Progress(
            settings.schedule.rounds,
            experiment.per_round,
            quiet=quiet,
            console=console,
            until_s=getattr(settings.schedule, "until_s", None),
        ) as progress:
            server = Server(experiment, folder, progress, resuming, tracking)
            carry(server.run)
        say("Saving the adapter and evaluating it in float32 ...")
        from fl import audit
        from fl.saving import export

        assert server.world is not None
        record |= _claim(experiment)
        state = server.world.server
        saved = export(experiment, state, folder.path / "adapter", _card(record, resolved, state))
        final = {**server.final(), **{k: v for k, v in saved.scores.items() if k != "examples"}}
        record["saved"] = saved.record()
        record["status"] = "completed"
        verdict = audit.canaries(experiment.guard)
        if verdict is not None:
            record["audit"] = verdict
            audit.write(folder.path, {"canaries": verdict})
            if not quiet or verdict["contradicts"]:
                audit.show(console, {"canaries": verdict})
    except KeyboardInterrupt as error:
        error.add_note(f"go on with `shoal run --resume {folder.path}`")
        raise
    except BaseException as error:
        record |= {"status": "failed", "error": " ".join(str(error).split()) or type(error).__name__}
        raise
    finally:
        experiment.close()
        if final is None and server is not None and server.world is not None:
            final = server.final()
            record |= _claim(experiment)
        if final is not None:
            memory = environment.peak_device_memory_bytes() or environment.peak_memory_bytes()
            record["final"] = {**final, "peak_memory_bytes": memory}
        record["finished"] = _now()
        folder.write_run(record)
        tracking.finish()
        folder.close()
    if settings.report:
        from fl.report.html import write_report

        write_report([folder.path], folder.path / "report.html")
    return Outcome(folder.path, record)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _started(
    settings: Settings, resolved: Mapping[str, Any], overrides: list[str] | None, folder: RunFolder
) -> dict[str, Any]:
    """run.json as it is known before anything is loaded. A resumed run keeps what was known when it was cut off.

    Its status is ``interrupted`` until it ends, which is what a killed run leaves behind.
    """
    before = (read_run(folder.path) or {}) if overrides is None else {}
    words = before.get("overrides", []) if overrides is None else overrides
    if overrides is not None:
        folder.write_overrides(overrides)
    experiment = next((w.partition("=")[2] for w in reversed(words) if w.startswith("experiment=")), None)
    return {
        **before,
        "id": before.get("id") or secrets.token_hex(8),
        "name": settings.name,
        "experiment": experiment,
        "seed": settings.seed,
        "status": "interrupted",
        "started": before.get("started") or _now(),
        "finished": None,
        "versions": environment.versions(),
        "commit": environment.git_commit(),
        "model": _choice(settings.model),
        "data": _choice(settings.data),
        "task": settings.model.task,
        "adapter": _choice(settings.adapter),
        "privacy": before.get("privacy") or "not known yet: the run ended before it was planned",
        "settings": flat(resolved),
        "overrides": words,
        "final": before.get("final"),
        "error": None,
    }


def _choice(part: Any) -> str:
    """What a group's choice is called for people: its own name where it has one, else its class's."""
    for name in ("name", "path", "method", "architecture"):
        value = getattr(part, name, None)
        if isinstance(value, str):
            return value
    return type(part).__name__


def _claim(experiment: Experiment) -> dict[str, Any]:
    """The privacy statement as it stands, in words and as values."""
    from fl.initialise import statement

    made = experiment.guard.statement()
    start = experiment.settings.adapter.initialisation
    words = f"{made.text()} {experiment.settings.secure_aggregation.statement()}".rstrip()
    if isinstance(start, DataDriven) and start.source == "private" and made.unit is not None:
        what = f"about {start.examples} examples clipped to {start.clip:g}, with noise of {start.noise:g} times that"
        words = f"{words} Counted with the steps: each client's part in the adapter's start, a sum over {what}."
    elif isinstance(start, DataDriven):
        words = f"{words} {statement(start, experiment)}"
    return {"privacy": words, "privacy_statement": made.as_plain()}


def _described(experiment: Experiment, summary: dict[str, Any]) -> dict[str, Any]:
    cohort, settings = experiment.trainer.worker.cohort, experiment.settings
    plan = experiment.trainer.plan
    around = {}
    if settings.schedule.decentral:
        around["topology"] = settings.graph.about(len(experiment.data), settings.seed)
    frozen = sum(p.numel() for p in cohort.model.parameters())
    return {
        "device": environment.device_name(plan.device),
        "num_clients": len(experiment.data),
        "trainable_parameters": cohort.space.trainable,
        "total_parameters": frozen + cohort.layout.size,
        "engine": plan.settings(),
        "partition": summary,
        **around,
    }


def _shown(record: Mapping[str, Any], settings: Settings, folder: str) -> dict[str, Any]:
    from clients.trainer import Plan
    from clients.tuning import describe

    return {
        "experiment": record["name"],
        "model": f"{record['model']}, {record['trainable_parameters']:,} of {record['total_parameters']:,} train",
        "adapter": record["adapter"],
        "data": f"{record['data']}, {record['num_clients']} clients ({type(settings.partition).__name__.lower()})",
        "local": f"{type(settings.local.optimizer).__name__}, lr {settings.local.lr:g}, "
        + (f"{settings.local.epochs:g} epochs" if settings.local.epochs else f"{settings.local.steps} steps")
        + f" of {settings.local.batch_size}",
        "server": _length(settings),
        "engine": describe(Plan(**record["engine"])),
        "privacy": Statement(**record["privacy_statement"]).headline(),
        "seed": record["seed"],
        "folder": folder,
    }


def _length(settings: Settings) -> str:
    """Who steps, by which rule, and for how long."""
    schedule, until_s = settings.schedule, getattr(settings.schedule, "until_s", None)
    length = f"{schedule.rounds} rounds" if until_s is None else f"{until_s:g} virtual s"
    name = "" if schedule.in_rounds else f" under {type(schedule).__name__}"
    return f"{type(settings.aggregator).__name__}{name}, {length}"


def _card(record: Mapping[str, Any], resolved: Mapping[str, Any], server: ServerState) -> dict[str, Any]:
    return {
        "name": record["name"],
        "adapter": record["adapter"],
        "trainable": record["trainable_parameters"],
        "data": record["data"],
        "clients": record["num_clients"],
        "partition": resolved["partition"]["_target_"].rpartition(".")[2],
        "rounds": server.round,
        "seed": record["seed"],
        "privacy": record["privacy"],
        "model_settings": resolved["model"],
    }
