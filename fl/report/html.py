"""``report.html``: one file that needs no network, for one run or for several compared, with its figures as PNGs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fl.report.load import Run, load_all
from fl.report.style import Picture


def write_report(folders: Sequence[Path | str], out: Path | str) -> Path:
    """Write the report of ``folders`` to ``out`` and its figures to ``plots/*.png`` beside it; return the page's path.

    One run's folder makes that run's report. Several, a sweep's folder, or a folder of runs make a comparison.
    ``out`` is the page's file, or a folder to put ``report.html`` into. Raises `ShoalError` if a folder is no run or
    the report can't be written.
    """
    from fl.errors import ShoalError

    found = load_all(folders)
    path = Path(out)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        path = path / "report.html"
    if len(found.runs) == 1 and found.sweep is None:
        text, pictures = _single(found.runs[0])
    elif found.about.get("variants") and any(run.variant for run in found.runs):
        from fl.report.variants_page import variants_page

        text, pictures = variants_page(found, path)
    else:
        from fl.report.comparison_page import comparison_page

        text, pictures = comparison_page(found, path)
    try:
        _write(path, text, pictures)
    except OSError as error:
        raise ShoalError(
            f"The report can't be written to {path} ({error}). Choose another place with --out."
        ) from error
    return path


def _single(run: Run) -> tuple[str, list[Picture]]:
    from fl.report.run_page import run_page

    return run_page(run)


def _write(path: Path, text: str, pictures: Sequence[Picture]) -> None:
    plots = path.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (plots / f"{picture.name}.png").write_bytes(picture.png)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
