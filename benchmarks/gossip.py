"""What a round without a server costs beside training: 1,000 peers on a torus with 1e5 parameters each.

    python -m benchmarks.gossip                              # also the last part of python -m benchmarks.robust
    python -m benchmarks.gossip --peers 1000 --size 100000 --schedule dpsgd

A round of the schedule runs as in a run, events, bytes and times included, on updates that are there already: training
is taken out. Printed are CPU seconds of the process on one thread (the median of ``--rounds`` rounds after one to warm
up), the wall seconds of the fastest, and the ratio to the bare product ``W X`` of the graph's weights and the stacked
states by `scipy.sparse` in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aggregators.fedavg import FedAvg
from aggregators.server_optimizers import SGD
from clients.adapters.space import Space
from clients.layout import Layout
from clients.local.training import LocalTraining
from fl import environment
from fl.downlink import Downlink
from fl.messages import TrainReply
from fl.network import Lognormal
from fl.peers import PeerJob, Peers, Trained
from fl.sampling import Fixed
from fl.schedules.base import World
from fl.schedules.choco import CHOCO
from fl.schedules.dpsgd import DPSGD
from fl.schedules.gossip import Gossip
from fl.schedules.gradient_tracking import GradientTracking
from fl.state import ServerState, Update
from fl.topology.fixed import Torus
from fl.validation import Validator

SCHEDULES: dict[str, type[Gossip]] = {"dpsgd": DPSGD, "gradient_tracking": GradientTracking, "choco": CHOCO}


class Ready(Peers):
    """Peers whose training is done already, and takes no time that is counted."""

    def train(self, world: World, jobs: Any) -> list[Trained]:
        return [Trained(job, *self._made(job)) for job in jobs]

    def _made(self, job: PeerJob) -> tuple[TrainReply, Update]:
        vector = self.drawn[job.peer % len(self.drawn)]
        reply = TrainReply(job.peer, job.job, 0, "", vector, 10, 5, 100, 0.5)
        return reply, Update(job.peer, job.job, 0, vector, 10)


def world(number: int, size: int) -> World:
    space = Space(Layout(("x",), ((size,),)))
    server = ServerState(np.zeros(size, np.float32), space)
    made = World(
        None, range(number), 0, number, server, FedAvg(), SGD(), Fixed(), Lognormal(), LocalTraining(steps=5),
        Validator(space.layout.hash, size), Downlink(space, False, own=True),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    peers = Ready.of(server, Torus(), 0, number, frozenset())
    peers.drawn = [0.01 * rng.standard_normal(size, dtype=np.float32) for _ in range(8)]
    peers.states = rng.standard_normal((number, size), dtype=np.float32)
    made.peers = peers
    return made


def measured(number: int, size: int, schedule: str, rounds: int) -> dict[str, Any]:
    """CPU and wall seconds of a round, and of the bare product."""
    torch.set_num_threads(1)
    run = world(number, size)
    events = SCHEDULES[schedule](rounds=rounds + 1).run(run)
    cpu, wall = [], []
    for _ in range(rounds + 1):
        before = time.process_time(), time.perf_counter()
        while next(events)["event"] != "round":
            pass
        cpu.append(time.process_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    assert run.peers is not None
    weights, states = run.peers.graph(1).weights.astype(np.float32), run.peers.states
    bare = []
    for _ in range(rounds + 1):
        start = time.process_time()
        weights @ states
        bare.append(time.process_time() - start)
    product = statistics.median(bare[1:])
    return {
        "peers": number, "size": size, "schedule": schedule, "cpu_s": statistics.median(cpu[1:]),
        "fastest_wall_s": min(wall[1:]), "product_cpu_s": product, "ratio": statistics.median(cpu[1:]) / product,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['peers']:,} peers on a torus, {result['size']:,} float32 each, {result['schedule']}: a round without "
        f"training takes {result['cpu_s']:.2f} CPU s (fastest {result['fastest_wall_s']:.2f} s of wall time), "
        f"{result['ratio']:.2f} of the product W X ({result['product_cpu_s']:.2f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000, help="peers on a torus")
    parser.add_argument("--size", type=int, default=100_000, help="parameters of each")
    parser.add_argument("--schedule", choices=SCHEDULES, default="dpsgd", help="what happens in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    options = parser.parse_args()
    result = measured(options.peers, options.size, options.schedule, options.rounds)
    show(result)
    if options.out:
        options.out.write_text(json.dumps({"machine": environment.versions(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
