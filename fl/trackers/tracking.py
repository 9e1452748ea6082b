"""A run's tracker, kept from doing harm: one that fails is off, the run goes on, and run.json says so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from fl.records import RunFolder, read_events
from fl.trackers.base import Session, Tracker

SENT = frozenset({"round", "eval"})


class Tracking:
    """The tracker of one run. ``record`` is run.json as the run keeps it: the tracker's fate is noted there, as
    ``"tracker": {"name", "error"}``.

    An exception at the tracker gives one warning on stderr, and nothing is sent any more.
    """

    def __init__(self, tracker: Tracker, record: dict[str, Any], folder: RunFolder):
        self.tracker, self.record, self.folder = tracker, record, folder
        self.session: Session | None = None

    def begin(self) -> None:
        """Open the session, and give it what metrics.jsonl holds (of a resumed run: up to its checkpoint)."""
        self._guarded(self._begin)

    def event(self, event: Mapping[str, Any]) -> None:
        """Send an event as it stands in metrics.jsonl; client events stay there."""
        if self.session is not None and event["event"] in SENT:
            self._guarded(self.session.event, event)

    def finish(self) -> None:
        """Close the session with the record's final numbers and status."""
        if self.session is not None:
            self._guarded(self.session.finish, self.record["final"] or {}, self.record["status"])
            self.session = None

    def _begin(self) -> None:
        self.session = self.tracker.start(self.record, self.folder.path)
        if self.session is None:
            return
        self.record["tracker"] = {"name": self.tracker.name, "error": None}
        for event in read_events(self.folder.path):
            if event["event"] in SENT:
                self.session.event(event)

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # whatever it is, the run is worth more
            self.session = None
            reason = " ".join(str(error).split())
            text = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
            self.record["tracker"] = {"name": self.tracker.name, "error": text}
            print(f"shoal: warning: tracker={self.tracker.name} failed and is off: {text}", file=sys.stderr)
            with suppress(OSError):  # a full disk, say; the run will find out by itself
                self.folder.write_run(self.record)
