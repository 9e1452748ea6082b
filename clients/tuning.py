"""How to lay the work on this machine: measured on a few real steps, not guessed.

What is measured, each on a real batch of the run and after a warm-up step: the time of one client step for each
precision of the frozen base and implementation of attention, then for growing cohorts, then for one process with many
threads against many processes with one. The result is cached under the machine, the software and the shape of the
work, so that the next run of the same shape gets the same `Plan`, and with it the same bits.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from clients.cohort import Cohort, CohortBatch
from clients.data.batch import Batch
from clients.data.cache import cache_root
from clients.local.optimizers import Optimizer
from clients.local.private import Private, gradients
from clients.local.training import Work
from clients.pool import Pool, available
from clients.trainer import Plan
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import key_bytes

# A coarser base (bfloat16) has to earn its keep, and a larger cohort its memory.
GAIN_FOR_PRECISION = 1.15
GAIN_FOR_SIZE = 1.03
# Measuring ends after about this long, with the best so far; and one candidate's repeats after the other.
BUDGET_S = 20.0
LONG_S = 1.5


@dataclass(frozen=True)
class Resources:
    """What a user may fix of a `Plan`; ``auto`` is measured (``device``: CUDA where there is one, else the CPU)."""

    device: str = setting("auto", help="auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", choices=["auto", "float32", "bfloat16"], help="of the frozen base")
    attention: str = setting("auto", choices=["auto", "sdpa", "eager"], help="implementation of attention")
    cohort_size: int | str = setting("auto", ge=1, help="clients trained in one pass, or auto")
    workers: int | str = setting("auto", ge=1, help="worker processes, or auto")
    threads: int | str = setting("auto", ge=1, help="torch threads in each process, or auto")

    # Whether this process may start others by fork, which is not safe where threads are at work already.
    forks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("cohort_size", "workers", "threads"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise ConfigError(f"engine.{name}", value, "a whole number >= 1, or auto")
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
            raise ConfigError("engine.device", self.device, "auto, cpu, cuda or cuda:N")


@dataclass
class Probe:
    """What is measured: ``make(dtype, attention, device)`` builds a cohort, ``batches`` are typical client batches.

    ``private`` says how gradients are made private; None: not at all.
    """

    make: Callable[[torch.dtype, str, str], Cohort]
    batches: Sequence[Batch]
    optimizer: Optimizer
    accumulation: int = 1
    private: Private | None = None

    def __post_init__(self) -> None:
        self.built: dict[tuple[str, str, str], Cohort] = {}

    def seconds(self, plan: Plan, slots: int, repeats: int = 3) -> float:
        """Seconds of one *client* step in a cohort of ``slots`` (the best of ``repeats``, after a warm-up)."""
        key = (plan.dtype, plan.attention, plan.device)
        if key not in self.built:
            self.built.clear()
            gc.collect()
            self.built[key] = self.make(plan.torch_dtype, plan.attention, plan.device)
        cohort = self.built[key]
        groups = cohort.space.trains(1)
        with cohort.training(groups, cohort.initial):
            state = torch.from_numpy(cohort.initial.numpy()[cohort.space.columns(groups)])
            return self._seconds(cohort, slots, repeats, state)

    def _seconds(self, cohort: Cohort, slots: int, repeats: int, state: torch.Tensor) -> float:
        states = state.to(cohort.device).repeat(slots, 1)
        memory, lr = self.optimizer.init(states), torch.full((slots, 1), 1e-4, device=cohort.device)
        picked = [self.batches[i % len(self.batches)] for i in range(slots)]
        works = [Work(i, 0, np.zeros(0), [], 0.0, private=self.private) for i in range(slots)]
        best, began = float("inf"), time.perf_counter()
        for step in range(1, repeats + 2):
            if step > 2 and time.perf_counter() - began > LONG_S:
                break
            start = time.perf_counter()
            batch = CohortBatch.of(picked, device=cohort.device)
            _, grads = gradients(cohort, states, batch, works, step, self.accumulation)
            self.optimizer.step(states, grads, memory, step, lr)
            if cohort.device.type == "cuda":
                torch.cuda.synchronize(cohort.device)
            if step > 1:
                best = min(best, time.perf_counter() - start)
        return best / slots


def bfloat16_pays(device: str) -> bool:
    """Whether the processor multiplies bfloat16 natively, so that measuring it is worth while."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", " bf16 "))


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(device: str) -> str:
    """``device`` with auto resolved. Raises `ConfigError` for CUDA where there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("engine.device", device, "cpu or auto: this machine has no CUDA device")
    index = device.partition(":")[2]
    if index and device.startswith("cuda") and int(index) >= torch.cuda.device_count():
        raise ConfigError("engine.device", device, f"cuda:N with N below {torch.cuda.device_count()}")
    return device


def choose(wanted: Resources, probe: Probe, jobs: int, shape: Sequence[Any], note: Callable[[str], None]) -> Plan:
    """The plan for about ``jobs`` client jobs at a time. ``shape`` names the work in the cache; ``note`` is told."""
    device = pick_device(wanted.device)
    fixed = Plan(
        device,
        "float32" if wanted.dtype == "auto" else wanted.dtype,
        "sdpa" if wanted.attention == "auto" else wanted.attention,
        min(8, jobs) if wanted.cohort_size == "auto" else int(wanted.cohort_size),
        1 if wanted.workers == "auto" else int(wanted.workers),
        (1 if device == "cpu" else processors()) if wanted.threads == "auto" else int(wanted.threads),
    )
    open_ = [n for n in ("dtype", "attention", "cohort_size", "workers", "threads") if getattr(wanted, n) == "auto"]
    if not open_:
        return fixed
    name = key_bytes("plan-1", json.dumps([*map(str, shape), jobs, vars(wanted), machine(device)])).hex()[:24]
    cached = cache_root() / "plans" / f"{name}.json"
    before = _cached(cached)
    if before is not None:
        note(f"{describe(before)} (measured before on this machine for this shape)")
        return before
    note("Measuring a few steps to lay the work on this machine ...")
    start = time.perf_counter()
    plan, seen = _measure(wanted, fixed, probe, jobs)
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"plan": plan.settings(), "seconds per client step": seen}, indent=1))
    os.replace(temporary, cached)
    note(f"{describe(plan)} (measured in {time.perf_counter() - start:.0f} s)")
    return plan


def _cached(path: Path) -> Plan | None:
    """The plan in ``path``; None where there is none, or none that can be read: then it is measured again."""
    try:
        found = json.loads(path.read_text())["plan"]
        types = {name: type(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    right = types == {name: type(value) for name, value in Plan().settings().items()}
    return Plan(**found) if right else None


def describe(plan: Plan) -> str:
    """One line for the terminal."""
    return (
        f"{plan.device}, {plan.dtype} base, {plan.attention} attention, cohorts of {plan.cohort_size}, "
        f"{plan.workers} worker{'s' * (plan.workers > 1)} x {plan.threads} thread{'s' * (plan.threads > 1)}"
    )


def machine(device: str) -> list[str]:
    """What a measurement holds for: the processor or GPU, how many there are, and torch's version."""
    from fl.environment import device_name

    return [device_name(device), str(processors()), str(torch.__version__)]


class _Bench:
    """Measures a `Probe` under plans, in children on a CPU: this process starts no thread pool before its own forks."""

    def __init__(self, probe: Probe, forked: bool):
        self.probe, self.forked = probe, forked
        self.pools: dict[tuple[int, int], Pool] = {}
        self.seen: dict[str, float] = {}
        self.began = time.perf_counter()

    def __call__(self, plan: Plan, slots: int) -> float:
        """Seconds of a client step in cohorts of ``slots``; when several workers are at it at once, shared by them.

        Infinite for what there is no time left to measure.
        """
        label = f"{plan.dtype} {plan.attention} S={slots} {plan.workers}x{plan.threads}"
        if label not in self.seen and self.seen and time.perf_counter() - self.began > BUDGET_S:
            return float("inf")
        if label not in self.seen:
            if not self.forked:
                before = torch.get_num_threads()
                torch.set_num_threads(plan.threads)
                self.seen[label] = self.probe.seconds(plan, slots)
                torch.set_num_threads(before)
            else:
                shape = (plan.workers, plan.threads)
                if shape not in self.pools:
                    self.pools[shape] = Pool(self.probe, *shape)
                times = self.pools[shape].run([("seconds", (plan, slots))] * plan.workers)
                self.seen[label] = sum(times) / len(times) / plan.workers
        return self.seen[label]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


def _measure(wanted: Resources, plan: Plan, probe: Probe, jobs: int) -> tuple[Plan, dict[str, float]]:
    forked = plan.device == "cpu" and wanted.forks and available()
    bench = _Bench(probe, forked)
    try:
        single = replace(plan, workers=1, threads=1) if plan.device == "cpu" else plan
        single = _best_precision(wanted, single, bench, jobs)
        parallel = wanted.workers == "auto" and forked and processors() > 1 and jobs > 1
        if wanted.cohort_size == "auto":
            # With several workers a round's jobs are divided among them first.
            workers = processors() if parallel else plan.workers
            share = -(-jobs // workers)
            single = replace(single, cohort_size=_best_size(single, share, bench))
        plan = replace(single, workers=plan.workers, threads=plan.threads)
        if plan.device == "cpu":
            plan = _best_processes(wanted, plan, bench, parallel)
    finally:
        bench.close()
    return plan, bench.seen


def _best_precision(wanted: Resources, plan: Plan, bench: _Bench, jobs: int) -> Plan:
    """The fastest precision and attention; bfloat16 only where it gains at least `GAIN_FOR_PRECISION`."""
    dtypes = [wanted.dtype]
    if wanted.dtype == "auto":
        dtypes = ["float32", "bfloat16"] if bfloat16_pays(plan.device) else ["float32"]
    kinds = ["sdpa", "eager"] if wanted.attention == "auto" else [wanted.attention]
    if len(dtypes) * len(kinds) == 1:
        return replace(plan, dtype=dtypes[0], attention=kinds[0])
    slots = 1 if plan.device == "cpu" else min(8, jobs)
    best: list[tuple[float, Plan]] = []
    for dtype in dtypes:
        candidates = [replace(plan, dtype=dtype, attention=kind) for kind in kinds]
        try:
            best.append(min(((bench(c, slots), c) for c in candidates), key=lambda pair: pair[0]))
        except (ShoalError, RuntimeError, NotImplementedError):
            if not best:
                raise
            # Not every adapter works in bfloat16; nobody asked for it by name.
    if len(best) > 1 and best[1][0] * GAIN_FOR_PRECISION <= best[0][0]:
        return best[1][1]
    return best[0][1]


def _best_size(plan: Plan, most: int, bench: _Bench) -> int:
    """Double the cohort while a client step gets cheaper by more than `GAIN_FOR_SIZE`; stop before memory does."""
    limit = min(most, 16 if plan.device == "cpu" else 128)
    best, best_time, size, misses = 1, bench(plan, 1), 2, 0
    while size <= limit and misses < 2:
        try:
            now = bench(plan, size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if now * GAIN_FOR_SIZE < best_time:
            best, best_time, misses = size, now, 0
        else:
            misses += 1
        size *= 2
    return best


def _best_processes(wanted: Resources, plan: Plan, bench: _Bench, parallel: bool) -> Plan:
    """One process with one thread, one with all threads, or one process a processor: whichever is fastest."""
    cores = processors()
    options = [plan]
    if cores > 1 and wanted.threads == "auto" and wanted.workers in ("auto", 1):
        options.append(replace(plan, workers=1, threads=cores))
    if parallel:
        options.append(replace(plan, workers=max(1, cores // plan.threads)))
    if len(options) == 1:
        return plan
    return min(options, key=lambda option: bench(option, plan.cohort_size))
