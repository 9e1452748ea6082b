"""From the words on the command line to settings: Hydra composes, errors become one line each.

A list of values (``seed=0,1,2``) is a sweep, as in Hydra's multirun; `expand` makes one list of overrides a job.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl.errors import ConfigError

RUN_DIR, SWEEP_DIR = "hydra.run.dir", "hydra.sweep.dir"


def compose(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The resolved configuration as plain nested values, and Hydra's folders (`RUN_DIR`, `SWEEP_DIR`).

    Raises `ConfigError` for an unknown group, option or key, and for a value that can't be parsed.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("configs", version_base="1.3"):
            full = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
            full.hydra.job.num = 0
            folders = {RUN_DIR: Path(str(full.hydra.run.dir)), SWEEP_DIR: Path(str(full.hydra.sweep.dir))}
            OmegaConf.set_struct(full, False)
            full.pop("hydra")
            full.pop("experiment", None)
            resolved = OmegaConf.to_container(full, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}, folders


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's message as a `ConfigError` that names the key, the value and what is allowed."""
    text = str(error)
    values = dict(o.lstrip("+~").split("=", 1) for o in overrides if "=" in o)
    found = re.search(r"Could not find '([\w/.-]+)'", text) or re.search(r"In '[^']*': Could not find '([^']+)'", text)
    if found:
        group, _, option = found.group(1).rpartition("/")
        options = re.search(r"Available options in '[^']*':\n((?:\s+\S+\n?)+)", text)
        allowed = "one of " + ", ".join(options.group(1).split()) if options else "an option of the group"
        return ConfigError(group or option, option, allowed, f"See `shoal list {group}`.")
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if found:
        key = found.group(1)
        return ConfigError(key, values.get(key), "there is no such setting", "See `shoal list` and `shoal list GROUP`.")
    found = re.search(r"You must specify '([^']+)'|Could not find|No match in the defaults list.*?'([^']+)'", text)
    if found and (found.group(1) or found.group(2)):
        key = found.group(1) or found.group(2)
        return ConfigError(key, values.get(key), "there is no such group", "See `shoal list`.")
    first = " ".join(text.split())
    return ConfigError("overrides", list(overrides), first[:300], "Write settings as key=value.")


def expand(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[list[str]]]:
    """The axes of a sweep (key -> values as text, in order) and the overrides of each of its jobs (their product).

    Lists (``a=1,2``), ``range(...)`` and ``choice(...)`` are Hydra's. Without any, there is one job.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise explain(error, overrides) from error
    axes: dict[str, list[str]] = {}
    choices: list[list[str]] = []
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            values = list(override.sweep_string_iterator())
            axes[key] = [str(v) for v in values]
            choices.append([f"{key}={v}" for v in values])
        else:
            choices.append([str(override.input_line)])
    return axes, [list(job) for job in itertools.product(*choices)]


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
