"""Checkpoints: save named arrays and plain values to a folder so that they come back bit for bit, or not at all.

One checkpoint is one safetensors file, ``FOLDER/checkpoint.safetensors``, whose header holds the plain values as JSON.
A new one is written beside the old one, flushed to the disk, and then renamed over it; a rename within a folder is
atomic. So whenever the process dies (kill -9, power cut, full disk), the folder holds the old or the new, complete.
Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fl.errors import ShoalError

FORMAT = 1
FILE = "checkpoint.safetensors"
_PARTIAL = "checkpoint.safetensors.partial"
_HEADER = "shoal"  # one key only: safetensors writes several in no fixed order, and the bytes would differ
_DTYPES = frozenset(
    ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]
)


class CheckpointError(ShoalError):
    """A checkpoint can't be written, or the one at hand can't be trusted. The message has the way out."""


def save(folder: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Save ``arrays`` and ``meta`` in ``folder``, in place of the checkpoint that it holds.

    ``arrays`` keep their shape, type and bits (NaN payloads too). ``meta`` is nested dicts with text keys, lists,
    text, numbers, true, false and null; floats come back exactly. When `save` returns, the checkpoint is on the disk.
    Raises `CheckpointError` where something can't be kept as it is or can't be written; the old checkpoint stays.
    """
    folder = Path(folder)
    _check_values(meta, "meta")
    kept = {name: _plain(name, array) for name, array in arrays.items()}
    text = json.dumps(meta)
    header = json.dumps({"format": FORMAT, "digest": _digest(kept, text), "meta": text})
    partial, final = folder / _PARTIAL, folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kept, partial, metadata={_HEADER: header})
        flush_to_disk(partial)  # the bytes before the name, else a power cut can leave the name on an empty file
        os.replace(partial, final)
        flush_to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint in {folder} could not be written: {error}. Make room or choose another hydra.run.dir; "
            "the checkpoint before it, if there was one, is intact."
        ) from error


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and values saved last in ``folder``, or None if it holds no checkpoint.

    Raises `CheckpointError` if the file is damaged or of a format that this version does not know.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            found = header["format"]
            if found == FORMAT:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                text, digest = header["meta"], header["digest"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"it can't be read ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found}; this version of Shoal reads format {FORMAT}. "
            "Resume with the version that wrote it (see versions.shoal in run.json)."
        )
    if _digest(arrays, text) != digest:
        raise _damaged(path, "its contents don't match their checksum")
    return arrays, json.loads(text)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} is damaged: {why}. Put back a copy of it, or delete the folder {path.parent} and "
        "start the run anew."
    )


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.name not in _DTYPES or array.dtype.byteorder == ">":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise CheckpointError(
            f"{name!r} is of type {kind}, which a checkpoint can't keep exactly: use a NumPy array of "
            f"{', '.join(sorted(_DTYPES))}."
        )
    return np.asarray(array, order="C")  # safetensors copies from the data pointer and knows no strides


def _check_values(value: Any, path: str) -> None:
    """Refuse what JSON would give back as something else (a tuple as a list, the key 1 as "1")."""
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) is list:
        for index, item in enumerate(value):
            _check_values(item, f"{path}[{index}]")
    elif isinstance(value, Mapping) and all(type(key) is str for key in value):
        for key, item in value.items():
            _check_values(item, f"{path}.{key}")
    else:
        raise CheckpointError(
            f"{path} is {value!r}, which a checkpoint can't keep exactly: use dicts with text keys, lists, text, "
            "Python numbers, true, false and null, and put arrays among the arrays."
        )


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    """SHA-256 over the values' text and each array's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
