"""Where a run took place: versions, commit, device and peak memory. Nothing here fails a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

_PACKAGES = {
    "torch": "torch",
    "flwr": "flwr",
    "peft": "peft",
    "transformers": "transformers",
    "numpy": "numpy",
    "shoal": "shoal-fl",
}


def versions() -> dict[str, str | None]:
    """Versions of Python, Shoal and the libraries that decide a result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit(folder: str | os.PathLike[str] = ".") -> str | None:
    """The commit checked out in ``folder``, with ``+changes`` if tracked files differ from it; None outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def device_name(device: str = "cpu") -> str:
    """The device in words: a GPU's name, or the processor's with the number of cores this process may use."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()} ({cores} cores)"


def peak_memory_bytes() -> int:
    """The most resident memory that this process, or the largest child process that has ended, ever had, in bytes.

    The larger of the two, not their sum: worker processes share pages with their parent.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    own = _high_water_mark() or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(own, unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def peak_device_memory_bytes() -> int | None:
    """The most memory that tensors had on the current CUDA device, in bytes; None where CUDA was not used."""
    torch = sys.modules.get("torch")  # not imported here: if nobody did, there are no tensors
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def _high_water_mark() -> int | None:
    """VmHWM of this process in bytes (Linux). ru_maxrss won't do alone: it starts at what the parent process had."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0][1]) if found else None


def _git(folder: str | os.PathLike[str], *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"
