"""From the words on the command line to settings: Hydra composes, errors become one line each.

A list of values (``seed=0,1,2``) is a sweep, as in Hydra's multirun; `expand` makes one list of overrides a job.
A preset may hold a section ``sweep:``, which says what `shoal sweep` varies and is no setting of a run: `compose`
leaves it out, `sweep_section` reads it.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fl.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

SECTION = "sweep"
RUN_DIR, SWEEP_DIR = "hydra.run.dir", "hydra.sweep.dir"


def compose(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The resolved configuration as plain nested values, and Hydra's folders (`RUN_DIR`, `SWEEP_DIR`).

    Raises `ConfigError` for an unknown group or option, for a value that can't be parsed and for a list of values.
    An unknown key comes through: `fl.experiment.Settings.of` refuses it, and knows what there is.
    """
    from omegaconf import OmegaConf

    with _composed(overrides) as (full, parsed):
        full.hydra.job.num = 0
        folders = {RUN_DIR: Path(str(full.hydra.run.dir)), SWEEP_DIR: Path(str(full.hydra.sweep.dir))}
        OmegaConf.set_struct(full, False)
        full.pop("hydra")
        full.pop("experiment", None)
        if not any(_is_of_section(override) for override in parsed):  # what was typed is refused as no setting
            full.pop(SECTION, None)
        resolved = OmegaConf.to_container(full, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    settings = {str(k): v for k, v in resolved.items()}
    given = {str(o.key_or_group): o.value() for o in parsed if not o.is_delete()}
    _drop_foreign(settings, given)
    _suit_engine(settings, given)
    return settings, folders


def sweep_section(overrides: Sequence[str]) -> Any:
    """The section ``sweep:`` of the preset that the words choose, with their ``sweep.KEY=VALUE``; None without one.

    Of the words only these, the preset and where to look for it (hydra.searchpath) count. Raises `ConfigError` as
    `compose` does.
    """
    from omegaconf import OmegaConf

    chosen = ("experiment", "hydra.searchpath")
    parsed = [o for o in _parse(overrides) if o.key_or_group in chosen or _is_of_section(o)]
    with _composed([str(o.input_line) for o in parsed]) as (full, _):
        found = full.get(SECTION)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def _is_of_section(override: Override) -> bool:
    return str(override.key_or_group).partition(".")[0] == SECTION


@contextlib.contextmanager
def _composed(overrides: Sequence[str]) -> Iterator[tuple[DictConfig, list[Override]]]:
    """What Hydra composes, nothing resolved yet, and the words as read; what goes wrong inside is a `ConfigError`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    parsed = _parse(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("configs", version_base="1.3"):
            groups = set(GlobalHydra.instance().config_loader().list_groups(""))
            words = [_checked(override, groups) for override in parsed]
            yield hydra_compose("config", overrides=words, return_hydra_config=True), parsed
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of the words, each by itself, so that the one that can't be read is named."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), []
    for word in map(_spelt, overrides):
        key, sign, value = word.partition("=")
        try:
            (override,) = parser.parse_overrides([word])
        except HydraException as error:
            reason = str(error).partition("\nSee https")[0].splitlines()[-1].partition(" expecting {")[0]
            allowed = f"it can't be read ({reason})" if sign else "settings are written key=value"
            way_out = f"""Quote what has spaces, commas, brackets or = in it: '{key}="..."'.""" if sign else ""
            raise ConfigError(key, value if sign else None, allowed, way_out) from error
        if not override.key_or_group:
            raise ConfigError(word, value, "settings are written key=value")
        parsed.append(override)
    return parsed


def _spelt(word: str) -> str:
    """The word in Hydra's spelling: ``aggregator.staleness=hinge`` chooses an option of a group within a group, as
    ``aggregator/staleness=hinge`` does."""
    from fl.listing import config_dir

    key, sign, value = word.partition("=")
    path = key.lstrip("+~").replace(".", "/")
    named = re.fullmatch(r"[\w-]+(,[\w-]+)*", value) is not None and value != "null"
    if sign and named and re.fullmatch(r"\w+(/\w+)+", path) and (config_dir() / path).is_dir():
        return f"{key.replace('.', '/')}={value}"
    return word


def _checked(override: Override, groups: set[str]) -> str:
    """The word for Hydra. A plain setting becomes ``++key=value``, which can also fill a mapping (adapter.options)."""
    key = override.key_or_group
    word = str(override.input_line)
    if override.is_sweep_override():
        value = word.partition("=")[2]
        raise ConfigError(key, value, "a run has one value for each setting", "Use `shoal sweep` for lists.")
    if override.is_delete() or key.partition(".")[0] == "hydra":
        return word
    if key in groups or "/" in key:
        if key in groups and not isinstance(override.value(), str):
            raise ConfigError(key, override.value(), "expected the name of an option", f"See `shoal list {key}`.")
        return word
    return "++" + word if not override.is_add() and not override.is_force_add() and not override.package else word


def _drop_foreign(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Delete what a preset sets for an option that was replaced on the command line, where the new one has no such key.

    ``experiment=quickstart partition=iid`` is not to be refused for the preset's ``partition.alpha``. ``given`` is what
    the command line holds; nothing of it is deleted.
    """
    from fl.listing import config_dir, list_groups

    if "experiment" not in given or len(given) == 1:
        return
    options = {group: {o.name: o.settings for o in found} for group, found in list_groups(config_dir()).items()}
    preset = options["experiment"].get(given["experiment"], {})
    for group, name in given.items():
        if group == "experiment" or not isinstance(name, str) or name not in options.get(group, {}):
            continue
        prefix = group.replace("/", ".") + "."
        known = _known(group, name, options, given)
        for key in [key.removeprefix(prefix) for key in preset if key.startswith(prefix)]:
            first = key.partition(".")[0]
            if key in known or (first in known and first not in nested(group, options)):
                continue
            name_of = f"{prefix}{key}."
            if not any(f"{g}.".startswith(name_of) or name_of.startswith(f"{g}.") for g in given if "." in g):
                _pop(settings, [*group.split("/"), *key.split(".")])


def _suit_engine(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Where clients train apart, put what that asks for in the place of what a preset, and nobody else, says.

    On hosts time is real (``network=wall_clock``). Clients keep what the newest round needs (``checkpoint_every=1``).
    """
    engine = settings.get("engine")
    target = engine.get("_target_") if isinstance(engine, dict) else None
    if target in ("fl.engine.settings.SuperLink", "fl.engine.settings.Ray") and "checkpoint_every" not in given:
        settings["checkpoint_every"] = 1
    if target != "fl.engine.settings.SuperLink" or "network" in given:
        return
    from fl.listing import config_dir

    own = yaml.safe_load((config_dir() / "network" / "wall_clock.yaml").read_text(encoding="utf-8"))
    typed = {key.removeprefix("network."): value for key, value in given.items() if key.startswith("network.")}
    settings["network"] = {**own, **typed}


def nested(group: str, options: Mapping[str, Any]) -> set[str]:
    """The settings of ``group`` that are groups themselves (``init`` of adapter)."""
    return {g.removeprefix(f"{group}/") for g in options if g.startswith(f"{group}/")}


def _known(group: str, name: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """The dotted settings of the option ``name``, with those of the options that it chooses itself."""
    known = set(options[group][name])
    for inner in nested(group, options):
        choice = given.get(f"{group}/{inner}", options[group][name].get(inner))
        known |= {f"{inner}.{key}" for key in options[f"{group}/{inner}"].get(choice, {})}
    return known


def _pop(place: dict[str, Any], path: Sequence[str]) -> None:
    for part in path[:-1]:
        place = place.get(part, {})
    place.pop(path[-1], None)


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's message as a `ConfigError` that names the key, the value and what is allowed."""
    text = str(error)
    values = dict(o.lstrip("+~").split("=", 1) for o in overrides if "=" in o)

    def found(pattern: str) -> str | None:
        match = re.search(pattern, text)
        return match.group(1) if match else None

    if option := found(r"Could not (?:find|load) '([^']+)'"):
        group, _, name = option.rpartition("/")
        listed = found(r"Available options in '[^']*':\n((?:\s+\S+\n?)+?)(?:Config search|$)")
        options = listed.split() if listed else []
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        way_out = (f"Did you mean {near[0]}? " if near else "") + f"See `shoal list {group}`."
        allowed = "one of " + ", ".join(options) if options else "an option of the group"
        return ConfigError(group or name, name, allowed, way_out)
    if key := found(r"Could not append to config\. An item is already at '([^']+)'"):
        return ConfigError(f"+{key}", values.get(key), "there is such a setting already", f"Write {key}=VALUE.")
    if key := found(r"Multiple values for (\S+?)\.? "):
        return ConfigError(f"+{key}", values.get(key), "the group has an option already", f"Write {key}=NAME.")
    if key := found(r"Could not delete[^']*'([^']+)'"):
        return ConfigError(f"~{key}", values.get(key), "there is nothing to delete", "See `shoal list`.")
    if key := found(r"Error merging override \+*([^=]+)="):
        return ConfigError(key, values.get(key), "a value of another kind is there", f"See `shoal list {key}`.")
    if key := found(r"Could not override '([^']+)'") or found(r"Key '([^']+)' is not in struct"):
        what = "group" if "/" in key or "@" in key else "setting"
        return ConfigError(key, values.get(key), f"there is no such {what}", "See `shoal list` and `shoal list GROUP`.")
    first = " ".join(text.partition("full_key:")[0].split())[:300]
    # What is left is about values that refer to others: ${key}, or ??? for none.
    shown = next((k for k, v in values.items() if "${" in v or v == "???"), "overrides")
    return ConfigError(shown, values.get(shown, list(overrides)), first, "Write settings as key=value.")


def expand(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[list[str]]]:
    """The axes of a sweep (key -> values as text, in order) and the overrides of each of its jobs (their product).

    Lists (``a=1,2``), ``range(...)`` and ``choice(...)`` are Hydra's. Without any, there is one job.
    """
    axes: dict[str, list[str]] = {}
    choices: list[list[str]] = []
    for key, values, words in alternatives(overrides):
        if values is not None:
            if key in axes:
                raise ConfigError(key, ",".join(values), "one list for each setting", "Join the two lists.")
            axes[key] = values
        choices.append(words)
    return axes, [list(job) for job in itertools.product(*choices)]


def alternatives(overrides: Sequence[str]) -> list[tuple[str, list[str] | None, list[str]]]:
    """Of each word its key, the values of its list (None where it is none), and the words of single runs it stands for.

    ``+a=1,2`` is ``("a", ["1", "2"], ["+a=1", "+a=2"])``, ``b=3`` is ``("b", None, ["b=3"])``. Raises `ConfigError`.
    """
    from hydra.errors import HydraException

    found: list[tuple[str, list[str] | None, list[str]]] = []
    for override in _parse(overrides):
        word, key = str(override.input_line), override.get_key_element()
        if not override.is_sweep_override():
            found.append((key.lstrip("+~"), None, [word]))
            continue
        try:
            values = [str(v) for v in override.sweep_string_iterator()]
        except HydraException as error:
            key, _, value = word.partition("=")
            raise ConfigError(key, value, "a list (a,b), range(...) or choice(...) to sweep over") from error
        found.append((key.lstrip("+"), values, [f"{key}={v}" for v in values]))
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flat(value, name + ".")
        else:
            out[name] = value
    return out
