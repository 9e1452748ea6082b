"""Data sets of the Hugging Face hub, or a local folder of data files, through ``datasets``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clients.data.sources.columns import Columns, Table
from fl.config import setting
from fl.errors import ConfigError, ShoalError


@dataclass(frozen=True)
class HubData(Columns):
    """``datasets.load_dataset(name, subset, revision=revision)``; class labels keep their names.

    ``name`` is a data set on the hub, or a folder with csv, json or parquet files. Without ``test_split``, a
    ``test_fraction`` of ``train_split`` is held out. Give a ``revision`` so that a name always means the same rows.
    """

    name: str | None = setting(None, help="hub name, or a folder of data files")
    subset: str | None = setting(None, help="configuration of the data set, as sst2 of nyu-mll/glue")
    revision: str | None = setting(None, help="branch, tag or commit on the hub")
    train_split: str = setting("train", help="split to train on")
    test_split: str | None = setting(None, help="split to test on; null splits the training split")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            raise ConfigError("data.name", self.name, "a name is needed", "Give data.name=ORG/NAME or a folder.")

    def origin(self) -> Any:
        """A hash of the columns used: what the hub gives under a name may change."""
        columns = {*self.text_columns, self.label, self.group, self.prompt, self.response}
        sha = hashlib.sha256()
        for name, table in filter(None, self.tables()):
            sha.update(name.encode())
            for column in sorted(c for c in columns if c is not None and c in table):
                sha.update(json.dumps([column, list(table[column])], default=str).encode())
        return sha.hexdigest()

    def tables(self) -> tuple[tuple[str, Table], tuple[str, Table] | None]:
        return self._loaded[0]

    def label_order(self) -> list[str] | None:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[tuple[tuple[str, Table], tuple[str, Table] | None], list[str] | None]:
        train, names = self._read(self.train_split)
        return (train, self._read(self.test_split)[0] if self.test_split else None), names

    def _read(self, split: str) -> tuple[tuple[str, Table], list[str] | None]:
        try:
            import datasets
        except ImportError as error:
            raise ShoalError("data=hf needs the package datasets: pip install 'shoal-fl[hub]'.") from error
        name = f"{self.name}{'/' + self.subset if self.subset else ''}@{split}"
        try:
            found = datasets.load_dataset(self.name, self.subset, split=split, revision=self.revision)
        except Exception as error:
            # Each storage and file format raises its own kind; all mean that there is no data set.
            raise ShoalError(f"data set {name} can't be loaded: {_why(error)}") from error
        table = {column: found[column][:] for column in found.column_names}
        names = getattr(found.features.get(self.label), "names", None)
        if names and self.label is not None:
            unlabelled = sum(code is None or code < 0 for code in table[self.label])
            if unlabelled:
                raise ShoalError(f"data set {name}: {unlabelled} rows have no label; use a split that has them.")
            table[self.label] = [names[code] for code in table[self.label]]
        return (name, table), names


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())[:200].rstrip(".")
    kind = type(error).__name__
    if "script" in text.lower() or "trust_remote_code" in text:
        hint = "It needs a script, which is never run; name a copy in Parquet (revision=refs/convert/parquet, say)."
    elif "split" in text.lower():
        hint = "Set data.train_split and data.test_split to splits it has."
    elif "config" in text.lower():
        hint = "Set data.subset to one it has."
    elif "offline" in f"{text} {kind}".lower() or "connect" in f"{text} {kind}".lower():
        hint = "The hub can't be reached: go online (HF_HUB_OFFLINE unset), or give a local folder."
    else:
        hint = "Check data.name, or give a local folder with csv, json or parquet files."
    return f"{text or kind}. {hint}"
