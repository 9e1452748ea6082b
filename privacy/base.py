"""What a privacy mechanism says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Privacy(ABC):
    """A promise about privacy, or its absence; the settings are fields."""

    @abstractmethod
    def statement(self) -> str:
        """A sentence or two for run.json and the model card: what is promised to whom, or that nothing is."""
