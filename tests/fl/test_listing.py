"""`shoal list`: groups and options from files, in order and with their defaults, without anything heavy imported."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fl import listing
from fl.errors import ConfigError, ShoalError
from fl.listing import Option, config_dir, list_groups, top_settings
from fl.setting_help import SIGNS, setting_help

FILES = {
    "config.yaml": "# all\ndefaults:\n  - zeta: two\n  - alpha: one\n  - experiment: null\n  - _self_\n"
    "seed: 3\nclients:\n  number: 10\n  per_round: null\nhydra:\n  run:\n    dir: x\n",
    "alpha/one.yaml": "# the first [of] all\n_target_: nowhere.One\nrate: 0.5\nkinds: [a, b]\noptions: {}\n",
    "alpha/three.yaml": "\n# the third\n_target_: nowhere.Three\nrate: 0.5\nkinds: [a, b]\nmore: true\n",
    "zeta/two.yaml": "# two\ndefaults:\n  - inner: deep\n\n_target_: nowhere.Two\nsteps: 5\n",
    "zeta/inner/deep.yaml": "# deep down\n_target_: nowhere.Deep\nbeta: 0.9\n",
    "zeta/inner/flat.yaml": "# flat\n_target_: nowhere.Flat\n",
    "experiment/quick.yaml": "# @package _global_\n# a quick one\ndefaults:\n  - override /alpha: three\n"
    "clients:\n  number: 4\nalpha:\n  rate: 0.1\n",
    "experiment/mute.yaml": "seed: 1\n",
    "zeta/_hidden.yaml": "# not an option\n",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def shown(group=None, as_json=False) -> str:
    console = Console(width=160, record=True, highlight=False, file=open("/dev/null", "w"))  # noqa: SIM115
    listing.show(group, as_json, console)
    return console.export_text()


def test_groups_stand_in_the_order_of_the_defaults_and_options_in_alphabetical_order(folder):
    groups = list_groups(folder)
    assert list(groups) == ["zeta", "zeta/inner", "alpha", "experiment"]
    assert [o.name for o in groups["alpha"]] == ["one", "three"]


def test_an_option_has_its_line_settings_and_class(folder):
    groups = list_groups(folder)
    assert groups["alpha"][0] == Option(
        "one", "the first [of] all", {"rate": 0.5, "kinds": ["a", "b"], "options": {}}, True, "nowhere.One"
    )
    assert groups["alpha"][1].default is False
    assert groups["zeta"][0].settings == {"inner": "deep", "steps": 5}


def test_the_default_of_a_group_within_a_group_comes_from_its_option(folder):
    assert [(o.name, o.default) for o in list_groups(folder)["zeta/inner"]] == [("deep", True), ("flat", False)]


def test_a_preset_shows_what_it_overrides(folder):
    mute, quick = list_groups(folder)["experiment"]
    assert quick.line == "a quick one"
    assert quick.settings == {"alpha": "three", "clients.number": 4, "alpha.rate": 0.1}
    assert mute.line == "" and mute.settings == {"seed": 1}


def test_top_settings_are_those_of_no_group(folder):
    assert top_settings(folder) == {"seed": 3, "clients.number": 10, "clients.per_round": None}


def test_a_file_that_is_no_yaml_is_named(folder):
    (folder / "alpha" / "bad.yaml").write_text("# bad\na: [1\n")
    with pytest.raises(ShoalError, match=r"alpha/bad\.yaml can't be read as YAML"):
        list_groups(folder)


def test_the_list_names_every_option_and_marks_defaults(folder, monkeypatch):
    monkeypatch.setattr(listing, "config_dir", lambda: folder)
    text = shown()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "* one the first [of] all" in lines  # markup in a comment stays text
    assert "three the third" in lines
    assert any(line.startswith("clients.number 10") for line in lines)
    assert "rate" not in text and "not an option" not in text


def test_a_group_is_shown_with_settings_and_what_its_options_share_once(folder, monkeypatch):
    monkeypatch.setattr(listing, "config_dir", lambda: folder)
    lines = [line.split() for line in shown("alpha").splitlines()]
    assert lines.count(["alpha.rate", "0.5"]) == 1
    assert lines.index(["each", "of", "them", "has"]) < lines.index(["alpha.rate", "0.5"])
    assert ["alpha.more", "true"] in lines and ["alpha.options", "{}"] in lines
    assert ["zeta"] not in [line[:1] for line in lines]
    inner = shown("zeta")
    assert "zeta.inner.beta" in inner and "zeta.inner  " in inner


def test_a_section_without_a_group_can_be_listed(folder, monkeypatch):
    monkeypatch.setattr(listing, "config_dir", lambda: folder)
    text = shown("clients")
    assert "clients.per_round" in text and "seed" not in text


def test_an_unknown_group_is_refused_with_the_groups(folder, monkeypatch):
    monkeypatch.setattr(listing, "config_dir", lambda: folder)
    with pytest.raises(ConfigError, match=r"group='alfa'.*zeta, zeta/inner, alpha.*Did you mean alpha\?") as caught:
        listing.show("alfa")
    assert caught.value.exit_code == 2


def test_json_for_scripts(folder, monkeypatch, capsys):
    monkeypatch.setattr(listing, "config_dir", lambda: folder)
    listing.show(as_json=True)
    table = json.loads(capsys.readouterr().out)
    assert table["settings"] == {"seed": 3, "clients.number": 10, "clients.per_round": None}
    assert table["groups"]["zeta/inner"][0] == {
        "name": "deep", "line": "deep down", "default": True, "settings": {"beta": 0.9},
    }  # fmt: skip
    listing.show("alpha", as_json=True)
    assert list(json.loads(capsys.readouterr().out)["groups"]) == ["alpha"]


def options() -> list[tuple[str, Option]]:
    return [(group, option) for group, some in list_groups(config_dir()).items() for option in some]


def test_every_option_of_shoal_has_a_line():
    found = options()
    assert {"model", "data", "partition", "adapter", "local", "experiment"} <= {group for group, _ in found}
    assert [f"{group}/{option.name}" for group, option in found if not option.line] == []


@pytest.mark.parametrize("target", sorted({option.target for _, option in options() if option.target}))
def test_help_read_from_source_is_the_help_of_the_class(target):
    module, _, name = target.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    found = setting_help(target)
    for field in dataclasses.fields(cls):
        if not field.init or not field.metadata:
            continue
        text = found[field.name]
        assert text.startswith(field.metadata["help"])
        for key, sign in SIGNS.items():
            if field.metadata[key] is not None:
                assert f"{sign} {field.metadata[key]:g}" in text


def test_help_follows_nested_settings_and_forgives_what_it_can_not_find():
    found = setting_help("fl.experiment.Settings")
    assert found["seed"] == "every random draw comes from it (>= 0)"
    assert found["clients.number"].endswith("(>= 1)")
    assert setting_help("no.such.Class") == setting_help("fl.config.NoSuch") == setting_help("") == {}


def test_nothing_heavy_is_imported():
    code = """
import sys
from fl.listing import show
show(); show("partition"); show(as_json=True)
heavy = {"torch", "transformers", "flwr", "peft", "matplotlib", "numpy", "hydra", "clients", "aggregators"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_group_may_be_asked_for_in_the_plural(capsys):
    listing.show("aggregators", as_json=True)
    plural = capsys.readouterr().out
    listing.show("aggregator", as_json=True)
    assert plural == capsys.readouterr().out
    with pytest.raises(ConfigError, match="aggregatorss"):
        listing.show("aggregatorss")
