"""What one run leaves behind: the files, and every field of run.json."""

import datetime
import json

import pytest
import yaml
from rich.console import Console

import fl.run
from fl.compose import flat
from fl.errors import ConfigError, ShoalError
from fl.records import read_run, without_wall
from fl.run import run
from tests.helpers import DECODER, ENCODER, SHARED, evaluations, final, go, same_metrics, weights

TOP = [
    "id", "name", "experiment", "seed", "status", "started", "finished", "versions", "device", "commit", "model",
    "data",
    "task", "adapter", "num_clients", "trainable_parameters", "total_parameters", "engine", "partition",
    "privacy", "privacy_statement",
    "settings", "overrides", "final", "error", "saved",
]  # fmt: skip
FINAL = [
    "loss", "rounds", "bytes_up", "bytes_down", "virtual_s", "wall_s", "client_steps", "client_steps_per_s",
    "tokens_per_s", "rejected_updates", "rejected", "peak_memory_bytes", "epsilon", "stopped",
]  # fmt: skip
ENGINE = ["device", "dtype", "attention", "cohort_size", "workers", "threads"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with its report."""
    folder = tmp_path_factory.mktemp("run") / "run"
    go(folder, "report=true", "seed=4", "adapter.rank=5")
    return folder


def test_the_files_of_a_run(folder):
    assert {p.name for p in folder.iterdir()} == {
        "adapter", "checkpoint", "config.yaml", "metrics.jsonl", "overrides.yaml", "plots", "report.html", "run.json",
    }  # fmt: skip
    assert list((folder / "plots").glob("*.png"))


@pytest.mark.parametrize("base", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_run_json_has_every_field(tmp_path, base):
    go(tmp_path / "run", base=base)
    found = read_run(tmp_path / "run")
    assert set(found) == set(TOP)
    scores = ["accuracy", "macro_f1"] if base is ENCODER else ["perplexity"]
    assert set(found["final"]) == {*FINAL, *scores}
    assert set(found["engine"]) == set(ENGINE)
    assert set(found["partition"]) == {"sizes", "test_sizes", "labels", "label_names", "groups", "tokens"}
    assert {"python", "torch", "flwr", "peft", "transformers", "shoal"} <= set(found["versions"])
    nullable = {"experiment", "commit", "error"}
    assert all(found[name] is not None for name in set(TOP) - nullable)
    assert all(found["final"][name] is not None for name in {*FINAL, *scores} - {"epsilon", "stopped"})
    assert found["task"] == ("classification" if base is ENCODER else "causal_lm")


def test_what_run_json_says(folder):
    found = read_run(folder)
    assert (found["name"], found["experiment"], found["seed"], found["status"]) == ("run", None, 4, "completed")
    assert (found["model"], found["data"], found["adapter"]) == ("TinyEncoder", "Tiny", "LoRA")
    assert found["num_clients"] == len(found["partition"]["sizes"]) == 4
    assert found["trainable_parameters"] == found["total_parameters"] - 19424
    assert "No privacy guarantee" in found["privacy"]
    assert found["engine"] == {
        "device": "cpu", "dtype": "float32", "attention": "sdpa", "cohort_size": 4, "workers": 1, "threads": 1,
    }  # fmt: skip
    assert found["final"]["epsilon"] is None
    assert found["final"]["peak_memory_bytes"] > 1e8
    assert found["final"]["client_steps"] == 2 * 4 * 2
    started, finished = (datetime.datetime.fromisoformat(found[k]) for k in ("started", "finished"))
    assert started <= finished
    assert finished.tzinfo is not None
    last = evaluations(folder)[-1]
    assert found["final"]["accuracy"] == last["accuracy"]


def test_the_config_is_resolved_and_complete(folder):
    config, found = yaml.safe_load((folder / "config.yaml").read_text()), read_run(folder)
    assert flat(config) == found["settings"]
    assert (config["seed"], config["adapter"]["rank"], config["clients"]["number"]) == (4, 5, 4)
    assert {k: config["engine"][k] for k in ENGINE} == found["engine"]
    assert "${" not in (folder / "config.yaml").read_text()
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == found["overrides"]
    assert found["overrides"][-1] == "adapter.rank=5"


def test_settings_that_were_measured_are_written_down(tmp_path, monkeypatch):
    """``auto`` does not stay in the config, or a resumed run might measure something else."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    words = ["engine.cohort_size=auto", "engine.attention=auto"]
    go(tmp_path / "run", *words, shared=None)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["engine"]["attention"] in ("sdpa", "eager")
    assert config["engine"]["cohort_size"] in (1, 2, 4)
    assert "auto" not in [config["engine"][k] for k in ENGINE]
    assert read_run(tmp_path / "run")["overrides"][-2:] == words


def test_the_report_shows_the_run(folder):
    page = (folder / "report.html").read_text()
    for text in ("TinyEncoder", "completed", "adapter.rank", "partition"):
        assert text in page


def test_without_a_report_there_is_none(tmp_path):
    go(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "plots").exists()


def test_the_folder_is_that_of_hydra_run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run([*ENCODER, "hydra.run.dir=here/there"], shared=SHARED, quiet=True)
    assert done.folder.resolve() == tmp_path / "here" / "there"
    assert done.run == json.loads((tmp_path / "here/there/run.json").read_text())


def test_without_it_the_folder_is_named_for_the_experiment_and_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run([*ENCODER, "name=mine"], shared=SHARED, quiet=True)
    assert done.folder.parts[:2] == ("outputs", "mine")
    datetime.datetime.strptime("/".join(done.folder.parts[2:]), "%Y-%m-%d/%H-%M-%S")


def test_runs_of_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch):
    """Started by a script, side by side: the second would else take the first for an unfinished run and clear it."""
    monkeypatch.chdir(tmp_path)
    compose = fl.run.compose

    def at_noon(words):
        return compose([*words, "hydra.run.dir=outputs/run/noon"])

    monkeypatch.setattr(fl.run, "compose", at_noon)
    folders = [run([*ENCODER, f"seed={seed}"], shared=SHARED, quiet=True).folder.as_posix() for seed in (0, 1, 2)]
    assert folders == ["outputs/run/noon", "outputs/run/noon-2", "outputs/run/noon-3"]
    assert [read_run(folder)["seed"] for folder in folders] == [0, 1, 2]


def test_the_preset_that_counts_is_recorded(tmp_path):
    words = ["experiment=instruct", "experiment=quickstart", *ENCODER]
    done = run(words, folder=tmp_path / "run", shared=SHARED, quiet=True)
    assert done.run["experiment"] == "quickstart"


def test_a_run_can_be_repeated_from_its_settings(tmp_path, folder):
    """run.json's flat settings are words for the command line."""
    settings = read_run(folder)["settings"]
    plain = {k: v for k, v in settings.items() if not k.endswith("_target_") and not isinstance(v, list | dict)}
    words = [f"{k}={'null' if v is None else str(v).lower() if isinstance(v, bool) else v}" for k, v in plain.items()]
    words = ["model=tiny-encoder", "data=tiny", "partition=iid", *words, "report=false"]
    run(words, folder=tmp_path / "again", shared=SHARED, quiet=True)
    assert weights(tmp_path / "again") == weights(folder)
    assert same_metrics(tmp_path / "again", folder)


def test_settings_are_refused_before_the_folder_is_made(tmp_path):
    with pytest.raises(ConfigError):
        go(tmp_path / "run", "local.lr=-1")
    assert not (tmp_path / "run").exists()


def test_a_setting_that_data_refuse_leaves_a_failed_run(tmp_path):
    with pytest.raises(ConfigError):
        go(tmp_path / "run", "clients.number=500")
    found = read_run(tmp_path / "run")
    assert found["status"] == "failed"
    assert found["error"].startswith("partition.min_size=8 is not allowed")
    assert found["final"] is None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShoalError, match="can't be made"):
        go(tmp_path / "file" / "run")


def test_a_finished_run_is_not_written_over(tmp_path):
    go(tmp_path / "run")
    before = without_wall(read_run(tmp_path / "run"))
    with pytest.raises(ShoalError, match="finished run"):
        go(tmp_path / "run", "seed=1")
    assert without_wall(read_run(tmp_path / "run")) == before
    assert final(tmp_path / "run")


def test_brackets_in_what_is_printed_are_not_markup(tmp_path):
    console = Console(record=True, width=60, force_terminal=False)
    rows = tmp_path / "[bold]rows.csv"
    rows.write_text("text,label\n" + "the soup was good,1\nthe film was bad,0\n" * 40)
    words = [*ENCODER, "data=csv", f"data.path='{rows}'", "data.max_length=16"]
    run(words, folder=tmp_path / ("deep/" * 12) / "[red]run", shared=SHARED, console=console)
    text = console.export_text()
    assert f"Loading TinyEncoder and {rows} ...\n" in text  # on one line, however long
    assert "[red]run" in text.replace("\n", "").replace(" ", "").replace("│", "")
