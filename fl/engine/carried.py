"""An experiment on its way to other hosts: its settings as one JSON string in Flower's run config, and how each message
says to which run it belongs.

A run config holds ``cfg``, the resolved settings as JSON; or, where it was typed for ``flwr run``, ``experiment``,
``seed`` and further ``settings``, from which both sides compose the same. ``folder`` is the run's, ``resume`` whether
it goes on, ``words`` what was typed.

Every message carries a note (`Note`): who made it, for which run and settings. A node refuses what does not fit.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fl.compose import RUN_DIR, compose, flat
from fl.errors import ConfigError, ShoalError

# Whose classes a node runs for a server.
OURS = ("fl", "clients", "aggregators", "privacy")
# Raised when messages, their headers or a node's state change in a way that another version would misread.
PROTOCOL = 1

Scalars = Mapping[str, bool | int | float | str]


def version() -> str:
    """The version of Shoal that is installed here."""
    try:
        return importlib.metadata.version("shoal-fl")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def carry(resolved: Mapping[str, Any], folder: str, words: Sequence[str] | None, resume: bool) -> dict[str, Any]:
    """The run config for ``resolved`` settings."""
    return {
        "cfg": json.dumps(resolved, sort_keys=True),
        "folder": folder,
        "resume": resume,
        "words": shlex.join(words or []),
    }


def carried(config: Scalars) -> tuple[dict[str, Any], str, list[str]]:
    """The resolved settings of a run config, the folder for the run, and the words that were typed.

    Raises `ConfigError`, for both ways.
    """
    text = config.get("cfg", "")
    if text:
        try:
            resolved = json.loads(str(text))
        except ValueError as error:
            raise ConfigError("cfg", str(text)[:60], f"JSON of resolved settings ({error})") from error
        if not isinstance(resolved, dict):
            raise ConfigError("cfg", str(text)[:60], "a JSON object of resolved settings")
        return resolved, str(config.get("folder", "")), shlex.split(str(config.get("words", "")))
    words = [f"{name}={config[name]}" for name in ("experiment", "seed") if config.get(name, "") != ""]
    words += ["engine=superlink", *shlex.split(str(config.get("settings", "")))]
    for word in words:  # a node composes them: they shall not read its environment or its files
        if "${" in word or word.lstrip("+~").startswith("hydra"):
            raise ConfigError("settings", word, "settings of an experiment, without references and Hydra's own")
    resolved, folders = compose(words)
    return resolved, str(config.get("folder", "")) or str(folders[RUN_DIR]), words


def digest(resolved: Mapping[str, Any]) -> str:
    """A name for ``resolved`` settings, the same on every host."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Note:
    """What every message to a node carries beside its clients' messages.

    ``run`` is the run's own name, the same after a resume; ``digest`` that of its settings; ``nodes`` how many nodes
    take part, by which they pace their polling; ``clients`` how many there are; ``labels`` the names of the labels, for
    nodes with data of their own.
    ``answered`` is how many replies of each client (as text) have been heard, under a privacy claim.
    """

    run: str
    digest: str
    nodes: int = 1
    clients: int = 0
    labels: list[str] = field(default_factory=list)
    answered: dict[str, int] = field(default_factory=dict)
    shoal: str = field(default_factory=version)
    protocol: int = PROTOCOL

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def check_note(found: Mapping[str, Any], resolved: Mapping[str, Any]) -> Note:
    """The note of a message for a run with ``resolved`` settings. Raises `ShoalError` for another version or run."""
    if found.get("protocol") != PROTOCOL or found.get("shoal") != version():
        there = f"{found.get('shoal')!s:.20} (messages {found.get('protocol')!s:.20})"
        raise ShoalError(
            f"the server runs Shoal {there}, this node Shoal {version()} (messages {PROTOCOL}). "
            "Install the same version on all hosts."
        )
    run, name = found.get("run"), found.get("digest")
    if not isinstance(run, str) or not run.isalnum() or len(run) > 64:
        raise ShoalError(f"a message names no run but {run!r:.40}")
    if name != digest(resolved):
        raise ShoalError(
            f"a message of run {run} is for other settings ({name!s:.40}) than this run's config ({digest(resolved)}). "
            "Install the same version and commit of Shoal on all hosts."
        )
    labels, answered, nodes = found.get("labels"), found.get("answered"), found.get("nodes")
    if not isinstance(labels, list) or not isinstance(answered, dict) or not isinstance(nodes, int):
        raise ShoalError(f"a message of run {run} has a note that can't be read")
    counts = {str(client): int(count) for client, count in answered.items()}
    return Note(run, name, nodes, int(found.get("clients", 0)), [str(label) for label in labels], counts)


def check_foreign(
    resolved: Mapping[str, Any],
    packages: Sequence[str],
    folders: Sequence[Path],
    unread: Collection[str] = ("engine", "tracker"),
) -> None:
    """Refuse ``resolved`` settings of somebody else that name code or files which are not theirs to use here.

    A class (``_target_``) must be of one of ``packages``, which are importable here; a text that names a file or folder
    of this machine must name one in ``folders``, and none that only its owner may read or that Shoal keeps. Settings of
    the groups ``unread`` are not looked at: nothing that they name is opened. Raises `ConfigError`.
    """
    for key, value in flat(resolved).items():
        if key.partition(".")[0] in unread and not key.endswith("_target_"):
            continue
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                continue
            if key.endswith("_target_") and text.partition(".")[0] not in packages:
                allowed = f"a class of {', '.join(packages)}: this node runs no other code for a server"
                raise ConfigError(key, text, allowed, "Start it with `shoal node --allow PACKAGE`.")
            if _exists(text) and not any(_inside(text, folder) for folder in folders):
                allowed = f"an open file in {', '.join(map(str, folders))}: this node reads no others for a server"
                raise ConfigError(key, text, allowed, "Start it with `shoal node --files FOLDER`.")


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _inside(text: str, folder: Path) -> bool:
    path = Path(text).expanduser().resolve()
    private = path.stat().st_mode & 0o077 == 0 or ".shoal" in path.parts
    return path.is_relative_to(folder.resolve()) and not private
