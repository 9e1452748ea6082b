"""Every file under configs/: it composes, builds, can be overridden in full, and says in a line what it is."""

from dataclasses import fields
from functools import reduce
from pathlib import Path

import pytest
import yaml

from fl.compose import compose
from fl.config import _resolve, build
from fl.experiment import Clients, Saving, Settings
from fl.listing import list_groups

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONS = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*/*.yaml"))
PRESETS = [name for name in OPTIONS if name.startswith("experiment/")]
PARTS = [name for name in OPTIONS if name not in PRESETS]
TRACE = "client,seconds_per_step,latency_s,down_mbps,up_mbps\n" + "".join(f"{c},1,0,1,1\n" for c in range(10))


def read(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def built(words: list[str]) -> Settings:
    """The settings of the words, not yet asked whether an optional library is there."""
    return build(compose(words)[0], "", Settings)


def needed(name: str, tmp_path: Path) -> list[str]:
    """Settings without which an option can't be chosen: files that only a user has."""
    if name == "network/trace":
        (tmp_path / "devices.csv").write_text(TRACE)
        return [f"network.path={tmp_path / 'devices.csv'}"]
    if name in ("data/csv", "data/jsonl", "data/parquet"):
        (tmp_path / "rows").write_text("text,label\na,b\n")
        return [f"data.path={tmp_path / 'rows'}"]
    if name == "topology/file":
        (tmp_path / "edges.txt").write_text("".join(f"{i} {(i + 1) % 10}\n" for i in range(10)))
        return ["schedule=dpsgd", f"topology.path={tmp_path / 'edges.txt'}"]
    if name.startswith("schedule/compressor/"):
        return ["schedule=choco"]
    if name.startswith("adapter/init/") and "bra" in _resolve(read(name)["_target_"], name).form:
        return ["adapter=lora_xs"]
    return {"data/hf": ["data.name=org/set"], "model/hf": ["model.name=org/model"]}.get(name, [])


def test_there_are_the_groups_that_an_experiment_has():
    groups = {name.rpartition("/")[0] for name in OPTIONS}
    parts = {f.name for f in fields(Settings)} - {"clients", "saving", "name", "seed", "checkpoint_every", "report"}
    nested = {"local/optimizer", "adapter/init", "schedule/compressor"}
    nested |= {f"aggregator/{name}" for name in ("staleness", "combine", "pre")}
    assert groups == parts | {"experiment", *nested}


@pytest.mark.parametrize("name", OPTIONS)
def test_its_first_line_says_what_it_is(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    comment = next(line for line in lines if not line.startswith("# @package"))
    assert comment.startswith("# ")
    assert 15 < len(comment) < 110
    group, _, option = name.rpartition("/")
    assert next(o for o in list_groups(CONFIGS)[group] if o.name == option).line == comment.removeprefix("# ")


@pytest.mark.parametrize("name", PARTS)
def test_its_keys_are_its_class_s_settings(name):
    """A key that is missing in the file could not be overridden, and one too many would be refused."""
    content = read(name)
    cls = _resolve(content["_target_"], name)
    chosen = {key for item in content.get("defaults", []) if isinstance(item, dict) for key in item}
    assert set(content) - {"_target_", "defaults"} | chosen == {f.name for f in fields(cls) if f.init}


@pytest.mark.parametrize("name", PARTS)
def test_every_setting_says_what_it_means(name):
    cls = _resolve(read(name)["_target_"], name)
    for field in fields(cls):
        if field.init:
            assert field.metadata.get("help"), f"{name}: {field.name} has no help"


@pytest.mark.parametrize("name", PARTS)
def test_it_can_be_chosen_and_each_of_its_settings_set_again(name, tmp_path):
    """And giving every setting its own default on the command line changes nothing."""
    group, _, option = name.rpartition("/")
    base = [f"{group}={option}", *needed(name, tmp_path)]
    settings = built(base)
    part = reduce(getattr, group.split("/"), settings)
    assert type(part) is _resolve(read(name)["_target_"], name)
    for key, value in read(name).items():
        if key not in ("_target_", "defaults", "path", "name") and not isinstance(value, list | dict):
            assert getattr(part, key) == value
    prefix = group.replace("/", ".")
    words = []
    for key, value in read(name).items():
        if key in ("_target_", "defaults") or isinstance(value, list | dict) or any(f"{key}=" in w for w in base):
            continue
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else f'"{value}"'
        words.append(
            f"{prefix}.{key}={text if not isinstance(value, int | float) or isinstance(value, bool) else value}"
        )
    assert built(base + words) == settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_and_validates(name):
    option = name.removeprefix("experiment/")
    resolved, folders = compose([f"experiment={option}"])
    settings = Settings.of(resolved)
    assert settings.name == option
    assert folders["hydra.run.dir"].parts[1] == option
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("# @package _global_\n")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_settings_can_be_overridden(name):
    option = name.removeprefix("experiment/")
    words = ["schedule.rounds=3", "local.steps=1", "seed=9", "clients.number=4", "model=tiny-decoder", "data=tiny"]
    # Workers of gradient coding hold the same samples, or it is refused.
    partition = "replicated" if option == "gradient_coding" else "iid"
    # Four clients are fewer than these name, or can withstand.
    fewer = {"monna": ["attack.clients=[3]"], "byzantine": ["aggregator.f=1"]}.get(option, [])
    words += [f"partition={partition}", "network=instant", *fewer]
    settings = Settings.of(compose([f"experiment={option}", *words])[0])
    assert (settings.schedule.rounds, settings.local.steps, settings.seed, settings.clients.number) == (3, 1, 9, 4)


def test_the_top_level_is_that_of_the_settings():
    content = read("config")
    chosen = {key for item in content["defaults"] if isinstance(item, dict) for key in item} - {"experiment"}
    assert set(content) - {"defaults", "hydra"} | chosen == {f.name for f in fields(Settings)}
    blocks = {"clients": Clients, "saving": Saving}
    for block, cls in blocks.items():
        assert set(content[block]) == {f.name for f in fields(cls)}
        assert build(content[block], block, cls) == cls()
    defaults = Settings.of(compose([])[0])
    for field in fields(Settings):
        if field.name in content and field.name not in blocks:
            assert getattr(defaults, field.name) == field.default == content[field.name]


def test_the_package_carries_every_file():
    """What an installation leaves out can't be chosen."""
    patterns = ("*.yaml", "*/*.yaml", "*/*/*.yaml")
    found = {p for pattern in patterns for p in CONFIGS.glob(pattern)}
    assert found == set(CONFIGS.rglob("*.yaml"))
    packaged = (CONFIGS.parent / "pyproject.toml").read_text()
    deepest = max(len(p.relative_to(CONFIGS).parts) for p in found)
    assert "/".join(["*"] * (deepest - 1) + ["*.yaml"]) in packaged
