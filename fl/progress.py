"""What a user sees while a run works: a live line on a terminal, one plain line a round anywhere else.

The live display shows the round, client-steps per second, the last loss and test metric, epsilon, virtual time and the
time that is left. Rates are taken over the last half minute, so that they follow a change of load; the time left comes
from the rounds done since the display began, so that a resumed run is not taken for a fast one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fl.report.numbers import human

WINDOW_S = 30.0
LINES = 100  # plain lines of a run of many rounds
_BLOCKS = "▁▂▃▄▅▆▇█"


class Progress:
    """A context manager around a run's loop.

    ``jobs(done, steps)`` says that ``done`` more of the round's client jobs have ended, with ``steps`` client steps;
    ``round(...)`` that a round is over; ``note(text)`` prints a line above the display. ``start_round`` is the number
    of rounds that were done before (a resumed run). ``until_s`` is the virtual time at which the run ends, if it does
    by time. ``quiet`` shows nothing but notes.
    """

    def __init__(
        self,
        total_rounds: int,
        total_jobs_per_round: int,
        quiet: bool = False,
        console: Console | None = None,
        start_round: int = 0,
        clock: Callable[[], float] = time.monotonic,
        until_s: float | None = None,
    ):
        self.until_s = until_s
        self._begun_at = 0.0  # the share that was done before
        self._virtual_s = 0.0
        self._printed = -1.0
        self.total_rounds, self.jobs_per_round = total_rounds, max(1, total_jobs_per_round)
        self.quiet, self.console, self.clock = quiet, console or Console(), clock
        self.start_round = self.rounds_done = start_round
        self.jobs_done = 0
        self.begun = clock()
        self._recent: deque[tuple[float, int]] = deque([(self.begun, 0)])
        self._metrics: list[float] = []
        self._last: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self.begun = self.clock()
        self._recent = deque([(self.begun, 0)])
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.quiet:
            self._live = Live(self, console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def jobs(self, done: int, steps: int) -> None:
        """``done`` more client jobs of this round have ended; they took ``steps`` client steps together."""
        self.jobs_done = min(self.jobs_done + done, self.jobs_per_round)
        now = self.clock()
        self._recent.append((now, steps))
        while len(self._recent) > 2 and self._recent[1][0] < now - WINDOW_S:
            self._recent.popleft()

    def round(
        self,
        round: int,
        loss: float | None = None,
        metric_name: str | None = None,
        metric: float | None = None,
        virtual_s: float | None = None,
        epsilon: float | None = None,
    ) -> None:
        """Round ``round`` is over. ``loss`` and ``metric`` are the newest known; None leaves the last one standing."""
        if self.rounds_done == self.start_round:
            self.start_round = max(self.start_round, round - 1)  # a resumed run's first round is not its first
            self._begun_at = self.start_round / self.total_rounds
            if self.until_s is not None and self.start_round:
                self._begun_at = max(self._begun_at, (virtual_s or 0.0) / self.until_s)
        self.rounds_done, self.jobs_done = round, 0
        self._virtual_s = virtual_s or self._virtual_s
        if loss is not None:
            self._last["loss"] = human(loss, "fixed")
        if metric is not None and metric_name:
            self._last[metric_name] = human(metric, "percent" if metric_name == "accuracy" else "fixed")
            self._metrics.append(metric)
        if epsilon is not None:
            self._last["epsilon"] = human(epsilon, "fixed")
        if virtual_s:
            self._last["virtual"] = human(virtual_s, "seconds")
        if self._live is None and not self.quiet and self._line_due():
            self.console.print(
                "  ".join([self._place(round), *self.facts()]),
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        """A line that stays, above the live display."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @property
    def share(self) -> float:
        """The share of the run that is done, by rounds or by virtual time."""
        by_rounds = (self.rounds_done + self.jobs_done / self.jobs_per_round) / max(self.total_rounds, 1)
        return by_rounds if self.until_s is None else min(1.0, max(by_rounds, self._virtual_s / self.until_s))

    def _place(self, round: int) -> str:
        return f"round {round}/{self.total_rounds}" if self.until_s is None else f"round {round}"

    def _line_due(self) -> bool:
        """Whether a plain line is due: one a round, but of many rounds no more than `LINES` in all."""
        if self.total_rounds > LINES and self.share < 1 and self.share - self._printed < 1 / LINES:
            return False
        self._printed = self.share
        return True

    @property
    def steps_per_s(self) -> float | None:
        """Client steps per second over the last half minute of reports; None before the first."""
        elapsed = self._recent[-1][0] - self._recent[0][0]
        steps = sum(n for _, n in list(self._recent)[1:])
        return steps / elapsed if steps and elapsed > 0 else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the last round at the pace so far; None before anything was done."""
        done = self.share - self._begun_at
        return None if done <= 0 else max(0.0, (self.clock() - self.begun) / done * (1 - self.share))

    def facts(self) -> list[str]:
        """The last numbers with their names, as they stand in the line."""
        facts = [f"{name} {value}" for name, value in self._last.items()]
        rate, left = self.steps_per_s, self.remaining_s
        if rate is not None:
            facts.append(f"{rate:,.3g} client-steps/s")
        if left and self.share < 1:
            facts.append(f"{_clock(left)} left")
        return facts

    def __rich__(self) -> RenderableType:
        shown = min(self.rounds_done + (self.rounds_done < self.total_rounds), self.total_rounds)
        bar = Table.grid(padding=(0, 1))
        jobs = f"{self.jobs_done}/{self.jobs_per_round} clients" if self.share < 1 else "done"
        bar.add_row(
            Text(self._place(shown), style="bold"),
            ProgressBar(total=1.0, completed=self.share, width=32),
            Text(jobs, style="dim"),
            Text(sparkline(self._metrics[-24:]), style="cyan"),
        )
        return Group(bar, Text("  ".join(self.facts()), style="dim"))


def header(settings: Mapping[str, Any]) -> RenderableType:
    """A compact panel of a run's settings: one row a group.

    ``settings`` may be nested or flat with dotted keys; a group's ``_target_`` is shown as the class's name, first.
    """
    rows: dict[str, list[str]] = {}
    for key, value in _flat(settings):
        first, _, rest = key.partition(".")
        text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
        if rest.endswith("_target_"):
            name = text.rpartition(".")[2]
            inner = rest.removesuffix("_target_").rstrip(".")
            rows.setdefault(first, []).append(f"{inner}={name}" if inner else name)
        elif rest:
            rows.setdefault(first, []).append(f"{rest}={text}")
        else:
            rows.setdefault(first, []).append(text)
    title = (rows.pop("name", None) or rows.get("experiment") or ["run"])[0]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, parts in rows.items():
        table.add_row(Text(name), Text(" ".join(parts)))
    return Panel(table, title=Text(title, style="bold"), title_align="left", border_style="dim", expand=False)


def sparkline(values: list[float]) -> str:
    """Values as a row of blocks from the lowest to the highest: ``▁▄▆█``."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] for v in values)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
