"""Virtual runtime of gradient coding against scheme and load, without training: assignments, deadlines, the wait rule.

    python -m benchmarks.gradient_coding                          # n = 16, 64, 256; about 3 minutes
    python -m benchmarks.gradient_coding --workers 256 --mu 1 --waiting all

Workers are a `network=gilbert_elliott`: a good round takes ``seconds_per_job`` and ``load`` times
``seconds_per_gradient``, a bad one ``slowdown`` times that. Every scheme of a grid of parameters runs ``--pilot`` jobs
on a seed of its own; of each kind the fastest is run for ``--jobs`` jobs on every one of ``--seeds``, which the choice
has not seen. Schemes, wait rule and times are those of a run (`fl.coding`, `fl.fleet`), messages take no time, and
every job is checked to be decodable at its deadline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fl.clock import seconds
from fl.coding.master import Master
from fl.coding.schemes import GC, MSGC, SRSGC, Scheme
from fl.coding.wait import WAITING
from fl.errors import ShoalError
from fl.network import GilbertElliott

KINDS = ("uncoded", "gc", "sr_sgc", "m_sgc")
PILOT_SEED = 1000
SAMPLES = 1 << 17  # what a gradient is over: enough for loads to be exact to 1e-3
_bad = lru_cache(maxsize=1 << 20)(GilbertElliott.bad)


@dataclass(frozen=True)
class Remembering(GilbertElliott):
    """`GilbertElliott` that draws each worker's spells once, however many schemes run on them."""

    def bad(self, seed: int, client: int, job: int) -> bool:
        return _bad(self, seed, client, job)


@dataclass(frozen=True)
class Choice:
    """A scheme of the grid: its kind, parameters in words, and how it is made for a number of jobs."""

    kind: str
    parameters: str
    make: Callable[[int], Scheme]


def grid(n: int) -> Iterator[Choice]:
    """What is tried: numbers of stragglers from a 64th of the workers to half of them, and short bursts and windows."""
    many = sorted(
        {max(1, round(n * share)) for share in (1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)}
    )
    yield Choice("uncoded", "", lambda jobs: GC(n, jobs, 0))
    for s in many:
        yield Choice("gc", f"s={s}", lambda jobs, s=s: GC(n, jobs, s))
    for lam in many:
        for b, w in ((1, 2), (1, 3), (2, 3), (2, 5), (3, 4)):
            words = f"B={b}, W={w}, lambda={lam}"
            yield Choice("sr_sgc", words, lambda jobs, b=b, w=w, lam=lam: SRSGC(n, jobs, b, w, lam))
        for b, w in ((1, 2), (1, 3), (2, 3), (2, 4), (3, 4)):
            words = f"B={b}, W={w}, lambda={lam}"
            yield Choice("m_sgc", words, lambda jobs, b=b, w=w, lam=lam: MSGC(n, jobs, b, w, lam))


def simulate(scheme: Scheme, network: GilbertElliott, seed: int, mu: float, waiting: str) -> tuple[float, float]:
    """Virtual seconds of a run of ``scheme``, and the share of its rounds that had to wait for late workers.

    Raises `ShoalError` if a job can't be decoded at its deadline.
    """
    master, fleet, now, waited = Master(scheme, SAMPLES, mu, waiting), network.fleet(seed, scheme.n), 0, 0
    rounds = scheme.jobs + scheme.delay
    for number in range(1, rounds + 1):
        tasks = scheme.assign(number)
        asked = {worker: (master.samples(own), 0, 0) for worker, own in enumerate(tasks) if own}
        found = master.round(fleet, number, now, asked, [])
        fastest = min((job.arrived - now for job in found.jobs.values()), default=0)
        waited += found.cut.end > int((1 + mu) * fastest)
        now += found.cut.end
        master.done(number, found.cut.late)
        due = number - scheme.delay
        if due >= 1 and not scheme.decodable(due):
            raise ShoalError(f"Job {due} can't be decoded at its deadline.")
    return seconds(now), waited / rounds


def compare(n: int, args: argparse.Namespace, network: GilbertElliott) -> dict[str, Any]:
    """The pilot's runtimes a job of the whole grid for ``n`` workers, and the chosen schemes' on all seeds."""
    tried: list[dict[str, Any]] = []
    choices = list(grid(n))
    for choice in choices:
        scheme = choice.make(args.pilot)
        took, _ = simulate(scheme, network, PILOT_SEED, args.mu, args.waiting)
        tried.append(
            {"kind": choice.kind, "parameters": choice.parameters, "load": scheme.load, "s_job": took / args.pilot}
        )
    chosen: list[dict[str, Any]] = []
    for kind in KINDS:
        best = min((i for i, c in enumerate(choices) if c.kind == kind), key=lambda i: tried[i]["s_job"])
        found = [simulate(choices[best].make(args.jobs), network, seed, args.mu, args.waiting) for seed in args.seeds]
        scheme = choices[best].make(1)
        chosen.append({
            "kind": kind, "parameters": choices[best].parameters, "load": scheme.load, "delay": scheme.delay,
            "runtimes_s": [took for took, _ in found], "waited": statistics.mean(share for _, share in found),
        })  # fmt: skip
    return {"workers": n, "pilot": tried, "chosen": chosen}


def spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(result: dict[str, Any]) -> str:
    """The chosen schemes of ``result`` as rows of Markdown, each beside GC on the same seed."""
    gc = next(row["runtimes_s"] for row in result["chosen"] if row["kind"] == "gc")
    lines = []
    for row in result["chosen"]:
        mean, std = spread(row["runtimes_s"])
        ratio, ratio_std = spread([100 * (own / other - 1) for own, other in zip(row["runtimes_s"], gc, strict=True)])
        cells = (
            result["workers"], row["kind"], row["parameters"] or "-", f"{row['load']:.4f}", row["delay"],
            f"{mean:.0f} +- {std:.0f}", f"{ratio:+.0f} +- {ratio_std:.0f} %", f"{100 * row['waited']:.0f} %",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Seconds a job against load: all that was tried, a line along the fastest at each load, the chosen marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.2 * len(results), 3.8), squeeze=False)
    for axis, result in zip(axes[0], results):
        for kind, colour in zip(KINDS, ("0.4", "C0", "C1", "C2")):
            rows = sorted((r["load"], r["s_job"]) for r in result["pilot"] if r["kind"] == kind)
            axis.plot(*zip(*rows), ".", color=colour, alpha=0.35)
            best = [row for i, row in enumerate(rows) if all(row[1] < other[1] for other in rows[:i])]
            axis.plot(*zip(*best), color=colour)
            own = next(r for r in result["chosen"] if r["kind"] == kind)
            jobs = result["jobs"]
            mean, std = spread([took / jobs for took in own["runtimes_s"]])
            axis.errorbar(own["load"], mean, std, marker="D", color=colour, capsize=3, label=kind)
        axis.set_xscale("log")
        axis.set_xticks([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5], minor=False)
        axis.set_xlim(0.7 / result["workers"], 0.7)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_title(f"{result['workers']} workers")
        axis.set_xlabel("load (share of a gradient a round)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("virtual seconds a job")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--workers", type=numbers, default=[16, 64, 256])
    parser.add_argument("--jobs", type=int, default=240)
    parser.add_argument("--pilot", type=int, default=60, help="jobs of each scheme of the grid")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--mu", type=float, default=0.2)
    parser.add_argument("--waiting", choices=WAITING, default="longer")
    parser.add_argument("--p-gb", type=float, default=0.05)
    parser.add_argument("--p-bg", type=float, default=0.8)
    parser.add_argument("--slowdown", type=float, default=4.0)
    parser.add_argument("--seconds-per-job", type=float, default=1.0)
    parser.add_argument("--seconds-per-gradient", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("outputs/gradient_coding.json"))
    args = parser.parse_args()
    network = Remembering(
        p_gb=args.p_gb, p_bg=args.p_bg, slowdown=args.slowdown, seconds_per_job=args.seconds_per_job,
        seconds_per_step=args.seconds_per_gradient / SAMPLES, latency_s=0.0, down_mbps=None, up_mbps=None,
    )  # fmt: skip
    begun, results = time.perf_counter(), []
    print("| n | scheme | parameters | load | T | runtime, s | beside GC | rounds that waited |")
    print("|--:|---|---|--:|--:|--:|--:|--:|")
    for n in args.workers:
        results.append({**compare(n, args, network), "jobs": args.jobs})
        print(table(results[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    plot(results, args.out.with_suffix(".png"))
    print(f"{args.out} and .png, after {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
