"""Heat maps of rules against attacks: which sweeps are ones, what each cell says, and that it can be read."""

import itertools
import json
import re
from html import unescape
from pathlib import Path

import pytest

from fl.comparison import compare
from fl.report.groups import Group, group
from fl.report.heat_map import (
    COLORS,
    DARK,
    LIGHT,
    THRESHOLD,
    attack_card,
    attack_cells,
    heat_map,
    luminance,
    number_text,
)
from fl.report.load import load_all
from tests.fl.test_report import Page

RULES, ATTACKS, ALPHAS, SEEDS = ["mean", "krum", "median"], ["alie", "none", "sign_flip"], [0.1, 10], [0, 1]


def accuracy(rule: str, attack: str, alpha: float, seed: int) -> float:
    hurt = {"none": 0.0, "alie": 0.2, "sign_flip": 0.5 if rule == "mean" else 0.1}[attack]
    return 0.9 - hurt - 0.01 * RULES.index(rule) - 0.1 * (alpha < 1) - 0.02 * seed


def write(folder: Path, variants: bool, failed: tuple[str, str] | None = None) -> Path:
    """A sweep of rules, as variants or as values of a setting, over attacks, alpha and seeds."""
    jobs = []
    for number, (rule, attack, alpha, seed) in enumerate(itertools.product(RULES, ATTACKS, ALPHAS, SEEDS)):
        varied = {"attack": attack, "partition.alpha": str(alpha), "seed": str(seed)}
        if not variants:
            varied = {"aggregator/combine": rule, **varied}
        dead = (rule, attack) == failed
        run = folder / str(number)
        run.mkdir(parents=True)
        info = {
            "experiment": "byzantine",
            "seed": seed,
            "status": "failed" if dead else "completed",
            "task": "classification",
            "settings": {"seed": seed, "partition.alpha": alpha},
            "final": {} if dead else {"accuracy": accuracy(rule, attack, alpha, seed), "rounds": 3},
        }
        (run / "run.json").write_text(json.dumps(info))
        jobs.append({"dir": str(number), "overrides": varied} | ({"variant": rule} if variants else {}))
    axes = {"attack": ATTACKS, "partition.alpha": ALPHAS, "seed": SEEDS}
    about = {"axes": axes, "runs": jobs}
    if variants:
        about |= {"variants": {rule: {"set": [f"aggregator/combine={rule}"], "tune": []} for rule in RULES}}
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def groups_of(folder: Path, variants: bool) -> list[Group]:
    found = load_all([folder])
    if not variants:
        return group(found.runs)
    return [Group({"variant": row.variant, **row.settings}, row.runs) for row in compare(found).tuned]


@pytest.mark.parametrize("variants", [True, False])
def test_each_cell_has_the_seeds_of_its_rule_and_attack(tmp_path, variants):
    cells = attack_cells(groups_of(write(tmp_path, variants), variants), "accuracy")
    expected = {
        (f"alpha {alpha:g}", rule, attack): [accuracy(rule, attack, alpha, seed) for seed in SEEDS]
        for rule, attack, alpha in itertools.product(RULES, ATTACKS, ALPHAS)
    }
    assert cells == expected


def test_other_sweeps_have_no_heat_map(tmp_path):
    groups = groups_of(write(tmp_path, True), True)
    assert attack_cells([], "accuracy") == {}
    assert attack_cells(groups, "perplexity") == {}
    assert attack_cells([g for g in groups if g.values["attack"] == "alie"], "accuracy") == {}
    assert attack_cells([g for g in groups if g.values["variant"] == "mean"], "accuracy") == {}
    without = [Group({k: v for k, v in g.values.items() if k != "attack"}, g.runs) for g in groups]
    assert attack_card(without, "accuracy") == (None, None)


def texts(svg: str) -> list[str]:
    return [unescape(word) for word in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_the_picture_prints_mean_worst_seed_and_worst_attack():
    cells = {
        ("", "mean", "none"): [0.9, 0.8],
        ("", "mean", "alie"): [0.7, 0.5],
        ("", "mean", "ipm"): [0.64, 0.1],
        ("", "krum", "none"): [0.81],
        ("", "krum", "alie"): [0.75],
        ("", "krum", "ipm"): [],
    }
    words = texts(heat_map(cells, "Test accuracy", percent=True).svg)
    assert words.count("85.0") == 1 and words.count("80.0") >= 1
    assert words.count("37.0") == 2  # under ipm, and as the worst attack's mean
    assert words.count("10.0") == 2  # the worst seed of any attack
    assert words.count("—") == 2  # krum met no ipm, so its worst attack is not known
    assert {"mean", "krum", "none", "alie", "ipm", "worst attack"} <= set(words)


def test_a_run_without_attack_is_no_worst_attack():
    cells = {("", rule, attack): [x] for rule in "ab" for attack, x in (("none", 0.111), ("p", 0.222), ("q", 0.333))}
    words = texts(heat_map(cells, "Test accuracy", percent=True).svg)
    assert (words.count("11.1"), words.count("22.2"), words.count("33.3")) == (4, 8, 4)  # mean and worst seed of each


def test_the_worst_is_the_largest_perplexity():
    cells = {("", "a", "p"): [2.0, 3.0], ("", "a", "q"): [400.0, 401.0], ("", "b", "p"): [3.0]}
    words = texts(heat_map(cells | {("", "b", "q"): [5.0]}, "Test perplexity", higher_is_better=False).svg)
    assert words.count("400") == words.count("401") == 2  # 400.5, rounded to even
    assert words.count("5.00") >= 2
    assert {"10.0", "100"} <= set(words)  # the colour bar has decades: 2 to 400 would be one colour else


def test_the_card_has_the_same_numbers_as_a_table(tmp_path):
    made, picture = attack_card(groups_of(write(tmp_path, True, failed=("median", "alie")), True), "accuracy")
    page = Page(made)
    assert picture.wide and "over 2 completed runs" in page.text
    assert page.tags.count("table") == 2 and {"alpha 0.1", "alpha 10"} <= set(page.words)
    head, *rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", made)[:4])
    assert head == ["rule", "none", "alie", "sign_flip", "worst attack"]
    shown = {re.sub("<.*?>", "", row[0]): [re.sub("<.*?>", "", cell) for cell in row[1:]] for row in rows}
    assert shown["mean"] == ["79.0 (78.0)", "59.0 (58.0)", "29.0 (28.0)", "29.0 (28.0)"]
    assert shown["krum"] == ["78.0 (77.0)", "58.0 (57.0)", "68.0 (67.0)", "58.0 (57.0)"]
    assert shown["median"] == ["77.0 (76.0)", "—", "67.0 (66.0)", "—"]
    best = [i for row in rows for i, cell in enumerate(row) if "<b>" in cell]
    assert best == [1, 2, 3, 4] and "<b>68.0 </b>" in rows[1][3]


def test_text_can_be_read_on_every_colour():
    """The contrast ratio of WCAG 2.1, between the text chosen and the cell's colour, is 4.4 or better."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    for value in range(256):
        cell = luminance(colormaps[COLORS](value))
        text = luminance(to_rgb(DARK if cell > THRESHOLD else LIGHT))
        assert (max(cell, text) + 0.05) / (min(cell, text) + 0.05) >= 4.4, value
    assert luminance((1, 1, 1)) == pytest.approx(1) and luminance((0, 0, 0)) == 0


def test_a_large_heat_map_is_wide_and_safe():
    rules = [f"rule {i} <b>" for i in range(20)]
    attacks = [f"attack{i}" for i in range(8)]
    cells = {(p, r, a): [0.5, 0.6] for p in ("alpha 0.1", "alpha 10") for r in rules for a in attacks}
    picture = heat_map(cells, "Test accuracy", percent=True)
    assert picture.wide and picture.png[:4] == b"\x89PNG"
    words = texts(picture.svg)
    assert words.count("55.0") == 2 * 20 * 9 and words.count("rule 3 <b>") == 1 and words.count("attack3") == 2
    assert "<b>" not in picture.svg and "<image" not in picture.svg
    assert len(picture.svg) < 400_000


@pytest.mark.parametrize(
    ("value", "text"),
    [(97.34, "97.3"), (100.0, "100"), (99.97, "100"), (9.999, "10.0"), (3.2, "3.20"), (52e3, "5e+04")],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text
