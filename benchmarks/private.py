"""DP-SGD in the cohort beside the same step without privacy, and beside Opacus, in one run.

    python -m benchmarks.private                                  # minilm, 8 clients, 16 x 32 and 16 x 64 of any length
    python -m benchmarks.private --model bert-base --slots 4 --shapes 16x128

A client step is forward, backward, clipping to C = 1 by sample, noise, and AdamW, for LoRA r=8 and the head. Timed are

* ``cohort``: S clients in one pass without privacy (`clients.cohort.Cohort.gradients`);
* ``private``: the same with `clients.local.private.gradients`;
* ``hooks``, ``ghost``: Opacus' per-sample gradients and ghost clipping with `DPOptimizer`, one client after another;

each in float32 with SDPA and in the precision and attention that `clients.tuning` chose for this machine, with one
thread; and ``auto``, the whole plan, beside Opacus with as many threads as there are processors. The shape ``16x32``
has samples of 32 tokens, ``16x4-64`` of lengths drawn uniformly from 4 to 64; Opacus pads a batch to its longest.

All are measured in turn, ``--repeats`` times over. The machine may be at other work, so times are the least of the
repeats, and ratios those of these; the spread is in the JSON. Opacus takes the mean over all tokens of a language
model's batch, which is another gradient, so only classifiers are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch.nn import CrossEntropyLoss

from benchmarks.cohort import Bench, Runner, batch_of, spec_of
from clients import tuning
from clients.adapters.lora import LoRA
from clients.data.batch import Batch
from clients.local.optimizers import AdamW
from clients.local.private import Private
from clients.models import ModelSpec
from clients.trainer import Plan
from fl.errors import ConfigError
from fl.keys import generator

MODES = ("hooks", "ghost")


class PrivateBench(Bench):
    """The things to time, on one model, for ``clients`` batches of ``samples`` of ``shortest`` to ``length`` tokens."""

    def __init__(self, spec: ModelSpec, rank: int, samples: int, shortest: int, length: int, clients: int):
        super().__init__(spec, rank, samples, length)
        self.shortest, self.clients = shortest, clients

    def batches(self, number: int) -> list[Batch]:
        out = []
        for i in range(number):
            whole = batch_of(self.spec.task, self.samples, self.length, self.vocabulary(), i)
            ends = generator("benchmark", "length", i).integers(self.shortest, self.length + 1, self.samples)
            mask = (torch.arange(self.length) < torch.from_numpy(ends)[:, None]).long()
            labels = whole.labels if whole.labels.dim() == 1 else whole.labels.masked_fill(mask == 0, -100)
            width = int(ends.max())
            labels = labels if labels.dim() == 1 else labels[:, :width]
            out.append(Batch((whole.input_ids * mask)[:, :width], mask[:, :width], labels))
        return out

    def _kept(self, key: tuple, build: Callable[[], object]) -> object:
        if key not in self.cache:  # all of them: loading takes longer than a step
            self.cache[key] = build()
        return self.cache[key]

    def probe(self, private: bool) -> tuning.Probe:
        mechanism = Private(1.0, 1.0, self.samples, ("benchmark",)) if private else None
        return tuning.Probe(self.make, self.batches(self.clients), AdamW(), private=mechanism)

    def step(self, plan: Plan, slots: int, private: bool) -> float:
        """Seconds of a client step in a cohort of ``slots``."""
        probe = self._kept(("step", plan.dtype, plan.attention, private), lambda: self.probe(private))
        assert isinstance(probe, tuning.Probe)
        return probe.seconds(plan, slots, repeats=2)

    def opacus(self, plan: Plan, mode: str) -> float:
        """Seconds of a client step with Opacus: the mean over the clients' batches, each with a fresh optimiser."""

        def build() -> Callable[[Batch], float]:
            base = self.base(plan.torch_dtype, plan.attention, plan.device)
            model = LoRA(rank=self.rank).attach(base, self.spec.target_modules, 0).train()
            return (_hooks if mode == "hooks" else _ghost)(model, self.samples, base.task)

        step = self._kept(("opacus", mode, plan.dtype, plan.attention), build)
        return statistics.fmean(step(batch) for batch in self.batches(self.clients))  # type: ignore[operator]


def _loss(task: str) -> Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]]:
    """Logits and targets as a criterion takes them. Opacus' ghost clipping wants a row for each sample."""
    if task != "classification":
        raise ConfigError("--model", task, "a classifier: Opacus averages tokens over the batch, not over a sample")
    return lambda logits, batch: (logits.float(), batch.labels)


def _timed(forward: Callable[[Batch], None], step: Callable[[], None], batch: Batch) -> float:
    start = time.perf_counter()
    forward(batch)
    step()
    return time.perf_counter() - start


def _hooks(model: torch.nn.Module, samples: int, task: str) -> Callable[[Batch], float]:
    prepare = _loss(task)
    module = GradSampleModule(model, strict=False, loss_reduction="mean")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(batch: Batch) -> float:
        inner = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        optimizer = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=samples)

        def forward(batch: Batch) -> None:
            optimizer.zero_grad()
            logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            torch.nn.functional.cross_entropy(*prepare(logits, batch)).backward()

        return _timed(forward, optimizer.step, batch)

    return run


def _ghost(model: torch.nn.Module, samples: int, task: str) -> Callable[[Batch], float]:
    prepare = _loss(task)
    module = GradSampleModuleFastGradientClipping(model, strict=False, loss_reduction="mean", max_grad_norm=1.0)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(batch: Batch) -> float:
        inner = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        optimizer = DPOptimizerFastGradientClipping(
            inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=samples
        )
        criterion = DPLossFastGradientClipping(module, optimizer, CrossEntropyLoss())

        def forward(batch: Batch) -> None:
            optimizer.zero_grad()
            logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            criterion(*prepare(logits, batch)).backward()

        return _timed(forward, optimizer.step, batch)

    return run


def measure(spec: ModelSpec, rank: int, shape: str, slots: int, repeats: int, wanted: tuning.Resources) -> dict:
    """All rows of one batch shape."""
    samples, _, lengths = shape.partition("x")
    shortest, _, length = lengths.rpartition("-")
    bench = PrivateBench(spec, rank, int(samples), int(shortest or length), int(length), slots)
    named = ["private benchmark", spec, rank, shape]
    plan = tuning.choose(wanted, bench.probe(True), slots, named, lambda text: print("  " + text, flush=True))
    run, cores = Runner(bench, "cpu"), tuning.processors()
    single = Plan("cpu", "float32", "sdpa", slots, 1, 1)
    chosen = replace(plan, workers=1, threads=1)
    rows: dict[str, Callable[[], float]] = {}
    for name, one in (("", single), (f" {plan.dtype} {plan.attention}", chosen)):
        rows["cohort" + name] = lambda one=one: run("step", 1, 1, one, slots, False)
        rows["private" + name] = lambda one=one: run("step", 1, 1, one, slots, True)
        for mode in MODES:
            rows[mode + name] = lambda one=one, mode=mode: run("opacus", 1, 1, one, mode)
    rows["auto"] = lambda: run("step", plan.workers, plan.threads, plan, min(slots, plan.cohort_size), True)
    for mode in MODES:
        rows[f"{mode}, {cores} threads"] = lambda mode=mode: run("opacus", 1, cores, single, mode)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    try:
        for repeat in range(repeats + 1):  # the first is a warm-up
            for name, call in rows.items():
                value = call()
                if repeat:
                    seconds[name].append(value)
    finally:
        run.close()
    best = {name: min(values) for name, values in seconds.items()}
    ratios = {}
    for end in dict.fromkeys(("", f" {plan.dtype} {plan.attention}")):
        ratios["private / cohort" + end] = best["private" + end] / best["cohort" + end]
        ratios |= {f"{mode} / private" + end: best[mode + end] / best["private" + end] for mode in MODES}
    ratios |= {f"{mode}, {cores} threads / auto": best[f"{mode}, {cores} threads"] / best["auto"] for mode in MODES}
    return {
        "shape": shape, "slots": slots, "plan": plan.settings(), "seconds of a client step": best,
        "spread": {name: [min(v), max(v)] for name, v in seconds.items()}, "ratios": ratios,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, or a classifier of model=shape (bert-base)")
    parser.add_argument("--shapes", default="16x32,16x4-64", help="samples x tokens, several with commas")
    parser.add_argument("--slots", type=int, default=8, help="clients")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16: of the plan that is chosen")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = spec_of(options.model)
    wanted = tuning.Resources(device="cpu", dtype=options.dtype)
    results = {"model": options.model, "rank": options.rank, "machine": tuning.machine("cpu"), "shapes": []}
    print(f"{options.model}, LoRA r={options.rank}, {options.slots} clients; {'; '.join(results['machine'])}")
    for shape in options.shapes.split(","):
        print(f"\n{shape}", flush=True)
        result = measure(spec, options.rank, shape, options.slots, options.repeats, wanted)
        results["shapes"].append(result)
        for name, value in result["seconds of a client step"].items():
            print(f"{name:34}{value:10.4f} s")
        for name, value in result["ratios"].items():
            print(f"{name:44}{value:8.2f}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
