"""What the rules for low-rank updates cost beside plain averaging, and beside the dense matrices that they avoid.

    python -m benchmarks.lowrank                     # 100 clients, rank 16, a module of 2048 x 2048
    python -m benchmarks.lowrank --clients 32 --size 8192 --out lowrank.json

One module, float32 updates of all clients, one thread as in a run's parent process. For each rule, in the same run and
in turn, `--repeats` times over (fewer where they take long):

* ``rule``: its `aggregate`;
* ``mean``: plain averaging (`aggregators.fedavg.FedAvg`) of the same updates; the ratio is of the medians;
* ``dense``: what the rule would do with matrices of the size of the weights: the mean of the clients' products, one
  product at a time, less the new adapter's (FedEx), and its SVD (FlexLoRA, and FedEx cut to a rank). For FedSVD, the
  SVD of the product of the mean factors. Once each, as it takes long; rules that only average have none.

``exact`` rules are those with ``increment + delta(new) = D*``; their relative error is measured where the stacked ranks
are few enough, and says what float32 leaves of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from aggregators.base import Aggregator
from aggregators.factored import relative_error
from aggregators.fedavg import FedAvg
from aggregators.fedex import FedEx
from aggregators.fedsb import FedSB
from aggregators.fedsvd import FedSVD
from aggregators.flexlora import FlexLoRA
from aggregators.flora import FLoRA
from aggregators.hetlora import HetLoRA
from aggregators.rolora import RoLoRA
from clients.adapters.space import Module, Space
from clients.layout import Layout
from fl import environment
from fl.keys import generator
from fl.state import ServerState, Update

PHASES = {"lora": ("A", "B"), "b": ("B",), "alternating": ("B",), "core": ("R",)}
BUDGET_S = 10.0  # of repeats, for one rule; there is always one
LIMIT = 10.0  # times plain averaging, for an exact rule


@dataclass(frozen=True)
class Row:
    """A rule, the form of adapter it acts on, whether it is exact, and which dense way there is beside it."""

    rule: Aggregator
    form: str
    exact: bool
    dense: str = ""


ROWS = {
    "fedavg (lora: FedIT)": Row(FedAvg(), "lora", False),
    "fedavg (ffa)": Row(FedAvg(), "b", True),
    "fedex": Row(FedEx(), "lora", True, "residual"),
    "flora": Row(FLoRA(), "lora", True, "sum"),
    "fedsb": Row(FedSB(), "core", True),
    "fedsvd": Row(FedSVD(), "b", True, "refactor"),
    "rolora": Row(RoLoRA(), "alternating", True),
    "hetlora": Row(HetLoRA(), "lora", False),
    "fedex, rank 16": Row(FedEx(rank=16), "lora", False, "residual svd"),
    "flexlora": Row(FlexLoRA(), "lora", False, "sum svd"),
}


def case(form: str, clients: int, size: int, rank: int) -> tuple[ServerState, list[Update]]:
    """A server and the updates of ``clients`` of one module ``(size, size)``, at the scale of a trained adapter."""
    core = {"R": (rank, rank)} if form == "core" else {}
    shapes = {"A": (rank, size), "B": (size, rank), **core}
    layout = Layout(tuple(shapes), tuple(shapes.values()))
    module = Module("layer", "A", "B", 2.0, rank, "R" if core else None)
    space = Space(layout, tuple(shapes), (PHASES[form],), (module,))
    vector = (generator("lowrank", form).normal(size=layout.size) / np.sqrt(size)).astype(np.float32)
    if form == "lora":
        space.tensor(vector, "B")[...] = 0
    server = ServerState(vector, space)
    columns = space.columns(PHASES[form])
    updates = []
    for client in range(clients):
        draw = generator("lowrank", form, client).normal(size=len(columns)) * 0.3 / np.sqrt(size)
        updates.append(Update(client, 1, 0, draw.astype(np.float32), 20 + client, columns=columns))
    return server, updates


def dense(kind: str, server: ServerState, updates: list[Update], new: ServerState) -> Callable[[], object]:
    """The work of a rule with matrices of the size of the weights, in float32 as the updates are."""
    space, shares = server.space, FedAvg().shares(updates)
    module = space.modules[0]

    def ends(update: Update) -> tuple[np.ndarray, np.ndarray]:
        y = server.vector.copy()
        y[update.columns] += update.vector
        return space.tensor(y, module.b), space.tensor(y, module.a)

    def product() -> np.ndarray:
        total = np.zeros(space.sizes(module), np.float32)
        for share, update in zip(shares, updates, strict=True):
            b, a = ends(update)
            total += (torch.from_numpy(b * np.float32(module.scale * share)) @ torch.from_numpy(a)).numpy()
        return total

    def run() -> object:
        if kind == "refactor":
            mean = FedAvg().aggregate(server, updates).vector
            matrix = (
                torch.from_numpy(space.tensor(mean, module.b)) @ torch.from_numpy(space.tensor(mean, module.a))
            ).numpy()
        else:
            matrix = product()
        if "residual" in kind:
            b, a = space.tensor(new.vector, module.b) * np.float32(module.scale), space.tensor(new.vector, module.a)
            matrix -= (torch.from_numpy(b) @ torch.from_numpy(a)).numpy()
        return (
            torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
            if "svd" in kind or kind == "refactor"
            else matrix
        )

    return run


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, row: Row, clients: int, size: int, rank: int, repeats: int, with_dense: bool) -> dict:
    server, updates = case(row.form, clients, size, rank)
    times: dict[str, list[float]] = {"rule": [], "mean": []}
    began = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat and time.perf_counter() - began > BUDGET_S:
            break
        for key, rule in (("rule", row.rule), ("mean", FedAvg())):
            times[key].append(seconds(partial(rule.aggregate, server, updates)))
    times = {key: values[1:] or values for key, values in times.items()}  # the first is a warm-up
    new = row.rule.aggregate(server, updates)
    out: dict = {
        "exact": row.exact,
        "numbers_a_client": len(updates[0].vector),
        "rule_s": statistics.median(times["rule"]),
        "mean_s": statistics.median(times["mean"]),
        "spread_s": {key: [min(v), max(v)] for key, v in times.items()},
        "increment_rank": sum(piece.rank for piece in new.increment.values()),
    }
    out["times_mean"] = out["rule_s"] / out["mean_s"]
    few = updates[:10]  # the error needs the singular values of all factors together
    out["relative_error_of_10_clients"] = relative_error(
        server, few, row.rule.shares(few), row.rule.aggregate(server, few)
    )
    if row.dense and with_dense:
        out["dense_s"] = seconds(dense(row.dense, server, updates, new))
        out["dense_times_rule"] = out["dense_s"] / out["rule_s"]
    print(line(name, out), flush=True)
    return out


def line(name: str, row: dict) -> str:
    times_dense = f"{row['dense_times_rule']:10.1f}" if "dense_times_rule" in row else " " * 10
    verdict = ("" if row["times_mean"] < LIMIT else "  over the limit") if row["exact"] else "  not exact"
    return (
        f"{name:22}{1000 * row['rule_s']:10.2f}{1000 * row['mean_s']:10.2f}{row['times_mean']:8.2f}"
        f"{times_dense}{row['relative_error_of_10_clients'] or 0:12.1e}{verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the module")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense ways")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a run's parent process
    shape = {"clients": options.clients, "size": options.size, "rank": options.rank}
    machine = environment.device_name("cpu")
    print(f"{options.clients} clients, rank {options.rank}, a module of {options.size} x {options.size}; {machine}")
    print(f"{'':22}{'rule ms':>10}{'mean ms':>10}{'x mean':>8}{'dense x':>10}{'error':>12}")
    rows = {
        name: measure(name, row, **shape, repeats=options.repeats, with_dense=not options.no_dense)
        for name, row in ROWS.items()
    }
    worst = max(row["times_mean"] for row in rows.values() if row["exact"])
    print(f"the slowest exact rule takes {worst:.2f} times plain averaging (limit {LIMIT:g})")
    if options.out:
        results = {
            "machine": machine,
            "processors": os.cpu_count(),
            "versions": environment.versions(),
            **shape,
            "repeats": options.repeats,
            "rules": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
