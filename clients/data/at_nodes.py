"""Data that never leave their nodes: each client's samples lie in a file at its node, and nobody deals anything out.

The server has the numbers of samples that nodes told, and no sample (`server_side`). A node has the samples of the
clients that it hosts, from one file each (`node_side`). Both are a `FederatedData`; parts that lie somewhere else are
`Elsewhere`: they have a length, and whatever would look into them raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from clients.data.cache import cache_root, stored_folder
from clients.data.federated import FederatedData, federate
from clients.data.partition import Partition
from clients.data.source import FORMAT, Source
from clients.data.sources.files import Csv, File, Jsonl, Parquet
from clients.data.tokenise import tokenise, tokenizer_id
from clients.data.tokens import TokenData
from clients.models.base import CLASSIFICATION, ModelSpec, digest
from fl.errors import ConfigError, ShoalError
from fl.keys import generator

KINDS: dict[str, type[File]] = {".csv": Csv, ".jsonl": Jsonl, ".parquet": Parquet}
Sizes = Mapping[int, tuple[int, int]]  # of each client: samples that it trains on, and that it is tested on


@dataclass(frozen=True)
class AtNodes(Partition):
    """Every client's samples are in a file at its node (``shoal node --data FILE``)."""

    def split(self, labels, groups, num_examples, num_clients, rng) -> NoReturn:
        """Raises `ConfigError`: there is nothing here to deal out."""
        raise ConfigError(
            "partition", "at_nodes", "one that deals samples out, where all clients are in this process",
            "Use engine=superlink, with `shoal node --data FILE` at each node; or partition=iid.",
        )  # fmt: skip


class Elsewhere(Sequence[int]):
    """``size`` samples of ``client`` that are at its node: they can be counted, and nothing else."""

    def __init__(self, client: int, size: int):
        self.client, self._size = client, size

    def __len__(self) -> int:
        return self._size

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ShoalError(f"the samples of client {self.client} are at its node (partition=at_nodes), and stay there")

    __getitem__ = __iter__ = __array__ = _refuse


def held(parts: Sequence[Any]) -> list[np.ndarray]:
    """Those of ``parts`` whose samples are here and not `Elsewhere`."""
    return [part for part in parts if not isinstance(part, Elsewhere)]


@dataclass(eq=False)
class AtNodesData(FederatedData):
    """Federated data of which some, or all, are `Elsewhere`."""

    def summary(self) -> dict[str, Any]:
        """Sizes alone. No node tells its labels or tokens; the latter count as 0, as in a reply that hides them."""
        return {
            "sizes": [len(p) for p in self.parts], "test_sizes": [len(p) for p in self.client_tests], "labels": None,
            "label_names": list(self.train.label_names), "groups": None, "tokens": [0] * len(self.parts),
        }  # fmt: skip


def elsewhere(sizes: Sizes) -> tuple[list[Any], list[Any]]:
    """The parts and test sets of clients 0, 1, ... that told ``sizes``."""
    return tuple([Elsewhere(c, sizes[c][side]) for c in sorted(sizes)] for side in (0, 1))  # type: ignore[return-value]


def server_side(train: TokenData, test: TokenData, sizes: Sizes, seed: int, public: int) -> AtNodesData:
    """What the server has: its own samples, and the ``sizes`` of clients 0 to n - 1.

    ``test`` is the central test set. Of ``train``, ``public`` samples are the public ones, drawn as `federate` draws
    them; the others name the labels and serve to measure the machine. Raises `ConfigError`.
    """
    if sorted(sizes) != list(range(len(sizes))):
        raise ShoalError(f"clients are numbered 0 to {len(sizes) - 1}; told were the sizes of {sorted(sizes)}")
    if public > len(train):
        raise ConfigError("data.public", public, f"at most the {len(train)} training samples of the server")
    aside = np.sort(generator(seed, "public").permutation(len(train))[:public]) if public else np.zeros(0, np.int64)
    return AtNodesData(train, test, *elsewhere(sizes), None, aside)


def kind_of(path: Path) -> type[File]:
    """The source that reads a file, by its name's end. Raises `ConfigError`."""
    if path.suffix.lower() not in KINDS:
        raise ConfigError("--data", path.name, f"a file whose name ends with {', '.join(KINDS)}")
    return KINDS[path.suffix.lower()]


def source_of(settings: Source, path: Path) -> File:
    """The source of a client's own file, with the columns that ``settings`` name where they are a file's too."""
    cls = kind_of(path)
    names = {f.name for f in fields(cls)} & {f.name for f in fields(settings)} - {"path", "test_path", "group"}
    return cls(path=str(path), **{name: getattr(settings, name) for name in names})


def samples(source: File, spec: ModelSpec, labels: Sequence[str]) -> TokenData:
    """All rows of a file as samples for the model ``spec``, whose labels index the experiment's ``labels``.

    From the cache if they were tokenised before; other users of the machine can't read them there. Raises `ShoalError`
    with row and value where the file is not what it should be.
    """
    tokenizer = spec.tokenizer()
    columns = {f.name: getattr(source, f.name) for f in fields(source) if f.name not in ("path", "test_path")}
    of_it = [type(source).__name__, columns, source.origin(), spec.task, tokenizer_id(tokenizer), list(labels)]
    key = digest(FORMAT, "at_nodes", *of_it)
    options: dict[str, Any] = {"max_length": source.max_length, "chunk": source.chunked(spec.task), "fingerprint": key}

    def make(out: Path) -> None:
        found, _ = source.examples(spec.task)
        if spec.task == CLASSIFICATION:
            if found.labels is None:
                raise ConfigError("data.label", source.label, "the column of the labels", "Set data.label=COLUMN.")
            found.labels = _coded(found.labels, found.label_names, labels, str(source.path))
        else:
            found.labels = None
        found.label_names = list(labels)
        tokenise(found, tokenizer, task=spec.task, **options).save(out / "samples")
        (out / "samples").chmod(0o700)

    return TokenData.open(stored_folder(cache_root() / "tokens" / key, make) / "samples")


def _coded(codes: np.ndarray, names: Sequence[str], labels: Sequence[str], path: str) -> np.ndarray:
    """``codes`` (n,) of a file's own ``names`` as those of the experiment's ``labels``."""
    known = {name: code for code, name in enumerate(labels)}
    new = np.array([known.get(name, -1) for name in names], dtype=np.int64)
    rows = np.flatnonzero(new[codes] < 0)
    if len(rows):
        row = int(rows[0])
        allowed = f"one of the experiment's labels: {', '.join(labels)}; this is row {row + 1} of {path}"
        raise ConfigError("data.label", names[codes[row]], allowed)
    return new[codes]


@dataclass(frozen=True)
class _Files(Partition):
    """Each client's samples are those of its file; ``ends`` of the files in the joined set, by client."""

    ends: tuple[tuple[int, int, int], ...] = ()

    def split(self, labels, groups, num_examples, num_clients, rng):
        ranges = {client: np.arange(first, last) for client, first, last in self.ends}
        return [ranges.get(client, np.zeros(0, np.int64)) for client in range(num_clients)]


def node_side(own: Mapping[int, TokenData], clients: int, seed: int, client_test_fraction: float) -> AtNodesData:
    """What a node has: the samples of the clients that it hosts (``own``), of the run's ``clients`` in all.

    ``client_test_fraction`` of each client's is held out as `federate` does it. Other clients are `Elsewhere`, and
    counted as the smallest that is here: how many samples they have is not known, and nothing here depends on it. There
    is no central test set either: a sample stands in its place. Raises `ConfigError`.
    """
    hosted = sorted(own)
    if hosted[0] < 0 or hosted[-1] >= clients:
        raise ConfigError("--clients", hosted, f"clients of the run, which has 0 to {clients - 1}")
    train = joined([own[c] for c in hosted])
    ends = np.cumsum([0, *(len(own[c]) for c in hosted)]).tolist()
    files = _Files(ends=tuple(zip(hosted, ends[:-1], ends[1:], strict=True)))
    none = train.select(np.arange(1), f"{train.fingerprint}/one")
    made = federate(train, none, files, clients, seed, client_test_fraction)
    smallest = min(len(made.parts[c]) for c in hosted)
    parts, tests = elsewhere(dict.fromkeys(range(clients), (smallest, 0)))
    for client in hosted:
        parts[client], tests[client] = made.parts[client], made.client_tests[client]
    return AtNodesData(train, none, parts, tests)


def joined(sets: Sequence[TokenData]) -> TokenData:
    """The samples of ``sets``, one behind the other. They are alike: of one model and one list of labels."""
    first = sets[0]
    if len(sets) == 1:
        return first
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([s.lengths for s in sets]))]).astype(np.int64)

    def together(name: str) -> np.ndarray | None:
        arrays = [getattr(s, name) for s in sets]
        return None if any(a is None for a in arrays) else np.concatenate(arrays)

    tokens = np.concatenate([s.tokens for s in sets])
    fingerprint = digest("joined", *(s.fingerprint for s in sets))
    return TokenData(
        tokens, offsets, together("labels"), None, first.label_names, [], first.task, first.pad_id, fingerprint,
        together("prompt_lengths"),
    )  # fmt: skip
