"""Who holds what, as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

MAX_ROWS = 20
BAR = 24
BLOCKS = "█▓▒░"  # tell labels apart where there are no colours
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "white", "bright_black")


def format_summary(summary: dict[str, Any]) -> Table:
    """A table of ``FederatedData.summary()``: samples, tokens and labels of each client.

    The bar's length is the client's share of the largest, its colours are the labels (8 colours, then again). Of
    more than 20 clients, 20 are shown from the largest to the smallest at even ranks. The last line is the total.
    """
    sizes: list[int] = summary["sizes"]
    largest = max(sizes, default=0) or 1
    shown = list(range(len(sizes)))
    title = f"{len(sizes)} clients"
    if len(sizes) > MAX_ROWS:
        ranked = sorted(shown, key=lambda c: (-sizes[c], c))
        shown = [ranked[round(i * (len(sizes) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
        title += f", {MAX_ROWS} of them from the largest to the smallest"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", show_footer=True)
    table.add_column("client", footer="all", no_wrap=True)
    for name, total in (("train", sizes), ("held out", summary["test_sizes"]), ("tokens", summary["tokens"])):
        table.add_column(name, justify="right", footer=f"{sum(total):,}")
    table.add_column("samples by label" if summary["labels"] else "samples", footer=_legend(summary), no_wrap=True)
    for client in shown:
        counts = summary["labels"][client] if summary["labels"] else [sizes[client]]
        name = summary["groups"][client] if summary["groups"] else str(client)
        numbers = (f"{summary[key][client]:,}" for key in ("sizes", "test_sizes", "tokens"))
        table.add_row(_shorten(name), *numbers, _bar(counts, largest))
    return table


def _bar(counts: list[int], largest: int) -> Text:
    """Blocks in the labels' colours; the cut points are rounded, so the lengths add up."""
    bar, done, drawn = Text(), 0, 0
    for label, count in enumerate(counts):
        done += count
        end = round(BAR * done / largest)
        bar.append(BLOCKS[label % len(BLOCKS)] * (end - drawn), style=COLOURS[label % len(COLOURS)])
        drawn = end
    return bar


def _legend(summary: dict[str, Any]) -> Text:
    names = summary["label_names"] if summary["labels"] else []
    legend = Text()
    for label, name in enumerate(names[: len(COLOURS)]):
        count = sum(row[label] for row in summary["labels"])
        legend.append(f"{BLOCKS[label % len(BLOCKS)]} ", style=COLOURS[label]).append(
            f"{_shorten(name, 12)} {count:,}  "
        )
    if len(names) > len(COLOURS):
        legend.append(f"and {len(names) - len(COLOURS)} more")
    return legend


def _shorten(name: str, width: int = 28) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
