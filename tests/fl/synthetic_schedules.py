"""Made-up runs of asynchronous schedules: a small event simulation writes the events, a formula the test metric."""

from __future__ import annotations

import heapq
import json
import math
from pathlib import Path
from typing import Any

from fl.keys import generator

STATE_BYTES = 298_000


def write_scheduled(
    folder: Path,
    schedule: str = "fedasync",
    *,
    seed: int = 0,
    clients: int = 20,
    steps: int = 400,
    slow: float = 0.8,
    latency: float = 0.03,
    jitter: float = 0.0,
    tick_s: float = 0.5,
    buffer: int = 5,
    every_s: float = 0.5,
    noise: float = 0.005,
    lost: float = 0.0,
    max_staleness: int | None = None,
) -> Path:
    """Write a run of ``schedule`` (synchronous, fedasync, fedbuff, fedfix) in ``steps`` server steps.

    Client i of M computes for 1 - slow i / (M - 1) seconds (times a lognormal draw of spread ``jitter``), after a
    download and before an upload of ``latency`` seconds. The test metric is evaluated every ``every_s`` seconds.
    """
    rng = generator(seed, "scheduled", schedule)
    compute = [1 - slow * i / max(1, clients - 1) for i in range(clients)]
    heap: list[tuple[float, int]] = []
    work: dict[int, dict[str, Any]] = {}
    jobs = [0] * clients
    lines: list[dict[str, Any]] = []
    version, step, total, due = 0, 0, 0, 0.0
    arrived: list[dict[str, Any]] = []

    def start(client: int, now: float) -> None:
        jobs[client] += 1
        began = now + latency
        done = began + compute[client] * float(rng.lognormal(0, jitter) if jitter else 1.0)
        end = round(done + latency, 6)
        work[client] = {"round": jobs[client], "version": version, "sent_s": now, "began_s": began, "done_s": done}
        heapq.heappush(heap, (end, client))

    def evaluate(now: float) -> None:
        level = 0.5 + 0.35 * (1 - math.exp(-now / 6)) + float(rng.normal(0, noise))
        common = {
            "event": "eval",
            "split": "test",
            "round": step,
            "virtual_s": round(now, 6),
            "wall_s": now,
            "examples": 2000,
        }
        lines.append(common | {"loss": 1.2 - level, "accuracy": min(level, 1.0)})

    def serve(now: float) -> None:
        nonlocal step, version, total, arrived
        good = [event for event in arrived if event["accepted"]]
        refused = [event["reason"] for event in arrived if not event["accepted"]]
        step, version, total = step + 1, version + bool(good), total + STATE_BYTES * len(arrived)
        lines.append(
            {
                "event": "round", "round": step, "version": version, "virtual_s": now, "wall_s": 0.01 * step,
                "sampled": len(arrived), "accepted": len(good), "rejected": {r: refused.count(r) for r in set(refused)},
                "bytes_down_total": total, "bytes_up_total": total, "client_steps": 5 * len(arrived), "loss": 0.5,
                "staleness": sum(e["staleness"] for e in good) / len(good) if good else 0.0,
                "live_versions": len({w["version"] for w in work.values()}), "client_steps_total": 0,
            }
        )  # fmt: skip
        arrived = []

    for client in range(clients):
        start(client, 0.0)
    while step < steps:
        tick = round((step + 1) * tick_s, 6) if schedule == "fedfix" else math.inf
        now = min(heap[0][0] if heap else math.inf, tick)
        while due < now:
            evaluate(due)
            due = round(due + every_s, 6)
        while heap and heap[0][0] == now:
            end, client = heapq.heappop(heap)
            given = work.pop(client)
            stale = version - given["version"]
            reason = "error" if rng.random() < lost else None
            if reason is None and max_staleness is not None and stale > max_staleness:
                reason = "stale"
            event = {
                "event": "client", **given, "client": client, "virtual_s": end, "staleness": stale, "examples": 100,
                "bytes_down": STATE_BYTES, "bytes_up": STATE_BYTES, "steps": 5, "loss": 0.5,
                "accepted": reason is None, "reason": reason,
            }  # fmt: skip
            if reason == "error":
                event["done_s"] = None
            arrived.append(event)
            lines.append(event)
            if step < steps and len(arrived) == {"fedasync": 1, "fedbuff": buffer}.get(schedule):
                serve(now)
            if schedule in ("fedasync", "fedbuff"):
                start(client, now)
        ended = now == tick or (schedule == "synchronous" and not heap)
        if ended:
            idle = [client for client in range(clients) if client not in work]
            serve(now)
            for client in idle:
                start(client, now)
    evaluate(now)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    test = next(line for line in reversed(lines) if line["event"] == "eval")
    info = {
        "name": schedule, "experiment": "fedfix", "seed": seed, "status": "completed", "task": "classification",
        "num_clients": clients, "model": "minilm", "data": "vader", "privacy": "No privacy is promised.",
        "overrides": [f"schedule={schedule}", f"seed={seed}"],
        "settings": {
            "seed": seed, "schedule._target_": f"fl.schedules.{schedule}.{schedule.capitalize()}",
            "schedule.rounds": steps, "clients.number": clients,
        },
        "final": {
            "loss": test["loss"], "accuracy": test["accuracy"], "rounds": step, "virtual_s": now, "wall_s": 4.0,
            "bytes_up": total, "bytes_down": total, "client_steps": 5 * sum(jobs),
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def write_schedules(folder: Path, schedules: dict[str, dict[str, Any]], seeds: list[int], **common: Any) -> Path:
    """Write a sweep whose variants are ``schedules`` (name -> arguments of `write_scheduled`), without tuning."""
    runs: list[dict[str, Any]] = []
    for name, given in schedules.items():
        for seed in seeds:
            write_scheduled(folder / str(len(runs)), seed=seed, **({"schedule": name} | common | given))
            runs.append({"dir": str(len(runs)), "variant": name, "overrides": {"seed": str(seed)}})
    about = {
        "axes": {"seed": seeds}, "common": [], "variants": {name: {"set": [f"schedule={name}"]} for name in schedules},
        "tune": None, "target": 0.75, "runs": runs,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder
