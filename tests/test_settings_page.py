"""docs/settings.md and the commands of all pages: what they say of settings is what the code does."""

import re
import shlex
from pathlib import Path

import pytest

from fl.compose import compose, flat
from fl.config import build
from fl.errors import ConfigError, RunStopped, ShoalError
from fl.experiment import Settings
from fl.listing import config_dir, list_groups, show_value, top_settings
from fl.setting_help import setting_help
from fl.variants import plan

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "settings.md").read_text()
ROWS = re.findall(r"^\| `([\w.]+)` \| (\S+) \| (.+) \|$", PAGE, re.MULTILINE)
# What a user relies on under these names.
RELIED_ON = [
    "seed", "clients.number", "clients.per_round", "schedule.rounds", "local.steps", "local.epochs", "local.lr",
    "local.batch_size", "adapter.rank", "partition.alpha", "model", "data", "engine", "engine.cohort_size",
    "engine.device", "privacy.epsilon",
]  # fmt: skip


def rows() -> dict[str, str]:
    """The row of every setting and group with its default option, as the code has it."""
    out = {}
    for group, options in list_groups(config_dir()).items():
        option = next((o for o in options if o.default), None)
        if option is None or group == "experiment":
            continue
        out[group] = f"| `{group}` | {option.name} | `shoal list {group}` |"
        for key, value in option.settings.items():
            meaning = setting_help(option.target or "").get(key, "")
            out[f"{group}.{key}"] = f"| `{group}.{key}` | {show_value(value)} | {meaning} |"
    meanings = setting_help("fl.experiment.Settings")
    for key, value in top_settings(config_dir()).items():
        out[key] = f"| `{key}` | {show_value(value)} | {meanings[key]} |"
    return out


def test_every_row_is_what_the_code_says():
    expected = rows()
    for key, default, meaning in ROWS:
        assert f"| `{key}` | {default} | {meaning} |" == expected[key]
    assert len(ROWS) > 30


def test_the_page_has_what_users_rely_on():
    assert set(RELIED_ON) <= {key for key, _, _ in ROWS}
    for words in ("hydra.run.dir=DIR", "hydra.sweep.dir=DIR", "--resume", "SHOAL_CACHE"):
        assert words in PAGE


def test_the_defaults_are_those_of_a_run_without_words():
    settings = flat(compose([])[0])
    for key, default, _ in ROWS:
        if key in settings:
            assert show_value(settings[key]) == default


def test_exit_codes_are_listed():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert codes == {0, ShoalError.exit_code, ConfigError.exit_code, RunStopped.exit_code, 130}


def test_the_example_of_a_refusal_is_real():
    (shown,) = re.findall(r"^    shoal: (.+) \.\.\. (.+)$", PAGE, re.MULTILINE)
    with pytest.raises(ConfigError) as raised:
        Settings.of(compose(["local.lrr=1"])[0])
    assert str(raised.value).startswith(shown[0])
    assert str(raised.value).endswith(shown[1])


def commands() -> list[tuple[str, str]]:
    """(page, command) for each `shoal run` and `shoal sweep` with settings in the README and the docs."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in re.findall(r"(?:^|`)\s*((?:\S*/)?shoal (?:run|sweep) [^`\n]*)", page.read_text(), re.MULTILINE):
            found.append((page.relative_to(ROOT).as_posix(), line.strip()))
    return found


COMMANDS = commands()
DEVICES = "client,seconds_per_step,latency_s,down_mbps,up_mbps\n" + "".join(f"{c},1,0,1,1\n" for c in range(100))


EDGES = "".join(f"{i} {(i + 1) % 10}\n" for i in range(10))


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c}" for p, c in COMMANDS])
def test_commands_of_the_docs_are_accepted(page, command, tmp_path, monkeypatch):
    if "--resume" in command or "key=value" in command or "..." in command:
        pytest.skip("it has no settings of its own")
    monkeypatch.chdir(tmp_path)
    words = [w for w in shlex.split(command, comments=True) if "=" in w]
    for word in words:  # files that are the reader's
        key, _, value = word.partition("=")
        if key.endswith("path"):
            Path(value).write_text(EDGES if key.startswith("topology") else DEVICES)
    jobs = [job.words for job in plan(words).jobs] if "shoal sweep" in command else [words]
    for job in jobs[:: max(1, len(jobs) // 12)]:  # of a large sweep some: composing takes time
        build(compose(job)[0], "", Settings)


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 8
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/settings.md"}
