"""What a run writes down: its folder with config.yaml, overrides.yaml, run.json and metrics.jsonl.

Small files are replaced whole (written beside, flushed to the disk, renamed). metrics.jsonl only grows, one JSON object
a line and event; a resumed run first cuts it back to where its checkpoint was taken. The bytes of a line depend on its
values only, so two runs of one seed differ in the `WALL_FIELDS` and nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from fl import checkpoint
from fl.errors import ShoalError

# What depends on the wall clock, in metrics.jsonl and in run.json, and the run's own name; all else replays exactly.
WALL_FIELDS = frozenset(
    {"id", "wall_s", "started", "finished", "client_steps_per_s", "tokens_per_s", "peak_memory_bytes"}
)

METRICS = "metrics.jsonl"
LOCK = ".lock"
RUN = "run.json"
# What a run makes beside metrics.jsonl, and a new run in the same folder must not inherit.
_PRODUCTS = (
    METRICS,
    RUN,
    "config.yaml",
    "overrides.yaml",
    "audit.json",
    "adapter",
    "checkpoint",
    "report.html",
    "plots",
    "tensorboard",
    "mlflow",
    "wandb",
)


def fresh_folder(path: Path) -> Path:
    """Make the folder ``path``, or ``path-2``, ``path-3`` ... where it is taken: by a run started in the same second.

    Raises `ShoalError` if none can be made.
    """
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise _not_made(error) from error
    raise AssertionError("unreachable")


def _not_made(error: OSError) -> ShoalError:
    return ShoalError(f"The run's folder can't be made: {error}. Choose another hydra.run.dir.")


class RunFolder:
    """One run's folder, open for writing.

    - ``RunFolder(path)`` starts a run: makes the folder, and removes what an earlier, unfinished run left in it. It
      refuses a folder with a finished run or with a checkpoint, unless ``overwrite``.
    - ``RunFolder(path, resume=True)`` goes on with the run that is there.

    One process at a time has a folder open; its death closes it. Raises `ShoalError` with the way out.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False):
        self.path = Path(path)
        if resume:
            if not (self.path / RUN).is_file():
                way_out = "Give the folder that `shoal run` printed, or start the run anew."
                raise ShoalError(f"{self.path} holds no run to resume: it has no {RUN}. {way_out}")
            self._lock = _locked(self.path)
        else:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _not_made(error) from error
            self._lock = _locked(self.path)
            try:
                self._start(overwrite)
            except BaseException:
                self._unlock()
                raise
        # a resumed run writes from where `truncate` puts it; until then nothing that is there may be lost
        self._metrics = open(self.path / METRICS, "ab")  # noqa: SIM115

    def _start(self, overwrite: bool) -> None:
        if not overwrite:
            if (read_run(self.path) or {}).get("status") == "completed":
                raise ShoalError(
                    f"{self.path} holds a finished run, which is not overwritten. "
                    "Choose another hydra.run.dir, or delete the folder."
                )
            if (self.path / "checkpoint" / checkpoint.FILE).exists():
                raise ShoalError(
                    f"{self.path} holds a run that can go on. Use `shoal run --resume {self.path}`, "
                    "choose another hydra.run.dir, or delete the folder."
                )
        for name in _PRODUCTS:
            product = self.path / name
            if product.is_dir() and not product.is_symlink():
                shutil.rmtree(product)
            else:
                product.unlink(missing_ok=True)

    @property
    def checkpoint(self) -> Path:
        """Where `fl.checkpoint` keeps this run's checkpoint."""
        return self.path / "checkpoint"

    def write_config(self, config: Mapping[str, Any] | str) -> None:
        """Write config.yaml, from nested settings or from YAML text."""
        write_atomically(self.path / "config.yaml", config if isinstance(config, str) else _yaml(config))

    def write_overrides(self, overrides: Sequence[str]) -> None:
        """Write overrides.yaml, the list of what the command line changed."""
        write_atomically(self.path / "overrides.yaml", _yaml(list(overrides)))

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Write run.json. Written early with status ``interrupted``, it tells the truth after a kill as well."""
        write_atomically(self.path / RUN, json.dumps(plain(run), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def append(self, event: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl; it has left the process when this returns, so a kill does not lose it."""
        self._metrics.write(line(event))
        self._metrics.flush()

    def offset(self) -> int:
        """The length of metrics.jsonl in bytes: what a checkpoint keeps for `truncate`, once `flush` has returned."""
        return self._metrics.tell()

    def flush(self) -> None:
        """Wait until metrics.jsonl is on the disk: a checkpoint must not be there before the lines that it counts."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def truncate(self, offset: int) -> None:
        """Cut metrics.jsonl back to ``offset`` bytes. Raises `ShoalError` if it is shorter: lines would be missing."""
        self._metrics.flush()
        length = (self.path / METRICS).stat().st_size
        if length < offset:
            raise ShoalError(
                f"{self.path / METRICS} has {length} bytes, but the checkpoint was taken at {offset}: lines are "
                "missing. Put back the file, or start the run anew in another hydra.run.dir."
            )
        self._metrics.truncate(offset)
        self._metrics.seek(offset)

    def close(self) -> None:
        """Flush metrics.jsonl to the disk and close it."""
        if not self._metrics.closed:
            self.flush()
            self._metrics.close()
            self._unlock()

    def _unlock(self) -> None:
        if not self._lock.closed:
            (self.path / LOCK).unlink(missing_ok=True)  # while it is locked: nobody else holds it
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _locked(folder: Path) -> IO[bytes]:
    """The lock of ``folder``, held until it is closed. Raises `ShoalError` while another process holds it.

    A POSIX record lock: worker processes that are forked later do not have it, and can't keep it when this one dies.
    Two folders that one process opens at a path are not kept apart.
    """
    while True:
        file = open(folder / LOCK, "ab")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            file.close()
            raise ShoalError(
                f"{folder} is open for writing: another process works on the run in it. Wait until it is over or stop "
                "it (a run at a SuperLink with `flwr stop`), or choose another hydra.run.dir."
            ) from error
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        except FileNotFoundError:
            pass
        file.close()  # whoever held it has removed it meanwhile


def read_run(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What run.json in the folder ``path`` says, or None if there is none that can be read."""
    try:
        return json.loads((Path(path) / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of metrics.jsonl in the folder ``path``, in order; a last line cut off by a crash is left out."""
    file = Path(path) / METRICS
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(text) for text in lines]
    except ValueError as error:
        raise ShoalError(f"{file} has a line that is not JSON: {error}. Was it edited?") from error


def without_wall(event: Mapping[str, Any] | str | bytes) -> dict[str, Any]:
    """An event or a run (a mapping, or its line of JSON) without its `WALL_FIELDS`, at any depth: for comparisons."""
    values = json.loads(event) if isinstance(event, str | bytes) else event
    return {
        key: without_wall(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in WALL_FIELDS
    }


def line(event: Mapping[str, Any]) -> bytes:
    """One event as a line of JSON: keys in the given order, floats in their shortest exact form (`repr`)."""
    text = json.dumps(plain(event), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def plain(value: Any, path: str = "") -> Any:
    """``value`` as plain Python for JSON and YAML: NumPy numbers and arrays converted, NaN and infinity to None.

    Raises TypeError with the key for anything else.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{path or 'the value'} is a {type(value).__name__}, which JSON can't hold")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, or a crash at any moment, finds the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    checkpoint.flush_to_disk(partial)
    os.replace(partial, path)
    checkpoint.flush_to_disk(path.parent)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True)
