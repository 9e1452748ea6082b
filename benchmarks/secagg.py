"""What secure aggregation costs a client and the server, in seconds and bytes, beside a plain sum.

    python -m benchmarks.secagg                              # 10, 100, 1,000 clients; 74,498 and 1,000,000 numbers
    python -m benchmarks.secagg --clients 100 --lengths 74498 --out secagg.json

One round for each row, with all its parties, in one thread; seconds are CPU seconds of the process, so that other work
on the machine counts little. Vectors are random uint32; every sum is compared with the plain one. For each number of
clients and length: the graph of `privacy.secure_aggregation.graph` (the default fractions, 0.1 colluding and 0.1
dropping out) and, up to 100 clients, the complete graph, without dropouts and with 5 % (at least one) that drop out
after sharing, which is where they cost the server most.

* ``client``: all four stages, the mean over the clients in the sum; ``server``: all stages together;
* ``x plain``: ``server`` over the time to add up as many plain float32 vectors, in the same run;
* ``up``, ``down``: bytes of a client's messages, the mean over the clients in the sum.

Then the proof of a norm on shares (`privacy.secure_aggregation.norm_check`), for a client and each of two servers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fl import environment
from fl.keys import generator, key_bytes
from privacy.secure_aggregation.graph import Topology
from privacy.secure_aggregation.norm_check import NormCheck
from privacy.secure_aggregation.protocol import Coordinator, Participant

CONTEXT = "benchmark/1"
COMPLETE = Topology(complete_up_to=10**9)
MOST_COMPLETE = 100  # clients; the complete graph's cost is quadratic in them
NORM = 300_000


class Meter:
    """CPU seconds and bytes by party."""

    def __init__(self) -> None:
        self.seconds: dict[Any, float] = defaultdict(float)
        self.up: dict[int, int] = defaultdict(int)
        self.down: dict[int, int] = defaultdict(int)

    def run(self, party: Any, call: Callable, *arguments: Any) -> Any:
        start = time.process_time()
        out = call(*arguments)
        self.seconds[party] += time.process_time() - start
        return out

    def client(self, client: int, call: Callable, *arguments: Any) -> bytes:
        """A stage of a client: its last argument is what it was sent, if there is one."""
        if arguments:
            self.down[client] += len(arguments[-1])
        message = self.run(client, call, *arguments)
        self.up[client] += len(message)
        return message


def one_round(topology: Topology, clients: int, length: int, dropouts: int) -> dict:
    """A round's costs; the vectors of one client at a time are in memory."""
    meter = Meter()
    party = {i: Participant(topology, i, CONTEXT, key_bytes(0, "secagg", i, 1)) for i in range(clients)}
    server = Coordinator(topology, CONTEXT, length, np.uint32, generator("secagg", "graph"))
    lost = set(generator("secagg", "lost").choice(clients, dropouts, replace=False).tolist())
    rosters = meter.run("server", server.rosters, {i: meter.client(i, p.advertise) for i, p in party.items()})
    shares = {i: meter.client(i, party[i].share, m) for i, m in rosters.items()}
    inboxes = meter.run("server", server.inboxes, shares)
    exact, plain = np.zeros(length, np.uint32), np.zeros(length, np.float32)
    for i in sorted(set(inboxes) - lost):
        vector = generator("secagg", "vector", i).integers(0, 2**32, length, np.uint32)
        meter.run("server", server.add, i, meter.client(i, party[i].mask, vector, inboxes[i]))
        exact += vector
        vector = vector.astype(np.float32)
        meter.run("plain", np.add, plain, vector, plain)
    requests = meter.run("server", server.requests)
    answers = {i: meter.client(i, party[i].unmask, m) for i, m in requests.items()}
    total = meter.run("server", server.total, answers)
    if total.tobytes() != exact.tobytes():
        raise SystemExit(f"the sum of {clients} clients is wrong")
    plan, heard = topology.plan(clients), server.survivors
    return {
        "clients": clients,
        "length": length,
        "graph": "complete" if plan.complete else "regular",
        "neighbours": plan.degree,
        "threshold": plan.threshold,
        "dropouts": dropouts,
        "client_s": statistics.fmean(meter.seconds[i] for i in heard),
        "server_s": meter.seconds["server"],
        "plain_s": meter.seconds["plain"],
        "server_times_plain": meter.seconds["server"] / meter.seconds["plain"],
        "up_bytes": statistics.fmean(meter.up[i] for i in heard),
        "down_bytes": statistics.fmean(meter.down[i] for i in heard),
        "plain_bytes": 4 * length,
    }


def norm_proof(length: int, repeats: int = 5) -> dict:
    """The costs of a client's proof; the first time, tables of the field are made, and it is left out."""
    check = NormCheck(length, NORM)
    x = generator("secagg", "norm", length).normal(size=length)
    x = np.trunc(x * (NORM / np.linalg.norm(x))).astype(np.int64)
    times: dict[str, list[float]] = {"client_s": [], "server_s": [], "accept_s": []}
    for repeat in range(repeats + 1):
        meter = Meter()
        messages = meter.run("client_s", check.prove, x, key_bytes("secagg", repeat), CONTEXT, 0)
        opened = [meter.run(s, check.open, s, m, CONTEXT, 0, key_bytes("query")) for s, m in enumerate(messages)]
        if not meter.run("accept_s", check.accept, [opening for _, opening in opened]):
            raise SystemExit("an honest proof was rejected")
        meter.seconds["server_s"] = max(meter.seconds[0], meter.seconds[1])
        for key, values in times.items():
            values.append(meter.seconds[key])
    return {
        "length": length,
        "bound": NORM,
        **{key: statistics.median(values[1:]) for key, values in times.items()},
        "up_bytes": sum(map(len, messages)),
        "between_servers_bytes": len(opened[0][1]),
        "soundness_log2": check.soundness_log2(),
    }


def line(row: dict) -> str:
    return (
        f"{row['clients']:7}{row['length']:10}  {row['graph']:9}{row['neighbours']:5}{row['dropouts']:6}"
        f"{1000 * row['client_s']:11.1f}{row['server_s']:10.2f}{row['server_times_plain']:9.1f}"
        f"{row['up_bytes'] / 1e3:11.1f}{row['up_bytes'] / row['plain_bytes']:8.3f}{row['down_bytes'] / 1e3:9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[74_498, 1_000_000])
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    print(environment.device_name("cpu"))
    print(
        f"{'clients':>7}{'numbers':>10}  {'graph':9}{'k':>5}{'lost':>6}{'client ms':>11}{'server s':>10}{'x plain':>9}"
        f"{'up kB':>11}{'x plain':>8}{'down kB':>9}"
    )
    rounds = []
    for clients in options.clients:
        topologies = [Topology()]
        if clients <= MOST_COMPLETE and not Topology().plan(clients).complete:
            topologies.append(COMPLETE)
        for length in options.lengths:
            for topology in topologies:
                for dropouts in (0, max(1, clients // 20)):
                    rounds.append(one_round(topology, clients, length, dropouts))
                    print(line(rounds[-1]), flush=True)
    by = {(r["clients"], r["length"], r["graph"], r["dropouts"]): r for r in rounds}
    for (clients, length, graph, dropouts), row in by.items():
        regular = by.get((clients, length, "regular", dropouts))
        if graph == "complete" and regular:
            ratios = ", ".join(f"{k} {row[k + '_s'] / regular[k + '_s']:.2f}" for k in ("client", "server"))
            print(f"complete over regular, {clients} clients, {length} numbers, {dropouts} lost: {ratios}")
    norms = [norm_proof(length) for length in sorted({*options.lengths, 100_000}) if length <= 100_000]
    for row in norms:
        print(
            f"norm of {row['length']} numbers: client {1000 * row['client_s']:.0f} ms, each of 2 servers "
            f"{1000 * row['server_s']:.0f} ms, up {row['up_bytes'] / 1e3:.1f} kB, "
            f"between servers {row['between_servers_bytes'] / 1e3:.1f} kB"
        )
    if options.out:
        results = {
            "machine": environment.device_name("cpu"),
            "processors": os.cpu_count(),
            "versions": environment.versions(),
            "rounds": rounds,
            "norm_checks": norms,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
