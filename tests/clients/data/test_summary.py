"""The table says what the summary says."""

import io

import pytest
from rich.console import Console

from clients.data.summary import BAR, MAX_ROWS, format_summary


def show(summary):
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(format_summary(summary))
    return console.file.getvalue()


def summary(clients, labels=True, names=None):
    return {
        "sizes": [10 * (i + 1) for i in range(clients)],
        "test_sizes": list(range(clients)),
        "tokens": [1000 * i for i in range(clients)],
        "labels": [[3 * (i + 1), 7 * (i + 1)] for i in range(clients)] if labels else None,
        "label_names": ["no", "yes"] if labels else [],
        "groups": names,
    }


def test_a_line_a_client_and_the_total():
    text = show(summary(4))
    assert "4 clients" in text
    rows = [line.split() for line in text.splitlines()]
    assert rows[4][:4] == ["2", "30", "2", "2,000"]
    assert rows[-1][:4] == ["all", "100", "6", "6,000"] and "no 30" in text and "yes 70" in text


def test_bars_are_shares_of_the_largest_split_by_label():
    lines = show(summary(4)).splitlines()
    bars = [(line.count("█"), line.count("▓")) for line in lines[2:6]]
    assert bars[3] == (round(BAR * 0.3), BAR - round(BAR * 0.3))
    assert [sum(b) for b in bars] == [BAR // 4, BAR // 2, 3 * BAR // 4, BAR]


@pytest.mark.parametrize("labels", [True, False])
def test_many_clients_are_a_choice_from_largest_to_smallest(labels):
    lines = show(summary(500, labels)).splitlines()
    assert "500 clients" in lines[0] and len(lines) == MAX_ROWS + 3
    assert lines[2].split()[:2] == ["499", "5,000"] and lines[MAX_ROWS + 1].split()[:2] == ["0", "10"]


def test_natural_clients_by_name():
    assert "Abraham Lincoln" in show(summary(2, labels=False, names=["Abraham Lincoln", "B"]))
