"""The privacy-utility frontier, and what stands beside every epsilon: unit, neighbours, delta, accountant."""

import json
import statistics
from pathlib import Path

import pytest

from fl.comparison import BEST, blocks, compare
from fl.report import load_all, load_run, write_report
from fl.report.claims import scope, statement_table
from fl.report.curves import axes_of
from fl.report.frontier import NONE, SMALLEST, frontier, frontier_card, frontier_picture, frontier_table
from fl.report.groups import group
from fl.report.tables import final_rows
from fl.report.variant_tables import grid_table, markdown, notes
from tests.fl.synthetic_runs import STATE_BYTES, write_run, write_sweep, write_variants
from tests.fl.test_report import Page

AXES = {"privacy.epsilon": [1, 0.5, 4], "adapter": ["lora", "ffa"], "seed": [0, 1, 2]}
CLAIM = {
    "mechanism": "DP-SGD at every client",
    "unit": "example of one client",
    "relation": "adding or removing it",
    "sampling": "Poisson, at rate batch_size/n_i (0.02)",
    "clipping": "each example's gradient to L2 norm C = 1",
    "noise": None,
    "participation": "up to 6 of 6 rounds of a client",
    "accountant": "RDP",
    "delta": 0.0036,
    "against": "the server",
    "uncovered": ["evaluations on held-out examples", "the choice of <hyper-parameters>"],
    "also": [],
    "holders": [{"client": 0, "examples": 280, "rate": 0.02, "steps": 18, "limit": None, "epsilon": 0.99876}],
}


def claim(folder: Path, **changed) -> Path:
    """Give a run, or every run of a sweep, the statement that its epsilon is about."""
    for path in [folder / "run.json", *folder.glob("*/run.json")]:
        if path.is_file():
            info = json.loads(path.read_text())
            epsilon = info["final"].get("epsilon")
            made = {**CLAIM, "epsilon": epsilon, "target": epsilon, **changed}
            info["privacy_statement"] = made if epsilon is not None else {"mechanism": "No guarantee", "unit": None}
            path.write_text(json.dumps(info))
    return folder


def edit(folder: Path, change) -> Path:
    """Change a run's run.json in place."""
    info = json.loads((folder / "run.json").read_text())
    change(info)
    (folder / "run.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    return claim(write_sweep(tmp_path_factory.mktemp("frontier"), AXES))


def lines_of(folder: Path):
    return frontier(group(load_all([folder]).runs), "accuracy")


# ---------------------------------------------------------------------------------------------------------- lines


def test_a_line_is_a_choice_of_the_other_settings_with_its_points_by_epsilon(sweep):
    lines = lines_of(sweep)
    assert [line.name for line in lines] == ["adapter=ffa", "adapter=lora"]
    assert [[epsilon for epsilon, _ in line.points] for line in lines] == [[0.5, 1.0, 4.0]] * 2
    runs = load_all([sweep]).runs
    mine = [r.numbers["accuracy"] for r in runs if r.axes["adapter"] == "ffa" and r.axes["privacy.epsilon"] == 1]
    point = lines[0].points[1][1]
    assert point.statistics("accuracy") == (
        3,
        pytest.approx(statistics.mean(mine)),
        pytest.approx(statistics.stdev(mine)),
    )


def test_a_point_stands_at_what_was_spent_and_not_at_the_target(tmp_path):
    folder = claim(write_sweep(tmp_path, {"privacy.epsilon": [1, 2], "seed": [0]}))
    edit(folder / "1", lambda info: info["final"].update(epsilon=1.75))
    (line,) = lines_of(folder)
    assert [epsilon for epsilon, _ in line.points] == [1.0, 1.75]
    assert "epsilon 2" in frontier_table([line], "accuracy")  # the table's head is the budget


def test_there_is_no_frontier_without_two_epsilons(tmp_path):
    assert lines_of(write_sweep(tmp_path / "none", {"adapter.rank": [2, 4, 8], "seed": [0]})) == []
    one = claim(write_sweep(tmp_path / "one", {"privacy.epsilon": [2], "adapter": ["lora", "ffa"], "seed": [0]}))
    assert lines_of(one) == []
    assert frontier_card(group(load_all([one]).runs), "accuracy") == (None, None)


def test_runs_without_a_guarantee_are_the_reference_of_their_line(sweep, tmp_path):
    free = write_sweep(tmp_path / "free", {"adapter": ["ffa"], "seed": [0, 1]})
    lines = frontier(group(load_all([sweep, free]).runs), "accuracy")
    found = {line.name: line.reference for line in lines}
    assert found["adapter=lora"] is None
    assert [run.folder.parent.name for run in found["adapter=ffa"].runs] == ["free", "free"]
    shown = Page(frontier_table(lines, "accuracy")).text
    assert NONE in shown
    assert NONE in frontier_picture(lines, "accuracy").svg
    assert NONE not in frontier_table(lines_of(sweep), "accuracy")


def test_epsilons_of_two_units_are_two_lines(tmp_path):
    folder = claim(write_sweep(tmp_path, {"privacy.epsilon": [1, 2], "seed": [0]}))
    more = claim(write_sweep(tmp_path / "more", {"privacy.epsilon": [1, 2], "seed": [0]}), unit="client")
    runs = [*load_all([folder]).runs, *load_all([more]).runs]
    groups = [item for some in (runs[:2], runs[2:]) for item in group(some)]
    lines = frontier(groups, "accuracy")
    assert [line.name for line in lines] == ["for one example of one client", "for one client"]
    assert all(len(line.points) == 2 for line in lines)
    assert "epsilon spent for" not in frontier_picture(lines, "accuracy").svg  # no unit that holds for both


def test_failed_runs_and_spent_nothing_are_no_points(tmp_path):
    folder = claim(write_sweep(tmp_path, {"privacy.epsilon": [1, 2, 4], "seed": [0, 1]}))
    edit(folder / "0", lambda info: info.update(status="failed"))
    for name in "45":
        edit(folder / name, lambda info: info["final"].update(epsilon=0.0))
    (line,) = lines_of(folder)
    assert [epsilon for epsilon, _ in line.points] == [1.0, 2.0]
    assert "(1 of 2)" in frontier_table([line], "accuracy")


# --------------------------------------------------------------------------------------------- figure, table, page


def test_a_marker_s_area_is_the_traffic_of_a_run(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    folder = claim(write_sweep(tmp_path, {"privacy.epsilon": [1, 2], "adapter": ["lora", "ffa"], "seed": [0]}))
    for name in "13":  # ffa, which is the first line
        edit(folder / name, lambda info: info["final"].update(bytes_up=25 * STATE_BYTES, bytes_down=0))
    areas: dict[str, list[float]] = {}
    scatter = Axes.scatter

    def watched(self, x, y, s, **style):
        areas.setdefault(style["color"], []).append(s)
        return scatter(self, x, y, s=s, **style)

    monkeypatch.setattr(Axes, "scatter", watched)
    lines = lines_of(folder)
    picture = frontier_picture(lines, "accuracy")
    small, large = areas.values()
    traffic = [
        line.points[0][1].statistics("bytes_up")[1] + line.points[0][1].statistics("bytes_down")[1] for line in lines
    ]
    assert traffic == [25 * STATE_BYTES, 100 * STATE_BYTES]
    assert large[0] == large[1] and small[0] == small[1] == large[0] / 4 > SMALLEST
    assert "29.8 MB a run" in picture.svg and "7.45 MB a run" in picture.svg


def test_the_table_has_a_column_an_epsilon_and_the_bytes(sweep):
    shown = Page(frontier_table(lines_of(sweep), "accuracy"))
    assert "accuracy epsilon 0.5 epsilon 1 epsilon 4 up down" in shown.text
    assert shown.tags.count("tr") == 3
    assert shown.text.count("±") == 6


def test_a_sweep_over_epsilon_has_one_report_with_its_frontier(sweep):
    out = sweep / "report.html"
    write_report([sweep], out)
    page = Page(out.read_text())
    assert "Privacy and utility" in page.text and "What each holder has spent" in page.text
    about = (
        "Epsilon is for one example of one client (neighbours by adding or removing it), delta 0.0036, RDP accountant."
    )
    assert page.text.count(about) == 2  # at the frontier, and at the table that has epsilon as a column
    assert "epsilon spent for one example of one client" in page.text  # the axis of the figures
    assert (sweep / "plots" / "frontier.png").is_file()
    assert not (sweep / "plots" / "final_accuracy.png").exists()  # the frontier shows the same, and more


# ------------------------------------------------------------------------------------------------------- claims


def test_the_scope_names_unit_neighbours_delta_and_accountant(tmp_path):
    first = load_run(claim(write_run(tmp_path / "a", epsilon=2.0)))
    other = load_run(claim(write_run(tmp_path / "b", epsilon=2.0), delta=0.01))
    coarse = load_run(claim(write_run(tmp_path / "c", epsilon=2.0), unit="client", accountant="PRV (Opacus)"))
    silent = load_run(write_run(tmp_path / "d", epsilon=2.0))
    about = "one example of one client (neighbours by adding or removing it)"
    assert scope([first]) == f"{about}, delta 0.0036, RDP accountant"
    assert scope([first, other, silent]) == f"{about}, delta 0.0036 to 0.01, RDP accountant"
    both = "one client (neighbours by adding or removing it), delta 0.0036, PRV (Opacus) accountant"
    assert scope([first, coarse]) == f"{about}, delta 0.0036, RDP accountant; or {both}"
    assert scope([silent]) == ""


def test_no_epsilon_of_a_run_stands_alone(tmp_path):
    run = load_run(claim(write_run(tmp_path, epsilon=2.0)))
    rows = {name: (value, remark) for name, value, remark in final_rows(run)}
    assert rows["Privacy loss epsilon"] == ("2.00", "for one example of one client, delta 0.0036")
    assert axes_of([run])[-1].label == "epsilon spent for one example of one client"
    write_report([tmp_path], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "ε = 2.00 for one example of one client, delta 0.0036" in page.text


def test_the_statement_is_a_table_with_every_part_and_the_holders_folded(tmp_path):
    run = load_run(claim(write_run(tmp_path, epsilon=2.0)))
    shown = Page(statement_table(run))
    for text in (
        "Mechanism DP-SGD at every client",
        "Spent epsilon 2 at delta 0.0036, of a budget of epsilon 2",
        "Protected one example of one client; neighbours by adding or removing it",
        "Sampling Poisson", "Clipping each example's gradient", "Participation up to 6 of 6", "Accountant RDP",
        "Holds against the server", "Not covered evaluations", "the choice of <hyper-parameters>",
    ):  # fmt: skip
        assert text in shown.text, text
    assert "Noise" not in shown.text and "Counted otherwise" not in shown.text  # nothing is said of them
    assert "details" in shown.tags and "client examples rate steps limit epsilon 0 280 0.02 18 — 0.9988" in shown.text
    spent = load_run(claim(write_run(tmp_path / "i", epsilon=2.0), epsilon=None))
    assert "Spent no finite epsilon" in Page(statement_table(spent)).text
    assert statement_table(load_run(write_run(tmp_path / "n"))) is None


# ----------------------------------------------------------------------------------- variants at several epsilons


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> Path:
    """Two variants at two values of local.lr, at epsilon 1 (where the larger value is better) and 4 (the smaller)."""
    folder = tmp_path_factory.mktemp("private")
    given = {"fine": {"gain": 0.3}, "poor": {"gain": 0.12}}
    write_variants(folder, given, {"fine": [0.1, 0.2], "poor": [0.1, 0.2]}, [0, 1], target=None, epsilon=4.0)
    about = json.loads((folder / "sweep.json").read_text())
    jobs = []
    for job in about["runs"]:
        varied, place = job["overrides"], f"low{job['dir']}"
        jobs.append({**job, "overrides": {**varied, "privacy.epsilon": "4"}})
        gain = given[job["variant"]]["gain"] - (0.15 if varied["local.lr"] == "0.1" else 0.08)
        write_run(
            folder / place,
            seed=int(varied["seed"]),
            gain=gain,
            epsilon=1.0,
            settings={"local.lr": float(varied["local.lr"])},
        )
        jobs.append({**job, "dir": place, "overrides": {**varied, "privacy.epsilon": "1"}})
        edit(folder / job["dir"], lambda info: info["settings"].update({"privacy.epsilon": 4}))
        edit(folder / place, lambda info: info["settings"].update({"privacy.epsilon": 1}))
    (folder / "sweep.json").write_text(json.dumps({**about, "runs": jobs}))
    return claim(folder)


def test_a_value_is_chosen_for_each_variant_at_each_epsilon(variants):
    made = compare(load_all([variants]))
    assert [(r.variant, r.settings["privacy.epsilon"]) for r in made.tuned] == [
        ("fine", 1), ("poor", 1), ("fine", 4), ("poor", 4),
    ]  # fmt: skip
    assert [r.value for r in made.tuned if r.settings["privacy.epsilon"] == 1] == [0.2, 0.2]
    _, lines = grid_table(made)
    assert [line[0][0] for line in lines] == [r.name for r in made.tuned]
    chosen = [[text for text, bold in line[1:] if bold] for line in lines]
    assert all(len(texts) == 1 for texts in chosen)


def test_rows_are_compared_within_one_epsilon_alone(variants):
    made = compare(load_all([variants]))
    assert [r.standing == BEST for r in made.tuned] == [True, False, True, False]
    assert [name for name, _ in blocks(made.tuned)] == ["privacy.epsilon=1", "privacy.epsilon=4"]
    for _, rows in made.equal:
        assert [sum(r.standing == BEST for r in some) for _, some in blocks(rows)] == [1, 1]


def test_the_tables_are_by_epsilon(variants):
    made = compare(load_all([variants]))
    text = markdown(made)
    assert text.count("### privacy.epsilon=1") == text.count("### privacy.epsilon=4") == 1 + len(made.equal)
    assert any("Each choice of privacy.epsilon has a table" in note for note in notes(made))
    assert any("delta 0.0036" in note and "tuning" in note for note in notes(made))
    out = variants / "report.html"
    write_report([variants], out)
    page = Page(out.read_text())
    assert "Privacy and utility" in page.text and "Not resolved from it" in page.text
    assert (variants / "plots" / "frontier.png").is_file()
    best = max(made.tuned, key=lambda r: r.metric.mean)
    assert f"{best.name}" in page.text.split("Not resolved from it")[0]
