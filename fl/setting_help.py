"""What each setting of a class means, read from the class's source, so that nothing heavy is imported.

`fl.config.setting` holds a field's help and its bounds. Importing the class would load torch for most of them; its
source is parsed instead, and base classes and re-exports are followed within the project's own packages.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def setting_help(target: str) -> dict[str, str]:
    """Help and bounds of each setting of the class ``target`` (``package.module.Class``), inherited ones too.

    A field that is itself a class of settings gives its own as ``field.name``. What can't be found is left out.
    """
    module, _, name = target.rpartition(".")
    return _class_help(module, name, 0)


def _class_help(module: str, name: str, depth: int) -> dict[str, str]:
    found = _find(module, name, 0)
    if found is None or depth > 8:
        return {}
    module, node = found
    help_texts: dict[str, str] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            help_texts.update(_class_help(module, base.id, depth + 1))
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if isinstance(item.value, ast.Call) and isinstance(item.value.func, ast.Name):
            if item.value.func.id == "setting":
                help_texts[item.target.id] = _text(item.value)
        elif item.value is None and isinstance(item.annotation, ast.Name):
            inner = _class_help(module, item.annotation.id, depth + 1)
            help_texts.update({f"{item.target.id}.{key}": text for key, text in inner.items()})
    return help_texts


def _text(call: ast.Call) -> str:
    given = {k.arg: k.value for k in call.keywords if k.arg}
    values = {}
    for key, node in given.items():
        try:
            values[key] = ast.literal_eval(node)
        except ValueError:
            continue
    bounds = " and ".join(f"{sign} {values[key]:g}" for key, sign in SIGNS.items() if values.get(key) is not None)
    text = str(values.get("help", ""))
    if values.get("choices"):
        bounds = "one of " + ", ".join(map(str, values["choices"]))
    return f"{text} ({bounds})" if text and bounds else text or bounds


def _find(module: str, name: str, depth: int) -> tuple[str, ast.ClassDef] | None:
    """The class's syntax tree and the module that it stands in, through ``from x import y`` where needed."""
    path = _path(module)
    if path is None or depth > 8:
        return None
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".")
                    kept = len(parts) - node.level + (path.name == "__init__.py")
                    origin = [*parts[:kept], node.module] if node.level else [node.module]
                    return _find(".".join(p for p in origin if p), alias.name, depth + 1)
    return None


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ast.Module([], [])


def _path(module: str) -> Path | None:
    """The file of a module, found without importing the packages it is in."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations)), *rest)
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.is_file():
            return path
    return None
