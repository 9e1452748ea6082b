"""Settings: each configurable part is a frozen dataclass whose fields are checked once, when it is built.

A group's YAML file names the class in ``_target_`` and gives its settings; `build` turns that mapping into the
object and refuses, with the full key's name, a setting that is unknown, of the wrong type or out of its range::

    @dataclass(frozen=True)
    class Dirichlet(Partition):
        alpha: float = setting(0.5, gt=0, help="concentration; small is skewed")

    build({"_target_": "clients.data.partition.Dirichlet", "alpha": 0.1}, "partition")
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from fl.errors import ConfigError

_MISSING = dataclasses.MISSING


def setting(
    default: Any = _MISSING,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Sequence[Any] | None = None,
    help: str = "",
) -> Any:
    """A dataclass field with its allowed range: ``gt``/``ge``/``lt``/``le`` bounds or a list of ``choices``."""
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le, "choices": choices, "help": help}
    if isinstance(default, list | dict | set):
        value = default
        return dataclasses.field(default_factory=lambda: type(value)(value), metadata=bounds)
    return dataclasses.field(default=default, metadata=bounds)


def build(values: Mapping[str, Any] | Any, path: str, base: type | None = None) -> Any:
    """Build the object that ``values['_target_']`` (or else ``base``) names, with its settings checked.

    ``path`` is the dotted key of the mapping, used in messages. Raises `ConfigError`.
    """
    group = path.replace(".", "/")
    if not isinstance(values, Mapping):
        inside = [f.name for f in dataclasses.fields(base) if f.init] if base is not None else []
        allowed = "it stands for several settings" + (f": {', '.join(inside)}" if inside else "")
        example = f"Set {path}.{inside[0]}=VALUE" if inside else f"Choose one with {group}=NAME"
        raise ConfigError(path, values, allowed, f"{example}; see `shoal list {group}`.")
    values = dict(values)
    target = values.pop("_target_", None)
    cls = _resolve(target, path) if target is not None else base
    if cls is None:
        raise ConfigError(path, values, "a group with a _target_", f"See `shoal list {group}`.")
    if base is not None and not issubclass(cls, base):
        raise ConfigError(f"{path}._target_", target, f"a subclass of {base.__module__}.{base.__qualname__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key, value in values.items():
        if key not in fields:
            name = f"{path}.{key}" if path else key
            while isinstance(value, Mapping) and len(value) == 1:  # what was typed: new.key=1, not new={key: 1}
                name, value = f"{name}.{next(iter(value))}", next(iter(value.values()))
            allowed = f"no such setting; {path or 'the experiment'} has {', '.join(sorted(fields)) or 'none'}"
            raise ConfigError(name, value, allowed, _closest(key, fields) or f"See `{f'shoal list {group}'.strip()}`.")
    checked = {}
    for name, field in fields.items():
        key = f"{path}.{name}" if path else name
        if name in values:
            checked[name] = check(values[name], hints[name], field.metadata, key)
        elif field.default is _MISSING and field.default_factory is _MISSING:
            raise ConfigError(key, None, "a value is needed", f"Give one with {key}=VALUE.")
    return cls(**checked)


def _closest(key: str, names: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(names), n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _resolve(target: str, path: str) -> type:
    module, _, name = str(target).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}._target_", target, f"an importable class ({error})") from error
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{path}._target_", target, "a dataclass")
    return typing.cast(type, cls)


def check(value: Any, hint: Any, bounds: Mapping[str, Any], key: str) -> Any:
    """``value`` converted to the type ``hint`` and checked against ``bounds``; raises `ConfigError` naming ``key``."""
    if dataclasses.is_dataclass(value) and isinstance(hint, type) and isinstance(value, hint):
        return value
    if dataclasses.is_dataclass(hint) or (isinstance(value, Mapping) and "_target_" in value):
        return build(value, key, typing.cast(type, hint) if dataclasses.is_dataclass(hint) else None)
    converted = _convert(value, hint, key)
    _check_bounds(converted, bounds, key)
    return converted


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return _convert(value, option, key)
            except ConfigError:
                continue
        raise ConfigError(key, value, f"expected {_name(hint)}")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(key, value, f"one of {', '.join(map(str, args))}")
    if origin in (list, tuple):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise ConfigError(key, value, f"expected {_name(hint)}", f"Write {key}=[a,b].")
        return origin(_convert(v, args[0] if args else Any, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(key, value, "expected a mapping")
        return {str(k): _convert(v, args[1] if args else Any, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(value, key, typing.cast(type, hint))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(key, value, f"expected {_name(hint)}")


def _check_bounds(value: Any, bounds: Mapping[str, Any], key: str) -> None:
    if value is None:
        return
    choices = bounds.get("choices")
    if choices is not None and value not in choices:
        raise ConfigError(key, value, f"one of {', '.join(map(str, choices))}", _closest(str(value), map(str, choices)))
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    wanted = [f"{sign} {bounds[name]}" for name, sign in _SIGNS.items() if bounds.get(name) is not None]
    if not math.isfinite(value) or not all(
        _HOLDS[name](value, bounds[name]) for name in _SIGNS if bounds.get(name) is not None
    ):
        raise ConfigError(key, value, "a number " + (" and ".join(wanted) or "that is finite"))


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_HOLDS: dict[str, Any] = {
    "gt": lambda v, b: v > b,
    "ge": lambda v, b: v >= b,
    "lt": lambda v, b: v < b,
    "le": lambda v, b: v <= b,
}


def _name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(
            hint.__name__, hint.__name__
        )
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _name(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        args = typing.get_args(hint)
        many = {int: "whole numbers", float: "numbers", str: "words"}
        return f"a list of {many.get(args[0], _name(args[0]))}" if args else "a list"
    return str(hint)
