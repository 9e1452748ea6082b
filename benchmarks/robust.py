"""What robust rules cost beside plain averaging, and beside byzfl's of the same name where byzfl is at hand.

    python -m benchmarks.robust                              # 20 and 100 updates of 1e6 float32
    python -m benchmarks.robust --byzfl FOLDER --out robust.json

At the end comes a round of 1,000 peers (`benchmarks.gossip`).

Seconds are CPU seconds of the process on one thread, so that other work on the machine counts little; each is the
median of `--repeats` calls after one to warm up (fewer where they take long), all in the same run:

* ``rule``: `aggregators.robust.combine`, from float32 rows to a float64 vector;
* ``mean``: `aggregators.mean.weighted_mean` of the same rows; the ratio is of the medians;
* ``byzfl``: its rule on the same rows, as a NumPy array and as a torch tensor; the faster of the two counts.

``--byzfl`` is a folder with the unpacked wheel of byzfl 0.0.11 (``pip download --no-deps byzfl``, then unzip). Only its
aggregators are imported: importing the package whole asks for torchvision, matplotlib and seaborn, so its other parts
are replaced by empty modules. What it can't do is left out: nearest-neighbour mixing of 100 updates would take 32 GB,
the subset of least diameter C(100, 20) trials, and centred clipping fails on tensors.

Updates are normal with a standard deviation of 1e-3; f is a fifth of them. The goal is to be faster than byzfl on every
shared rule, and `DISTANCES` times on those that compare all updates with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aggregators import robust
from aggregators.mean import weighted_mean
from aggregators.robust import Mean, NoPre, Pre, Rule
from benchmarks import gossip
from fl import environment
from fl.keys import torch_generator

BUDGET_S = 8.0  # of repeats, for one rule; there is always one
DISTANCES = 5.0  # times faster than byzfl


@dataclass(frozen=True)
class Row:
    """A rule and what is done before it; byzfl's class (empty: it has none), which compares all updates or not."""

    rule: Rule
    pre: Pre = NoPre()
    byzfl: str = ""
    compares: bool = False


ROWS = {
    "mean": Row(Mean(), byzfl="Average"),
    "krum": Row(robust.Krum(), byzfl="Krum", compares=True),
    "multi_krum": Row(robust.MultiKrum(), byzfl="MultiKrum", compares=True),
    "nna": Row(robust.NNA(), byzfl="MoNNA"),
    "mda": Row(robust.MDA(), byzfl="MDA", compares=True),
    "median": Row(robust.CoordinateMedian(), byzfl="Median"),
    "trimmed_mean": Row(robust.TrimmedMean(), byzfl="TrMean"),
    "meamed": Row(robust.MeaMed(), byzfl="Meamed"),
    "bulyan": Row(robust.Bulyan()),
    "geometric_median": Row(robust.GeometricMedian(), byzfl="GeometricMedian"),
    "centered_clipping": Row(robust.CenteredClipping(start="zero"), byzfl="CenteredClipping"),
    "caf": Row(robust.CAF(), byzfl="CAF"),
    "fltrust": Row(robust.FLTrust()),
    "foolsgold": Row(robust.FoolsGold()),
    "nnm, mean": Row(Mean(), robust.NNM(), byzfl="NNM", compares=True),
    "bucketing, mean": Row(Mean(), robust.Bucketing(2), byzfl="Bucketing"),
    "clipping, mean": Row(Mean(), robust.Clipping(), byzfl="Clipping"),
    "arc, mean": Row(Mean(), robust.ARC(), byzfl="ARC"),
    "arc_nnm, median": Row(robust.CoordinateMedian(), robust.ARCNNM()),
}
IMPOSSIBLE = {("NNM", 100), ("MDA", 100), ("Meamed", 100)}  # of byzfl: see above; MeaMed takes 10 GB
FAILS_ON_TENSORS = {"CenteredClipping"}


def load(folder: Path | None) -> types.SimpleNamespace:
    """byzfl's aggregators and pre-aggregators, from its unpacked wheel (None: as it is installed)."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    for part in ("attacks", "benchmark", "fed_framework"):
        sys.modules[f"byzfl.{part}"] = types.ModuleType(f"byzfl.{part}")
    from byzfl.aggregators import aggregators, preaggregators

    return types.SimpleNamespace(**vars(aggregators) | vars(preaggregators))


def theirs(byzfl: Any, name: str, f: int) -> Callable[[Any], Any]:
    """byzfl's rule; a pre-aggregator is followed by its mean, and gets a copy where it would change its input."""
    settings: dict[str, dict] = {
        "Bucketing": {"s": 2},
        "Clipping": {"c": 1.0},
        "CenteredClipping": {"tau": 1.0},
        "Average": {},
        "Median": {},
        "GeometricMedian": {},
    }
    rule = getattr(byzfl, name)(**settings.get(name, {"f": f}))
    if name in ("NNM", "Bucketing"):
        return lambda rows: byzfl.Average()(rule(rows))
    if name in ("Clipping", "ARC"):
        return lambda rows: byzfl.Average()(rule(rows.clone() if torch.is_tensor(rows) else rows.copy()))
    return rule


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of CPU seconds of some calls; the first is a warm-up unless it is the only one."""
    times: list[float] = []
    for _ in range(repeats + 1):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
        if sum(times) > BUDGET_S:
            break
    return statistics.median(times[1:] or times)


def measure(n: int, length: int, repeats: int, byzfl: Any, only: list[str]) -> dict[str, dict]:
    rows = 1e-3 * torch.randn((n, length), generator=torch_generator("robust", "benchmark", n))
    root, f = rows.mean(dim=0), n // 5
    array, equal = rows.numpy(), np.ones(n)
    results = {}
    for name, row in ROWS.items():
        if only and name not in only:
            continue
        rule = partial(robust.combine, row.rule, row.pre, f, rows, root=root if row.rule.root else None)
        # in turn, so that a change of the machine's load meets both
        mean_s = seconds(partial(weighted_mean, array, equal), repeats)
        result: dict[str, Any] = {"rule_s": seconds(rule, repeats), "mean_s": mean_s, "compares": row.compares}
        result["times_mean"] = result["rule_s"] / mean_s
        if byzfl is not None and row.byzfl and (row.byzfl, n) not in IMPOSSIBLE:
            other = theirs(byzfl, row.byzfl, f)
            result["byzfl_numpy_s"] = seconds(partial(other, array), repeats)
            if row.byzfl not in FAILS_ON_TENSORS:
                result["byzfl_torch_s"] = seconds(partial(theirs(byzfl, row.byzfl, f), rows), repeats)
            fastest = min(v for k, v in result.items() if k.startswith("byzfl"))
            result["byzfl_times_rule"] = fastest / result["rule_s"]
        results[name] = result
        print(line(name, n, result), flush=True)
    return results


def line(name: str, n: int, result: dict) -> str:
    def milliseconds(key: str) -> str:
        return f"{1000 * result[key]:11.1f}" if key in result else " " * 11

    text = f"{n:4} {name:20}{milliseconds('rule_s')}{result['times_mean']:8.2f}"
    if "byzfl_times_rule" in result:
        goal = DISTANCES if result["compares"] else 1.0
        verdict = "" if result["byzfl_times_rule"] >= goal else f"  below {goal:g}"
        times = f"{result['byzfl_times_rule']:9.2f}"
        text += f"{milliseconds('byzfl_numpy_s')}{milliseconds('byzfl_torch_s')}{times}{verdict}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, nargs="+", default=[20, 100], help="numbers of updates")
    parser.add_argument("--length", type=int, default=1_000_000, help="numbers in an update")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], choices=list(ROWS), help="these rules")
    parser.add_argument("--byzfl", type=Path, help="folder with byzfl's unpacked wheel")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a run's parent process
    machine = environment.device_name("cpu")
    byzfl = load(options.byzfl) if options.byzfl else None
    print(f"{options.length:,} float32 numbers an update; CPU ms on one thread; {machine}")
    print(f"   n {'':20}{'rule':>11}{'x mean':>8}{'byzfl np':>11}{'torch':>11}{'x rule':>9}")
    rules = {str(n): measure(n, options.length, options.repeats, byzfl, options.only) for n in options.updates}
    gossip.show(gossip.measured(1_000, 100_000, "dpsgd", 3))
    if options.out:
        results = {
            "machine": machine,
            "processors": os.cpu_count(),
            "versions": environment.versions(),
            "length": options.length,
            "repeats": options.repeats,
            "rules": rules,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
