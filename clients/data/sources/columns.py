"""What data with named columns have in common: texts, labels, groups, prompts and responses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clients.data.source import Source
from clients.data.tokenise import Examples
from clients.models.base import CAUSAL_LM
from fl.config import setting
from fl.errors import ConfigError

Table = Mapping[str, Sequence[Any]]
MAX_LABELS = 1000


@dataclass(frozen=True)
class Columns(Source):
    """Columns by name. A causal language model takes ``prompt`` and ``response``, or else ``text``.

    ``template`` makes the prompt's text; ``{prompt}`` stands for the column. Only the response carries loss.
    """

    text: str | list[str] = setting("text", help="column with the text; two for pairs, as [premise,hypothesis]")
    label: str | None = setting("label", help="column with the label; null for none")
    group: str | None = setting(None, help="column that says whose sample it is, for partition=natural")
    prompt: str | None = setting(None, help="column with the prompt (causal language models)")
    response: str | None = setting(None, help="column with the response")
    template: str = setting("{prompt}\n", help="text made of a prompt")
    chunk: bool = setting(False, help="causal: cut long texts into pieces of max_length instead of truncating")

    def __post_init__(self) -> None:
        if not 1 <= len(self.text_columns) <= 2:
            raise ConfigError("data.text", self.text, "one column, or two for pairs")
        if (self.prompt is None) != (self.response is None):
            key = "data.response" if self.response is None else "data.prompt"
            raise ConfigError(key, None, "data.prompt and data.response go together")
        if "{prompt}" not in self.template:
            raise ConfigError("data.template", self.template, "a text that contains {prompt}")

    @property
    def text_columns(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else self.text

    @abstractmethod
    def tables(self) -> tuple[tuple[str, Table], tuple[str, Table] | None]:
        """(what it is called, its columns) of the data, and of the test data if there are any."""

    def label_order(self) -> list[str] | None:
        """The names of the labels, where the data fix their order; else they are sorted."""
        return None

    def chunked(self, task: str) -> bool:
        return self.chunk and task == CAUSAL_LM and self.prompt is None

    def examples(self, task: str) -> tuple[Examples, Examples | None]:
        main, test = self.tables()
        parts = [main] if test is None else [main, test]
        wanted = {"data.prompt": self.prompt, "data.response": self.response} if self._dialogue(task) else {}
        wanted = wanted or {"data.text": self.text_columns[0], "data.text[1]": (*self.text_columns, None)[1]}
        wanted["data.group"] = self.group
        if task != CAUSAL_LM:
            wanted["data.label"] = self.label
        for name, table in parts:
            _need(table, name, {k: v for k, v in wanted.items() if v is not None})
        labels = self._coded([(n, t) for n, t in parts if self.label in t], self.label, "data.label")
        groups = self._coded(parts, self.group, "data.group")
        found = [self._examples(task, name, table) for name, table in parts]
        for i, examples in enumerate(found):
            if len(labels[0]) == len(parts):
                examples.labels, examples.label_names = labels[0][i], labels[1]
            if groups[0]:
                examples.groups, examples.group_names = groups[0][i], groups[1]
        return found[0], found[1] if test is not None else None

    def _dialogue(self, task: str) -> bool:
        return task == CAUSAL_LM and self.prompt is not None

    def _examples(self, task: str, name: str, table: Table) -> Examples:
        if self._dialogue(task):
            prompts = _texts(table, name, str(self.prompt), "data.prompt")
            filled = [self.template.replace("{prompt}", p) for p in prompts]
            return Examples(filled, _texts(table, name, str(self.response), "data.response"), is_prompt=True)
        columns = [_texts(table, name, column, "data.text") for column in self.text_columns]
        return Examples(columns[0], columns[1] if len(columns) == 2 else None)

    def _coded(
        self, parts: list[tuple[str, Table]], column: str | None, key: str
    ) -> tuple[list[np.ndarray], list[str]]:
        """Codes of a column of each table, and the names they index: values sorted, as numbers where all are."""
        if column is None or not parts:
            return [], []
        values = [[_value(v, key, name, row) for row, v in enumerate(table[column])] for name, table in parts]
        distinct = {v for part in values for v in part}
        if key == "data.label" and len(distinct) > MAX_LABELS:
            raise ConfigError(key, column, f"at most {MAX_LABELS} labels; this column has {len(distinct)} values")
        names = sorted(distinct, key=int) if all(v.lstrip("-").isdecimal() for v in distinct) else sorted(distinct)
        if key == "data.label":
            names = self.label_order() or names
        codes = {v: i for i, v in enumerate(names)}
        return [np.array([codes[v] for v in part], dtype=np.int64) for part in values], names


def _need(table: Table, name: str, wanted: Mapping[str, str]) -> None:
    missing = {key: column for key, column in wanted.items() if column not in table}
    if not missing:
        return
    key, column = next(iter(missing.items()))
    others = [f"{k}={v!r}" for k, v in missing.items() if k != key]
    also = f"; also missing: {', '.join(others)}" if others else ""
    has = ", ".join(map(str, table)) or "none"
    raise ConfigError(key, column, f"{name} has no such column, only {has}{also}", f"Set {key}=COLUMN.")


def _texts(table: Table, name: str, column: str, key: str) -> list[str]:
    for row, value in enumerate(table[column]):
        if not isinstance(value, str):
            raise ConfigError(key, column, f"a column of text; row {row + 1} of {name} holds {value!r}")
    return list(table[column])


def _value(value: Any, key: str, name: str, row: int) -> str:
    """A label or group as text; whole numbers and booleans are numbers."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, bool | int | np.integer) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise ConfigError(key, value, f"text or a whole number in every row; this is row {row + 1} of {name}")
