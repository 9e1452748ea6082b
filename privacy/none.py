"""No privacy mechanism, said plainly."""

from __future__ import annotations

from dataclasses import dataclass

from fl.config import setting
from fl.errors import ConfigError
from privacy.base import Privacy


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

    def statement(self) -> str:
        return (
            "No privacy guarantee: no noise was added to what clients sent, and the server saw every client's update "
            "in the clear. The updates and the adapter may reveal the training data."
        )
