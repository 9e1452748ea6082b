"""RoLoRA: odd rounds train B beside a frozen common A, even rounds A beside a frozen common B (arXiv 2502.01755).

Each round is linear in what trains, so its mean is exact. B starts at zero, where A has no gradient: B comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

from clients.adapters.lora import Factors


@dataclass(frozen=True)
class RoLoRA(Factors):
    """The factors of LoRA, trained in turn."""

    phases = (("B",), ("A",))
    shape = "alternating"
