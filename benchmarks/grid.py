"""What a message costs in one process: a client's request and its reply, beside a plain function call.

    python -m benchmarks.grid                       # 10 to 10,000 clients, 1 KB and 1 MB, in about a minute
    python -m benchmarks.grid --out grid.json

All clients get the same state and each hands it back as its update, so that only the machinery is timed. For each
number of clients and size of the state, in a process of its own:

* ``call``: ``reply = client(request)`` with the vectors themselves, no message at all;
* ``in process``: a Flower message for each client over `InProcessGrid`, one node a client;
* ``cohort``: over `CohortGrid` on one node of `InProcessGrid`, which is what a run uses;
* ``whole``: the same, with what a schedule does to each message besides: exact byte counts and validation.

The last three include encoding and decoding at both ends. A time is the median over repeats (a single one for 10,000
clients), divided by the number of clients; about half of it there is Python's garbage collector, which looks through
all messages that are alive. Memory is the growth of the process's peak while ``whole`` runs; the state itself is
counted in it once.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message

from fl import environment
from fl.engine.cohort_grid import CohortGrid, cohort_app, node_id
from fl.engine.in_process import FIRST_NODE, InProcessGrid
from fl.messages import TrainReply, TrainRequest, freeze, payload_bytes
from fl.validation import Validator

CLIENTS = (10, 100, 1_000, 10_000)
SIZES = {"1 KB": 256, "1 MB": 262_144}  # float32 numbers in the state
LAYOUT = "0123456789abcdef"
BUDGET_S = 1.0  # of repeats, for one path of one case; there is always one


def answer(request: TrainRequest) -> TrainReply:
    job = (request.client, request.round, request.version, LAYOUT)
    return TrainReply(*job, request.state, examples=400, steps=5, tokens=2000, loss=0.5)


def answer_message(message: Message, context: Context | None = None) -> Message:
    return Message(answer(TrainRequest.from_record(message.content)).to_record(), reply_to=message)


def requests(state: np.ndarray, clients: int, round: int) -> list[TrainRequest]:
    return [TrainRequest(client, round, round, state, LAYOUT, {"lr": 0.1}) for client in range(clients)]


def by_call(state: np.ndarray, clients: int, round: int) -> None:
    replies = [answer(request) for request in requests(state, clients, round)]
    assert all(reply.update is state for reply in replies)


def over(grid: InProcessGrid | CohortGrid, name: Callable[[int], int], whole: bool) -> Callable:
    """A function that asks all clients of ``grid`` once and checks what comes back."""
    validator = Validator(LAYOUT, lambda request: request.state.size, max_norm=1e4)

    def ask(state: np.ndarray, clients: int, round: int) -> None:
        asked = requests(state, clients, round)
        records = [request.to_record() for request in asked]
        ids = grid.push_messages([Message(r, name(c), "train") for c, r in enumerate(records)])
        replies = grid.pull_messages(ids)
        if whole:
            sizes = [payload_bytes(record) for record in records]
            sizes += [payload_bytes(reply.content) for reply in replies]
            checked = [validator.check(reply, request) for reply, request in zip(replies, asked, strict=True)]
            validator.forget(round + 1)
            assert min(sizes) > 4 * state.size and all(isinstance(reply, TrainReply) for reply in checked)
        else:
            decoded = [TrainReply.from_record(reply.content) for reply in replies]
            assert len(decoded) == clients and np.shares_memory(decoded[-1].update, state)

    return ask


def timed(ask: Callable[[np.ndarray, int, int], None], state: np.ndarray, clients: int) -> dict[str, float]:
    """Milliseconds a client: median and least over as many repeats as the budget allows, at most 50."""
    ask(state, min(clients, 1000), 0)  # to warm up
    times: list[float] = []
    while sum(times) < BUDGET_S and len(times) < 50:
        gc.collect()
        start = time.perf_counter()
        ask(state, clients, len(times) + 1)
        times.append(time.perf_counter() - start)
    scale = 1e3 / clients
    return {"median_ms": statistics.median(times) * scale, "least_ms": min(times) * scale, "repeats": len(times)}


def run_case(clients: int, size: int) -> dict[str, Any]:
    """All paths for one number of clients and one size. The memory is measured first, while the process is small."""
    handler = cohort_app(lambda messages, context: [answer_message(message) for message in messages])
    with CohortGrid(InProcessGrid(handler), clients) as cohort, InProcessGrid(answer_message, clients) as single:
        whole = over(cohort, node_id, whole=True)
        whole(freeze(np.zeros(256, np.float32)), 10, -1)
        before = environment.peak_memory_bytes()
        state = freeze(np.ones(size, np.float32))
        whole(state, clients, 0)
        memory = environment.peak_memory_bytes() - before
        paths = {
            "call": by_call,
            "in process": over(single, lambda client: FIRST_NODE + client, whole=False),
            "cohort": over(cohort, node_id, whole=False),
            "whole": whole,
        }
        times = {name: timed(ask, state, clients) for name, ask in paths.items()}
    for name in times:
        times[name]["ratio_to_call"] = times[name]["median_ms"] / times["call"]["median_ms"]
    return {"clients": clients, "state_bytes": 4 * size, "paths": times, "peak_growth_bytes": memory}


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as text: ms a message, how many calls that is, and memory."""
    names = list(cases[0]["paths"])
    head = f"{'clients':>8}{'state':>8}" + "".join(f"{name:>20}" for name in names) + f"{'memory':>12}{'a client':>12}"
    lines = [head, f"{'':>16}" + "".join(f"{'ms (x call)':>20}" for _ in names) + f"{'MiB':>12}{'KiB':>12}"]
    for case in cases:
        cells = [f"{p['median_ms']:.4f} ({p['ratio_to_call']:,.0f})" for p in case["paths"].values()]
        size = next(name for name, numbers in SIZES.items() if 4 * numbers == case["state_bytes"])
        grown = case["peak_growth_bytes"]
        memory = f"{grown / 2**20:>12.1f}{grown / 1024 / case['clients']:>12.1f}"
        lines.append(f"{case['clients']:>8,}{size:>8}" + "".join(f"{cell:>20}" for cell in cells) + memory)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--case", nargs=2, type=int, metavar=("CLIENTS", "NUMBERS"), help="one case only, as JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(*options.case)))
        return
    cases = []
    for size in SIZES.values():
        for clients in CLIENTS:
            command = [sys.executable, "-m", "benchmarks.grid", "--case", str(clients), str(size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            cases.append(json.loads(done.stdout))
    machine = environment.device_name()
    print(f"One request and its reply, in one process; {machine}\n\n{table(cases)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "versions": environment.versions(), "cases": cases}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nWritten to {options.out}")


if __name__ == "__main__":
    main()
