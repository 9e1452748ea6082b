"""What a node keeps on disk between messages: ``FOLDER/RUN/client-C/checkpoint.safetensors``, and the node's secret.

Files are checkpoints (`fl.checkpoint`): written beside the old one, flushed, then renamed, so a process that dies or a
full disk leaves the old or the new, complete; nothing is unpickled. Folders have mode 0700, files 0600.

An answer leaves only after what it cost and what its client remembers are on the disk. So a node that loses its memory
at any moment has forgotten nothing that anybody has seen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl import checkpoint
from fl.errors import ShoalError

log = logging.getLogger("shoal.node")
SECRET = "secret"
SECRET_BYTES = 32
UNUSABLE = "this place has no secret to key its noise with"
USED = "used"  # its time says when a run was last written to
DAY_S = 86400
Stamp = tuple[int, int, int]


class HomeError(ShoalError):
    """What went wrong at a node. Its text goes to the server; ``here`` has the details, which do not leave."""

    def __init__(self, text: str, here: str):
        super().__init__(f"{text} (its node's log says more)")
        self.here = here
        log.error("%s: %s", text, here)


class Kept:
    """What the clients of ``run`` keep under ``folder``.

    Several processes may use one folder, one at a time: `newer` tells whether another one has written since.
    """

    def __init__(self, folder: Path, run: str):
        if not run.isalnum():
            raise ShoalError(f"a run's name has letters and digits, not {run!r:.40}")
        self.folder, self.run = folder / run, run
        self._seen: dict[int, Stamp | None] = {}  # the files as they were when this process last read or wrote them

    def holds(self, client: int) -> bool:
        """Whether there is something of ``client``."""
        return self._file(client).exists()

    def newer(self, client: int) -> bool:
        """Whether the disk has another state of ``client`` than this process last read or wrote."""
        return client not in self._seen or self._seen[client] != self._stamp(client)

    def forget_read(self, clients: Iterable[int]) -> None:
        """From now on `newer` is true for ``clients``: what memory has of them is not to be gone on from."""
        for client in clients:
            self._seen.pop(client, None)

    def load(self, client: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """What ``client`` has kept, or None. Raises `HomeError` where the file is damaged: nothing starts anew then."""
        stamp = self._stamp(client)
        try:
            found = checkpoint.load(self._client(client))
        except checkpoint.CheckpointError as error:
            text = f"client {client}: what it kept of run {self.run} is damaged, so it can't go on"
            raise HomeError(text, str(error)) from None
        self._seen[client] = stamp
        return found

    def save(self, client: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Put ``arrays`` and ``meta`` on the disk in place of what ``client`` has kept.

        Raises `HomeError` where that can't be (a full disk): what was there before is intact, and the job that made
        these must not be answered.
        """
        folder = self._client(client)
        try:
            private(folder)
            checkpoint.save(folder, arrays, meta)
            self._file(client).chmod(0o600)
            _touch(self.folder / USED)
        except (OSError, checkpoint.CheckpointError) as error:
            self._seen.pop(client, None)
            with contextlib.suppress(OSError):
                for partial in folder.glob("*.partial"):  # it would take the room that is missing
                    partial.unlink()
            text = f"client {client}: what it must remember of run {self.run} can't be written to its node's disk"
            raise HomeError(f"{text}, so the job is not done", str(error)) from None
        self._seen[client] = self._stamp(client)

    def _client(self, client: int) -> Path:
        return self.folder / f"client-{client}"

    def _file(self, client: int) -> Path:
        return self._client(client) / checkpoint.FILE

    def _stamp(self, client: int) -> Stamp | None:
        try:
            found = self._file(client).stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def private(folder: Path) -> None:
    """Make ``folder`` and those above it that are missing, with mode 0700. Raises OSError."""
    for path in reversed([folder, *folder.parents]):
        if not path.is_dir():
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)


def secret(folder: Path) -> bytes:
    """The 32 random bytes of ``folder``, made at the first call; of processes that call at once all get the same.

    They are written to a file of another name, which is then linked to its place: it is there complete, or not.
    Raises `HomeError` where they can't be kept, or others can read them.
    """
    path = folder / SECRET
    try:
        private(folder)
        if not path.exists():
            fresh = folder / f".{SECRET}-{secrets.token_hex(8)}"
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(SECRET_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(fresh, path)
                checkpoint.flush_to_disk(folder)
            finally:
                fresh.unlink()
        found, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise HomeError(UNUSABLE, f"{path} can't be made or read: {error.strerror}") from error
    if mode & 0o077:
        raise HomeError(UNUSABLE, f"{path} has mode {mode:04o}, and others may read it: chmod 600 {path}")
    if len(found) != SECRET_BYTES:
        raise HomeError(UNUSABLE, f"{path} has {len(found)} bytes, not {SECRET_BYTES}: put it back, or delete it")
    return found


def forget(folder: Path, older_than_days: float) -> list[str]:
    """Delete what clients kept of runs that were not written to for so long; their names.

    The privacy books of a run go with it, so its nodes refuse to go on with it.
    """
    gone = []
    for used in sorted(folder.glob(f"*/{USED}")):
        if time.time() - used.stat().st_mtime > older_than_days * DAY_S:
            shutil.rmtree(used.parent)
            gone.append(used.parent.name)
    return gone


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    os.utime(path)
