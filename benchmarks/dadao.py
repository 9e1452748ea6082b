"""What DADAO and gradient tracking cost on the same convex problem and graph: gradients, uses of edges, vectors sent.

    python -m benchmarks.dadao                                  # quadratics: identical and rotated Hessians
    python -m benchmarks.dadao --problem head --l2 0.1 0.01     # softmax regression on MiniLM's features of VADER

Both run until the mean squared distance of the peers' x to the optimum is ``--to`` of that at the start. DADAO
(`fl.gossip.engine`) has its own constants, L and mu as they are, and the least communication that it converges with;
its counts are means over ``--seeds`` of clocks. Gradient tracking has Metropolis-Hastings weights and the best of 19
steps between 0.01 / L and 13 / L, which a user would not know. A use of an edge carries 2 vectors of DADAO (one each
way) and 4 of gradient tracking.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from clients.heads import SoftmaxHead
from fl.gossip.dadao import Dadao, X
from fl.gossip.engine import Engine
from fl.gossip.rates import uniform
from fl.keys import generator
from fl.topology.base import Topology
from fl.topology.fixed import Complete, Ring, Star, Torus

PEERS, UNIT = 16, 1_000_000
GRAPHS: dict[str, Topology] = {"ring": Ring(), "torus": Torus(), "star": Star(), "complete": Complete()}
STEPS = 0.01 * 400.0 ** (np.arange(19) / 15)  # times 1 / L


@dataclass
class Problem:
    """n objectives: ``gradient(peers, points)`` of some of them, each at its own point, and the optimum of the mean."""

    gradient: Callable[[np.ndarray, np.ndarray], np.ndarray]
    best: np.ndarray
    smoothness: float
    convexity: float

    def error(self, models: np.ndarray) -> float:
        """The mean squared distance of ``models`` ``(n, d)`` to the optimum, over that of zero."""
        return float(np.square(models - self.best).sum(axis=1).mean() / (self.best @ self.best))


def quadratic(kappa: float, rotated: bool, size: int = 10) -> Problem:
    """``x^T H_i x / 2 + b_i^T x``, the eigenvalues of each H_i spread from ``1 / kappa`` to 1."""
    draws = generator("dadao benchmark", int(kappa), int(rotated))
    hessians = np.repeat(np.diag(np.geomspace(1 / kappa, 1, size))[None], PEERS, axis=0)
    if rotated:
        turns = np.linalg.qr(draws.normal(size=(PEERS, size, size)))[0]
        hessians = turns @ hessians @ turns.transpose(0, 2, 1)
    offsets = draws.normal(size=(PEERS, size))
    best = np.linalg.solve(hessians.mean(axis=0), -offsets.mean(axis=0))
    return Problem(
        lambda peers, points: np.einsum("kab,kb->ka", hessians[peers], points) + offsets[peers], best, 1.0, 1 / kappa
    )


def heads(settings: Sequence[str], l2: float) -> Problem:
    """The objectives of ``schedule=dadao`` over ``settings``."""
    from fl.compose import compose
    from fl.experiment import Experiment, Settings
    from fl.schedules.dadao import HeadPart

    words = ["adapter=head", "schedule=dadao", f"clients.number={PEERS}", *settings]
    experiment = Experiment(Settings.of(compose(words)[0]))
    try:
        part = HeadPart(experiment, l2)
        own: list[SoftmaxHead] = [part.problem(peer) for peer in range(PEERS)]
    finally:
        experiment.close()

    def whole(point: np.ndarray) -> tuple[float, np.ndarray]:
        return float(np.mean([h.loss(point) for h in own])), np.mean([h.gradient(point) for h in own], axis=0)

    options = {"maxiter": 20_000, "maxfun": 40_000, "gtol": 1e-11, "ftol": 0.0, "maxcor": 50}
    found = minimize(whole, np.zeros(own[0].size), jac=True, method="L-BFGS-B", options=options)
    return Problem(
        lambda peers, points: np.stack([own[i].gradient(x) for i, x in zip(peers, points, strict=True)]),
        found.x, max(h.smoothness() for h in own), l2,
    )  # fmt: skip


def dadao(problem: Problem, graph: Topology, to: float, seed: int) -> dict[str, float]:
    """Gradients of a peer and uses of edges until the error is ``to``."""
    pairs = graph.graph(PEERS, 0, 1).edges
    rates = uniform(PEERS, pairs)
    method = Dadao(
        np.zeros((PEERS, len(problem.best))), problem.smoothness, problem.convexity, rates.times(rates.needed)
    )
    run = Engine(method, problem.gradient, seed, UNIT)
    step = max(1.0, math.sqrt(problem.smoothness / problem.convexity) / 10)
    time = 0.0
    while problem.error(method.at(time)[:, X]) > to:
        time += step
        run.run(round(time * UNIT))
        time = round(time * UNIT) / UNIT
    return {"gradients": float(run.gradients.mean()), "uses": float(run.uses.sum()), "vectors": 2.0 * run.uses.sum()}


def tracking(problem: Problem, graph: Topology, to: float, most: int) -> dict[str, float] | None:
    """The same of gradient tracking with the best step of the grid; None: none came there in ``most`` rounds."""
    made = graph.graph(PEERS, 0, 1)
    weights, everyone = np.asarray(made.weights.todense()), np.arange(PEERS)
    best: dict[str, float] | None = None
    for scale in STEPS[::-1]:
        x, lr = np.zeros((PEERS, len(problem.best))), scale / problem.smoothness
        slopes = problem.gradient(everyone, x)
        y = slopes.copy()
        for count in range(1, most + 1):
            x = weights @ (x - lr * y)
            fresh = problem.gradient(everyone, x)
            y, slopes = weights @ y + fresh - slopes, fresh
            error = problem.error(x)
            if error <= to:
                uses = float(count * len(made.edges))
                best = {"step": float(scale), "gradients": float(count), "uses": uses, "vectors": 4 * uses}
                most = count  # a step that takes longer is of no interest
            if error <= to or not error < 1e6:
                break
    return best


def measured(
    cases: Iterator[tuple[str, Problem]], graphs: Sequence[str], to: float, seeds: int, most: int
) -> list[dict]:
    rows = []
    for name, problem in cases:
        kappa = problem.smoothness / problem.convexity
        for graph in graphs:
            runs = [dadao(problem, GRAPHS[graph], to, seed) for seed in range(seeds)]
            ours = {key: float(np.mean([r[key] for r in runs])) for key in runs[0]}
            other = tracking(problem, GRAPHS[graph], to, most)
            rows.append({"problem": name, "kappa": kappa, "graph": graph, "dadao": ours, "tracking": other})
            print(line(rows[-1]), flush=True)
    return rows


HEADER = (
    "| problem | L/mu | graph | gradients of a peer: DADAO | tracking | uses of edges: DADAO | tracking "
    "| vectors: DADAO | tracking | step L |\n|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"
)


def line(row: dict[str, Any]) -> str:
    ours, other = row["dadao"], row["tracking"]
    cells = [
        text
        for key in ("gradients", "uses", "vectors")
        for text in (f"{ours[key]:,.0f}", "-" if other is None else f"{other[key]:,.0f}")
    ]
    step = "-" if other is None else f"{other['step']:.2f}"
    return f"| {row['problem']} | {row['kappa']:,.0f} | {row['graph']} | {' | '.join(cells)} | {step} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=["quadratic", "head"], default="quadratic")
    parser.add_argument("--kappa", type=float, nargs="*", default=[20, 100, 1000])
    parser.add_argument("--l2", type=float, nargs="*", default=[0.1, 0.01])
    parser.add_argument("--graphs", nargs="*", choices=list(GRAPHS), default=list(GRAPHS))
    parser.add_argument(
        "--to", type=float, default=1e-4, help="squared distance to the optimum, over that at the start"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of DADAO's clocks")
    parser.add_argument("--most", type=int, default=20_000, help="rounds of gradient tracking")
    parser.add_argument(
        "--set", nargs="*", default=["data.max_train=1000"], metavar="key=value", help="for --problem head"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    print(HEADER, flush=True)
    if options.problem == "head":
        cases = ((f"head, l2 {l2:g}", heads(options.set, l2)) for l2 in options.l2)
    else:
        kinds = ((kappa, rotated) for rotated in (False, True) for kappa in options.kappa)
        cases = (("rotated" if rotated else "identical", quadratic(kappa, rotated)) for kappa, rotated in kinds)
    rows = measured(cases, options.graphs, options.to, options.seeds, options.most)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"peers": PEERS, "to": options.to, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
