import json
import subprocess
import sys
from pathlib import Path

import pytest

from clients.models import TinyEncoder
from fl.cli import main
from fl.records import read_run
from tests.helpers import ENCODER, go

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "flwr", "matplotlib", "hydra", "omegaconf", "numpy")


def said(capfd) -> tuple[str, str]:
    out, err = capfd.readouterr()
    return out, err


# Light commands


LIGHT = [["--help"], ["run", "--help"], ["list"], ["list", "local", "--json"]]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_and_list_import_nothing_heavy(arguments):
    code = (
        "import sys\nfrom fl.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        f"print(code, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-1] == "0 []"
    assert len(done.stdout) > 200


def test_the_console_command_is_installed():
    done = subprocess.run([Path(sys.executable).parent / "shoal", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for command in ("run", "sweep", "report", "list"):
        assert command in done.stdout


def test_list_covers_every_group_with_its_line(capfd):
    assert main(["list"]) == 0
    out, _ = said(capfd)
    for path in (ROOT / "configs").rglob("*.yaml"):
        group = path.parent.relative_to(ROOT / "configs").as_posix()
        if group == ".":
            continue
        comments = [line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
        line = next(c for c in comments if not c.startswith("@"))
        assert group in out
        assert line[:60] in out
    assert "local/optimizer" in out


def test_list_of_a_group_as_json(capfd):
    assert main(["list", "adapter", "--json"]) == 0
    found = json.loads(said(capfd)[0])
    assert list(found["groups"]) == ["adapter", "adapter/init"]
    options = {o["name"]: o for o in found["groups"]["adapter"]}
    assert set(options) == {p.stem for p in (ROOT / "configs/adapter").glob("*.yaml")}
    assert options["lora"]["settings"]["rank"] == 8
    assert options["lora"]["default"] is True
    assert main(["list", "local/optimizer", "--json"]) == 0
    assert "sgd" in [o["name"] for o in json.loads(said(capfd)[0])["groups"]["local/optimizer"]]


def test_list_of_no_group_is_refused(capfd):
    assert main(["list", "adaptor"]) == 2
    assert said(capfd)[1].startswith("shoal: group='adaptor' is not allowed")


@pytest.mark.parametrize("arguments", [["fly"], ["run", "--fast"], ["report"], ["list", "a", "b=1"], ["run", "-x=1"]])
def test_wrong_arguments_exit_2(arguments, capfd):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "shoal" in said(capfd)[1]


# Wrong settings

WRONG = {
    "local.lrr": ["local.lrr=1"],
    "new.key": ["+new.key=1"],
    "clients": ["~clients"],
    "model": ["model=nope"],
    "experiment": ["experiment=nope"],
    "schedule.rounds": ["schedule.rounds=two"],
    "local.lr": ["local.lr=-1"],
    "privacy.epsilon": ["privacy.epsilon=8"],
    "engine.device": ["engine.device=cuda"],
    "seed": ["seed=0,1"],
    "clients.number": ["clients.number=null"],
    "clients.per_round": ["partition=natural", "clients.number=null", "clients.per_round=99"],
    "partition.min_size": ["clients.number=200"],
    "attack.clients": ["attack=faulty", "attack.clients=[4]"],
    "network.path": ["network=trace"],
    "data.path": ["data=csv"],
    "adapter.method": ["adapter=peft", "adapter.method=nope"],
    "adapter.options.nope": ["adapter=peft", "adapter.options.nope=1"],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_exits_2_before_any_model_loads(key, capfd, tmp_path, monkeypatch):
    import torch

    if key == "engine.device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")

    def load(*_arguments, **_named):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(TinyEncoder, "load", load)
    words = [*ENCODER, f"hydra.run.dir={tmp_path / 'run'}", *WRONG[key], "--quiet"]
    assert main(["run", *words]) == 2
    out, err = said(capfd)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"shoal: {key}=")
    assert " is not allowed: " in err
    assert (read_run(tmp_path / "run") or {"status": "failed"})["status"] == "failed"


def test_the_folder_of_a_wrong_setting_can_be_used_again(tmp_path, capfd):
    words = [*ENCODER, f"hydra.run.dir={tmp_path / 'run'}", "--quiet"]
    assert main(["run", *words, "clients.number=null"]) == 2
    assert main(["run", *words]) == 0
    assert read_run(tmp_path / "run")["status"] == "completed"


# Runs


def test_a_quiet_run_prints_nothing(tmp_path, capfd):
    assert main(["run", *ENCODER, "report=true", f"hydra.run.dir={tmp_path / 'run'}", "--quiet"]) == 0
    assert said(capfd) == ("", "")
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_quiet_process_prints_nothing(tmp_path):
    """No library's warning either."""
    words = [*ENCODER, f"hydra.run.dir={tmp_path / 'run'}", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "fl.cli", "run", *words], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_settings_may_stand_on_both_sides_of_an_option(tmp_path, capfd):
    assert main(["run", *ENCODER, "--quiet", f"hydra.run.dir={tmp_path / 'run'}", "seed=5"]) == 0
    run = read_run(tmp_path / "run")
    assert (run["seed"], run["model"]) == (5, "TinyEncoder")


def test_a_run_shows_its_course_and_where_things_are(tmp_path, capfd):
    folder = tmp_path / ("a-long-name-" * 8) / "run [1]"
    assert main(["run", *ENCODER, "report=true", f"hydra.run.dir='{folder}'"]) == 0
    out, err = said(capfd)
    assert err == ""
    lines = out.splitlines()
    for name, file in (("Folder", ""), ("Report", "report.html"), ("Adapter", "adapter")):
        shown = next(line for line in lines if line.startswith(name))
        assert Path(shown[len(name) :].strip()) == folder / file  # whole, on one line
    assert any(line.startswith("round 1/2") for line in lines)
    assert any(line.startswith("round 2/2") for line in lines)
    assert "4 clients" in out
    assert "Test accuracy" in out
    assert "cohorts of 4" in out


def test_a_run_does_not_overwrite_another(tmp_path, capfd):
    go(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(["run", *ENCODER, f"hydra.run.dir={tmp_path / 'run'}", "--quiet"]) == 1
    assert "holds a finished run" in said(capfd)[1]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_through_the_command(tmp_path, capfd, monkeypatch):
    from fl.server_app import Server

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Server, "_evaluate", interrupted)
        assert main(["run", *ENCODER, f"hydra.run.dir={folder}", "--quiet"]) == 130
    said(capfd)
    assert main(["run", "--resume", str(folder), "--quiet"]) == 0
    assert said(capfd) == ("", "")
    assert read_run(folder)["status"] == "completed"
    assert read_run(folder)["overrides"] == [*ENCODER, f"hydra.run.dir={folder}"]


# Reports


def test_report_of_one_run_and_of_several(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        go(tmp_path / str(seed), f"seed={seed}")
    assert main(["report", "0"]) == 0
    assert said(capfd)[0] == "0/report.html\n"
    assert main(["report", "0", "1"]) == 0
    assert said(capfd)[0] == "report.html\n"
    assert main(["report", "0", "1", "--out", "both.html"]) == 0
    for name in ("0/report.html", "report.html", "both.html"):
        text = (tmp_path / name).read_text()
        assert "<html" in text
        assert "http://" not in text.replace("http://www.w3.org", "")


def test_report_of_no_run_is_one_line(tmp_path, capfd):
    assert main(["report", str(tmp_path)]) == 1
    err = said(capfd)[1]
    assert err.startswith(f"shoal: {tmp_path} ")
    assert err.count("\n") == 1
