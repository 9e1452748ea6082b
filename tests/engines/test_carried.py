"""Settings and notes that cross hosts: what is sent is what arrives, and what does not fit is refused by name."""

import json
from pathlib import Path

import pytest

from fl.compose import compose
from fl.engine import carried as module
from fl.engine.carried import OURS, PROTOCOL, Note, carried, carry, check_foreign, check_note, digest, version
from fl.errors import ConfigError, ShoalError
from tests.helpers import ENCODER

WORDS = ("engine=superlink", "seed=3", "data.max_train=17", "clients.per_round=null", *ENCODER)


def test_resolved_settings_arrive_as_they_are():
    resolved = compose(WORDS)[0]
    config = carry(resolved, "/runs/one", ["seed=3", "name=a b"], False)
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert carried(config) == (resolved, "/runs/one", ["seed=3", "name=a b"])
    assert digest(carried(config)[0]) == digest(resolved)


def test_what_is_typed_for_flwr_run_is_composed_on_both_sides():
    config = {"experiment": "fed_sb", "seed": 5, "settings": " ".join(ENCODER) + " name='a b'", "cfg": "", "folder": ""}
    resolved, folder, words = carried(config)
    assert (resolved["seed"], resolved["name"]) == (5, "a b")
    assert resolved["engine"]["_target_"] == "fl.engine.settings.SuperLink"
    assert resolved["network"]["_target_"] == "fl.network.WallClock"
    assert folder.startswith("outputs/a b/")
    assert resolved == compose(words)[0]
    assert digest(resolved) == digest(carried(config)[0])


@pytest.mark.parametrize("text", ["{", "[1]", "7"])
def test_settings_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="^cfg="):
        carried({"cfg": text})


def test_a_digest_changes_with_every_setting():
    seen = {digest(compose([*WORDS, word])[0]) for word in ("seed=4", "local.lr=0.5", "network.timeout_s=9", "name=x")}
    assert len({*seen, digest(compose(WORDS)[0])}) == 5


def test_a_note_is_for_one_run_and_one_version():
    resolved = compose(WORDS)[0]
    note = Note("ab12", digest(resolved), 3, 8, ["neg", "pos"], {"1": 4})
    plain = json.loads(json.dumps(note.plain()))
    assert check_note(plain, resolved) == note
    for change, reason in [
        ({"protocol": PROTOCOL + 1}, rf"runs Shoal .* \(messages {PROTOCOL + 1}\), this node Shoal {version()}"),
        ({"shoal": "0.0.1"}, r"runs Shoal 0\.0\.1 .* Install the same version"),
        ({"digest": "f" * 32}, "is for other settings"),
        ({"run": "../../etc"}, "names no run"),
        ({"run": None}, "names no run"),
        ({"run": "a" * 65}, "names no run"),
        ({"labels": "neg"}, "can't be read"),
        ({"answered": [1]}, "can't be read"),
        ({"nodes": "many"}, "can't be read"),
    ]:
        with pytest.raises(ShoalError, match=reason):
            check_note({**plain, **change}, resolved)
    with pytest.raises(ShoalError, match="runs Shoal None"):
        check_note({}, resolved)


def test_the_version_is_the_installed_one(monkeypatch):
    assert version()[0].isdigit()

    def missing(name):
        raise module.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(module.importlib.metadata, "version", missing)
    assert version() == "unknown"


def test_a_server_names_no_code_and_no_files_but_those_a_node_allows(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "mine.csv").write_text("text,label")
    (here / "link.csv").symlink_to(there / "mine.csv")
    monkeypatch.chdir(here)
    resolved = compose(WORDS)[0]

    def check(packages=OURS, **data):
        changed = {**resolved, "data": {**resolved["data"], **data}}
        check_foreign(changed, packages, [Path(".")])

    check()
    check(path="mine.csv")
    check(path=str(here / "mine.csv"))
    check(path=str(there / "none.csv"))
    for path in ("../there/mine.csv", str(there / "mine.csv"), "link.csv", "/", "~"):
        with pytest.raises(ConfigError, match=r"^data\.path=.*--files"):
            check(path=path)
    with pytest.raises(ConfigError, match=r"^data\.text="):
        check(text=["text", str(there / "mine.csv")])
    with pytest.raises(ConfigError, match=r"^data\._target_='os\.x'.*--allow"):
        check(_target_="os.x")
    check(_target_="mine.Data", packages=(*OURS, "mine"))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("network=lognormal",), "network"),
        (("clients.number=null", "partition=natural"), "clients.number"),
        (("checkpoint_every=5",), "checkpoint_every"),
        (("engine.address=localhost",), "engine.address"),
        (("engine.address=10.0.0.1:8000", "engine.insecure=true"), "engine.insecure"),
        (("secure_aggregation=shares",), "secure_aggregation"),
    ],
)
def test_what_hosts_cannot_carry_is_refused_before_anything_loads(words, key):
    from fl.experiment import Settings

    with pytest.raises(ConfigError) as refused:
        Settings.of(compose(["engine=superlink", *ENCODER, *words])[0])
    assert refused.value.key == key


def test_real_time_takes_the_place_of_a_preset_s_model_of_time():
    resolved = compose(["experiment=fedfix", "engine=superlink", "network.timeout_s=7"])[0]
    assert resolved["network"] == {"_target_": "fl.network.WallClock", "rejoin_s": 10.0, "timeout_s": 7}


@pytest.mark.parametrize("engine", ["ray", "superlink"])
def test_every_round_is_kept_whatever_a_preset_says(engine):
    words = ["experiment=gossip", "clients.number=4"]
    assert compose(words)[0]["checkpoint_every"] == 5
    assert compose([*words, f"engine={engine}"])[0]["checkpoint_every"] == 1
    assert compose([*words, f"engine={engine}", "checkpoint_every=5"])[0]["checkpoint_every"] == 5  # and is refused
