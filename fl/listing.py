"""What there is to choose: ``shoal list [GROUP] [--json]``.

Each option is a file ``configs/<group>/<name>.yaml``, whose first comment says in one line what it is. Nothing heavy is
imported: options are read as YAML and the meaning of their settings from source, so the answer takes a fraction of a
second.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fl.errors import ConfigError, ShoalError
from fl.setting_help import setting_help

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PRIMARY = "config.yaml"
SETTINGS_CLASS = "fl.experiment.Settings"
Row = tuple[str, str, str]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Option:
    """One choice of a group: its name, one line on it, its settings (dotted key -> default), and its class."""

    name: str
    line: str
    settings: dict[str, Any] = field(default_factory=dict)
    default: bool = False
    target: str | None = None


def config_dir() -> Path:
    """The folder of the ``configs`` package, found without importing it. Raises `ShoalError` if it is not installed."""
    spec = importlib.util.find_spec("configs")
    if spec is None or not spec.submodule_search_locations:
        raise ShoalError("The package `configs` is not installed. Install Shoal with `pip install -e .`.")
    return Path(next(iter(spec.submodule_search_locations)))


def list_groups(config_dir: Path | str) -> dict[str, list[Option]]:
    """Every group with its options; groups in the order of config.yaml, those that it does not name last.

    A folder in a group's folder is a group of its own (``local/optimizer``). Raises `ShoalError` if a file is no YAML.
    """
    root = Path(config_dir)
    chosen = _defaults(_read(root / PRIMARY))
    order = list(chosen)
    for group, name in list(chosen.items()):
        inner = _defaults(_read(root / group / f"{name}.yaml")) if name else {}
        chosen |= {f"{group}/{key}": value for key, value in inner.items()}
    found: dict[str, list[Option]] = {}
    for path in sorted(root.rglob("*.yaml")):
        group = path.parent.relative_to(root).as_posix()
        if group != "." and not any(part.startswith((".", "_")) for part in path.relative_to(root).parts):
            found.setdefault(group, []).append(_option(path, chosen.get(group)))

    def rank(group: str) -> tuple[int, str]:
        top = group.partition("/")[0]
        return (order.index(top) if top in order else len(order), group)

    return {group: found[group] for group in sorted(found, key=rank)}


def top_settings(config_dir: Path | str) -> dict[str, Any]:
    """The settings that belong to no group (``seed``, ``clients.number`` ...): dotted key -> default."""
    content = _read(Path(config_dir) / PRIMARY)
    return _flat({k: v for k, v in content.items() if k not in ("defaults", "hydra")})


def show(group: str | None = None, as_json: bool = False, console: Console | None = None) -> None:
    """Print all groups, or one with its settings, for people or as JSON. Raises `ConfigError` if there is none such."""
    folder = config_dir()
    groups, top = list_groups(folder), top_settings(folder)
    if group is not None:
        groups, top = _only(group, groups, top)
    if as_json:
        sys.stdout.write(as_text(groups, top) + "\n")
        return
    if console is None:
        from rich.console import Console as RichConsole

        console = RichConsole(highlight=False)
        if not console.is_terminal:
            console.width = 200  # one option a line, for grep
    console.print(render(groups, top, detailed=group is not None))


def as_text(groups: Mapping[str, list[Option]], top: Mapping[str, Any]) -> str:
    """JSON: ``{"groups": {group: [{"name", "line", "default", "settings"}]}, "settings": {key: default}}``."""
    table = {
        group: [{"name": o.name, "line": o.line, "default": o.default, "settings": o.settings} for o in options]
        for group, options in groups.items()
    }
    return json.dumps({"groups": table, "settings": dict(top)}, indent=2, default=str)


def render(groups: Mapping[str, list[Option]], top: Mapping[str, Any], detailed: bool = False) -> RenderableType:
    """Groups with a line on each option, for a terminal; ``detailed`` adds every setting, default and meaning."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    widest = max((len(o.name) for options in groups.values() for o in options), default=8)
    for group, options in groups.items():
        example = next((o.name for o in options if o.default), options[0].name)
        shared = _shared(group, options) if detailed else []
        parts.append(Text.assemble((group, "bold cyan"), (f"   choose with {group}={example}", "dim")))
        for option in options:
            table = Table.grid(padding=(0, 2))
            table.add_column(min_width=widest + 2, no_wrap=True)
            table.add_column()
            mark = "* " if option.default else "  "
            table.add_row(Text(mark + option.name, style="bold" if option.default else ""), Text(option.line))
            parts.append(table)
            rows = [row for row in _rows(group, option) if row not in shared] if detailed else []
            if rows:
                parts.append(_grid(rows, indent=4))
        if shared:
            parts.append(Text("  each of them has", style="dim"))
            parts.append(_grid(shared, indent=4))
        parts.append(Text(""))
    if top:
        meaning = setting_help(SETTINGS_CLASS)
        parts.append(Text.assemble(("settings of no group", "bold cyan"), ("   set with KEY=VALUE", "dim")))
        parts.append(_grid([(key, show_value(value), meaning.get(key, "")) for key, value in top.items()]))
        parts.append(Text(""))
    hints = ["* is the default."] if any(o.default for options in groups.values() for o in options) else []
    if not detailed:
        hints.append("`shoal list GROUP` shows a group's settings.")
    parts.append(Text(" ".join(hints), style="dim"))
    return Group(*parts)


def show_value(value: Any) -> str:
    """A default as one would write it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list | dict) else str(value).replace("\n", "\\n")


def _rows(group: str, option: Option) -> list[Row]:
    """(key, default, meaning) of each setting of an option."""
    meaning = setting_help(option.target) if option.target else {}
    prefix = "" if group == "experiment" else group.replace("/", ".") + "."
    return [(prefix + k, show_value(v), meaning.get(k, "")) for k, v in option.settings.items()]


def _shared(group: str, options: list[Option]) -> list[Row]:
    """The settings that all options have alike, to be said once; none where that would save little."""
    first, *rest = [_rows(group, option) for option in options]
    alike = [row for row in first if all(row in rows for rows in rest)]
    return alike if rest and len(alike) > 1 else []


def _grid(rows: list[Row], indent: int = 2) -> RenderableType:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=24, no_wrap=True)
    table.add_column(min_width=10, overflow="fold")
    table.add_column()
    for key, value, meaning in rows:
        table.add_row(Text(key), Text(value, style="green"), Text(meaning, style="dim"))
    return Padding(table, (0, 0, 0, indent), expand=False)


def _only(
    group: str, groups: Mapping[str, list[Option]], top: Mapping[str, Any]
) -> tuple[dict[str, list[Option]], dict[str, Any]]:
    name = group.strip("/")
    if name not in groups and name.removesuffix("s") in groups:
        name = name.removesuffix("s")  # people ask for aggregators, adapters, models
    some = {k: v for k, v in groups.items() if k == name or k.startswith(name + "/")}
    settings = {k: v for k, v in top.items() if k == name or k.startswith(name + ".")}
    if not some and not settings:
        names = [*groups, *dict.fromkeys(k.partition(".")[0] for k in top)]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See `shoal list`."
        raise ConfigError("group", group, "one of " + ", ".join(names), hint)
    return some, settings


def _option(path: Path, chosen: Any) -> Option:
    content = _read(path)
    if path.parent.name == "experiment":
        content.pop("sweep", None)  # what `shoal sweep` varies; no setting of a run
    target = content.pop("_target_", None)
    settings: dict[str, Any] = {}
    if path.parent.name == "experiment":  # a preset that begins with another one's settings
        parents = [item for item in content.get("defaults") or [] if isinstance(item, str) and item != "_self_"]
        for parent in parents:
            settings |= _option(path.with_name(f"{parent}.yaml"), None).settings
    settings |= {k: v for k, v in _defaults(content).items() if v is not None}
    settings |= _flat({k: v for k, v in content.items() if k != "defaults"})
    return Option(path.stem, _first_comment(path), settings, path.stem == chosen, target)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ShoalError(f"{path} can't be read as YAML: {' '.join(str(error).split())}.") from error
    return content if isinstance(content, dict) else {}


def _defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Hydra's defaults list as group -> option (``override /model: hf`` is model -> hf)."""
    found: dict[str, Any] = {}
    for item in content.get("defaults") or []:
        if isinstance(item, dict):
            for key, value in item.items():
                found[str(key).split()[-1].partition("@")[0].strip("/")] = value
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat({k: v for k, v in value.items() if k != "_target_"}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _first_comment(path: Path) -> str:
    """The first comment that is no directive of Hydra's (``# @package ...``)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            break
        text = text.lstrip("#").strip()
        if text and not text.startswith("@"):
            return text
    return ""
