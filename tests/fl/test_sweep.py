import csv
import json

import pytest

from fl.cli import main
from fl.errors import ConfigError, RunStopped
from fl.records import read_run
from fl.report.load import load_all
from fl.sweep import sweep
from tests.helpers import ENCODER, evaluations, final, go, weights

LISTS = ["adapter.rank=2,4,8", "seed=0,1"]


@pytest.fixture(autouse=True)
def report(request, monkeypatch):
    """Drawing takes most of a tiny sweep's time; the test of the table draws."""
    if "table" in request.node.name:
        return
    monkeypatch.setattr("fl.report.html.write_report", lambda folders, out: out.write_text("<html>") and out)


def test_three_by_two_runs_share_one_base_and_end_in_one_table(tmp_path, loads, capfd):
    folder = tmp_path / "sweep"
    assert main(["sweep", *ENCODER, *LISTS, f"hydra.sweep.dir={folder}"]) == 0
    assert len(loads) == 1
    out, err = capfd.readouterr()
    assert err == ""
    about = json.loads((folder / "sweep.json").read_text())
    assert about["axes"] == {"adapter.rank": [2, 4, 8], "seed": [0, 1]}
    assert [r["overrides"] for r in about["runs"]][:3] == [
        {"adapter.rank": "2", "seed": "0"}, {"adapter.rank": "2", "seed": "1"}, {"adapter.rank": "4", "seed": "0"},
    ]  # fmt: skip
    assert [r["dir"] for r in about["runs"]] == list("012345")
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["adapter.rank"], row["runs"], row["n"]) for row in rows] == [(r, "2", "2") for r in "248"]
    for i in range(6):
        run = read_run(folder / str(i))
        assert run["status"] == "completed"
        assert (run["settings"]["adapter.rank"], run["seed"]) == ([2, 4, 8][i // 2], i % 2)
    for i, row in enumerate(rows):
        losses = [final(folder / str(2 * i + seed))["loss"] for seed in (0, 1)]
        assert float(row["loss_mean"]) == pytest.approx(sum(losses) / 2)
    page = (folder / "report.html").read_text()
    assert "adapter.rank" in page
    found = load_all([folder])
    assert [run.axes for run in found.runs][-1] == {"adapter.rank": 8, "seed": 1}
    for i in range(6):
        assert f"[{i + 1}/6] adapter.rank={[2, 4, 8][i // 2]}  seed={i % 2}: accuracy" in out
    lines = out.splitlines()
    assert f"Summary  {folder / 'summary.csv'}" in lines
    assert f"Report   {folder / 'report.html'}" in lines


def test_sweeps_of_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch, capfd):
    import fl.sweep

    monkeypatch.chdir(tmp_path)
    compose = fl.sweep.compose
    monkeypatch.setattr(fl.sweep, "compose", lambda words: compose([*words, "hydra.sweep.dir=noon"]))
    for seeds in ("0,1", "2,3"):
        assert sweep([*ENCODER, f"seed={seeds}"], quiet=True) == 0
    assert [read_run(tmp_path / place)["seed"] for place in ("noon/0", "noon-2/0")] == [0, 2]


def test_a_run_of_a_sweep_is_the_run_by_itself(tmp_path):
    assert sweep([*ENCODER, "seed=3,4", f"hydra.sweep.dir={tmp_path / 'sweep'}"], quiet=True) == 0
    go(tmp_path / "alone", "seed=4", shared=None)
    assert weights(tmp_path / "sweep" / "1") == weights(tmp_path / "alone")


def test_a_quiet_sweep_prints_nothing(tmp_path, capfd):
    assert main(["sweep", *ENCODER, "seed=0,1", f"hydra.run.dir={tmp_path / 'sweep'}", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "sweep" / "summary.csv").is_file()  # hydra.run.dir names a sweep's folder as well


def test_the_same_sweep_again_does_what_is_missing(tmp_path, monkeypatch, capfd):
    from fl import run as runs

    folder, done, real = tmp_path / "sweep", [], runs.run
    words = [*ENCODER, "seed=0,1,2", f"hydra.sweep.dir={folder}"]

    def counting(overrides, **named):
        done.append(named["folder"].name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(overrides, **named)

    monkeypatch.setattr(runs, "run", counting)
    assert main(["sweep", *words, "--quiet"]) == 130
    assert f"the same command with hydra.sweep.dir={folder} goes on" in capfd.readouterr().err
    before = (folder / "0" / "run.json").read_bytes()
    assert main(["sweep", *words]) == 0
    assert done == ["0", "1", "2", "2"]
    assert (folder / "0" / "run.json").read_bytes() == before
    assert "[1/3] seed=0: complete already" in capfd.readouterr().out
    assert len(load_all([folder]).runs) == 3


def test_a_run_that_was_cut_off_is_resumed(tmp_path, monkeypatch):
    from fl import run as runs

    folder, resumed, real = tmp_path / "sweep", [], runs.resume
    words = [*ENCODER, "seed=0,1", f"hydra.sweep.dir={folder}"]
    assert sweep(words, quiet=True) == 0
    run = read_run(folder / "1")
    (folder / "1" / "run.json").write_text(json.dumps(run | {"status": "interrupted"}))

    def counting(place, **named):
        resumed.append(place.name)
        return real(place, **named)

    monkeypatch.setattr(runs, "resume", counting)
    assert sweep(words, quiet=True) == 0
    assert resumed == ["1"]
    assert read_run(folder / "1")["status"] == "completed"


@pytest.mark.parametrize("change", [["seed=0,1,2"], ["seed=0,1", "local.lr=0.1"], ["adapter.rank=0,1"]])
def test_another_sweep_does_not_mix_with_the_one_in_the_folder(tmp_path, change):
    (tmp_path / "sweep.json").write_text(json.dumps({"axes": {"seed": [0, 1]}, "common": [], "runs": []}))
    change = [w.replace("rank=0,1", "rank=2,3") for w in change]
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir=.*another sweep"):
        sweep([*change, f"hydra.sweep.dir={tmp_path}"], quiet=True)
    assert not (tmp_path / "0").exists()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capfd):
    folder = tmp_path / "sweep"
    words = [*ENCODER, "attack=faulty", "attack.kind=crash", "attack.fraction=0,1,0.25", f"hydra.sweep.dir={folder}"]
    assert main(["sweep", *words]) == 1
    out, err = capfd.readouterr()
    assert [read_run(folder / i)["status"] for i in "012"] == ["completed", "failed", "completed"]
    assert "shoal: [2/3] attack.fraction=1: failed: Round 1 has 0 accepted updates" in err
    assert "[3/3]" in out
    assert (folder / "summary.csv").is_file()
    assert (folder / "report.html").is_file()
    assert final(folder / "2")["rejected"] == {"error": 2}


def test_whatever_a_run_raises_the_others_go_on(tmp_path, monkeypatch, capfd):
    from fl import run as runs

    real = runs.run

    def breaking(overrides, **named):
        if named["folder"].name == "0":
            raise ZeroDivisionError("a bug")
        return real(overrides, **named)

    monkeypatch.setattr(runs, "run", breaking)
    assert sweep([*ENCODER, "seed=0,1", f"hydra.sweep.dir={tmp_path}"], quiet=True) == 1
    err = capfd.readouterr().err
    assert "shoal: [1/2] seed=0: failed: a bug" in err
    assert "Traceback" in err
    assert read_run(tmp_path / "1")["status"] == "completed"


def test_every_job_is_checked_before_the_first_one_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter\.rank=0"):
        sweep([*ENCODER, "adapter.rank=4,0", f"hydra.sweep.dir={tmp_path / 'sweep'}"], quiet=True)
    assert not (tmp_path / "sweep").exists()


def test_without_a_list_a_sweep_is_one_run(tmp_path):
    assert sweep([*ENCODER, f"hydra.sweep.dir={tmp_path}"], quiet=True) == 0
    assert read_run(tmp_path / "0")["status"] == "completed"


def test_all_failing_is_reported_too(tmp_path, capfd):
    words = [*ENCODER, "schedule.max_update_norm=1e-9", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    assert sweep(words, quiet=True) == 1
    assert RunStopped.exit_code == 3
    assert capfd.readouterr().err.count("failed: Round 1") == 2


PRESET = """\
# @package _global_
# two adapters compared on the tiny model, for the tests
defaults:
  - override /model: tiny-encoder
  - override /data: tiny
  - override /partition: iid
name: duel
data: {client_test_fraction: 0.2}
sweep:
  axes: {seed: [0, 1]}
  tune: {key: local.lr, by: clients}
  target: 0.3
  variants:
    small: {set: [adapter.rank=2], tune: [0.001, 0.003]}
    large: {set: [adapter.rank=8], tune: [0.003]}
"""


@pytest.fixture
def duel(tmp_path):
    """The words that choose a preset with variants, in a folder of its own."""
    (tmp_path / "presets" / "experiment").mkdir(parents=True)
    (tmp_path / "presets" / "experiment" / "duel.yaml").write_text(PRESET)
    tiny = [word for word in ENCODER if word.partition("=")[0] not in ("model", "data", "partition")]
    return [f"hydra.searchpath=[file://{tmp_path / 'presets'}]", "experiment=duel", *tiny]


def test_a_preset_s_variants_end_in_a_comparison(tmp_path, duel, capfd):
    folder = tmp_path / "sweep"
    assert main(["sweep", *duel, f"hydra.sweep.dir={folder}"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    about = json.loads((folder / "sweep.json").read_text())
    assert about["tune"] == {"key": "local.lr", "by": "clients"} and about["target"] == 0.3
    assert [(r["variant"], r["overrides"]) for r in about["runs"]][1:3] == [
        ("small", {"local.lr": "0.001", "seed": "1"}), ("small", {"local.lr": "0.003", "seed": "0"}),
    ]  # fmt: skip
    for i, (rank, lr) in enumerate([(2, 0.001), (2, 0.003), (8, 0.003)]):
        for seed in (0, 1):
            run = read_run(folder / str(2 * i + seed))
            found = (run["settings"]["adapter.rank"], run["settings"]["local.lr"], run["seed"])
            assert found == (rank, lr, seed)
            assert not [key for key in run["settings"] if key.startswith("sweep")]
            assert "sweep" not in (folder / str(2 * i + seed) / "config.yaml").read_text()
    table = json.loads((folder / "comparison.json").read_text())
    assert [(row["variant"], row["n"]) for row in table["tuned"]] == [("small", 2), ("large", 2)]
    own = {lr: [evaluations(folder / str(i), "clients")[-1]["mean"] for i in at] for lr, at in ((0.001, (0, 1)),
           (0.003, (2, 3)))}  # fmt: skip
    best = 0.001 if sum(own[0.001]) >= sum(own[0.003]) else 0.003
    assert table["tuned"][0]["value"] == best
    last = [final(folder / str(i))["accuracy"] for i in (4, 5)]
    assert table["tuned"][1]["accuracy"]["mean"] == pytest.approx(sum(last) / 2)
    assert [(equal["value"], len(equal["rows"])) for equal in table["equal"]] == [(0.003, 2)]
    assert "| large | 0.003 | 2 |" in (folder / "comparison.md").read_text()
    assert "[6/6] large  local.lr=0.003  seed=1: accuracy" in out
    assert f"Compared {folder / 'comparison.md'}" in out.splitlines()
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["local.lr"], row["n"]) for row in rows] == [
        ("large", "0.003", "2"), ("small", "0.001", "2"), ("small", "0.003", "2"),
    ]  # fmt: skip
    # Another target is another question about the same runs; another variant is another sweep.
    before = (folder / "0" / "run.json").read_bytes()
    assert main(["sweep", *duel, f"hydra.sweep.dir={folder}", "sweep.target=0.9", "--quiet"]) == 0
    assert json.loads((folder / "comparison.json").read_text())["target"] == 0.9
    assert (folder / "0" / "run.json").read_bytes() == before
    with pytest.raises(ConfigError, match="another sweep"):
        sweep([*duel, f"hydra.sweep.dir={folder}", "variants=small"], quiet=True)


def test_a_variant_that_fails_is_listed_and_the_others_compared(tmp_path, duel, capfd):
    folder = tmp_path / "sweep"
    crash = 'sweep.variants.large.set=["attack=faulty","attack.kind=crash","attack.fraction=1"]'
    words = [*duel, crash, "seed=0"]
    assert main(["sweep", *words, f"hydra.sweep.dir={folder}"]) == 1
    assert "shoal: [3/3] large  local.lr=0.003: failed: Round 1 has 0 accepted" in capfd.readouterr().err
    table = json.loads((folder / "comparison.json").read_text())
    assert [(run["run"], run["variant"], run["status"]) for run in table["left_out"]] == [("2", "large", "failed")]
    assert "Round 1 has 0 accepted updates" in table["left_out"][0]["error"]
    assert [(row["variant"], row["n"]) for row in table["tuned"]] == [("small", 1), ("large", 0)]
    assert "- run 2 (large, local.lr=0.003) failed: Round 1" in (folder / "comparison.md").read_text()


def test_variants_that_were_interrupted_go_on(tmp_path, duel, monkeypatch, capfd):
    from fl import run as runs

    folder, done, real = tmp_path / "sweep", [], runs.run
    words = [*duel, "seed=0", f"hydra.sweep.dir={folder}"]

    def counting(overrides, **named):
        done.append(named["folder"].name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(overrides, **named)

    monkeypatch.setattr(runs, "run", counting)
    assert main(["sweep", *words, "--quiet"]) == 130
    assert f"the same command with hydra.sweep.dir={folder} goes on" in capfd.readouterr().err
    assert not (folder / "comparison.json").exists()
    assert main(["sweep", *words]) == 0
    assert done == ["0", "1", "1", "2"]
    assert "[1/3] small  local.lr=0.001: complete already" in capfd.readouterr().out
    assert json.loads((folder / "comparison.json").read_text())["left_out"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [(["adapter.rank=0"], r"adapter\.rank=0 is not allowed.*variant small"),
     (['sweep.variants.large.set=["adapter.ranks=8"]'], r"adapter\.ranks=8.*Did you mean rank\?.*variant large"),
     (["evaluation.clients=never"], r"evaluation\.clients='never'.*chooses by the clients' own test sets"),
     (["data.client_test_fraction=0"], r"data\.client_test_fraction=0.*own test sets"),
     (["sweep.tune.by=test"], r"sweep\.tune\.by='test'.*one of clients")],
)  # fmt: skip
def test_what_is_wrong_with_a_variant_is_said_before_the_first_run(tmp_path, duel, words, message):
    with pytest.raises(ConfigError, match=message):
        sweep([*duel, *words, f"hydra.sweep.dir={tmp_path / 'sweep'}"], quiet=True)
    assert not (tmp_path / "sweep").exists()
