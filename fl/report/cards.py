"""Parts that the report of one run and that of several share: tiles, status, privacy, settings, footer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl.report.claims import stated, statement_table
from fl.report.groups import show
from fl.report.load import Run
from fl.report.numbers import DASH
from fl.report.page import Markup, card, figure, tag
from fl.report.style import Picture


def status(run: Run) -> Markup:
    """How a run ended, as a coloured label."""
    kind = run.status if run.status in ("completed", "failed") else "other"
    return tag("span", run.status, class_=f"status {kind}")


def tile(name: str, value: str, remark: str = "", main: bool = False) -> Markup:
    """One headline number."""
    shown = tag("dd", value, tag("small", remark) if remark else None)
    return tag("div", tag("dt", name), shown, class_="tile main" if main else "tile")


def privacy_card(run: Run, spent: Picture | None = None) -> Markup:
    """What is promised about privacy: the statement as a table, the same in words folded below it, and ``spent``."""
    words = tag("p", str(run.info.get("privacy") or "This run makes no statement about privacy."))
    listed = statement_table(run) if stated(run).get("unit") else None
    shown = words if listed is None else tag("div", listed, tag("details", tag("summary", "In words"), words))
    if spent is not None:
        shown = tag("div", shown, figure(spent), class_="figures")
    return card("Privacy", shown, class_="card privacy")


def settings_card(run: Run, common: Mapping[str, Any] | None = None, title: str = "How it was run") -> Markup:
    """Settings, engine and versions, folded; what was set on the command line is marked."""
    settings = run.settings if common is None else common
    groups: dict[str, list[tuple[str, Any]]] = {}
    for key, value in settings.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first if rest else "", []).append((rest or key, value))
    given = run.overrides if common is None else {}
    sections = []
    for name, pairs in sorted(groups.items()):
        rows = []
        for key, value in pairs:
            full = f"{name}.{key}" if name else key
            text: Any = short(key, value)
            rows.append(
                [tag("dt", "type" if key == "_target_" else key), tag("dd", _marked(text) if full in given else text)]
            )
        sections.append(tag("section", tag("h3", name or "experiment"), tag("dl", *rows)))
    engine = [(k, v) for k, v in dict(run.info.get("engine") or {}).items() if v is not None]
    machine = [("machine", run.info.get("device")), ("commit", run.info.get("commit"))] + engine
    parts: list[Markup | None] = []
    if sections:
        count = tag("span", f" {len(settings)}")
        parts.append(tag("details", tag("summary", "Settings", count), tag("div", *sections, class_="settings")))
    if common is None and run.info.get("overrides"):
        line = " ".join(str(v) for v in run.info["overrides"])
        parts.append(tag("details", tag("summary", "Given on the command line"), tag("code", line), open=True))
    parts.append(_folded("Engine", machine))
    parts.append(_folded("Versions", list(dict(run.info.get("versions") or {}).items())))
    known = any(part is not None for part in parts)
    return card(title, *parts, note="" if known else "Not known: the run left no run.json.")


def _marked(text: str) -> Markup:
    return tag("span", text, class_="set", title="given on the command line")


def _folded(name: str, pairs: list[tuple[str, Any]]) -> Markup | None:
    rows = [[tag("dt", key), tag("dd", show(value))] for key, value in pairs if value is not None]
    if not rows:
        return None
    short = ", ".join(f"{key} {show(value)}" for key, value in pairs[:3] if value is not None) + (
        " ..." if len(rows) > 3 else ""
    )
    return tag("details", tag("summary", name, tag("span", f" {short}")), tag("dl", *rows, class_="facts-list"))


def short(key: str, value: Any) -> str:
    """A setting's value; of a class's full name only the last part."""
    text = show(value)
    return text.rpartition(".")[2] if key.endswith("_target_") else text or DASH


def footer(run: Run, folder: Path) -> Markup:
    """Where the page came from."""
    version = dict(run.info.get("versions") or {}).get("shoal")
    return tag("footer", f"Written by Shoal{f' {version}' if version else ''} from ", tag("code", folder.name))
