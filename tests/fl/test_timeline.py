"""Timelines: which jobs and which stretch are shown, what the text and the figures say of them."""

import re
from pathlib import Path

import numpy as np
import pytest

from fl.cli import main
from fl.report import load_run, write_report
from fl.report.jobs import Job, at_work, by_speed, jobs_of, version_times
from fl.report.load import Run
from fl.report.staleness_plots import live_versions, staleness_by_client, staleness_histogram, staleness_pictures
from fl.report.timeline import LEGEND, timeline_text
from fl.report.timeline_plot import timeline_picture
from fl.report.timeline_view import MOST_CLIENTS, MOST_JOBS, outcome, shades, view
from tests.fl.synthetic_runs import write_run
from tests.fl.synthetic_schedules import write_scheduled


def event(client: int, sent: float, began: float, done: float, end: float, stale: int = 0, reason=None) -> dict:
    return {
        "event": "client", "client": client, "round": 1, "version": 0, "sent_s": sent, "began_s": began,
        "done_s": done, "virtual_s": end, "staleness": stale, "accepted": reason is None, "reason": reason,
    }  # fmt: skip


def small() -> Run:
    """Ten seconds: client 0 is twice at work (the second time stale), client 1 is slow, client 2 is lost on the way."""
    clients = [
        event(0, 0, 1, 3, 4),
        event(1, 0, 1, 9, 10),
        event(2, 0, 2, 5, 5, reason="error"),
        event(0, 6, 7, 9, 10, 3),
    ]
    rounds = [{"round": i, "version": i, "virtual_s": at} for i, at in ((1, 4.0), (2, 10.0))]
    return Run(Path("x"), {"experiment": "x"}, rounds=rounds, clients=clients)


def job(**given) -> Job:
    common = {
        "client": 0, "sent": 0.0, "began": 1.0, "done": 2.0, "end": 3.0, "staleness": 0, "accepted": True,
        "reason": None, "round": 1,
    }  # fmt: skip
    return Job(**common | given)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "synchronous": {"clients": 10, "steps": 8},
        "fedasync": {},
        "fedfix": {"steps": 24},
        "workers": {"schedule": "synchronous", "clients": 256, "steps": 4, "jitter": 0.3},
    }
    return {name: load_run(write_scheduled(folder / name, **{"schedule": name} | how)) for name, how in made.items()}


# ----------------------------------------------------------------------------------------------------------------- jobs


def test_phases_are_those_that_are_known_and_last():
    assert job().phases() == [("down", 0, 1), ("work", 1, 2), ("up", 2, 3)]
    assert job(began=None, done=None).phases() == [("work", 0, 3)]
    assert job(began=0.0, done=3.0).phases() == [("work", 0, 3)]
    # Lost while it worked: what was planned for later has not happened.
    assert job(end=1.5).phases() == [("down", 0, 1), ("work", 1, 1.5)]


def test_at_work_counts_jobs_from_each_moment_on():
    times, count = at_work([job(sent=0.0, end=2.0), job(sent=1.0, end=3.0), job(sent=2.0, end=4.0)])
    assert times.tolist() == [0, 1, 2, 3, 4] and count.tolist() == [1, 2, 2, 1, 0]


def test_clients_are_sorted_by_the_median_length_of_their_jobs():
    jobs = [job(client=2, end=1.0), job(client=2, end=1.0), job(client=2, end=50.0), job(client=1, end=2.0)]
    assert by_speed(jobs) == [2, 1]


def test_versions_are_made_by_steps_that_change_something():
    rounds = [{"version": v, "virtual_s": float(i + 1)} for i, v in enumerate([0, 1, 1, 2])]
    assert version_times(Run(Path("x"), {}, rounds=rounds)) == [2.0, 4.0]


# ----------------------------------------------------------------------------------------------------------------- view


def test_a_short_run_is_shown_whole(runs):
    shown = view(runs["synchronous"])
    assert shown.title == "10 clients, the fastest on top"
    assert shown.clients == list(range(9, -1, -1))
    assert (len(shown.jobs), shown.start, len(shown.versions)) == (80, 0.0, 8)
    assert shown.end == pytest.approx(runs["synchronous"].final["virtual_s"])


def test_a_long_run_is_cut_to_a_stretch_of_its_middle_that_begins_with_a_version(runs):
    run = runs["fedasync"]
    shown = view(run)
    assert shown.start in version_times(run) and shown.start > 0.1 * shown.whole_s
    busiest = sum(j.client == shown.clients[0] for j in shown.jobs)
    assert MOST_JOBS - 2 <= busiest <= MOST_JOBS + 2
    assert re.fullmatch(r"20 clients, the fastest on top; [\d.]+ s to [\d.]+ s of 11\.5 s", shown.title)
    assert all(j.end > shown.start and j.sent < shown.end for j in shown.jobs)


def test_the_stretch_holds_the_slowest_clients_job():
    jobs = [event(0, 0.1 * k, 0.1 * k, 0.1 * k + 0.1, 0.1 * k + 0.1) for k in range(400)]
    jobs += [event(1, 10.0 * k, 10.0 * k, 10.0 * k + 10, 10.0 * k + 10) for k in range(4)]
    shown = view(Run(Path("x"), {}, clients=jobs, rounds=[{"version": 1, "virtual_s": 40.0}]))
    assert shown.end - shown.start == pytest.approx(15.0)


def test_a_cut_asynchronous_run_does_not_show_what_left_no_record(runs):
    run = runs["fedasync"]
    shown = view(run, most_jobs=40)
    last = sorted(max(j.end for j in jobs_of(run) if j.client == c) for c in shown.clients)
    assert shown.end - shown.start > 0.8 * shown.whole_s and shown.end <= last[2] < shown.whole_s


def test_of_many_clients_some_are_picked_from_the_fastest_to_the_slowest(runs):
    shown = view(runs["workers"])
    order = by_speed(jobs_of(runs["workers"]))
    assert (len(shown.clients), shown.of_clients) == (MOST_CLIENTS, 256)
    assert (shown.clients[0], shown.clients[-1]) == (order[0], order[-1])
    places = [order.index(client) for client in shown.clients]
    assert set(np.diff(places)) <= {7, 8}
    assert shown.title.startswith("36 of 256 clients, fastest to slowest")
    assert {j.client for j in shown.jobs} == set(shown.clients)
    assert len(shown.every) == 4 * 256


def test_shades_split_the_stale_into_thirds():
    stale = [job(staleness=s) for s in (0, 0, 0, 1, 2, 3, 10, 11, 12, 20, 21, 30)]
    assert shades(stale) == [(1, 10), (11, 20), (21, 30)]
    assert shades([job(staleness=2), job(staleness=2)]) == [(2, 2)]
    assert shades([job(), job(staleness=5, accepted=False)]) == []


def test_outcomes_in_words():
    assert outcome(job()) == "accepted"
    assert outcome(job(staleness=1)) == "accepted, 1 version stale"
    assert outcome(job(accepted=False, reason="stale", staleness=9)) == "rejected (stale), 9 versions stale"
    assert outcome(job(accepted=False, reason="error")) == "lost"


# ----------------------------------------------------------------------------------------------------------------- text


def test_the_text_is_a_line_a_client():
    assert timeline_text(small(), 35) == "\n".join(
        [
            "Who worked when: 3 clients, the fastest on top",
            "versions         |          |",
            "client 0 <<====>>....<<####>>  80 %",
            "client 2 <<<<xxxxxx..........  50 %",
            "client 1 <<================>> 100 %",
            "at work  99999999663366666666",
            "         0 s           10.0 s",
            LEGEND,
        ]
    )


def test_text_keeps_its_width_and_counts_versions_that_fall_together(runs):
    for width in (60, 100):
        lines = timeline_text(runs["fedasync"], width).splitlines()
        body = lines[1:-3]
        assert max(map(len, body)) == width and len(body) == 22
        marks = lines[1][10:].replace("|", "1").replace(" ", "0")
        assert sum(map(int, marks)) == len(view(runs["fedasync"]).versions)


def test_what_lasts_for_less_than_half_a_character_is_not_shown():
    jobs = [event(0, 0, 0, 0.2, 0.2), event(0, 1, 1, 1.3, 1.3), event(1, 0, 0, 10, 10)]
    run = Run(Path("x"), {}, clients=jobs, rounds=[{"version": 1, "virtual_s": 10.0}])
    assert "client 0 ..=.................   5 %" in timeline_text(run, 35)


def test_jobs_that_follow_one_another_at_once_are_told_apart():
    jobs = [event(0, 2.0 * k, 2.0 * k, 2.0 * k + 2, 2.0 * k + 2) for k in range(5)]
    run = Run(Path("x"), {}, clients=jobs, rounds=[{"version": 1, "virtual_s": 10.0}])
    assert "client 0 ===>===>===>===>===> 100 %" in timeline_text(run, 35)


def test_many_short_jobs_and_none_at_all(tmp_path):
    assert timeline_text(load_run(write_run(tmp_path / "still", instant=True))) is None
    assert timeline_picture(load_run(tmp_path / "still")) is None
    assert timeline_text(Run(Path("x"), {})) is None
    old = timeline_text(load_run(write_run(tmp_path / "old", reject=0.3)), 80)
    assert "client 0" in old and "xx" in old and "<" not in old.removesuffix(LEGEND)


def test_the_command_prints_it_and_writes_no_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    folder = write_scheduled(tmp_path / "a", "fedfix", steps=6, clients=4)
    assert main(["report", str(folder), "--timeline"]) == 0
    out = capsys.readouterr().out
    assert out == timeline_text(load_run(folder), 90) + "\n"
    assert not (folder / "report.html").exists()
    write_scheduled(tmp_path / "b", "fedasync", steps=6, clients=4)
    assert main(["report", str(tmp_path), "--timeline"]) == 0
    out = capsys.readouterr().out
    assert out.count("Who worked when") == 2 and f"{folder}\n" in out
    still = write_run(tmp_path / "still", instant=True)
    assert main(["report", str(still), "--timeline"]) == 1
    assert "has no timeline" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_picture_tells_outcomes_phases_and_staleness_apart(runs, tmp_path):
    fresh = timeline_picture(runs["synchronous"])
    for text in ("accepted, fresh", "thin: download, upload", "clients at work, of 10", ">versions<"):
        assert text in fresh.svg
    assert "stale" not in fresh.svg and "lost" not in fresh.svg
    stale = timeline_picture(runs["fedasync"])
    assert len(re.findall(r">stale by \d+ to \d+<", stale.svg)) == 3
    assert "staleness of what arrives, and its mean" in stale.svg and re.search(
        r"accepted, \d+ versions stale", stale.svg
    )
    bad = timeline_picture(load_run(write_scheduled(tmp_path / "bad", steps=60, lost=0.2, max_staleness=10)))
    assert ">rejected or lost<" in bad.svg and ">lost<" in bad.svg and "rejected (stale)" in bad.svg
    old = timeline_picture(load_run(write_run(tmp_path / "old")))
    assert "thin: download" not in old.svg and "accepted, fresh" in old.svg


def test_a_picture_of_many_stays_small(runs, tmp_path):
    assert len(timeline_picture(runs["workers"]).svg) < 250_000
    many = load_run(write_scheduled(tmp_path / "many", clients=256, steps=3000, jitter=0.4))
    assert len(timeline_picture(many).svg) < 450_000


def test_only_asynchronous_runs_have_figures_of_staleness(runs):
    assert staleness_pictures(runs["synchronous"]) == []
    assert [p.name for p in staleness_pictures(runs["fedasync"])] == ["staleness", "staleness_clients", "live_versions"]


def test_the_histogram_counts_every_accepted_update(runs):
    run = runs["fedasync"]
    picture = staleness_histogram(run)
    counted = {int(s): int(n) for s, n in re.findall(r"staleness (\d+): (\d+) updates", picture.svg)}
    stale = [e["staleness"] for e in run.clients]
    assert counted == {s: stale.count(s) for s in range(max(stale) + 1)}
    wide = Run(Path("x"), {}, clients=[event(0, 0, 0, 1, 1, s) for s in (0, 7, 90, 95, 399)])
    counted = re.findall(r"staleness (\d+) to (\d+): (\d+) updates", staleness_histogram(wide).svg)
    assert [(a, b, n) for a, b, n in counted if n != "0"] == [("0", "9", "2"), ("90", "99", "2"), ("390", "399", "1")]


def test_staleness_by_client_goes_from_the_fastest_to_the_slowest(runs):
    run = runs["fedfix"]
    told = re.findall(r"client (\d+): mean ([\d.]+), from (\d+) to (\d+), (\d+) updates", staleness_by_client(run).svg)
    assert [int(t[0]) for t in told] == by_speed(jobs_of(run))
    assert [float(t[1]) for t in told] == sorted(float(t[1]) for t in told)
    assert sum(int(t[4]) for t in told) == len(run.clients)


def test_live_versions_are_drawn_where_they_are_recorded(runs):
    assert "mean" in live_versions(runs["fedasync"]).svg
    assert live_versions(small()) is None


def test_an_asynchronous_runs_page_has_its_cards(runs, tmp_path):
    page = write_report([runs["fedasync"].folder], tmp_path / "out.html").read_text(encoding="utf-8")
    assert {"timeline", "staleness", "staleness_clients", "live_versions"} <= {
        p.stem for p in (tmp_path / "plots").iterdir()
    }
    for text in ("<h2>Staleness</h2>", "Server steps", "Mean staleness, versions", "Fluctuation: over 500 ms"):
        assert text in page
    plain = write_report([runs["synchronous"].folder], tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "<h2>Staleness</h2>" not in plain and "Server steps" not in plain and "<h2>Timeline</h2>" in plain
