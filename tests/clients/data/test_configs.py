"""Every choice of the groups model, data and partition: it builds, and all its settings are in its file."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import configs
from fl.config import build
from fl.errors import ConfigError

ROOT = Path(configs.__file__).parent
FILES = [p for group in ("model", "data", "partition") for p in sorted((ROOT / group).glob("*.yaml"))]
NEEDS = {"model/hf": "name", "data/hf": "name", "data/csv": "path", "data/jsonl": "path", "data/parquet": "path"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_choice_builds_with_every_setting_in_its_file(path, tmp_path):
    text = path.read_text()
    assert text.startswith("# ") and text.splitlines()[1].startswith("_target_: ")
    values, group = yaml.safe_load(text), path.parent.name
    needed = NEEDS.get(f"{group}/{path.stem}")
    if needed:
        with pytest.raises(ConfigError, match=f"{group}.{needed}"):
            build(values, group)
        (tmp_path / "file").write_text("")
        values[needed] = str(tmp_path / "file")
    found = build(values, group)
    assert {f.name for f in dataclasses.fields(found)} == set(values) - {"_target_"}
    assert all(f.metadata.get("help") for f in dataclasses.fields(found))


def test_a_wrong_value_names_the_key():
    values = yaml.safe_load((ROOT / "partition/dirichlet.yaml").read_text())
    with pytest.raises(ConfigError, match=r"partition\.alpha=-1"):
        build({**values, "alpha": -1}, "partition")
    with pytest.raises(ConfigError, match=r"partition\.alpah.*Did you mean alpha"):
        build({**values, "alpah": 1}, "partition")
