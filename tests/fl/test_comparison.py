"""The comparison of a sweep's variants: what is chosen, what is measured, and what is said not to be known."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from fl.comparison import (
    BEST,
    RESOLVED,
    UNRESOLVED,
    Row,
    aggregation_errors,
    as_plain,
    choose,
    compare,
    judged,
    reached,
)
from fl.report.groups import Spread
from fl.report.load import Collection, Run, load_all
from fl.report.pace import pace
from tests.fl.synthetic_runs import STATE_BYTES, write_run, write_variants

VARIANTS = {"good": {"gain": 0.4, "error": 0.2}, "fair": {"gain": 0.3, "once": 5000}, "poor": {"gain": 0.1}}
VALUES = {"good": [0.001, 0.003, 0.01], "fair": [0.003, 0.01, 0.03], "poor": [0.01]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    return write_variants(tmp_path_factory.mktemp("variants"), VARIANTS, VALUES, [2, 0, 1], target=0.75)


def change(folder: Path, name: int | str, edit) -> None:
    """Rewrite the events of one run: ``edit`` changes each in place, and returns False to leave it out."""
    path = folder / str(name) / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(e) + "\n" for e in events if edit(e) is not False))


def own_mean(value: float):
    """Set the mean over clients' own test sets, and nothing else."""

    def edit(event):
        if event.get("split") == "clients":
            event["mean"] = value

    return edit


def row(name: str, value=None, mean=None, std=None, clients=None, n=3) -> Row:
    nothing = Spread()
    run = Run(Path(name), {"status": "completed", "seed": 0}, variant=name)
    return Row(
        variant=name, settings={}, value=value, runs=[run] * n, index=0,
        metric=Spread(n if mean is not None else 0, mean, std),
        clients=Spread(n if clients is not None else 0, clients, 0.01),
        target_rounds=nothing, target_bytes=nothing, target_seconds=nothing,
        bytes_up=nothing, bytes_down=nothing, bytes_once=nothing,
        first_error=nothing, last_error=nothing, trainable=None, pace=pace([], None),
    )  # fmt: skip


def test_each_variant_stands_at_its_own_value_in_the_order_of_the_sweep(sweep):
    made = compare(load_all([sweep]))
    assert [(r.variant, r.value) for r in made.tuned] == [("good", 0.003), ("fair", 0.01), ("poor", 0.01)]
    assert (made.metric, made.key, made.by, made.target) == ("accuracy", "local.lr", "clients", 0.75)
    assert made.seeds == [0, 1, 2]
    assert made.test_examples == 2000
    assert [[r.value for r in rows] for rows in made.grid] == [VALUES["good"], VALUES["fair"], VALUES["poor"]]
    assert [r.index for r in made.tuned] == [0, 1, 2]
    assert all(r.index == 0 for r in made.grid[0])


def test_numbers_are_means_over_the_seeds_after_the_last_round(tmp_path):
    folder = write_variants(tmp_path, {"a": {}}, {"a": [0.1]}, [2, 0, 1])

    def peak(event):
        if event.get("split") == "test" and event["round"] == 4:
            event["accuracy"] = 0.99

    for index in range(3):
        change(folder, index, peak)
    found = load_all([folder])
    (only,) = compare(found).tuned
    last = [run.tests[-1]["accuracy"] for run in found.runs]
    own = [run.client_tests[-1]["mean"] for run in found.runs]
    assert [run.seed for run in only.runs] == [0, 1, 2]
    for measured, values in ((only.metric, last), (only.clients, own)):
        assert measured.n == 3
        assert measured.mean == pytest.approx(statistics.mean(values), rel=1e-12)
        assert measured.std == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert only.bytes_up == Spread(3, 50 * STATE_BYTES, 0.0)
    assert only.trainable == 74_115


def test_the_target_is_reached_at_the_first_evaluation_that_is_there(sweep):
    found = load_all([sweep])
    good, fair, poor = compare(found).tuned
    for made in (good, fair, poor):
        hits = []
        for run in made.runs:
            first = next((e["round"] for e in run.tests if e["accuracy"] >= 0.75), None)
            if first is not None:
                hits.append(first)
        assert made.target_rounds.n == len(hits)
        if hits:
            assert made.target_rounds.mean == pytest.approx(statistics.mean(hits))
            assert made.target_bytes.mean == pytest.approx(statistics.mean(10 * STATE_BYTES * h for h in hits))
    assert good.target_rounds.n == 3
    assert poor.target_rounds == Spread(0, None, None)


def test_a_target_met_exactly_counts_and_one_met_before_training_costs_nothing():
    run = Run(Path("x"), {}, rounds=[{"round": r, "bytes_up_total": 10 * r, "bytes_down_total": r} for r in (1, 2, 3)])
    run.tests = [{"round": r, "accuracy": a, "virtual_s": 1.5 * r} for r, a in ((0, 0.5), (2, 0.7), (3, 0.6))]
    assert reached(run, 0.7) == (2.0, 22.0, 3.0)
    assert reached(run, 0.70001) is None
    assert reached(run, 0.5) == (0.0, 0.0, 0.0)
    run = Run(Path("x"), {}, rounds=run.rounds)
    run.tests = [{"round": r, "perplexity": a} for r, a in ((0, 30.0), (2, 12.0), (3, 14.0))]
    assert reached(run, 12.0, higher_is_better=False) == (2.0, 22.0, None)
    assert reached(run, 11.0, higher_is_better=False) is None


def test_it_is_chosen_by_the_clients_and_not_by_the_central_test_set(tmp_path):
    folder = write_variants(tmp_path, {"a": {}}, {"a": [0.1, 0.2, 0.3]}, [0, 1])
    for index, value in enumerate([0.5, 0.5, 0.6, 0.6, 0.8, 0.7]):  # best centrally in the middle
        change(folder, index, own_mean(value))
    made = compare(load_all([folder]))
    (chosen,) = made.tuned
    assert chosen.value == 0.3
    assert chosen.metric.mean < max(r.metric.mean for r in made.rows)


def test_only_the_last_evaluation_of_the_clients_chooses(tmp_path):
    folder = write_variants(tmp_path, {"a": {}}, {"a": [0.1, 0.2]}, [0])
    for index, (early, late) in enumerate([(0.9, 0.5), (0.1, 0.6)]):

        def edit(event, early=early, late=late):
            if event.get("split") == "clients":
                event["mean"] = late if event["round"] == 10 else early

        change(folder, index, edit)
    assert compare(load_all([folder])).tuned[0].value == 0.2


def test_ties_go_to_the_smaller_value_and_perplexity_is_better_when_small():
    tied = [row("a", 0.1, clients=0.7), row("a", 0.01, clients=0.7), row("a", 0.001, clients=0.6)]
    assert choose(tied).value == 0.01
    assert choose(list(reversed(tied))).value == 0.01
    assert choose(tied, higher_is_better=False).value == 0.001
    assert choose([row("a", 10, clients=0.7), row("a", 9, clients=0.7)]).value == 9


def test_a_value_at_which_runs_fail_does_not_win_by_the_seeds_that_survived(tmp_path):
    folder = write_variants(tmp_path, {"a": {}}, {"a": [0.1, 0.2, 0.3]}, [0, 1, 2])
    for index in range(9):
        change(folder, index, own_mean([0.5, 0.6, 0.9][index // 3]))
    assert compare(load_all([folder])).tuned[0].value == 0.3
    write_run(folder / "7", seed=1, status="failed", stop_after=2, settings={"local.lr": 0.3})
    made = compare(load_all([folder]))
    assert made.tuned[0].value == 0.2
    assert made.left_out == [
        {
            "run": "7", "variant": "a", "overrides": {"local.lr": 0.3, "seed": 1}, "status": "failed",
            "error": "round 6: 1 of 5 updates was accepted, schedule.min_clients=2 are needed",
        }
    ]  # fmt: skip
    (third,) = [r for r in made.rows if r.value == 0.3]
    assert (len(third.completed), len(third.runs), third.clients.n) == (2, 3, 2)


def test_a_variant_of_which_every_run_failed_is_kept_with_nothing_known(tmp_path):
    folder = write_variants(tmp_path, {"a": {}, "b": {}}, {"a": [0.1], "b": [0.1, 0.2]}, [0])
    for index, lr in ((1, 0.1), (2, 0.2)):
        write_run(folder / str(index), status="failed", stop_after=2, settings={"local.lr": lr})
    made = compare(load_all([folder]))
    assert [r.variant for r in made.tuned] == ["a", "b"]
    assert made.tuned[1].metric == Spread(0, None, None) and made.tuned[1].standing is None
    assert made.tuned[1].index == 1
    assert [run["run"] for run in made.left_out] == ["1", "2"]


def test_a_variant_without_numbers_is_last_in_rank_also_where_less_is_better(tmp_path):
    folder = write_variants(tmp_path, {"a": {}, "b": {}}, {"a": [0.1], "b": [0.1]}, [0], task="causal_lm", target=45.0)
    write_run(folder / "0", status="failed", stop_after=2, settings={"local.lr": 0.1}, task="causal_lm")
    made = compare(load_all([folder]))
    assert made.metric == "perplexity" and not made.higher_is_better
    assert [r.index for r in made.tuned] == [1, 0]
    assert [r.standing for r in made.tuned] == [None, BEST]
    assert made.tuned[1].target_rounds.n == 1


def test_runs_that_left_nothing_are_listed(tmp_path):
    folder = write_variants(tmp_path, {"a": {}}, {"a": [0.1, 0.2]}, [0])
    for path in (folder / "1").iterdir():
        path.unlink()
    (lost,) = compare(load_all([folder])).left_out
    assert (lost["run"], lost["status"]) == ("1", "missing")
    assert "a, local.lr=0.2, seed=0" in lost["error"]


def test_equal_values_are_those_that_two_variants_share(sweep):
    made = compare(load_all([sweep]))
    assert [(value, [r.variant for r in rows]) for value, rows in made.equal] == [
        (0.003, ["good", "fair"]),
        (0.01, ["good", "fair", "poor"]),
    ]
    assert all(r.value == value for value, rows in made.equal for r in rows)
    assert [rows[0].standing for _, rows in made.equal] == [BEST, made.equal[1][1][0].standing]


def test_gaps_smaller_than_the_spread_are_not_resolved():
    rows = [row("a", mean=0.80, std=0.02), row("b", mean=0.775, std=0.01), row("c", mean=0.76, std=0.01)]
    assert [r.standing for r in judged(rows)] == [BEST, UNRESOLVED, RESOLVED]
    assert [r.standing for r in judged(rows, higher_is_better=False)] == [RESOLVED, UNRESOLVED, BEST]
    touching = [row("a", mean=0.75, std=0.125), row("b", mean=0.5, std=0.125)]
    assert judged(touching)[1].standing == UNRESOLVED
    alone = [row("a", mean=0.9, n=1), row("b", mean=0.1, n=1), row("c")]
    assert [r.standing for r in judged(alone)] == [BEST, UNRESOLVED, None]
    assert [r.standing for r in judged([row("c")])] == [None]


def test_errors_and_bytes_sent_once_come_from_the_rounds(sweep, tmp_path):
    good, fair, poor = compare(load_all([sweep])).tuned
    assert good.first_error.mean == pytest.approx(0.2) and good.last_error.mean == pytest.approx(0.2 * 1.1**9)
    assert fair.first_error == Spread(0, None, None)
    assert fair.bytes_once == Spread(3, 5000.0, 0.0)
    assert poor.bytes_once == Spread(0, None, None)
    folder = write_variants(tmp_path, {"a": {"error": 0.1}}, {"a": [0.1]}, [0])

    def edit(event):
        if event.get("event") == "round" and event["round"] in (1, 10):
            event["aggregation_error"] = None

    change(folder, 0, edit)
    found = load_all([folder])
    assert [round for round, _ in aggregation_errors(found.runs[0])] == list(range(2, 10))
    assert compare(found).tuned[0].first_error.mean == pytest.approx(0.11)


def test_further_axes_make_rows_of_their_own(sweep, tmp_path):
    folder = write_variants(tmp_path, {"a": {"gain": 0.1}, "b": {}}, {"a": [0.1, 0.2], "b": [0.1]}, [0])
    about = json.loads((folder / "sweep.json").read_text())
    extra = []
    for index, job in enumerate(about["runs"]):
        job["overrides"]["partition.alpha"] = "1"
        settings = {"local.lr": float(job["overrides"]["local.lr"])}
        write_run(folder / f"x{index}", settings=settings, gain=0.2 if job["variant"] == "a" else 0.1)
        varied = job["overrides"] | {"partition.alpha": "100"}
        extra.append({"dir": f"x{index}", "variant": job["variant"], "overrides": varied})
    about["runs"] += extra
    (folder / "sweep.json").write_text(json.dumps(about))
    made = compare(load_all([folder]))
    assert [r.name for r in made.tuned] == ["a, alpha=1", "b, alpha=1", "a, alpha=100", "b, alpha=100"]
    assert made.tuned[2].settings == {"partition.alpha": 100}
    assert all(len(r.runs) == 1 for r in made.rows) and len(made.rows) == 6


def test_without_a_tuned_setting_there_is_one_table(tmp_path):
    folder = write_variants(tmp_path, {"a": {}, "b": {"gain": 0.1}}, {"a": [0.1], "b": [0.1]}, [0, 1], target=None)
    about = json.loads((folder / "sweep.json").read_text()) | {"tune": None}
    for job in about["runs"]:
        del job["overrides"]["local.lr"]
    (folder / "sweep.json").write_text(json.dumps(about))
    made = compare(load_all([folder]))
    assert (made.key, made.equal, [len(r.runs) for r in made.tuned]) == (None, [], [2, 2])
    assert as_plain(made)["tune"] is None and as_plain(made)["tuned"][0]["target"] is None


def test_a_value_on_no_list_is_the_one_in_the_settings(tmp_path):
    folder = write_variants(tmp_path, {"a": {}, "b": {}}, {"a": [0.1], "b": [0.1]}, [0])
    about = json.loads((folder / "sweep.json").read_text())
    del about["runs"][1]["overrides"]["local.lr"]
    (folder / "sweep.json").write_text(json.dumps(about))
    assert [r.value for r in compare(load_all([folder])).tuned] == [0.1, 0.1]


def test_as_plain_values_it_is_json_with_full_numbers(sweep):
    made = compare(load_all([sweep]))
    table = json.loads(json.dumps(as_plain(made), allow_nan=False))
    assert table["tune"] == {"key": "local.lr", "by": "clients"} and table["seeds"] == [0, 1, 2]
    good, _, poor = table["tuned"]
    assert good["accuracy"] == {"n": 3, "mean": made.tuned[0].metric.mean, "std": made.tuned[0].metric.std}
    assert good["against_best"] == "best" and good["runs"] == ["4", "5", "3"]  # in the order of their seeds
    assert good["aggregation_error"]["first_round"]["mean"] == pytest.approx(0.2)
    assert (poor["target"]["reached"], poor["target"]["of"], poor["target"]["rounds"]) == (0, 3, None)
    assert poor["bytes_once"] is None
    assert len(table["grid"]) == 7 and [e["value"] for e in table["equal"]] == [0.003, 0.01]


def test_runs_of_no_variant_are_no_part_of_it(sweep):
    found = load_all([sweep])
    stranger = dataclasses.replace(found.runs[0], variant=None)
    made = compare(Collection(found.title, [*found.runs, stranger], found.sweep, [], found.about))
    assert sum(len(r.runs) for r in made.rows) == len(found.runs)
