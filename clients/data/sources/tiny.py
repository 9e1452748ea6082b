"""240 generated sentences with three labels and six topics: for tests and first steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clients.data.sentences import LABELS, TOPICS, sentences
from clients.data.source import Source
from clients.data.tokenise import Examples
from clients.models.base import digest


@dataclass(frozen=True)
class Tiny(Source):
    """`clients.data.sentences`: label = opinion, group = topic. A causal model learns the texts."""

    def origin(self) -> Any:
        return digest(sentences())

    def examples(self, task: str) -> tuple[Examples, Examples | None]:
        rows = sentences()
        found = Examples(
            [r.text for r in rows],
            labels=np.array([r.label for r in rows], dtype=np.int64),
            groups=np.array([r.topic for r in rows], dtype=np.int64),
            label_names=list(LABELS),
            group_names=list(TOPICS),
        )
        return found, None
