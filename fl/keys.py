"""Randomness from keys: every draw has its own generator, named by what it is for.

A key is a path such as ``(seed, "batches", client, version)``. It is hashed (SHA-256 of an unambiguous encoding) to
the seed of a fresh generator, so a draw never depends on how many draws came before it: not on the cohort size, the
number of workers, the engine, the order of arrivals, or a resume.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np

Part = int | str


def key_bytes(*path: Part) -> bytes:
    """32 bytes that name ``path``: SHA-256 over each part's type, length and text, so (1, "2") differs from ("12",)."""
    digest = hashlib.sha256()
    for part in path:
        text = str(int(part)) if isinstance(part, int | np.integer) else str(part)
        kind = "i" if isinstance(part, int | np.integer) else "s"
        digest.update(f"{kind}{len(text)}:{text}".encode())
    return digest.digest()


def key_int(*path: Part) -> int:
    """A 63-bit seed for ``path`` (for libraries that take an integer)."""
    return int.from_bytes(key_bytes(*path)[:8], "little") >> 1


def generator(*path: Part) -> np.random.Generator:
    """A fresh NumPy generator (PCG64) for ``path``."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(key_bytes(*path)[:16], "little")))


def torch_generator(*path: Part, device: str = "cpu"):
    """A fresh ``torch.Generator`` on ``device`` for ``path``."""
    import torch

    return torch.Generator(device=device).manual_seed(key_int(*path))


@contextlib.contextmanager
def seeded_globals(*path: Part) -> Iterator[None]:
    """Seed torch's global CPU generator from ``path`` inside the block, and put it back afterwards.

    Only for other libraries' code that reads the global generator and takes no other (PEFT's and transformers'
    weight initialisation).
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(key_int(*path))
        yield
