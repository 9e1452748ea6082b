"""A client's local steps as one differentiable function of its data.

A client's update after E full-batch steps is a function of where it started and of its data,

    U(w; X, Y) = w_E - w,    w_{k+1} = step( w_k, grad (1/m) sum_j CE( softmax(Y_j), f(w_k; X_j) ) )

with the client's own ``step`` (`LocalTraining`). The gradients keep their graphs, so U can be differentiated in X and Y
through all E steps. Tokens are discrete, so X is a tensor of hidden states: those that enter the first adapted layer.
All below it is frozen: nothing of an update says more about the tokens than they do, and the layers below need not run.
Y are the logits of soft labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.cohort import Cohort, CohortBatch
from clients.local.training import LocalTraining, clip_rows
from clients.prefix import skipping
from fl.errors import ConfigError

HEADS = {"classifier", "score", "lm_head"}  # what may be adapted outside the layers: it comes after them


@dataclass
class Samples:
    """m made-up samples for each of S slots: hidden states ``x`` ``(S, m, T, h)``, and logits of soft labels ``y``.

    ``y`` is ``(S, m, C)``, or ``(S, m, T - 1, V)`` for the next tokens of a causal language model.
    """

    x: Tensor
    y: Tensor


class Entrance:
    """Lets the hidden states of a `CohortBatch` (its ``prefix``) enter a model at its first adapted layer.

    Raises `ConfigError` where something is adapted below the model's list of layers, or beside it.
    """

    def __init__(self, cohort: Cohort):
        layers, cut = _adapted(cohort)
        self.cohort, self._seen = cohort, torch.empty(0)
        self.outputs = 0  # classes, or words of the vocabulary; known once something has passed
        for layer in layers[:cut]:
            layer.forward = skipping(layer.forward, lambda: cohort.slots.prefix is not None)
        layers[cut].register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        prefix = self.cohort.slots.prefix
        if prefix is None:
            self._seen = args[0] if args else kwargs["hidden_states"]
            return args, kwargs
        return ((prefix, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": prefix})

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(n, T, h)``: what enters the first adapted layer for the token ids ``(n, T)``."""
        mask = torch.ones_like(ids) if mask is None else mask
        batch = CohortBatch(ids[None], mask[None], ids[None], torch.ones(1, len(ids)), [len(ids)])
        with torch.no_grad():
            initial = self.cohort.initial.to(self.cohort.device)[None]
            self.outputs = self.cohort.logits(self.cohort.layout.views(initial), batch).shape[-1]
        return self._seen

    def random(self, number: int, width: int, generator: torch.Generator) -> Tensor:
        """``(number, width, h)``: the hidden states of random tokens."""
        config: Any = self.cohort.model.config
        ids = torch.randint(config.vocab_size, (number, width), generator=generator)
        return self.hidden(ids.to(self.cohort.device))


def _adapted(cohort: Cohort) -> tuple[Sequence[nn.Module], int]:
    """The model's list of layers and the index of the first adapted one."""
    paths = [path for path, module in cohort.model.named_modules() if any(module is s for _, _, s in cohort.swaps)]
    for path, module in cohort.model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        inside = [int(p[len(path) + 1 :].split(".")[0]) for p in paths if p.startswith(path + ".")]
        beside = {p.rpartition(".")[2] for p in paths if not p.startswith(path + ".")}
        if inside and beside <= HEADS:
            return list(module), min(inside)
    allowed = "modules of the model's layers, so that hidden states can enter below all that is adapted"
    raise ConfigError("adapter.target_modules", paths[:3], allowed, "Or use another aggregator.staleness.")


class Unrolled:
    """``U(w; X, Y)`` of a client with the algorithm ``local``, for S slots at once; differentiable in X and Y.

    The steps are those of `LocalTraining.fit`, made by the same code, for a client whose examples are one batch. An
    optimiser that changes tensors which its own gradient needs (AdamW) can't be differentiated so.
    """

    def __init__(self, cohort: Cohort, local: LocalTraining):
        self.cohort, self.local, self.steps = cohort, local, local.num_steps(1)

    def change(
        self, start: Tensor, samples: Samples, trained: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``(S, d)``: the change of ``start`` ``(S, d)`` after the local steps, at ``local.lr``, on ``samples``.

        ``trained`` ``(d,)`` bool are the columns that move (None: all); ``mask`` ``(S, m, T)`` is 1 at tokens that
        count (None: all do).
        """
        differentiable = samples.x.requires_grad or samples.y.requires_grad
        batch, targets = self._batch(samples, mask), samples.y.softmax(-1)
        params = start.clone()
        state = self.local.optimizer.init(params)
        lr = torch.full((len(start), 1), self.local.lr, dtype=start.dtype, device=start.device)
        for step in range(1, self.steps + 1):
            if not params.requires_grad:
                params.requires_grad_()
            loss = self._loss(params, batch, targets)
            grads = torch.autograd.grad(loss.sum(), params, create_graph=differentiable)[0]
            grads = grads.clone() if trained is None else grads * trained
            # In place on copies: an algorithm's own code may overwrite what it is given, and the graph needs the rest.
            params = params.clone() if differentiable else params.detach()
            grads = self.local.direction(params, grads, start, self.cohort)
            if self.local.clip_norm is not None:
                grads = clip_rows(grads, self.local.clip_norm)
            self.local.optimizer.step(params, grads, state, step, lr)
            if trained is not None:  # weight decay moves what has no gradient too
                params = torch.where(trained, params, start)
        return params - start

    def _batch(self, samples: Samples, mask: Tensor | None) -> CohortBatch:
        slots, number, width, _ = samples.x.shape
        # Token ids are not read, but some models look for padding among them.
        ids = torch.ones(slots, number, width, dtype=torch.long, device=samples.x.device)
        weights = torch.full((slots, number), 1 / number, dtype=torch.float64, device=samples.x.device)
        mask = torch.ones_like(ids) if mask is None else mask
        return CohortBatch(ids, mask, ids[..., 0], weights, [number] * slots, prefix=samples.x)

    def _loss(self, params: Tensor, batch: CohortBatch, targets: Tensor) -> Tensor:
        """``(S,)``: cross-entropy to the soft labels ``targets``, as `clients.cohort` has it for hard ones."""
        logits = self.cohort.logits(self.cohort.layout.views(params), batch)
        if targets.dim() == 4:
            logits = logits[..., :-1, :]
        losses = -(targets * F.log_softmax(logits, -1)).sum(-1)
        return losses.flatten(1).mean(1)
