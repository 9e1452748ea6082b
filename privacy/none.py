"""No privacy mechanism, said plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl.config import setting
from fl.errors import ConfigError
from privacy.base import Guard, Privacy, Statement

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings


@dataclass(frozen=True)
class NoPrivacy(Privacy):
    """Clients' data stay where they are, but what they send is sent as it is.

    Raises `ConfigError` for an ``epsilon``: a number that nothing keeps would be a false promise.
    """

    epsilon: float | None = setting(None, gt=0, help="needs a privacy mechanism; null means no guarantee")

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            raise ConfigError(
                "privacy.epsilon",
                self.epsilon,
                "no privacy mechanism is active (privacy=none), so nothing would keep it; only null is true",
                "Choose a mechanism from `shoal list privacy`, or leave privacy.epsilon=null.",
            )

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        secure = getattr(settings, "secure_aggregation", None)
        seen = "the server saw every client's update in the clear"
        schedule = getattr(settings, "schedule", None)
        if schedule is not None and schedule.decentral:
            seen = "every peer's neighbours saw what it sent in the clear"
        elif secure is not None and secure.active:
            seen = "the server saw sums of updates alone (secure aggregation), which are exact"
        text = f"No privacy guarantee: no noise was added to what clients sent, and {seen}"
        return Guard(Statement(f"{text}. The updates and the adapter may reveal the training data"))
