"""A rich table that leaves out its last columns where it would not fit, rather than squeeze them all."""

from __future__ import annotations

import copy

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table


class FittingTable(Table):
    """As many columns as the console is wide, from the first on, and never fewer than ``kept_columns``."""

    kept_columns = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitted = copy.copy(self)
        fitted.columns = list(self.columns)
        while len(fitted.columns) > self.kept_columns and self._needs(fitted, console, options) > options.max_width:
            fitted.columns.pop()
        if len(fitted.columns) < len(self.columns):
            left_out = ", ".join(str(c.header) for c in self.columns[len(fitted.columns) :])
            fitted.caption, fitted.caption_justify = f"left out for want of room: {left_out}", "left"
        return super(FittingTable, fitted).__rich_console__(console, options)

    @staticmethod
    def _needs(table: Table, console: Console, options: ConsoleOptions) -> int:
        """The width at which no cell is cut or wrapped."""
        wide = options.update(max_width=10_000)
        return table.__rich_measure__(console, wide).maximum
