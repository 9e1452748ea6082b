"""The pace of runs: what is compared at equal virtual time, how steady learning is, and who was idle."""

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from fl.comparison import as_plain, compare
from fl.report import load_all, load_run, write_report
from fl.report.groups import Spread
from fl.report.jobs import asynchronous, busy_s, idle_share, jobs_of
from fl.report.load import Run
from fl.report.pace import (
    Stretch,
    common_stretch,
    fluctuation,
    jobs_per_s,
    level,
    mean_staleness,
    pace,
    pace_columns,
    pace_numbers,
)
from fl.report.variant_tables import columns, markdown, time_columns
from tests.fl.synthetic_runs import write_run
from tests.fl.synthetic_schedules import write_scheduled, write_schedules


def evaluated(*points: tuple[float, float]) -> Run:
    """A run with these (virtual seconds, accuracy)."""
    tests = [{"round": i, "virtual_s": at, "accuracy": value} for i, (at, value) in enumerate(points)]
    return Run(Path("x"), {"status": "completed"}, tests=tests)


def job(client: int, sent: float, end: float, stale: int = 0, **more) -> dict:
    return {"client": client, "sent_s": sent, "virtual_s": end, "staleness": stale, "accepted": True, **more}


def worked(jobs: list[dict], end: float, **last) -> Run:
    return Run(Path("x"), {}, clients=jobs, rounds=[{"round": 1, "version": 1, "virtual_s": end, **last}])


# --------------------------------------------------------------------------------------------------- equal virtual time


def test_runs_are_compared_up_to_the_first_end_and_at_the_widest_gap():
    short = evaluated(*[(2.0 * k, 0.5) for k in range(6)])  # ends at 10
    long = evaluated(*[(0.5 * k, 0.5) for k in range(60)])
    assert common_stretch([short, long]) == Stretch(10_000_000, None)  # two changes of 2 s fit into 5 s: too few
    assert common_stretch([long]) == Stretch(29_500_000, 500_000)
    third = evaluated(*[(1.5 * k, 0.5) for k in range(8)])  # ends at 10.5
    assert common_stretch([third, long]) == Stretch(10_500_000, 1_500_000)
    assert common_stretch([third, long]).changes == 3


def test_gaps_before_the_half_or_after_the_end_do_not_count():
    late = evaluated((0, 0.1), (4, 0.2), (5, 0.3), (6, 0.3), (7, 0.3), (8, 0.3), (20, 0.4))
    other = evaluated(*[(0.5 * k, 0.5) for k in range(17)])  # ends at 8
    assert common_stretch([late, other]) == Stretch(8_000_000, 1_000_000)
    across = evaluated((0, 0.1), (3, 0.2), (4.5, 0.3), (5.5, 0.3), (6.5, 0.3), (7.5, 0.3), (9, 0.3))
    assert common_stretch([across, other]).spacing is None  # 3 to 4.5 and 7.5 to 9 reach into (4, 8]


def test_there_is_no_stretch_where_time_stands_still(tmp_path):
    assert common_stretch([evaluated((0, 0.5), (0, 0.6))]) is None
    assert common_stretch([]) is None
    still = load_run(write_run(tmp_path, instant=True))
    assert common_stretch([still]) is None
    assert pace_numbers(still) == {}
    assert pace_columns("accuracy", None, [pace([still], None)]) == []


def test_the_level_is_that_of_the_last_evaluation_and_not_in_between():
    run = evaluated((0, 0.2), (4, 0.6), (8, 0.9))
    assert level(run, Stretch(7_999_999, None)) == pytest.approx(0.6)
    assert level(run, Stretch(8_000_000, None)) == pytest.approx(0.9)
    assert level(Run(Path("x"), {}), Stretch(1, None)) is None


def test_fluctuation_is_the_deviation_of_the_changes_in_the_second_half():
    values = [0.1, 0.9, 0.2, 0.8, 0.50, 0.52, 0.49, 0.55, 0.53]
    run = evaluated(*[(float(k), v) for k, v in enumerate(values)])
    stretch = common_stretch([run])
    assert stretch == Stretch(8_000_000, 1_000_000) and stretch.changes == 4
    changes = [b - a for a, b in pairwise(values[4:])]
    assert fluctuation(run, stretch) == pytest.approx(statistics.stdev(changes), rel=1e-9)


def test_a_steady_rise_has_no_fluctuation():
    run = evaluated(*[(float(k), 0.05 * k) for k in range(17)])
    assert fluctuation(run, common_stretch([run])) == pytest.approx(0.0, abs=1e-12)


def test_being_evaluated_often_makes_no_run_look_steadier():
    """The same states, seen ten times as often: alone it is 0 nine times of ten, compared it is the same."""
    values = [0.5, 0.7, 0.4, 0.8, 0.45, 0.75, 0.5, 0.72, 0.41]
    seldom = evaluated(*[(float(k), v) for k, v in enumerate(values)])
    often = evaluated(*[(k / 10, values[k // 10]) for k in range(81)])
    stretch = common_stretch([seldom, often])
    assert fluctuation(often, stretch) == fluctuation(seldom, stretch)
    assert fluctuation(often, common_stretch([often])) < 0.5 * fluctuation(seldom, stretch)


def test_times_that_no_float_holds_exactly_are_read_at_the_right_evaluation():
    """0.1 k in floats differs from sums of 0.1: an evaluation read an ulp early would be the one before it."""
    run = evaluated(*[(0.1 * k, 0.5 + 0.1 * (k % 2)) for k in range(61)])
    stretch = common_stretch([run])
    assert (stretch.spacing, stretch.changes) == (100_000, 30)
    changes = [0.1, -0.1] * 15
    assert fluctuation(run, stretch) == pytest.approx(statistics.stdev(changes), rel=1e-9)
    # 249e-6 * 1e6 is a little below 249
    assert common_stretch([evaluated((0, 0.1), (249 / 1e6, 0.2))]).end == 249


# ----------------------------------------------------------------------------------------------------------------- work


def test_idle_time_is_what_no_job_covers():
    assert busy_s([], 0, 1) == 0
    run = worked([job(0, 0, 2), job(0, 4, 8), job(1, 0, 8)], end=8)
    assert idle_share(run) == pytest.approx(2 / 16)
    overlap = worked([job(0, 0, 6), job(0, 2, 4), job(0, 5, 7)], end=8)
    assert idle_share(overlap) == pytest.approx(1 / 8)
    late = worked([job(0, 0, 20)], end=8)  # after the end of its round
    assert idle_share(late) == 0
    assert idle_share(worked([], end=8)) is None


def test_after_its_last_arrival_a_client_of_an_asynchronous_run_is_not_known_to_idle():
    jobs = [job(0, 0, 2), job(0, 3, 4), job(1, 0, 5, stale=2)]
    run = worked(jobs, end=10)
    assert asynchronous(run)
    assert idle_share(run) == pytest.approx(1 / 9)
    jobs[2]["staleness"] = 0
    assert not asynchronous(worked(jobs, end=10, live_versions=1))
    assert idle_share(worked(jobs, end=10)) == pytest.approx(1 - 8 / 20)
    assert asynchronous(worked(jobs, end=10, live_versions=2))


def test_staleness_and_jobs_are_counted():
    refused = {"accepted": False, "reason": "stale"}
    run = worked([job(0, 0, 1, 4), job(1, 0, 2, 1), job(0, 1, 3, 9) | refused, job(1, 2, 9, 9)], end=4)
    assert mean_staleness(run) == pytest.approx((4 + 1 + 9) / 3)
    assert jobs_per_s(run) == pytest.approx(3 / 4)  # the last one ended after the run
    assert mean_staleness(worked([job(0, 0, 1) | refused], end=1)) is None


def test_jobs_without_times_begin_with_the_version_that_they_started_from(tmp_path):
    run = load_run(write_run(tmp_path, rounds=4))
    ends = {e["version"]: e["virtual_s"] for e in run.rounds} | {0: 0.0}
    assert [j.sent for j in jobs_of(run)] == [ends[e["version"]] for e in run.clients]
    assert all(j.phases() == [("work", j.sent, j.end)] for j in jobs_of(run))


def test_a_runs_numbers_hold_its_pace(tmp_path):
    run = load_run(write_scheduled(tmp_path / "a", steps=100))
    assert run.numbers["staleness_mean"] == pytest.approx(statistics.mean(e["staleness"] for e in run.clients))
    assert run.numbers["idle_share"] == pytest.approx(0, abs=1e-9)
    assert run.numbers["jobs_per_virtual_s"] == pytest.approx(100 / run.final["virtual_s"])
    plain = load_run(write_scheduled(tmp_path / "s", "synchronous", steps=5, clients=5))
    assert "staleness_mean" not in plain.numbers
    # Clients of 1, 0.8, 0.6, 0.4 and 0.2 s, and 0.03 s each way: the round takes 1.06 s.
    assert plain.numbers["idle_share"] == pytest.approx(1 - (3.0 + 5 * 0.06) / (5 * 1.06))


# --------------------------------------------------------------------------------------------------------------- tables

SCHEDULES = {
    "synchronous": {"steps": 10, "noise": 0.004},
    "fedasync": {"steps": 400, "noise": 0.03},
    "fedfix": {"steps": 24, "noise": 0.005},
}


@pytest.fixture(scope="module")
def schedules(tmp_path_factory) -> Path:
    return write_schedules(tmp_path_factory.mktemp("schedules"), SCHEDULES, [0, 1])


def test_variants_of_unlike_schedules_are_compared_at_equal_time(schedules):
    found = load_all([schedules])
    made = compare(found)
    ends = [run.tests[-1]["virtual_s"] for run in found.runs]
    assert made.stretch.end_s == pytest.approx(min(ends)) and max(ends) > 1.1 * min(ends)
    for row in made.tuned:
        at_end = []
        for run in row.runs:
            reached = [e["accuracy"] for e in run.tests if e["virtual_s"] <= made.stretch.end_s]
            at_end.append(reached[-1])
        assert row.pace.level.mean == pytest.approx(statistics.mean(at_end))
        assert row.pace.fluctuation == Spread.of([fluctuation(run, made.stretch) for run in row.runs])
    steps = {row.variant: row.pace.steps.mean for row in made.tuned}
    assert steps == {"synchronous": 10, "fedasync": 400, "fedfix": 24}
    noisy = {row.variant: row.pace.fluctuation.mean for row in made.tuned}
    assert noisy["fedasync"] > 2 * max(noisy["synchronous"], noisy["fedfix"])
    idle = {row.variant: row.pace.idle.mean for row in made.tuned}
    assert idle["fedasync"] < 0.01 < idle["fedfix"] < idle["synchronous"]


def test_time_to_the_target_stands_beside_rounds_and_bytes(schedules):
    made = compare(load_all([schedules]))
    for row in made.tuned:
        hits = [next(e["virtual_s"] for e in run.tests if e["accuracy"] >= 0.75) for run in row.runs]
        assert row.target_seconds == Spread.of(hits)
    heads = [column.head for column in columns(made)]
    at = heads.index("rounds to 75.0 %")
    assert heads[at : at + 3] == ["rounds to 75.0 %", "bytes to 75.0 %", "time to 75.0 %"]


def test_the_table_of_time_is_in_every_form_of_the_comparison(schedules, tmp_path):
    made = compare(load_all([schedules]))
    text = markdown(made)
    heads = [column.head for column in time_columns(made)]
    assert heads == [
        "variant", "server steps", "virtual time", "accuracy at 10.6 s", "fluctuation over 500 ms", "mean staleness",
        "client jobs", "clients idle",
    ]  # fmt: skip
    assert "| " + " | ".join(heads) + " |" in text
    assert "10 changes in the second half" in text
    plain = json.loads(json.dumps(as_plain(made)))
    assert plain["time"] == {"common_s": 10.6, "fluctuation_over_s": 0.5, "fluctuation_changes": 10}
    (first, *_) = plain["tuned"]
    assert first["time"]["fluctuation"]["n"] == 2 and first["target"]["virtual_s"]["n"] == 2
    assert first["time"]["staleness"]["mean"] == 0
    page = write_report([schedules], tmp_path / "variants.html").read_text(encoding="utf-8")
    assert all(f">{head}<" in page for head in heads)


def test_a_sweep_of_lists_has_the_table_of_time_too(schedules, tmp_path):
    folders = [schedules / str(i) for i in range(6)]
    page = write_report(folders, tmp_path / "lists.html").read_text(encoding="utf-8")
    for head in ("accuracy at 10.6 s", "fluctuation over 500 ms", "mean staleness", "clients idle"):
        assert f">{head}<" in page
    still = [write_run(tmp_path / str(s), seed=s, rounds=2, instant=True) for s in (0, 1)]
    assert "clients idle" not in write_report(still, tmp_path / "still.html").read_text(encoding="utf-8")


def test_runs_that_failed_do_not_shorten_the_time_of_the_others(tmp_path):
    folder = write_schedules(tmp_path, {"fedasync": {}, "fedfix": {"steps": 20}}, [0, 1], steps=200)
    whole = compare(load_all([folder])).stretch
    write_scheduled(folder / "1", seed=1, steps=3)
    info = json.loads((folder / "1" / "run.json").read_text()) | {"status": "failed", "error": "it broke"}
    (folder / "1" / "run.json").write_text(json.dumps(info))
    made = compare(load_all([folder]))
    assert made.stretch.end == whole.end and [row.pace.level.n for row in made.tuned] == [1, 2]
