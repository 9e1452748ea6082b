"""The ledger of a run: bytes, client steps, tokens and rejected updates, added up from the events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SUMS = ("bytes_up", "bytes_down", "client_steps", "tokens")


@dataclass
class Ledger:
    """Totals over the rounds so far. ``rejected`` counts updates by reason."""

    sums: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def record(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Add an event, and return it: a round's with the totals so far, others as they are."""
        if event["event"] == "initialise":
            self.sums.update({name: event[name] for name in ("bytes_down", "bytes_up")})
        if event["event"] != "round":
            return dict(event)
        for name in _SUMS:
            self.sums[name] += event[name]
        self.rejected.update(event["rejected"])
        totals = {f"{n}_total": self.sums[n] for n in ("bytes_down", "bytes_up", "client_steps")}
        out = {}
        for name, value in event.items():
            out[name] = value
            if name == "client_steps":
                out["client_steps_total"] = totals["client_steps_total"]
            if name == "bytes_up":
                out["bytes_down_total"] = totals["bytes_down_total"]
                out["bytes_up_total"] = totals["bytes_up_total"]
        return out

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"sums": dict(self.sums), "rejected": dict(self.rejected)}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Ledger:
        return cls(Counter(state["sums"]), Counter(state["rejected"]))

    def final(self) -> dict[str, Any]:
        """The totals as they go into run.json."""
        return {
            **{name: self.sums[name] for name in _SUMS},
            "rejected_updates": sum(self.rejected.values()),
            "rejected": dict(sorted(self.rejected.items())),
        }
