"""Numbers for people: which final numbers a run has, what each is called, and how it is written (MB, s, %).

Bytes are decimal (1 MB = 1,000,000 bytes). ``None`` and what is not finite are written as a dash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

DASH = "—"


@dataclass(frozen=True)
class Number:
    """What one final number is called and how it is written; ``headline`` ones stand in every table."""

    label: str
    kind: str  # percent, fixed, count, bytes, seconds, rate
    headline: bool = False
    short: str = ""


CATALOGUE: dict[str, Number] = {
    "accuracy": Number("Test accuracy", "percent", True, "accuracy"),
    "perplexity": Number("Test perplexity", "fixed", True, "perplexity"),
    "macro_f1": Number("Test macro-F1", "percent", False, "macro-F1"),
    "loss": Number("Test loss", "fixed", True, "loss"),
    "client_accuracy_mean": Number("Clients' own accuracy, mean", "percent"),
    "client_accuracy_worst_decile": Number("Clients' own accuracy, worst decile", "percent", True, "worst decile"),
    "client_accuracy_std": Number("Clients' own accuracy, spread", "percent"),
    "client_perplexity_mean": Number("Clients' own perplexity, mean", "fixed"),
    "client_perplexity_worst_decile": Number("Clients' own perplexity, worst decile", "fixed", True, "worst decile"),
    "client_perplexity_std": Number("Clients' own perplexity, spread", "fixed"),
    "epsilon": Number("Privacy loss epsilon", "fixed", True, "epsilon"),
    "rounds": Number("Rounds", "count"),
    "bytes_up": Number("Sent by clients", "bytes", True, "up"),
    "bytes_down": Number("Sent to clients", "bytes", True, "down"),
    "virtual_s": Number("Virtual time", "seconds", True, "virtual time"),
    "staleness_mean": Number("Mean staleness, versions", "fixed", True, "staleness"),
    "jobs_per_virtual_s": Number("Client jobs per virtual second", "rate"),
    "idle_share": Number("Time that clients were idle", "percent"),
    "wall_s": Number("Wall time", "seconds", True, "wall time"),
    "client_steps": Number("Client steps", "count"),
    "client_steps_per_s": Number("Client steps per second", "rate", True, "client-steps/s"),
    "tokens_per_s": Number("Tokens per second", "rate"),
    "rejected_updates": Number("Rejected updates", "count", True, "rejected"),
    "peak_memory_bytes": Number("Peak memory", "bytes"),
}


def describe(key: str) -> Number:
    """The entry of a final number; one that is not in the catalogue is written as it is named."""
    if key in CATALOGUE:
        return CATALOGUE[key]
    kind = "bytes" if key.endswith("bytes") else "seconds" if key.endswith("_s") else "fixed"
    return Number(key.replace("_", " ").capitalize(), kind, False, key)


def in_order(keys: Any) -> list[str]:
    """Names of final numbers, the catalogue's order first."""
    known = [key for key in CATALOGUE if key in keys]
    return known + sorted(key for key in keys if key not in CATALOGUE)


def write(key: str, value: Any) -> str:
    """A final number with its unit: ``write("bytes_up", 2.98e6)`` is ``2.98 MB``."""
    return human(value, describe(key).kind)


def human(value: Any, kind: str) -> str:
    """``value`` as text with its unit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return DASH if value is None or isinstance(value, float) else str(value)
    if kind == "percent":
        return f"{100 * value:.1f} %"
    if kind == "bytes":
        scale, unit = _bytes_scale(value)
        return f"{_digits(value / scale)} {unit}"
    if kind == "seconds":
        return _seconds(value)
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "rate":
        return f"{_digits(value)} /s"
    return _digits(value)


def spread(key: str, mean: float | None, std: float | None) -> str:
    """``mean ± standard deviation`` in one unit; the mean alone where there is no deviation (a single run)."""
    if mean is None or not math.isfinite(mean):
        return DASH
    if std is None:
        return write(key, mean)
    kind = describe(key).kind
    scale, unit = 1.0, ""
    if kind == "percent":
        scale, unit = 0.01, " %"
    elif kind == "bytes":
        scale, unit = _bytes_scale(mean)
        unit = f" {unit}"
    elif kind == "seconds":
        scale, unit = (1.0, " s") if abs(mean) < 120 else (60.0, " min") if abs(mean) < 7200 else (3600.0, " h")
    elif kind == "rate":
        unit = " /s"
    mean, std = mean / scale, std / scale
    if std <= 1e-12 * abs(mean):  # rounding of equal values
        exact = f"{mean:.1f}" if kind == "percent" else f"{mean:,.0f}" if kind == "count" else _digits(mean)
        return f"{exact} ± 0{unit}"
    places = 1 if kind in ("percent", "count") else _places(mean)
    if round(std, places) == 0:
        places += 1
    return f"{mean:,.{places}f} ± {std:,.{places}f}{unit}"


def compact(value: float) -> str:
    """A count with a unit prefix: 22713216 is ``22.7 M``."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{value:,.0f}"


def _digits(value: float) -> str:
    """About three significant digits without an exponent, as far as that can be read."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.{_places(value)}f}"


def _places(value: float) -> int:
    if value == 0:
        return 2
    return max(0, min(5, 2 - math.floor(math.log10(abs(value)))))


def _bytes_scale(value: float) -> tuple[float, str]:
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= scale:
            return scale, unit
    return 1.0, "B"


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    if abs(value) < 1:
        return f"{_digits(value * 1e3)} ms"
    if abs(value) < 120:
        return f"{_digits(value)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"
