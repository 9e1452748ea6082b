"""Run folders made up for tests of what reads them: the files' schema is a run's, the numbers come from formulas."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fl.keys import generator

LABELS = ["negative", "neutral", "positive"]
REASONS = ["not_finite", "shape", "too_large", "late"]
STATE_BYTES = 298_000


def write_run(
    folder: Path,
    *,
    experiment: str = "quickstart",
    seed: int = 0,
    rounds: int = 10,
    clients: int = 10,
    per_round: int = 5,
    task: str = "classification",
    alpha: float = 0.5,
    gain: float = 0.3,
    labels: list[str] | None = None,
    groups: list[str] | None = None,
    status: str = "completed",
    stop_after: int | None = None,
    reject: float = 0.0,
    epsilon: float | None = None,
    instant: bool = False,
    client_evals: bool = True,
    torn: bool = False,
    settings: dict[str, Any] | None = None,
    overrides: list[str] | None = None,
    error: float | None = None,
    once: int | None = None,
) -> Path:
    """Write run.json and metrics.jsonl for a run whose accuracy rises by ``gain`` (or whose perplexity falls).

    ``reject`` is the share of updates refused; ``stop_after`` ends the events at that round; ``torn`` cuts the last
    line in half; ``status=""`` leaves run.json out, as a run killed at its start would. ``error`` is the aggregation
    error of round 1 (it grows by a tenth each round), ``once`` the bytes sent once, in round 1; None: no such field.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = generator(seed, "synthetic", experiment, str(alpha))
    names = LABELS if labels is None else labels
    partition = _partition(rng, clients, alpha, names if task == "classification" else None, groups)
    metric = "perplexity" if task == "causal_lm" else "accuracy"
    lines: list[dict[str, Any]] = []
    speed = rng.lognormal(0.0, 0.5, clients)
    skill = rng.normal(0.0, 0.05, clients)
    virtual, wall, up, down, steps = 0.0, 0.5, 0, 0, 0
    refused: dict[str, int] = {}

    def evaluate(round_: int, per_client: bool) -> None:
        progress = 1 - math.exp(-4 * round_ / rounds)
        level = min(0.5 + gain * progress + float(rng.normal(0, 0.008)), 0.99)
        loss = 1.05 - 0.65 * gain / 0.3 * progress + float(rng.normal(0, 0.01))
        if task == "causal_lm":
            loss = 3.9 - gain * progress + float(rng.normal(0, 0.005))
        common = {"event": "eval", "round": round_, "virtual_s": virtual, "wall_s": wall}
        scores = {"accuracy": level, "macro_f1": level - 0.02}
        if task == "causal_lm":
            scores = {"perplexity": math.exp(loss)}
        lines.append({**common, "split": "test", "examples": 2000, "loss": loss, **scores})
        if per_client:
            own = np.clip(level + skill, 0, 1) if metric == "accuracy" else np.exp(loss + skill)
            worst = np.quantile(own, 0.1 if metric == "accuracy" else 0.9)
            listed: list[float | None] = [round(float(v), 4) for v in own]
            if clients > 3:
                listed[3] = None  # a client without test samples
            lines.append(
                {
                    **common,
                    "split": "clients",
                    "metric": metric,
                    "mean": float(own.mean()),
                    "std": float(own.std()),
                    "worst_decile": float(worst),
                    "per_client": listed,
                    "loss_mean": loss,
                }
            )

    evaluate(0, False)
    last = rounds if stop_after is None else stop_after
    for round_ in range(1, last + 1):
        chosen = np.sort(rng.choice(clients, size=min(per_round, clients), replace=False))
        loss = 0.1 + 0.95 * math.exp(-3 * round_ / rounds) * (3.7 if task == "causal_lm" else 1)
        bad: dict[str, int] = {}
        arrivals = []
        for client in chosen.tolist():
            arrival = 0.0 if instant else virtual + 4.0 * float(speed[client]) * float(rng.lognormal(0, 0.1))
            reason = REASONS[int(rng.integers(len(REASONS)))] if rng.random() < reject else None
            if reason:
                bad[reason] = bad.get(reason, 0) + 1
            arrivals.append(arrival)
            lines.append(
                {
                    "event": "client",
                    "round": round_,
                    "version": round_ - 1,
                    "client": client,
                    "virtual_s": arrival,
                    "staleness": 0,
                    "bytes_down": STATE_BYTES,
                    "bytes_up": STATE_BYTES + 100,
                    "examples": partition["sizes"][client],
                    "steps": 5,
                    "tokens": 2000,
                    "loss": None if reason == "not_finite" else loss,
                    "accepted": reason is None,
                    "reason": reason,
                    "wall_s": wall,
                }
            )
        virtual, wall = max(arrivals, default=virtual), wall + 1.7
        up, down, steps = up + STATE_BYTES * len(chosen), down + STATE_BYTES * len(chosen), steps + 5 * len(chosen)
        for reason, count in bad.items():
            refused[reason] = refused.get(reason, 0) + count
        lines.append(
            {
                "event": "round",
                "round": round_,
                "version": round_,
                "virtual_s": virtual,
                "wall_s": wall,
                "sampled": len(chosen),
                "accepted": len(chosen) - sum(bad.values()),
                "rejected": bad,
                "bytes_down": STATE_BYTES * len(chosen),
                "bytes_up": STATE_BYTES * len(chosen),
                "bytes_down_total": down,
                "bytes_up_total": up,
                "client_steps": 5 * len(chosen),
                "client_steps_total": steps,
                "tokens": 2000 * len(chosen),
                "loss": loss,
                "update_norm": 0.4,
                "epsilon": None if epsilon is None else epsilon * math.sqrt(round_ / rounds),
            }
            | ({} if error is None else {"aggregation_error": error * 1.1 ** (round_ - 1)})
            | ({} if once is None else {"bytes_once": once if round_ == 1 else 0})
        )
        if round_ == last or round_ % 2 == 0:
            evaluate(round_, client_evals and (round_ == last or round_ % 4 == 0))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text[:-40] if torn else text)
    if not status:
        return folder
    test = [line for line in lines if line.get("split") == "test"][-1]
    final = {key: test[key] for key in ("loss", "accuracy", "macro_f1", "perplexity") if key in test}
    final |= {
        "rounds": last,
        "bytes_up": up,
        "bytes_down": down,
        "virtual_s": virtual,
        "wall_s": wall,
        "client_steps": steps,
        "client_steps_per_s": 52.4 + seed,
        "tokens_per_s": 20_960.0,
        "rejected_updates": sum(refused.values()),
        "rejected": refused,
        "peak_memory_bytes": 1_240_000_000,
        "epsilon": epsilon,
    }
    all_settings = {
        "seed": seed,
        "name": experiment,
        "model._target_": "clients.models.MiniLM" if task == "classification" else "clients.models.SmolLM2",
        "model.dtype": "auto",
        "data._target_": "clients.data.datasets.Vader",
        "partition._target_": "clients.data.partition.Dirichlet",
        "partition.alpha": alpha,
        "clients.number": clients,
        "clients.per_round": per_round,
        "local._target_": "clients.local.sgd.SGD",
        "local.lr": 0.05,
        "local.steps": 5,
        "local.batch_size": 16,
        "adapter._target_": "clients.adapters.peft.Lora",
        "adapter.rank": 8,
        "adapter.target_modules": ["query", "value"],
        "schedule.rounds": rounds,
        "privacy.epsilon": epsilon,
    } | (settings or {})
    info = {
        "name": experiment,
        "experiment": experiment,
        "seed": seed,
        "status": status,
        "started": "2026-03-14T09:26:53+00:00",
        "finished": None if status == "interrupted" else "2026-03-14T09:27:12+00:00",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "peft": "0.21.2", "flwr": "1.41.0", "shoal": "0.1.0"},
        "device": "cpu (Intel Xeon, 2 cores)",
        "commit": "6e117eb0c1d2",
        "model": "minilm" if task == "classification" else "smollm2",
        "data": "vader" if task == "classification" else "sotu",
        "task": task,
        "adapter": "lora",
        "num_clients": clients,
        "trainable_parameters": 74_115,
        "total_parameters": 22_787_331,
        "engine": {
            "dtype": "bfloat16",
            "attention": "sdpa",
            "cohort_size": 8,
            "workers": 1,
            "threads": 2,
            "device": "cpu",
        },
        "partition": partition,
        "privacy": (
            "No privacy is promised: updates are sent in the clear and no noise is added."
            if epsilon is None
            else f"({epsilon}, 1e-5)-DP for each sample, Poisson sampling, add-or-remove neighbours."
        ),
        "settings": all_settings,
        "overrides": ["experiment=" + experiment, f"seed={seed}"] if overrides is None else overrides,
        "final": final if status == "completed" else {},
    }
    if status == "failed":
        info["error"] = "round 6: 1 of 5 updates was accepted, schedule.min_clients=2 are needed"
        info["final"] = final
    (folder / "run.json").write_text(json.dumps(info, indent=1))
    return folder


def write_sweep(folder: Path, axes: dict[str, list[Any]], **common: Any) -> Path:
    """Write a sweep over ``axes`` (key -> values): one run a combination. More alpha, more accuracy."""
    jobs = []
    for index, values in enumerate(itertools.product(*axes.values())):
        given = dict(zip(axes, values, strict=True))
        alpha = float(given.get("partition.alpha", 0.5))
        gain = 0.18 + 0.05 * math.log10(10 * alpha)
        epsilon = given.get("privacy.epsilon")
        if epsilon is not None:
            gain *= epsilon / (epsilon + 2)
        gain += 0.03 * sum(len(str(v)) % 3 for k, v in given.items() if isinstance(v, str))
        write_run(
            folder / str(index),
            seed=int(given.get("seed", 0)),
            alpha=alpha,
            epsilon=epsilon,
            settings={k: v for k, v in given.items() if k not in ("seed", "partition.alpha")},
            overrides=[f"{k}={v}" for k, v in given.items()],
            **({"gain": gain} | common),
        )
        jobs.append({"dir": str(index), "overrides": given})
    (folder / "sweep.json").write_text(json.dumps({"axes": axes, "runs": jobs}))
    return folder


def write_variants(
    folder: Path,
    variants: dict[str, dict[str, Any]],
    values: dict[str, list[float]],
    seeds: list[int],
    target: float | None = 0.7,
    **common: Any,
) -> Path:
    """Write a sweep of ``variants`` (name -> arguments of `write_run`), each at its ``values`` of local.lr.

    A variant's gain is largest at its middle value.
    """
    jobs: list[dict[str, Any]] = []
    for name, given in variants.items():
        for place, lr in enumerate(values[name]):
            for seed in seeds:
                gain = given.get("gain", 0.3) - 0.06 * abs(place - len(values[name]) // 2)
                write_run(
                    folder / str(len(jobs)),
                    seed=seed,
                    settings={"local.lr": lr},
                    overrides=[f"local.lr={lr}"],
                    **(common | given | {"gain": gain}),
                )
                varied = {"local.lr": str(lr), "seed": str(seed)}
                jobs.append({"dir": str(len(jobs)), "variant": name, "overrides": varied})
    about = {
        "axes": {"seed": seeds},
        "common": [],
        "variants": {name: {"set": [f"adapter={name}"], "tune": values[name]} for name in variants},
        "tune": {"key": "local.lr", "by": "clients"},
        "target": target,
        "runs": jobs,
    }
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def _partition(
    rng: np.random.Generator, clients: int, alpha: float, labels: list[str] | None, groups: list[str] | None
) -> dict[str, Any]:
    sizes = rng.integers(120, 900, clients)
    counts = None
    if labels is not None:
        shares = rng.dirichlet([max(alpha, 0.02)] * len(labels), clients)
        counts = [rng.multinomial(n, p).tolist() for n, p in zip(sizes, shares)]
    return {
        "sizes": sizes.tolist(),
        "test_sizes": (sizes // 5).tolist(),
        "labels": counts,
        "label_names": labels or [],
        "groups": groups,
        "tokens": (sizes * 23).tolist(),
    }
