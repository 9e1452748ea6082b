"""Weights & Biases: an offline run in the run's folder, for `wandb sync`, or a run at a server."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fl.config import setting
from fl.errors import ConfigError
from fl.records import write_atomically
from fl.trackers.base import Session, Tracker, about, final_scalars, scalars

FOLDER, RUN_ID = "wandb", "run_id"


@dataclass(frozen=True)
class WandB(Tracker):
    """Metrics by step, settings as the run's config, final numbers as its summary."""

    name: ClassVar[str] = "wandb"
    modules: ClassVar[tuple[str, ...]] = ("wandb",)
    environment: ClassVar[Mapping[str, str]] = {"WANDB_ERROR_REPORTING": "false"}  # else it reports from offline runs

    mode: str = setting("offline", choices=["offline", "online"], help="online needs `wandb login`")
    project: str = setting("shoal", help="the W&B project that the run is listed in")

    def check(self) -> None:
        """Also refuses ``mode=online`` without an API key, for which wandb would ask in the middle of the run."""
        super().check()
        import wandb

        if self.mode == "online" and not _has_key(wandb):
            way_out = "Log in with `wandb login`, or use tracker.mode=offline."
            raise ConfigError("tracker.mode", self.mode, "no API key for Weights & Biases is configured", way_out)

    def start(self, record: Mapping[str, Any], folder: Path) -> Session:
        """A new W&B run; for a resumed run one of the same id.

        Offline, a resumed run is written anew as a whole: of several offline parts with one id, the last that is
        synced replaces the others (wandb issue 3841).
        """
        import wandb

        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        for part in place.glob("offline-run-*"):
            shutil.rmtree(part)
        known = place / RUN_ID
        run_id = known.read_text(encoding="utf-8").strip() if known.is_file() else None
        run = wandb.init(
            project=self.project,
            name=record["name"],
            id=run_id,
            resume="allow" if run_id and self.mode == "online" else None,
            mode=self.mode,
            dir=str(folder),
            config={**record["settings"], "about": about(record)},
            settings=wandb.Settings(console="off", silent=True),
        )
        write_atomically(known, run.id)
        return _Session(wandb, run)


class _Session(Session):
    def __init__(self, wandb: Any, run: Any):
        self.wandb, self.run = wandb, run
        self.first = run.step  # a resumed online run's server has the steps below

    def event(self, event: Mapping[str, Any]) -> None:
        if event["round"] >= self.first:
            self.run.log(scalars(event), step=event["round"])

    def finish(self, final: Mapping[str, Any], status: str) -> None:
        if status == "completed":
            self.run.summary.update(final_scalars(final))
        self.run.finish(exit_code=0 if status == "completed" else 1)
        if self.wandb.run is None:  # no run of the caller's
            self.wandb.teardown()  # waits for the files, and ends the threads, before a sweep's next run forks


def _has_key(wandb: Any) -> bool:
    """Whether wandb would find an API key; asks no server and no person."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # before 0.25, which can't be asked without a prompt
