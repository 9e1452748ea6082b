"""The progress display: what it says on a terminal, elsewhere, and when asked to be quiet."""

import io

import pytest
from rich.console import Console

from fl.progress import Progress, header, sparkline


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_plain_line_a_round_where_there_is_no_terminal():
    clock, console = FakeClock(), plain()
    with Progress(4, 10, console=console, clock=clock) as progress:
        for number in (1, 2):
            for _ in range(5):
                clock.now += 1.0
                progress.jobs(2, 20)
            progress.round(number, 0.5 / number, "accuracy", 0.7, 12.5 * number, 1.25)
    first, second = text(console).splitlines()
    assert first.startswith("round 1/4  loss 0.500  accuracy 70.0 %  epsilon 1.25  virtual 12.5 s")
    assert second.startswith("round 2/4  loss 0.250")
    assert second.endswith("20 client-steps/s  0:10 left")


def test_a_long_line_is_not_broken():
    console = plain()
    with Progress(10_000, 1, console=console, clock=FakeClock()) as progress:
        progress.round(1, 1.0, "perplexity", 123456.0, 1e6, 123.0)
    assert len(text(console).splitlines()) == 1


def test_quiet_says_nothing_but_notes():
    console = plain()
    with Progress(2, 2, quiet=True, console=console) as progress:
        progress.jobs(2, 2)
        progress.round(1, 0.5, "accuracy", 0.7, 1.0, None)
        progress.note("kept [red]as it is[/red]")
    assert text(console) == "kept [red]as it is[/red]\n"
    live = terminal()
    with Progress(2, 2, quiet=True, console=live) as progress:
        progress.round(1, 0.5, "accuracy", 0.7, 1.0, None)
    assert text(live) == ""


def test_a_terminal_shows_the_round_and_the_numbers():
    clock, console = FakeClock(), terminal()
    with Progress(8, 10, console=console, clock=clock) as progress:
        clock.now += 10
        progress.jobs(10, 50)
        progress.round(1, 0.5, "accuracy", 0.6, 3.0, None)
        clock.now += 5
        progress.jobs(4, 25)
        progress.note("a note above")
    shown = text(console)
    last = shown[shown.rindex("round ") :]
    assert "round 2/8" in last and "4/10 clients" in last
    assert "loss 0.500" in last and "accuracy 60.0 %" in last and "5 client-steps/s" in last
    assert "epsilon" not in shown
    assert "a note above" in shown


def test_the_display_is_taken_down_when_a_run_fails():
    console = terminal()
    with pytest.raises(RuntimeError, match="broken"), Progress(2, 2, console=console):
        raise RuntimeError("broken")
    assert text(console).endswith("\x1b[?25h")  # the cursor is visible again


def test_the_last_numbers_stand_until_there_are_newer_ones():
    progress = Progress(4, 1, quiet=True, console=plain(), clock=FakeClock())
    progress.round(1, 0.9, "accuracy", 0.5, 1.0, 0.5)
    progress.round(2, 0.8)
    progress.round(3)
    assert progress.facts()[:4] == ["loss 0.800", "accuracy 50.0 %", "epsilon 0.500", "virtual 1.00 s"]


def test_the_rate_follows_the_last_half_minute():
    clock = FakeClock()
    progress = Progress(4, 100, quiet=True, console=plain(), clock=clock)
    assert progress.steps_per_s is None
    for _ in range(10):
        clock.now += 10
        progress.jobs(1, 100)
    assert progress.steps_per_s == pytest.approx(10)
    for _ in range(10):
        clock.now += 10
        progress.jobs(1, 10)
    assert progress.steps_per_s == pytest.approx(1)


def test_the_time_left_counts_parts_of_a_round():
    clock = FakeClock()
    progress = Progress(4, 10, quiet=True, console=plain(), clock=clock)
    assert progress.remaining_s is None
    clock.now += 5
    progress.jobs(5, 1)
    assert progress.remaining_s == pytest.approx(35)  # half a round took 5 s, three and a half are left
    clock.now += 5
    progress.round(1)
    assert progress.remaining_s == pytest.approx(30)


@pytest.mark.parametrize("start", [90, 0])
def test_a_resumed_run_is_not_taken_for_a_fast_one(start):
    clock = FakeClock()
    progress = Progress(100, 10, quiet=True, console=plain(), start_round=start, clock=clock)
    clock.now += 3
    progress.round(91)
    assert progress.remaining_s == pytest.approx(27)


def test_the_header_has_a_row_a_group():
    console = plain()
    console.width = 120
    nested = {
        "name": "quick[bold]start",
        "seed": 0,
        "model": {"_target_": "clients.models.MiniLM", "dtype": "auto"},
        "local": {"_target_": "clients.local.Training", "optimizer": {"_target_": "x.AdamW", "beta1": 0.9}},
        "clients": {"number": 10, "per_round": None, "all": True},
    }
    console.print(header(nested))
    flat = {"name": "quick[bold]start", "seed": 0, "model._target_": "clients.models.MiniLM", "model.dtype": "auto"}
    console.print(header(flat))
    lines = [line.strip("│ ") for line in text(console).splitlines()]
    assert "quick[bold]start" in lines[0]
    assert [" ".join(line.split()) for line in lines[1:5]] == [
        "seed 0",
        "model MiniLM dtype=auto",
        "local Training optimizer=AdamW optimizer.beta1=0.9",
        "clients number=10 per_round=null all=true",
    ]
    assert sum(" ".join(line.split()) == "model MiniLM dtype=auto" for line in lines) == 2


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([1.0]) == ""
