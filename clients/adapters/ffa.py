"""FFA-LoRA: A is frozen and the same for all clients, only B trains (Sun et al., ICLR 2024, arXiv 2403.12313).

``s B A`` is then linear in what trains, so the mean of the clients' B gives the mean of their weight changes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from clients.adapters.lora import Factors


@dataclass(frozen=True)
class FFA(Factors):
    """A starts Kaiming-uniform, or with orthonormal rows (``adapter/init=orthonormal``), each module its own."""

    phases = (("B",),)
    shape = "b"
