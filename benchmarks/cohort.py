"""Client-steps a second of the cohort, beside a plain PyTorch + PEFT loop and the arithmetic ceiling, in one run.

    python -m benchmarks.cohort                                  # minilm, 16 x 32 and 4 x 32
    python -m benchmarks.cohort --model bert-base --slots 1,8,32,128 --shapes 8x128

A client step is one optimiser step of one client: forward, backward and AdamW on a batch of that shape. What is timed:

* ``plain fp32``: the usual loop, one client after another: `get_peft_model`, `loss.backward()`, `torch.optim.AdamW`;
* ``plain, same``: that loop with the dtype and attention that `auto` chose;
* ``cohort S``: `clients.cohort.Cohort` with S slots, in one process with one thread (all of a GPU);
* ``auto``: the whole plan that `clients.tuning` chose, all its worker processes at once;
* ``GEMM ceiling``: the frozen layers' matrix products alone (forward, and the gradient to their inputs where the loop
  needs it), in the dtype that `auto` chose, on as many processors as `auto` uses.

All are measured in turn, `--repeats` times over, and medians and ratios of medians are printed and written as JSON.
Needs torch, transformers, peft and clients/ (with fl.config, fl.keys and fl.errors); no Flower and no Hydra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clients import tuning
from clients.adapters.lora import LoRA
from clients.cohort import Cohort, CohortBatch, causal_loss, classification_loss
from clients.data.batch import Batch
from clients.local.optimizers import AdamW
from clients.models import Base, MiniLM, ModelSpec, Shape
from clients.pool import Pool, available
from clients.trainer import Plan
from fl.keys import generator


def spec_of(name: str) -> ModelSpec:
    return MiniLM() if name == "minilm" else Shape(architecture=name)


def batch_of(task: str, samples: int, length: int, vocabulary: int, *key: int | str) -> Batch:
    """Full-length samples of random tokens."""
    rng = generator("benchmark", *key)
    ids = torch.from_numpy(rng.integers(1000, min(20000, vocabulary), (samples, length)))
    labels = ids if task == "causal_lm" else torch.from_numpy(rng.integers(0, 2, samples))
    return Batch(ids, torch.ones_like(ids), labels)


class Bench:
    """The things to time, on one model and batch shape. Runs in children on a CPU, some for each number of threads."""

    def __init__(self, spec: ModelSpec, rank: int, samples: int, length: int):
        self.spec, self.rank, self.samples, self.length = spec, rank, samples, length
        self.cache: dict[tuple, object] = {}

    def base(self, dtype: torch.dtype, attention: str, device: str) -> Base:
        labels = 2 if self.spec.task == "classification" else None
        return self.spec.load(labels, 0, dtype=dtype, attention=attention, device=device)

    def make(self, dtype: torch.dtype, attention: str, device: str) -> Cohort:
        base = self.base(dtype, attention, device)
        return Cohort(LoRA(rank=self.rank).attach(base, self.spec.target_modules, 0), base.task, device)

    def vocabulary(self) -> int:
        return self.spec.tokenizer().vocab_size

    def batches(self, number: int) -> list[Batch]:
        return [batch_of(self.spec.task, self.samples, self.length, self.vocabulary(), i) for i in range(number)]

    def _kept(self, key: tuple, build: Callable[[], object]) -> object:
        if key not in self.cache:
            self.cache.clear()  # one model at a time: memory is measured too
            self.cache[key] = build()
        return self.cache[key]

    def plain(self, plan: Plan) -> float:
        """Seconds of a client step of the plain loop (a fresh optimiser for each of two clients, two steps each)."""

        def build() -> tuple[nn.Module, list[nn.Parameter], str]:
            base = self.base(plan.torch_dtype, plan.attention, plan.device)
            model = LoRA(rank=self.rank).attach(base, self.spec.target_modules, 0)
            return model, [p for p in model.parameters() if p.requires_grad], base.task

        model, parameters, task = self._kept(("plain", plan.dtype, plan.attention), build)  # type: ignore[misc]
        loss_of = classification_loss if task == "classification" else causal_loss
        data = [(b.input_ids, b.attention_mask, b.labels) for b in self.batches(2)]
        data = [tuple(t.to(plan.device) for t in b) for b in data]  # type: ignore[misc]
        seconds = []
        for ids, mask, labels in data:
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
            for _ in range(2):
                start = time.perf_counter()
                logits = model(input_ids=ids, attention_mask=mask).logits.float()
                loss_of(logits[None], labels[None]).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                _wait(plan.device)
                seconds.append(time.perf_counter() - start)
        return min(seconds)

    def cohort(self, plan: Plan, slots: int) -> float:
        """Seconds of a client step in a cohort of ``slots``."""
        probe = self._kept(
            ("cohort", plan.dtype, plan.attention), lambda: tuning.Probe(self.make, self.batches(4), AdamW())
        )
        assert isinstance(probe, tuning.Probe)
        return probe.seconds(plan, slots, repeats=2)

    def ceiling(self, plan: Plan, slots: int) -> float:
        """Seconds of a client step's frozen matrix products alone."""
        shapes = self._kept(("shapes",), self.shapes)
        assert isinstance(shapes, list)
        rows, dtype, total = slots * self.samples * self.length, plan.torch_dtype, 0.0
        for inner, outer, passes in sorted(set(shapes)):
            x = torch.randn(rows, inner, device=plan.device, generator=_source(plan.device)).to(dtype)
            w = torch.randn(outer, inner, device=plan.device, generator=_source(plan.device)).to(dtype)
            dy = torch.randn(rows, outer, device=plan.device, generator=_source(plan.device)).to(dtype)
            best = float("inf")
            for _ in range(4):
                start = time.perf_counter()
                torch.mm(x, w.T)
                if passes == 2:
                    torch.mm(dy, w)
                _wait(plan.device)
                best = min(best, time.perf_counter() - start)
            total += best * shapes.count((inner, outer, passes))
        return total / slots

    def shapes(self) -> list[tuple[int, int, int]]:
        """(in, out, passes) of each frozen linear layer; 2 passes where a gradient goes back through it."""
        found: list[tuple[int, int, int]] = []
        cohort = self.make(torch.float32, "sdpa", "cpu")
        handles = []

        def record(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            weight = module.weight
            outer, inner = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]  # type: ignore[union-attr,misc]
            found.append((int(inner), int(outer), 2 if args[0].requires_grad else 1))

        for module in cohort.model.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                handles.append(module.register_forward_hook(record))
        batch = batch_of(self.spec.task, 1, 4, self.vocabulary(), 0)
        cohort.gradients(cohort.initial[None], CohortBatch.of([batch]))
        for handle in handles:
            handle.remove()
        return found


def _source(device: str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Runner:
    """Calls `Bench` in children with a given number of threads (CPU), or here (GPU)."""

    def __init__(self, bench: Bench, device: str):
        self.bench, self.forked = bench, device == "cpu" and available()
        self.pools: dict[tuple, Pool] = {}

    def __call__(self, method: str, workers: int, threads: int, *arguments: object) -> float:
        if not self.forked:
            return getattr(self.bench, method)(*arguments)
        # A pool for each kind of model, so that no child has to load one twice.
        key = (method, workers, threads, str(arguments[0]) if method == "plain" else "")
        if key not in self.pools:
            self.pools[key] = Pool(self.bench, workers, threads)
        times = self.pools[key].run([(method, arguments)] * workers)
        return sum(times) / len(times) / workers

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


def measure(spec: ModelSpec, rank: int, samples: int, length: int, slots: list[int], repeats: int, device: str) -> dict:
    """All rows of one batch shape."""
    bench = Bench(spec, rank, samples, length)
    # One round of the quickstart: ten clients.
    jobs = 10 if device == "cpu" else max(slots)
    probe = tuning.Probe(bench.make, bench.batches(4), AdamW())
    shape = ["benchmark", spec, rank, samples, length]
    plan = tuning.choose(
        tuning.Resources(device=device), probe, jobs, shape, lambda text: print("  " + text, flush=True)
    )
    cores = tuning.processors() if device == "cpu" else 1
    run = Runner(bench, device)
    one = replace(plan, workers=1, threads=1) if device == "cpu" else plan
    usual = replace(plan, dtype="float32", attention="sdpa")
    busy = max(plan.workers * plan.threads, 1) if device == "cpu" else 1
    rows: dict[str, Callable[[], float]] = {
        "plain fp32": lambda: run("plain", 1, cores, usual),
        "plain, same": lambda: run("plain", 1, cores, replace(plan, workers=1, threads=cores)),
        "plain fp32, 1 thread": lambda: run("plain", 1, 1, usual),
        "plain, same, 1 thread": lambda: run("plain", 1, 1, one),
        **{f"cohort {s}": (lambda s=s: run("cohort", 1, 1, one, s)) for s in slots},
        "auto": lambda: run("cohort", plan.workers, plan.threads, plan, plan.cohort_size),
        "GEMM ceiling": lambda: run("ceiling", busy, 1, plan, plan.cohort_size),
    }  # fmt: skip
    if device != "cpu":
        rows = {k: v for k, v in rows.items() if "1 thread" not in k}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    try:
        for repeat in range(repeats + 1):  # the first is a warm-up
            for name, call in rows.items():
                try:
                    value = call()
                except torch.OutOfMemoryError:
                    continue
                if repeat:
                    seconds[name].append(value)
    finally:
        run.close()
    median = {name: statistics.median(values) for name, values in seconds.items() if values}
    return {
        "samples": samples,
        "length": length,
        "plan": plan.settings(),
        "client_steps_per_s": {name: 1 / value for name, value in median.items()},
        "tokens_per_s": {name: samples * length / value for name, value in median.items()},
        "spread": {name: [min(v), max(v)] for name, v in seconds.items() if v},
        "times plain fp32": {name: median["plain fp32"] / value for name, value in median.items()},
        "times plain, same": {name: median["plain, same"] / value for name, value in median.items()},
        "share of GEMM ceiling": {name: median["GEMM ceiling"] / value for name, value in median.items()},
    }


def table(result: dict) -> str:
    lines = [f"{'':24}{'client-steps/s':>15}{'tokens/s':>12}{'x plain fp32':>14}{'x plain same':>14}{'of ceiling':>12}"]
    for name, rate in result["client_steps_per_s"].items():
        lines.append(
            f"{name:24}{rate:15.2f}{result['tokens_per_s'][name]:12,.0f}{result['times plain fp32'][name]:14.2f}"
            f"{result['times plain, same'][name]:14.2f}{result['share of GEMM ceiling'][name]:12.2f}"
        )
    return "\n".join(lines)


def loss_curves(steps: int, plan: Plan) -> float | None:
    """Largest gap between the loss curves of the plain float32 loop and the cohort as planned, on the demo's data.

    The curve is the mean over four clients, smoothed over 5 steps. None where the data can't be had.
    """
    from clients.data.sources.vader import Vader
    from fl.errors import ShoalError

    spec = MiniLM()
    try:
        train, _ = Vader(max_length=32).load(spec)
    except ShoalError:
        return None
    clients, size = 4, 16
    order = generator("curve").permutation(len(train))[: clients * size * 8].reshape(clients, 8, size)
    bench = Bench(spec, 8, size, 32)

    def curve(dtype: torch.dtype, attention: str) -> np.ndarray:
        cohort = bench.make(dtype, attention, "cpu")
        states = cohort.initial.repeat(clients, 1)
        optimizer, lr = AdamW(), torch.full((clients, 1), 2e-3)
        memory, losses = optimizer.init(states), []
        for step in range(steps):
            batch = CohortBatch.of([train.batch(order[c, step % 8]) for c in range(clients)])
            loss, grads = cohort.gradients(states, batch)
            optimizer.step(states, grads, memory, step + 1, lr)
            losses.append(float(loss.mean()))
        return np.convolve(losses, np.ones(5) / 5, mode="valid")

    return float(np.abs(curve(torch.float32, "sdpa") - curve(plan.torch_dtype, plan.attention)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="minilm", help="minilm, or an architecture of model=shape (bert-base, llama-1b)"
    )
    parser.add_argument("--shapes", default="16x32,4x32", help="samples x tokens, several with commas")
    parser.add_argument("--slots", default="1,2,4,8,16,32")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--curve", type=int, default=40, help="steps of the loss-curve check (minilm, CPU); 0: none")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = tuning.pick_device(options.device)
    spec, slots = spec_of(options.model), [int(s) for s in options.slots.split(",")]
    results = {"model": options.model, "rank": options.rank, "machine": tuning.machine(device), "shapes": []}
    print(
        f"{options.model}, LoRA r={options.rank} on {', '.join(spec.target_modules)}; {'; '.join(results['machine'])}"
    )
    for shape in options.shapes.split(","):
        samples, length = (int(n) for n in shape.split("x"))
        print(f"\n{samples} samples x {length} tokens", flush=True)
        result = measure(spec, options.rank, samples, length, slots, options.repeats, device)
        results["shapes"].append(result)
        print(table(result), flush=True)
    if options.model == "minilm" and device == "cpu" and options.curve:
        gap = loss_curves(options.curve, Plan(**results["shapes"][0]["plan"]))
        results["largest gap of the loss curves"] = gap
        print(f"\nlargest gap between the float32 loop's loss curve and the cohort's over {options.curve} steps: {gap}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
