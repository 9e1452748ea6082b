"""What is kept between runs: a folder that is made once, even by several processes at the same time.

The cache is ``$SHOAL_CACHE``, or ``~/.cache/shoal``. Anything in it may be deleted: it is made again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from fl.errors import ShoalError


def cache_root() -> Path:
    """The cache's folder, which may not exist yet."""
    given = os.environ.get("SHOAL_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "shoal"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` (the file ``path.lock`` beside it); another process waits. Makes the parent folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        raise ShoalError(
            f"the cache folder {path.parent} can't be written ({error.strerror}); set SHOAL_CACHE to one that can."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A fresh folder on the same disk as ``beside``, so that what is made in it can be renamed; removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}-", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stored_folder(path: Path, make: Callable[[Path], None]) -> Path:
    """The folder ``path``; if there is none, ``make(empty_folder)`` fills one, which then takes that name at once.

    So a folder with the name is always complete: a killed process leaves only a scratch folder, and of several
    processes one makes it while the others wait.
    """
    if path.is_dir():
        return path
    with locked(path):
        if not path.is_dir():
            with scratch(path) as folder:
                make(folder)
                # mkdtemp makes it private to this user; the cache has ordinary permissions.
                folder.chmod(0o755)
                folder.rename(path)
    return path
