"""Events go to metrics.jsonl and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fl.trackers.base import Session, Tracker


@dataclass(frozen=True)
class NoTracker(Tracker):
    """No tracker. Has no settings."""

    name: ClassVar[str] = "none"

    def start(self, record: Mapping[str, Any], folder: Path) -> Session | None:
        return None
