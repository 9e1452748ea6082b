"""TensorBoard: event files in the run's folder, written with `torch.utils.tensorboard.SummaryWriter`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fl.trackers.base import Session, Tracker, about, moment, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """Scalars and the settings in ``<run folder>/tensorboard``. Has no settings."""

    name: ClassVar[str] = "tensorboard"
    modules: ClassVar[tuple[str, ...]] = ("torch.utils.tensorboard",)

    def start(self, record: Mapping[str, Any], folder: Path) -> Session:
        """A resumed run's folder is written anew, so that no step is in it twice."""
        from torch.utils.tensorboard import SummaryWriter

        place = folder / FOLDER
        if place.exists():
            shutil.rmtree(place)
        # purge_step: a TensorBoard that has shown the old files forgets their points
        return _Session(SummaryWriter(str(place), purge_step=0), record)


class _Session(Session):
    def __init__(self, writer: SummaryWriter, record: Mapping[str, Any]):
        self.writer, self.record = writer, record
        writer.add_text("about", _table(about(record)), 0)
        writer.add_text("settings", _table(record["settings"]), 0)
        writer.flush()

    def event(self, event: Mapping[str, Any]) -> None:
        for name, value in scalars(event).items():
            self.writer.add_scalar(name, value, event["round"], walltime=moment(self.record, event))
        self.writer.flush()  # a kill loses nothing, and TensorBoard shows it at once

    def finish(self, final: Mapping[str, Any], status: str) -> None:
        shown = {k: v for k, v in final.items() if v is not None}
        self.writer.add_text("final", _table({"status": status, **shown}), int(final.get("rounds") or 0))
        self.writer.close()


def _table(values: Mapping[str, Any]) -> str:
    """Two columns in Markdown."""
    rows = (f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items())
    return "\n".join(["| | |", "|---|---|", *(" ".join(row.split()) for row in rows)])
