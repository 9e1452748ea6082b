"""Files of one's own: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.data.fetch import file_hash
from clients.data.sources.columns import Columns, Table
from fl.config import setting
from fl.errors import ConfigError, ShoalError


@dataclass(frozen=True)
class File(Columns):
    """A file with named columns, and perhaps another one to test on (else ``test_fraction`` is split off)."""

    path: str | None = setting(None, help="the file")
    test_path: str | None = setting(None, help="a file to test on; null splits the first one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ConfigError("data.path", self.path, "a file is needed", "Give data.path=FILE.")
        for key, path in (("data.path", self.path), ("data.test_path", self.test_path)):
            if path and not Path(path).expanduser().is_file():
                raise ConfigError(key, path, "a file that exists")

    def origin(self) -> Any:
        return [file_hash(p) for p in self._paths()]

    def tables(self) -> tuple[tuple[str, Table], tuple[str, Table] | None]:
        found = []
        for path in self._paths():
            table = self.read(path)
            if not table or not len(next(iter(table.values()))):
                raise ShoalError(f"{path} has no rows.")
            found.append((str(path), table))
        return found[0], found[1] if len(found) == 2 else None

    @abstractmethod
    def read(self, path: Path) -> Table:
        """The columns of the file. Raises `ShoalError` with the line where it is not what it should be."""

    def _paths(self) -> list[Path]:
        return [Path(p).expanduser() for p in (self.path, self.test_path) if p]


@dataclass(frozen=True)
class Csv(File):
    """Comma-separated values in UTF-8, whose first line names the columns."""

    delimiter: str = setting(",", help='what separates the fields; a tab is "\\t"')

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1:
            raise ConfigError("data.delimiter", self.delimiter, "one character")

    def read(self, path: Path) -> Table:
        csv.field_size_limit(1 << 27)
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter=self.delimiter, strict=True)
                names = next(reader, [])
                if len(set(names)) < len(names):
                    raise ShoalError(f"{path}: the first line names a column twice: {', '.join(names)}.")
                columns: list[list[str]] = [[] for _ in names]
                for row in reader:
                    if not row:
                        continue
                    if len(row) != len(names):
                        raise ShoalError(
                            f"{path}, line {reader.line_num}: {len(row)} fields, but the first line names {len(names)}."
                        )
                    for column, value in zip(columns, row, strict=True):
                        column.append(value)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ShoalError(f"{path} is not a CSV file in UTF-8: {error}.") from error
        return dict(zip(names, columns, strict=True))


@dataclass(frozen=True)
class Jsonl(File):
    """One JSON object a line, in UTF-8."""

    def read(self, path: Path) -> Table:
        rows: list[dict[str, Any]] = []
        try:
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ShoalError(f"{path}, line {number}: {line.strip()[:60]} is no JSON object.")
                    rows.append(row)
        except json.JSONDecodeError as error:
            raise ShoalError(f"{path}, line {number}: {error.msg} (JSON).") from error
        except UnicodeDecodeError as error:
            raise ShoalError(f"{path} is not in UTF-8: {error}.") from error
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name) for row in rows] for name in names}


@dataclass(frozen=True)
class Parquet(File):
    """A Parquet file; needs pyarrow (``pip install 'shoal-fl[parquet]'``)."""

    def read(self, path: Path) -> Table:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ShoalError("data=parquet needs pyarrow: pip install 'shoal-fl[parquet]'.") from error
        try:
            # One file, whatever its folder's name looks like ("key=value" is a partition to pyarrow).
            table = pq.read_table(path, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise ShoalError(f"{path} is not a Parquet file: {' '.join(str(error).split())[:200]}.") from error
        return {name: table.column(name).to_pylist() for name in table.column_names}
