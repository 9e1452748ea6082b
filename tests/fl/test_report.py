"""The report: what is read from run folders, the statistics over seeds, and pages that hold what they must."""

import csv
import dataclasses
import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fl.comparison import as_plain, compare
from fl.errors import ShoalError
from fl.report import comparison_table, final_table, load_all, load_run, write_report, write_summary_csv
from fl.report.curves import MOST_POINTS, ROUNDS, SECONDS, Axis, Curve, axes_of, mean_curve, metric_curve
from fl.report.groups import Spread, group, varying
from fl.report.numbers import human, spread, write
from fl.report.page import tag
from fl.report.plots import compared, comparison_curves, run_curves
from fl.report.style import VARIABLES, inline_svg
from fl.report.tables import final_rows
from fl.report.variant_plots import error_picture, groups_of, panels_picture
from fl.report.variant_tables import at_the_end, columns, markdown, notes, relative, terminal_table, write_comparison
from tests.fl.synthetic_runs import STATE_BYTES, write_run, write_sweep, write_variants
from tests.fl.synthetic_schedules import write_scheduled, write_schedules

BYTES = Axis("bytes", "Bytes", "MB")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Three settings times three seeds."""
    return write_sweep(tmp_path_factory.mktemp("sweep"), {"partition.alpha": [100, 0.1, 20], "seed": [0, 1, 2]})


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """A finished, private run with some updates refused, and its report."""
    folder = write_run(tmp_path_factory.mktemp("single"), reject=0.3, epsilon=3.0)
    write_report([folder], folder / "report.html")
    return folder


class Page(HTMLParser):
    """Counts what stands in a page and checks that every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attrs):
        self.tags.append(name)
        self.attributes += [(name, key, value or "") for key, value in attrs]
        if name not in ("meta", "link", "br", "input"):
            self.open.append(name)

    def handle_startendtag(self, name, attrs):
        self.tags.append(name)
        self.attributes += [(name, key, value or "") for key, value in attrs]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == attribute]


def rendered(table) -> str:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_run_is_read_back(tmp_path):
    run = load_run(write_run(tmp_path, rounds=6, clients=4, per_round=2))
    assert (run.experiment, run.seed, run.status, run.metric) == ("quickstart", 0, "completed", "accuracy")
    assert [e["round"] for e in run.rounds] == [1, 2, 3, 4, 5, 6]
    assert [e["round"] for e in run.tests] == [0, 2, 4, 6]
    assert len(run.clients) == 12
    assert run.numbers["bytes_up"] == 12 * STATE_BYTES
    assert run.numbers["client_accuracy_worst_decile"] == run.client_tests[-1]["worst_decile"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ShoalError, match=r"not a run's folder.*run\.json.*metrics\.jsonl"):
            load_all([folder])
    with pytest.raises(ShoalError, match="No folder was given"):
        load_all([])


def test_a_torn_last_line_is_left_out(tmp_path):
    whole = load_run(write_run(tmp_path / "whole"))
    torn = load_run(write_run(tmp_path / "torn", torn=True))
    assert (whole.skipped_lines, torn.skipped_lines) == (0, 1)
    assert torn.rounds == whole.rounds
    assert len(torn.client_tests) == len(whole.client_tests) - 1


def test_an_unfinished_run_has_the_numbers_of_its_events(tmp_path):
    killed = load_run(write_run(tmp_path / "killed", status="", stop_after=5, reject=0.5))
    assert killed.status == "unfinished" and not killed.completed
    assert killed.final["rounds"] == 5
    assert killed.final["accuracy"] == killed.tests[-1]["accuracy"]
    assert killed.final["bytes_down"] == 25 * STATE_BYTES
    assert killed.final["rejected_updates"] == sum(not e["accepted"] for e in killed.clients) > 0
    assert sum(killed.rejected.values()) == killed.final["rejected_updates"]


def test_a_round_that_was_written_twice_counts_once_as_last_written(tmp_path):
    folder = write_run(tmp_path, rounds=4)
    event = {"event": "round", "round": 2, "loss": 7.0, "bytes_up_total": 1, "bytes_down_total": 1}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    run = load_run(folder)
    assert [e["round"] for e in run.rounds] == [1, 2, 3, 4]
    assert run.rounds[1]["loss"] == 7.0


def test_a_run_json_that_is_no_object_is_named(tmp_path):
    folder = write_run(tmp_path)
    (folder / "run.json").write_text("{torn")
    with pytest.raises(ShoalError, match=r"run\.json can't be read as JSON"):
        load_run(folder)
    (folder / "run.json").write_text("[1]")
    with pytest.raises(ShoalError, match="holds list"):
        load_run(folder)


def test_what_is_not_finite_is_no_number(tmp_path):
    folder = write_run(tmp_path)
    info = json.loads((folder / "run.json").read_text())
    info["final"] |= {"loss": float("nan"), "epsilon": float("inf"), "macro_f1": True}
    (folder / "run.json").write_text(json.dumps(info))
    assert not {"loss", "epsilon", "macro_f1"} & set(load_run(folder).numbers)


def test_a_sweep_is_read_with_its_axes_and_names_what_is_missing(tmp_path):
    folder = write_sweep(tmp_path, {"partition.alpha": [0.1, 1], "seed": [0]})
    for path in (folder / "1").iterdir():
        path.unlink()
    found = load_all([folder])
    assert found.sweep == folder
    assert [run.axes for run in found.runs] == [{"partition.alpha": 0.1, "seed": 0}]
    assert [name for name, _ in found.missing] == ["1"]


def test_a_folder_of_runs_is_read_and_no_run_twice(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"run{seed}", seed=seed)
    assert [run.seed for run in load_all([tmp_path]).runs] == [0, 1]
    assert len(load_all([tmp_path, tmp_path / "run1"]).runs) == 2


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.8126, "percent", "81.3 %"),
        (2_980_000, "bytes", "2.98 MB"),
        (999, "bytes", "999 B"),
        (1_240_000_000, "bytes", "1.24 GB"),
        (0.0421, "seconds", "42.1 ms"),
        (12.34, "seconds", "12.3 s"),
        (252, "seconds", "4 min 12 s"),
        (7201, "seconds", "2 h 00 min"),
        (0, "seconds", "0 s"),
        (12345.0, "count", "12,345"),
        (52.44, "rate", "52.4 /s"),
        (0.40213, "fixed", "0.402"),
        (20.379, "fixed", "20.4"),
        (None, "fixed", "—"),
        (float("nan"), "bytes", "—"),
    ],
)
def test_numbers_for_people(value, kind, text):
    assert human(value, kind) == text


def test_mean_and_deviation_share_a_unit():
    assert spread("accuracy", 0.8234, 0.0101) == "82.3 ± 1.0 %"
    assert spread("bytes_up", 14_900_000, 200_000) == "14.9 ± 0.2 MB"
    assert spread("wall_s", 200.0, 30.0) == "3.33 ± 0.50 min"
    assert spread("loss", 0.5, 0.0) == "0.500 ± 0"
    assert spread("virtual_s", 11.478945, 2.2e-15) == "11.5 ± 0 s"
    assert spread("loss", 0.5, None) == write("loss", 0.5) == "0.500"
    assert spread("loss", None, None) == "—"


# ------------------------------------------------------------------------------------------------------ comparisons


def test_groups_leave_the_seed_out_and_are_in_the_order_of_their_numbers(sweep):
    groups = group(load_all([sweep]).runs)
    assert [item.values for item in groups] == [{"partition.alpha": v} for v in (0.1, 20, 100)]
    assert [[run.seed for run in item.runs] for item in groups] == [[0, 1, 2]] * 3
    assert [item.label for item in groups] == ["alpha=0.1", "alpha=20", "alpha=100"]


def test_statistics_are_the_sample_mean_and_deviation_of_completed_runs(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in range(4)]
    folders.append(write_run(tmp_path / "bad", seed=4, status="failed", stop_after=2))
    (only,) = group(load_all(folders).runs)
    values = [run.numbers["accuracy"] for run in only.runs if run.completed]
    n, mean, std = only.statistics("accuracy")
    assert (n, len(only.runs)) == (4, 5)
    assert mean == pytest.approx(statistics.mean(values), rel=1e-12)
    assert std == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert only.statistics("no_such_number") == (0, None, None)


def test_runs_outside_a_sweep_are_told_apart_by_few_overrides(tmp_path):
    kinds = [("minilm", {"model.size": 22, "model.depth": 6}), ("bert", {"model.size": 110, "model.depth": 12})]
    folders = []
    for name, settings in kinds:
        for seed in (0, 1):
            given = [f"model={name}", f"seed={seed}"]
            folders.append(write_run(tmp_path / f"{name}{seed}", seed=seed, settings=settings, overrides=given))
    runs = load_all(folders).runs
    assert varying(runs) == {"model": ["minilm", "minilm", "bert", "bert"]}
    for run in runs:
        run.info["overrides"] = []
    assert list(varying(runs)) == ["model.size", "model.depth"]


def test_overrides_that_miss_a_difference_give_way_to_settings(tmp_path):
    folders = [
        write_run(tmp_path / str(i), overrides=[f"local.lr={lr}"], settings={"local.lr": lr, "local.mu": mu})
        for i, (lr, mu) in enumerate([(0.1, 0), (0.1, 1), (0.2, 0)])
    ]
    assert varying(load_all(folders).runs) == {"local.lr": [0.1, 0.1, 0.2], "local.mu": [0, 1, 0]}


def test_summary_csv_holds_every_final_number_in_full(sweep, tmp_path):
    runs = load_all([sweep]).runs
    path = write_summary_csv(runs, tmp_path / "summary.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["partition.alpha"] for row in rows] == ["0.1", "20", "100"]
    assert [(row["n"], row["runs"], row["failed"], row["seeds"]) for row in rows] == [("3", "3", "0", "0 1 2")] * 3
    for key in ("accuracy", "loss", "bytes_up", "wall_s", "client_steps_per_s", "client_accuracy_worst_decile"):
        values = [run.numbers[key] for run in runs if run.axes["partition.alpha"] == 20]
        assert float(rows[1][f"{key}_mean"]) == pytest.approx(statistics.mean(values), rel=1e-12)
        assert float(rows[1][f"{key}_std"]) == pytest.approx(statistics.stdev(values), rel=1e-12, abs=1e-12)
    assert {f"{key}_mean" for run in runs for key in run.numbers} <= set(rows[0])
    assert not (tmp_path / "summary.csv.partial").exists()


def test_a_single_seed_has_no_deviation(tmp_path):
    runs = load_all([write_sweep(tmp_path / "s", {"partition.alpha": [0.1, 1], "seed": [0]})]).runs
    with write_summary_csv(runs, tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["accuracy_mean"] and rows[0]["accuracy_std"] == ""


def test_the_final_table_has_values_before_training_and_reasons(tmp_path):
    run = load_run(write_run(tmp_path, reject=0.5))
    rows = {label: (value, remark) for label, value, remark in final_rows(run)}
    assert rows["Test accuracy"][0] == write("accuracy", run.final["accuracy"])
    assert rows["Test accuracy"][1] == write("accuracy", run.tests[0]["accuracy"]) + " before training"
    top = next(iter(run.rejected.items()))
    assert rows["Rejected updates"][1].startswith(f"{top[0]} {top[1]}")
    text = rendered(final_table(run))
    assert all(label in text and value in text for label, (value, _) in rows.items())


def test_the_comparison_table_has_a_row_a_setting(sweep):
    runs = load_all([sweep]).runs
    lines = rendered(comparison_table(runs)).splitlines()
    for item in group(runs):
        (line,) = [line for line in lines if re.search(rf"\s{item.values['partition.alpha']}\s", line)]
        assert " 3 " in line and spread("accuracy", *item.statistics("accuracy")[1:]) in line


def test_a_narrow_terminal_gets_fewer_columns_and_whole_ones(sweep):
    runs = load_all([sweep]).runs
    console = Console(width=72, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(runs))
    text = console.export_text()
    (first, *_) = group(runs)
    assert spread("accuracy", *first.statistics("accuracy")[1:]) in text
    assert "client-steps/s" in text[text.index("left out for want of room:") :].replace("\n", " ")
    assert max(map(len, text.splitlines())) <= 72 and "…" not in text
    assert "left out" not in rendered(comparison_table(runs))


def test_the_comparison_table_counts_what_did_not_complete(tmp_path):
    folders = [write_run(tmp_path / "0"), write_run(tmp_path / "1", seed=1, status="interrupted", stop_after=3)]
    assert "1 of 2" in rendered(comparison_table(load_all(folders).runs))


# ----------------------------------------------------------------------------------------------------------- curves


def test_an_evaluation_is_placed_at_the_bytes_sent_by_then(tmp_path):
    run = load_run(write_run(tmp_path, rounds=6, per_round=3))
    curve = metric_curve(run, BYTES)
    assert curve.x == pytest.approx([0, *(2 * 3 * STATE_BYTES * r / 1e6 for r in (2, 4, 6))])
    assert curve.y == pytest.approx([100 * e["accuracy"] for e in run.tests])
    assert metric_curve(run, SECONDS).x == pytest.approx([e["virtual_s"] for e in run.tests])


def test_the_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path):
    runs = [load_run(write_run(tmp_path / str(s), seed=s)) for s in range(3)]
    band = mean_curve([metric_curve(run, ROUNDS) for run in runs])
    stacked = np.array([[100 * e["accuracy"] for e in run.tests] for run in runs])
    assert band.y == pytest.approx(stacked.mean(0))
    assert band.low == pytest.approx(stacked.min(0)) and band.high == pytest.approx(stacked.max(0))


def test_seeds_of_unlike_length_are_averaged_where_all_have_been(tmp_path):
    runs = [load_run(write_run(tmp_path / str(s), seed=s)) for s in range(3)]
    band = mean_curve([metric_curve(run, SECONDS) for run in runs])
    ends = [run.tests[-1]["virtual_s"] for run in runs]
    assert band.x[-1] == pytest.approx(min(ends)) and min(ends) < max(ends)
    last = runs[ends.index(min(ends))].tests[-1]["accuracy"]
    assert band.low[-1] - 1e-9 <= 100 * last <= band.high[-1] + 1e-9


def test_between_its_points_a_run_has_the_value_of_the_last_one():
    few = Curve(np.array([0.0, 4.0, 8.0]), np.array([10.0, 20.0, 30.0]))
    many = Curve(np.array([0.0, 1.0, 5.0, 9.0]), np.array([0.0, 2.0, 4.0, 6.0]))
    band = mean_curve([few, many])
    assert band.x.tolist() == [0, 1, 4, 5, 8]
    assert band.high.tolist() == [10, 10, 20, 20, 30] and band.low.tolist() == [0, 2, 2, 4, 4]
    assert band.y.tolist() == [5, 6, 11, 12, 17]


def test_curves_of_very_many_points_are_read_at_even_steps():
    rng = np.random.Generator(np.random.PCG64(1))
    runs = [Curve(np.arange(0.0, 400.0) + shift, rng.normal(size=400)) for shift in (0.0, 0.5)]
    band = mean_curve(runs)
    assert len(band.x) == MOST_POINTS and (band.x[0], band.x[-1]) == (0.5, 399.0)
    at = MOST_POINTS // 2
    assert band.y[at] == pytest.approx((runs[0].y[int(band.x[at])] + runs[1].y[int(band.x[at] - 0.5)]) / 2)


def test_virtual_time_comes_first_where_schedules_differ(tmp_path):
    runs = [load_run(write_scheduled(tmp_path / name, name, steps=5, clients=4)) for name in ("synchronous", "fedfix")]
    assert [axis.key for axis in axes_of(runs)] == ["virtual_s", "round", "bytes"]
    assert axes_of(runs[:1])[0].key == "round"
    longer = load_run(write_scheduled(tmp_path / "longer", "fedfix", steps=9, clients=4))
    assert axes_of([runs[1], longer])[0].key == "round"
    for run in runs:
        run.rounds, run.tests = (
            [e | {"virtual_s": 0.0} for e in run.rounds],
            [e | {"virtual_s": 0.0} for e in run.tests],
        )
    assert [axis.key for axis in axes_of(runs)] == ["round", "wall_s", "bytes"]


def test_two_evaluations_of_one_version_are_both_kept(tmp_path):
    run = load_run(write_scheduled(tmp_path, "synchronous", steps=3, clients=4, every_s=0.25))
    times = [e["virtual_s"] for e in run.tests]
    assert times == sorted(times) and times[:5] == [0, 0.25, 0.5, 0.75, 1.0]
    assert metric_curve(run, SECONDS).x.tolist() == times
    assert metric_curve(run, ROUNDS).x.tolist() == [0, 1, 2, 3]


def test_wall_time_stands_in_for_a_virtual_clock_that_stands_still(tmp_path):
    moving, still = (load_run(write_run(tmp_path / str(i), instant=i)) for i in (False, True))
    assert [axis.key for axis in axes_of([moving])] == ["round", "virtual_s", "bytes"]
    assert [axis.key for axis in axes_of([still])] == ["round", "wall_s", "bytes"]
    private = load_run(write_run(tmp_path / "p", epsilon=4.0))
    assert [axis.key for axis in axes_of([private])][-1] == "epsilon"


# ------------------------------------------------------------------------------------------------------------ pages


def test_a_report_of_one_run_holds_everything_and_needs_no_network(single):
    text = (single / "report.html").read_text(encoding="utf-8")
    page, run = Page(text), load_run(single)
    for title in ("Training", "Final numbers", "Rejected updates", "Privacy", "Clients", "Who holds what", "Timeline"):
        assert title in page.text
    for shown in (run.info["privacy"], run.info["commit"], "2.13.0", "SGD", write("accuracy", run.final["accuracy"])):
        assert shown in page.text
    accepted = sum(event["accepted"] for event in run.clients)
    assert f"{accepted} of 50 updates were accepted." in page.text
    for reason, count in run.rejected.items():
        assert re.search(rf"{reason} ([a-z' ]+) {count} ", page.text, re.I)  # the reason in words, then the count
    assert not re.search(r"https?:|@import|\bsrc=|url\((?!#)", text)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert all(target.startswith("#") or target == "data:," for target in page.values("href"))
    names = {p.stem for p in (single / "plots").iterdir()}
    axes = ("rounds", "seconds", "bytes", "epsilon")
    assert {f"{key}_{axis}" for key in ("accuracy", "loss") for axis in axes} <= names
    assert {"clients", "clients_rounds", "partition", "timeline", "epsilon_spent"} <= names
    assert all(p.read_bytes().startswith(b"\x89PNG\r\n") for p in (single / "plots").iterdir())
    assert not list(single.rglob("*.partial"))


def test_everything_shows_without_script(single):
    path = single / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.values("data-view") == ["round", "virtual_s", "bytes", "epsilon"] * 2  # the tabs, and the views
    assert not page.values("hidden") and "js" not in page.values("class")
    assert not [style for style in page.values("style") if "display" in style.replace("stroke", "")]
    rules = path.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    hiding = [rule for rule in re.findall(r"([^{}]+)\{[^{}]*display:none", rules) if "tabs" not in rule]
    assert hiding and all(part.strip().startswith(".js ") for rule in hiding for part in rule.split(","))


def test_pictures_take_the_pages_colours_and_their_ids_do_not_clash(single):
    text = (single / "report.html").read_text(encoding="utf-8")
    body = text[text.index("<body") :]
    assert "var(--c0)" in body and "var(--ink)" in body
    assert not [color for color in VARIABLES if color in body]
    ids = re.findall(r'\sid="([^"]+)"', body)
    assert ids and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', body)) <= set(ids)


def test_the_same_run_gives_the_same_report(tmp_path):
    folder = write_run(tmp_path / "run", rounds=2, client_evals=False)
    first, second = (write_report([folder], tmp_path / name / "report.html") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    for png in (tmp_path / "a" / "plots").iterdir():
        assert png.read_bytes() == (tmp_path / "b" / "plots" / png.name).read_bytes()


EVIL = '<script>alert("x")</script><img src=x onerror=y>&"\'$\\frac{$'


def test_no_string_of_a_user_becomes_html(tmp_path):
    for seed in (0, 1):
        folder = write_run(
            tmp_path / str(seed), seed=seed, experiment=EVIL, status="failed", reject=0.3, stop_after=2,
            labels=[EVIL + "a", EVIL + "\x00b"], groups=[[EVIL + str(i) for i in range(10)], None][seed],
            settings={EVIL: EVIL, "partition.x": EVIL, "local.kind": f"{EVIL}{seed}"},
            overrides=[f"{EVIL}={EVIL}{seed}"],
        )  # fmt: skip
        info = json.loads((folder / "run.json").read_text())
        info |= dict.fromkeys(("error", "privacy", "model", "data", "adapter", "device", "commit", "started"), EVIL)
        info["versions"] = {EVIL: EVIL}
        info["final"]["rejected"] = {EVIL: 3}
        (folder / "run.json").write_text(json.dumps(info))
    for folders in ([tmp_path / "0"], [tmp_path / "1"], [tmp_path / "0", tmp_path / "1"]):
        text = write_report(folders, tmp_path / "out.html").read_text(encoding="utf-8")
        page = Page(text)
        assert page.tags.count("script") == 1 and "img" not in page.tags
        assert not page.values("onerror")
        assert page.text.count('<script>alert("x")</script>') > 10
        assert "\x00" not in text


def test_escaping_leaves_only_markup_alone():
    assert tag("p", "a<b", tag("b", "&"), None, class_="x", data_view='"') == (
        '<p class="x" data-view="&quot;">a&lt;b<b>&amp;</b></p>'
    )


def test_text_in_a_picture_is_left_as_it_is():
    svg = '<?xml?><svg viewBox="0 0 1 1"><g id="m1"/><use xlink:href="#m1" style="fill: #0072b2"/>'
    svg += '<text style="font: 9px sans">id="m1" fill: #0072b2;</text></svg>'
    inline = inline_svg(svg, "plot", 'a "b"')
    assert '<g id="plot-m1"/><use href="#plot-m1" style="fill: var(--c0)"/>' in inline
    assert '>id="m1" fill: #0072b2;</text>' in inline
    assert 'aria-label="a &quot;b&quot;"' in inline and "?xml" not in inline


def test_a_comparison_has_a_row_a_setting_and_links_to_the_runs_that_have_a_report(sweep):
    write_report([sweep / "4"], sweep / "4" / "report.html")
    path = write_report([sweep], sweep / "report.html")
    page, found = Page(path.read_text(encoding="utf-8")), load_all([sweep])
    for item in group(found.runs):
        assert f"{item.values['partition.alpha']} 3 {spread('accuracy', *item.statistics('accuracy')[1:])}" in page.text
    assert [h for h in page.values("href") if "report" in h] == ["4/report.html"]
    assert "9 of 9" in page.text and "Who holds what" in page.text
    names = {p.stem for p in (sweep / "plots").iterdir()}
    assert {"accuracy_rounds", "loss_bytes", "final_accuracy", "clients_sorted", "partition_0"} <= names


def test_a_comparison_says_which_runs_are_left_out(tmp_path):
    folder = write_sweep(tmp_path, {"partition.alpha": [0.1, 1], "seed": [0, 1]})
    write_run(folder / "1", seed=1, alpha=0.1, status="failed", stop_after=2)
    (folder / "3" / "run.json").unlink()
    (folder / "3" / "metrics.jsonl").unlink()
    text = Page(write_report([folder], folder).read_text(encoding="utf-8")).text
    assert "1 of 3 runs did not complete and are left out of the means: 1 (failed)" in text
    assert "Run 3 of the sweep is missing" in text
    assert "1 of 2" in text


def test_many_settings_are_all_in_the_table_and_the_best_are_drawn(tmp_path):
    folder = write_sweep(tmp_path, {"partition.alpha": [float(a) for a in range(1, 16)], "seed": [0]}, rounds=2)
    page = Page(write_report([folder], folder).read_text(encoding="utf-8"))
    assert "Curves show the 12 best of 15 settings" in page.text
    assert page.text.count("15 of 15") == 1
    runs = load_all([folder]).runs
    best = sorted(runs, key=lambda run: run.numbers["accuracy"])[3:]
    drawn = [run for item in compared(group(runs)) for run in item.runs]
    assert drawn == [run for run in runs if run in best]


CASES = {
    "causal": {"task": "causal_lm", "experiment": "instruct", "gain": 0.9},
    "two hundred clients": {"clients": 200, "per_round": 20, "labels": [f"label {i}" for i in range(12)]},
    "named clients": {"clients": 4, "groups": ["Washington", "Adams", "Jefferson", "Madison"]},
    "a killed run": {"status": "", "torn": True, "stop_after": 3, "instant": True},
    "an interrupted run": {"status": "interrupted", "stop_after": 3},
    "no round yet": {"status": "interrupted", "stop_after": 0},
    "one client": {"clients": 1, "per_round": 1, "client_evals": True},
    "no evaluation on clients": {"client_evals": False},
    "all refused": {"reject": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_reports_of_all_kinds_of_runs(tmp_path, case):
    folder = write_run(tmp_path / "run", **CASES[case])
    page, run = Page(write_report([folder], folder).read_text(encoding="utf-8")), load_run(folder)
    assert run.experiment in page.text and run.status in page.text
    rendered(final_table(run))
    if case == "causal":
        assert "Test perplexity" in page.text and "accuracy" not in page.text
    if case == "two hundred clients":
        assert "other (6 labels)" in page.text and "199 clients, worst first" in page.text
    if case == "named clients":
        assert "Jefferson" in page.text
    if case == "a killed run":
        assert f"shoal run --resume {folder}" in page.text and "1 line of metrics.jsonl" in page.text
    if case == "all refused":
        assert "0 of 50 updates were accepted" in page.text


def test_runs_that_measured_only_the_clients_or_nothing_have_a_report(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    info = json.loads((folder / "run.json").read_text())
    for key in ("accuracy", "macro_f1", "loss"):
        del info["final"][key]
    (folder / "run.json").write_text(json.dumps(info))
    kept = [line for line in lines if line.get("split") != "test"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    text = Page(write_report([folder], folder).read_text(encoding="utf-8")).text
    assert "Clients' mean accuracy (%)" in text and "Clients' own accuracy, mean" in text
    (folder / "metrics.jsonl").write_text("")
    assert "Nothing has been evaluated yet" in Page(write_report([folder], folder).read_text(encoding="utf-8")).text


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    folder = write_run(tmp_path / "run", rounds=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ShoalError, match="can't be written to"):
        write_report([folder], tmp_path / "file" / "report.html")


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, fl.report, fl.report.html, fl.report.run_page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------------- variants


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> Path:
    """Nine variants at two or three values and two seeds; one run failed, one left nothing."""
    made = {
        f"method-{i}": {
            "gain": 0.1 + 0.035 * i,
            "error": [0.2, 1e-8, 0.0, None][i % 4],
            "once": 4000 if i == 2 else None,
        }
        for i in range(8)
    }
    made["worst"] = {"gain": 0.02}
    values = {name: [0.003, 0.01] if i % 2 else [0.001, 0.003, 0.01] for i, name in enumerate(made)}
    folder = write_variants(tmp_path_factory.mktemp("many"), made, values, [0, 1], target=0.7, rounds=6)
    write_run(folder / "1", seed=1, status="failed", stop_after=2, settings={"local.lr": 0.001})
    for path in (folder / "6").iterdir():
        path.unlink()
    return folder


def test_a_sweep_of_variants_has_tables_for_tuned_and_for_equal_values(variants):
    path = write_report([variants], variants / "report.html")
    page, made = Page(path.read_text(encoding="utf-8")), compare(load_all([variants]))
    for row in made.tuned:
        assert f"{row.name} {row.value:g} 2 {spread('accuracy', row.metric.mean, row.metric.std)}" in page.text
    assert "Each variant at its own local.lr" in page.text and "How local.lr was chosen" in page.text
    for value in ("0.001 5 variants", "0.003 9 variants", "0.01 9 variants"):
        assert f"local.lr={value}" in page.text
    assert "not reached (0 of 2)" in page.text and "not resolved from the best" in page.text
    assert "2 of 46 runs did not complete" in page.text
    assert "run 1 (method-0, local.lr=0.001, seed=1) failed" in page.text
    assert "run 6 missing: it left no run.json and no metrics.jsonl (method-1, local.lr=0.003, seed=0)" in page.text
    assert "The central test set has 2,000 examples" in page.text and "over 2 seeds (0, 1)" in page.text
    assert "Curves show the 7 best of 9 variants" in page.text
    assert "Below 1e-12 it is drawn on the dashed line" in page.text
    names = {p.stem for p in (variants / "plots").iterdir()}
    assert {"accuracy_rounds", "final_accuracy", "variants", "aggregation_error", "clients_sorted"} <= names
    assert path.stat().st_size < 1_500_000
    ids = page.values("id")
    assert len(ids) == len(set(ids))


def test_variants_of_unlike_schedules_are_drawn_against_virtual_time(tmp_path):
    schedules = {
        "synchronous": {"steps": 4},
        "fedasync": {"steps": 100},
        "fedbuff": {"steps": 20},
        "fedfix": {"steps": 9},
    }
    folder = write_schedules(tmp_path, schedules, [0, 1], clients=6)
    page = Page(write_report([folder], folder / "report.html").read_text(encoding="utf-8"))
    assert (
        page.values("data-view") == ["virtual_s", "round", "bytes"] * 2
    )  # the tabs, and the views: the first is shown
    made = compare(load_all([folder]))
    panels = panels_picture(made.tuned)
    assert "virtual time (s)" in panels.alt and ">virtual time (s)<" in panels.svg
    (axis, (metric, loss)), *_ = comparison_curves(groups_of(made.tuned))
    assert axis.key == "virtual_s" and "2 runs" in metric.svg and "2 runs" in loss.svg
    assert ": all get here<" in metric.svg
    same = write_schedules(tmp_path / "same", {"a": {}, "b": {}}, [0], schedule="synchronous", steps=3, clients=4)
    (axis, _), (_, (metric, _)), *_ = comparison_curves(groups_of(compare(load_all([same])).tuned))
    assert axis.key == "round" and "all get here" not in metric.svg


def test_log_axes_are_labelled_in_plain_numbers(variants, tmp_path):
    picture = error_picture(compare(load_all([variants])).tuned)
    assert "1e-8" in picture.svg and "0.01" in picture.svg and "$" not in picture.svg
    falling = write_run(tmp_path, task="causal_lm")
    lines = [json.loads(line) for line in (falling / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("split") == "test":
            line["perplexity"] = 4000.0 / (1 + 20 * line["round"])
    (falling / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, (metric, _) = run_curves(load_run(falling))[0]
    assert ">1000<" in metric.svg and "$" not in metric.svg


def test_the_comparison_is_also_written_as_markdown_and_json(variants, tmp_path):
    made = compare(load_all([variants]))
    path = write_comparison(made, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == as_plain(made)
    text = path.read_text()
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert [len(lines) - 2 for lines in tables] == [9, 9, 9, 5, 9, 9]
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    head = [cell.strip() for cell in tables[0][0].strip("| ").split(" | ")]
    best = next(row for row in made.tuned if row.standing == "best")
    (line,) = [line for line in tables[0] if line.startswith(f"| {best.name} |")]
    cells = dict(zip(head, (cell.strip() for cell in line.strip("| ").split(" | ")), strict=True))
    assert cells["against the best"] == "best" and cells["lr"] == f"{best.value:g}"
    assert cells["test accuracy"] == spread("accuracy", best.metric.mean, best.metric.std)
    assert cells["trained"] == "74,115" and cells["up"] == write("bytes_up", best.bytes_up.mean)
    assert {
        "rounds to 70.0 %",
        "bytes to 70.0 %",
        "down",
        "of it once",
        "error, first round",
        "error, last round",
    } <= set(head)
    first = tables[1][2].split(" | ")
    assert "(1 of 2)" in first[1] and first[2].startswith("**")
    assert text.count("**") == 2 * 9
    assert "- run 1 (method-0, local.lr=0.001, seed=1) failed: round 6" in text
    terminal = rendered(terminal_table(made))
    assert all(row.name in terminal for row in made.tuned) and "not reached (0 of 2)" in terminal


def test_columns_are_those_that_say_something(tmp_path):
    folder = write_variants(tmp_path, {"a": {}, "b": {}}, {"a": [0.1], "b": [0.1]}, [0], target=None, rounds=2)
    made = compare(load_all([folder]))
    heads = [column.head for column in columns(made)]
    assert heads == [
        "variant",
        "lr",
        "n",
        "test accuracy",
        "against the best",
        "clients' accuracy",
        "up",
        "down",
        "trained",
    ]
    assert "lr" not in [column.head for column in columns(made, tuned=False)]
    said = " ".join(notes(made))
    assert "With one seed no gap is resolved" in said and "target" not in said and "Error" not in said


def test_a_target_that_only_some_seeds_reach_says_how_many(variants):
    made = compare(load_all([variants]))
    some = dataclasses.replace(made.tuned[0], target_rounds=Spread.of([3.0]), target_bytes=Spread.of([2e6]))
    cells = {column.head: column.cell(some) for column in columns(made)}
    assert (cells["rounds to 70.0 %"], cells["bytes to 70.0 %"]) == ("3.0 (1 of 2)", "2.00 MB (1 of 2)")
    both = dataclasses.replace(some, target_rounds=Spread.of([3.0, 4.0]), target_bytes=Spread.of([2e6, 2e6]))
    cells = {column.head: column.cell(both) for column in columns(made)}
    assert (cells["rounds to 70.0 %"], cells["bytes to 70.0 %"]) == ("3.5 ± 0.7", "2.00 MB")


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.1324, 0.1364], "0.134 ± 0.003"), ([0.5], "0.500"), ([0.5, 0.5], "0.500"), ([5e-8, 6e-8], "5.5e-08"),
     ([0.0, 0.0], "0"), ([], "—")],
)  # fmt: skip
def test_relative_errors_for_people(values, text):
    assert relative(Spread.of(values)) == text


def test_a_value_at_the_end_of_three_is_pointed_out(variants):
    made = compare(load_all([variants]))
    middle = [row.name for row in made.tuned]
    assert not [row for row in at_the_end(made) if len(made.grid[middle.index(row.name)]) < 3]
    three = made.grid[2]
    made.tuned[2] = three[-1]
    assert three[-1] in at_the_end(made)
    assert f"Chosen at an end of its values, so that a better one may lie beyond: {three[-1].name} (0.01)" in " ".join(
        notes(made)
    )


def test_names_in_a_markdown_table_can_not_break_it(tmp_path):
    folder = write_variants(tmp_path, {"a": {}}, {"a": [0.1, 0.2]}, [0], rounds=2)
    about = json.loads((folder / "sweep.json").read_text())
    for job in about["runs"]:
        job["variant"] = EVIL + "|x\ny"
    (folder / "sweep.json").write_text(json.dumps(about))
    made = compare(load_all([folder]))
    tables = [part.splitlines() for part in markdown(made).split("\n\n") if part.startswith("| ")]
    assert all(len({line.replace("\\|", "").count("|") for line in lines}) == 1 for lines in tables)
    assert "<script>" not in markdown(made)
    page = Page(write_report([folder], tmp_path / "out.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.text.count('<script>alert("x")</script>') > 3


@pytest.mark.parametrize("case", ["all failed", "perplexity", "one variant", "no clients", "several folders"])
def test_reports_of_all_kinds_of_variants(tmp_path, case):
    kinds = {"all failed": {"status": "failed", "stop_after": 2}, "perplexity": {"task": "causal_lm"},
             "no clients": {"client_evals": False}}  # fmt: skip
    made = {"a": {}} if case == "one variant" else {"a": {}, "b": {"gain": 0.2}}
    values = {name: [0.1, 0.2] for name in made}
    target = 40.0 if case == "perplexity" else 0.6
    folder = write_variants(tmp_path / "s", made, values, [0, 1], target=target, rounds=4, **kinds.get(case, {}))
    folders = [folder, write_run(tmp_path / "other")] if case == "several folders" else [folder]
    page = Page(write_report(folders, tmp_path / "out.html").read_text(encoding="utf-8"))
    text = markdown(compare(load_all([folder])))
    if case == "all failed":
        assert f"{4 * len(made)} of {4 * len(made)} runs did not complete" in page.text
        assert text.count("failed: round 6") == 8
    if case == "perplexity":
        assert "rounds to 40.0" in page.text and "Best test perplexity" in page.text and "examples." in text
    if case == "several folders":
        assert "Shoal comparison" in page.text
    else:
        assert "Shoal sweep of variants" in page.text
