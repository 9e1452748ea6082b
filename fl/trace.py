"""Reads device traces: one row for each client, or one for each window of time in which it is available.

::

    client,seconds_per_step,latency_s,up_mbps,down_mbps,from_s,until_s
    0,0.12,0.04,5,40,0,3600
    0,,,,,7200,10800
    1,0.03,0.01,,,,

Client 0 is available in two windows; its further rows leave the device's columns empty, or repeat them. Client 1 is
always available and has no limit on its rates. The columns ``from_s`` and ``until_s`` may be left out.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fl.clock import ticks
from fl.errors import ConfigError

DEVICE_COLUMNS = ("seconds_per_step", "latency_s", "up_mbps", "down_mbps")
WINDOW_COLUMNS = ("from_s", "until_s")


@dataclass(frozen=True)
class Device:
    """A client's speed and link. Rates are in 10^6 bits a second (None: unlimited).

    ``windows`` are [from, until) in ticks, in order and apart; none means always available.
    """

    seconds_per_step: float
    latency_s: float
    down_mbps: float | None
    up_mbps: float | None
    windows: tuple[tuple[int, int], ...] = ()


def read_trace(path: str, key: str) -> dict[int, Device]:
    """The devices of the csv file ``path``, by client. Raises `ConfigError` with ``key`` and the line's number."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            return _read(csv.DictReader(file), path, key)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(key, path, f"a csv file that can be read ({error})") from error


def _read(rows: csv.DictReader, path: str, key: str) -> dict[int, Device]:
    def wrong(text: str) -> ConfigError:
        return ConfigError(key, path, f"line {max(1, rows.line_num)}: {text}")

    columns = list(rows.fieldnames or [])
    expected = ["client", *DEVICE_COLUMNS]
    if sorted(columns) not in (sorted(expected), sorted([*expected, *WINDOW_COLUMNS])):
        raise wrong(f"expected the columns {','.join(expected)}[,{','.join(WINDOW_COLUMNS)}]")
    devices: dict[int, Device] = {}
    for row in rows:
        try:
            client = _client(row)
            device, window = _device(row, devices.get(client)), _window(row)
            if client in devices:
                device = _with_window(devices[client], device, window)
            elif window:
                device = replace(device, windows=(window,))
        except ValueError as error:
            raise wrong(str(error)) from error
        devices[client] = device
    if not devices:
        raise wrong("there is no row")
    return devices


def _client(row: Mapping[str, str]) -> int:
    if None in row or None in row.values():
        raise ValueError("the row has more or fewer values than there are columns")
    if not row["client"].strip().isdecimal():
        raise ValueError(f"client must be a whole number >= 0, not {row['client']!r}")
    return int(row["client"])


def _device(row: Mapping[str, str], known: Device | None) -> Device:
    if known is not None and not any(row[name].strip() for name in DEVICE_COLUMNS):
        return replace(known, windows=())
    down, up = (_number(row, n, above_zero=True) if row[n].strip() else None for n in ("down_mbps", "up_mbps"))
    return Device(_number(row, "seconds_per_step"), _number(row, "latency_s"), down, up)


def _window(row: Mapping[str, str]) -> tuple[int, int] | None:
    given = [name for name in WINDOW_COLUMNS if row.get(name, "").strip()]
    if not given:
        return None
    if len(given) == 1:
        raise ValueError("a window needs both from_s and until_s")
    start, end = (ticks(_number(row, name)) for name in WINDOW_COLUMNS)
    if start >= end:
        raise ValueError(f"from_s={row['from_s']} must be below until_s={row['until_s']}")
    return start, end


def _with_window(known: Device, device: Device, window: tuple[int, int] | None) -> Device:
    if window is None or not known.windows:
        raise ValueError("the client is listed twice; only further windows of availability may repeat it")
    if replace(device, windows=known.windows) != known:
        raise ValueError("the client has another device than in its first row")
    windows = sorted([*known.windows, window])
    if any(closes > opens for (_, closes), (opens, _) in itertools.pairwise(windows)):
        raise ValueError("the window overlaps another one of the same client")
    return replace(known, windows=tuple(windows))


def _number(row: Mapping[str, str], name: str, *, above_zero: bool = False) -> float:
    allowed = "a number > 0" if above_zero else "a number >= 0"
    try:
        value = float(row[name])
    except ValueError:
        raise ValueError(f"{name} must be {allowed}, not {row[name]!r}") from None
    if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{name} must be {allowed}, not {row[name]!r}")
    return value
