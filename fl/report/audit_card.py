"""What an audit of the run found, beside what its ledger claims; read from audit.json in the run's folder."""

from __future__ import annotations

import json
from typing import Any

from fl.report.load import Run
from fl.report.page import Markup, card, table, tag

FILE = "audit.json"
HEAD = ("attack", "members", "others", "AUC", "found at 1 % FPR", "found at 0.1 % FPR")


def audit_card(run: Run) -> Markup | None:
    """The canaries' verdict and the attacks; None where the run was not audited."""
    found = _read(run)
    verdict, attacks = found.get("canaries"), found.get("membership")
    if not verdict and not attacks:
        return None
    parts: list[Markup | None] = []
    if verdict:
        parts.append(tag("p", verdict["sentence"], class_="banner failed" if verdict["contradicts"] else None))
    if attacks:
        parts.append(table(HEAD, rows(found)))
        told = [entry["sentence"] for entry in attacks]
        parts.append(tag("details", tag("summary", "In words"), *[tag("p", text) for text in told]))
    return card("Audit", *parts, note=_NOTE)


_NOTE = (
    "What could be shown against the run. An audit that finds little shows that these attacks found little, not that "
    "the run is private."
)


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The attacks of an audit: name, members, others, AUC and the members found at each low rate, for people."""
    listed = [(entry["score"], entry) for entry in found.get("membership") or []]
    worst = found.get("worst_client")
    if worst:
        listed.append((f"client {worst['client']}, exposed most", worst))
    return [
        (name, f"{e['members']:,}", f"{e['others']:,}", _interval(e["auc"]), *map(_found, e["found"].values()))
        for name, e in listed
    ]


def _interval(rate: dict[str, Any]) -> str:
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


def _found(rate: dict[str, Any]) -> str:
    return "too few others" if rate["note"] else _interval(rate)


def _read(run: Run) -> dict[str, Any]:
    try:
        found = json.loads((run.folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
