"""The seam to experiment trackers, and how an event of metrics.jsonl becomes named numbers at a step.

A session is given every event of its run from the first one on, whether the run is new or resumed; what its store holds
already it leaves out. So a tracker shows what metrics.jsonl holds, each number once. Client events are not sent.
"""

from __future__ import annotations

import datetime
import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from fl.errors import ConfigError

# Fields that say which event it is, or that another event gives.
_ROUND_SKIPS = frozenset({"event", "round", "version"})
_EVAL_SKIPS = frozenset({"event", "round", "split", "metric", "examples", "virtual_s", "wall_s"})
_OF_METRIC = frozenset({"mean", "std", "worst_decile"})


class Session(ABC):
    """One run at a tracker. Any exception turns the tracker off; it never stops the run."""

    @abstractmethod
    def event(self, event: Mapping[str, Any]) -> None:
        """Send a ``round`` or ``eval`` event, unless the store has it from before the run was resumed."""

    @abstractmethod
    def finish(self, final: Mapping[str, Any], status: str) -> None:
        """The run has ended with run.json's ``final`` numbers, ``completed``, ``failed`` or ``interrupted``."""


@dataclass(frozen=True)
class Tracker(ABC):
    """The ``tracker=`` group. ``name`` is the choice's name, and that of the extra which installs its library."""

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    environment: ClassVar[Mapping[str, str]] = {}  # set before the library is imported, where the user has not

    def check(self) -> None:
        """Import the library. Raises `ConfigError` where that fails, so that nothing is loaded in vain."""
        for key, value in self.environment.items():
            os.environ.setdefault(key, value)
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # a library that does not fit its own dependencies may raise anything
                reason = " ".join(str(error).split()) or type(error).__name__
                way_out = f'Install it with `pip install "shoal-fl[{self.name}]"`, or use tracker=none.'
                raise ConfigError("tracker", self.name, f"its library can't be imported ({reason})", way_out) from error

    @abstractmethod
    def start(self, record: Mapping[str, Any], folder: Path) -> Session | None:
        """Open the run that run.json's ``record`` describes, or go on with it; None if nothing is to be sent.

        What it writes to the disk is in the run's ``folder``.
        """


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an event by name; its ``round`` is their step.

    ``round/loss``, ``round/bytes_up_total``, ``round/virtual_s`` ... (``round/rejected`` is the sum over reasons);
    ``test/accuracy``, ``test/loss`` ... by the evaluation's split; ``clients/accuracy_mean``, ``clients/accuracy_std``,
    ``clients/accuracy_worst_decile``. Other events have none.
    """
    if event["event"] == "round":
        values = {**event, "rejected": sum((event.get("rejected") or {}).values())}
        named = {f"round/{k}": v for k, v in values.items() if k not in _ROUND_SKIPS}
    elif event["event"] == "eval":
        metric = event.get("metric")
        names = {k: f"{metric}_{k}" if metric and k in _OF_METRIC else k for k in event if k not in _EVAL_SKIPS}
        named = {f"{event['split']}/{name}": event[k] for k, name in names.items()}
    else:
        named = {}
    return _finite(named)


def final_scalars(final: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of run.json's ``final``: ``final/accuracy``, ``final/bytes_up`` ..."""
    return _finite({f"final/{k}": v for k, v in final.items()})


def moment(record: Mapping[str, Any], event: Mapping[str, Any]) -> float:
    """When an event happened, in Unix seconds: the start of the run and the wall time that it has worked since."""
    return datetime.datetime.fromisoformat(record["started"]).timestamp() + event["wall_s"]


def about(record: Mapping[str, Any]) -> dict[str, str]:
    """What a run is, in words, beside its settings."""
    names = ("experiment", "model", "data", "task", "adapter", "privacy", "device", "commit")
    words = {name: record.get(name) for name in names}
    words["shoal"] = record.get("versions", {}).get("shoal")
    return {name: str(value) for name, value in words.items() if value is not None}


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    }
