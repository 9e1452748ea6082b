"""The names of the files that `shoal keys` makes, and what is checked before one is used."""

from __future__ import annotations

from pathlib import Path

from fl.errors import ShoalError

CA_KEY, CA, SERVER_KEY, SERVER = "ca.key", "ca.crt", "server.key", "server.pem"


def node_files(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """The private key, the public key and the certificate of a node."""
    return folder / name, folder / f"{name}.pub", folder / f"{name}.crt"


def check_private(path: Path) -> Path:
    """``path``, which must be a file that only its owner can read."""
    check_public(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ShoalError(f"the private key {path} can be read by others (mode {mode:03o}). Do: chmod 600 {path}")
    return path


def check_public(path: Path) -> Path:
    """``path``, which must be a file."""
    if not path.is_file():
        raise ShoalError(f"there is no file {path}. `shoal keys` makes it; copy it here from where it was made.")
    return path
