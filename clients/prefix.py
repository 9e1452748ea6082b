"""The frozen prefix: layers below the first adapter give the same activations every round, so compute them once.

With adapters in the top layers only, the hidden states that enter the first adapted layer depend on the tokens and
the frozen weights alone. They are kept for each example at its own length (tokens x hidden scalars) and laid into
the batch; the layers below are skipped. Exact, except that positions which are padding hold zeros instead of unused
values. Not valid with dropout below the cut, nor when the base changes: `reset` then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clients.cohort import Cohort, CohortBatch
from clients.data.tokens import TokenData

HEADS = {"classifier", "score", "lm_head", "qa_outputs"}


class _Captured(Exception):
    """Raised once the hidden states are in hand: the layers above need not run."""


def first_adapted_layer(cohort: Cohort) -> tuple[nn.ModuleList | None, int]:
    """The model's list of layers and the index of its first adapted one; ``(None, 0)`` where nothing can be skipped."""
    paths = [path for path, module in cohort.model.named_modules() if any(module is s for _, _, s in cohort.swaps)]
    for path, module in cohort.model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            inside = [int(p[len(path) + 1 :].split(".")[0]) for p in paths if p.startswith(path + ".")]
            if not inside and not all(HEADS & set(name.split(".")) for name in cohort.layout.names):
                continue
            names = {p for p in paths if not p.startswith(path + ".")}
            cut = min(inside, default=len(module) - 1)  # where a head alone trains, all layers but the last
            # Whatever is adapted outside the layers must come after them, as a head does.
            head = all(p.rpartition(".")[2] in HEADS for p in names)
            return (module, cut) if head and cut > 0 else (None, 0)
    return None, 0


class PrefixCache:
    """Hidden states that enter the first adapted layer, for every example of ``sets`` (named `TokenData`).

    `fill` computes them all, in an order that depends on the data alone, before worker processes are forked: so they
    are shared, and the same for any number of workers.
    """

    def __init__(self, cohort: Cohort, sets: Mapping[str, TokenData], batch: int = 64):
        layers, self.cut = first_adapted_layer(cohort)
        if layers is None:
            raise ValueError("no layer below the first adapter: nothing to cache")
        self.cohort, self.sets, self.batch = cohort, dict(sets), batch
        self.rows: dict[str, Tensor] = {}  # (tokens of the set, hidden)
        self._captured: Tensor | None = None
        self._capturing = False
        self._below = list(layers[: self.cut])
        slots = cohort.slots
        for layer in self._below:
            layer.forward = skipping(layer.forward, lambda: slots.prefix is not None)
        self._hook = layers[self.cut].register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self._capturing:
            self._captured = args[0] if args else kwargs["hidden_states"]
            raise _Captured
        prefix = self.cohort.slots.prefix
        if prefix is None:
            return args, kwargs
        return ((prefix, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": prefix})

    def remove(self) -> None:
        """Give the model its own forward passes back."""
        self._hook.remove()
        for layer in self._below:
            del layer.forward

    def bytes_needed(self) -> int:
        """Memory of all hidden states: tokens x hidden size x bytes of a scalar."""
        name = next(iter(self.sets))
        sample = self._hidden(name, np.zeros(1, dtype=np.int64))
        tokens = sum(int(np.sum(d.lengths)) for d in self.sets.values())
        return tokens * sample.shape[-1] * sample.element_size()

    def _hidden(self, name: str, examples: np.ndarray) -> Tensor:
        batch = CohortBatch.of([self.sets[name].batch(examples)], device=self.cohort.device)
        state = self.cohort.initial.to(self.cohort.device)[None]
        self._capturing = True
        try:
            with torch.no_grad():
                self.cohort.logits(self.cohort.layout.views(state), batch)
        except _Captured:
            pass
        finally:
            self._capturing = False
        assert self._captured is not None
        return self._captured

    def fill(self, known: dict[str, Tensor] | None = None) -> None:
        """Compute the hidden states of every example; again if the base has changed.

        ``known`` are those of another cache with the same frozen layers and data, by set; what it lacks is added to it.
        """
        self.rows = {} if known is None else known
        for name, data in self.sets.items():
            if name in self.rows:
                continue
            lengths, offsets = np.asarray(data.lengths), np.asarray(data.offsets)
            order = np.argsort(lengths, kind="stable")
            rows: Tensor | None = None
            for low in range(0, len(order), self.batch):
                part = order[low : low + self.batch]
                hidden = self._hidden(name, part)
                if rows is None:
                    rows = hidden.new_empty(int(offsets[-1] - offsets[0]), hidden.shape[-1])
                    self.rows[name] = rows
                for row, example in enumerate(part):
                    start = int(offsets[example] - offsets[0])
                    rows[start : start + int(lengths[example])] = hidden[row, : int(lengths[example])]

    def lay(self, name: str, batch: CohortBatch, examples: Sequence[np.ndarray]) -> CohortBatch:
        """``batch`` with the hidden states of ``examples`` (indices into the set, one array a slot) laid in."""
        data, rows = self.sets[name], self.rows[name]
        slots, per_slot, width = batch.input_ids.shape
        prefix = rows.new_zeros(slots, per_slot, width, rows.shape[-1])
        first = int(data.offsets[0])
        for s, mine in enumerate(examples):
            for j, example in enumerate(mine):
                start, length = int(data.offsets[example]) - first, int(data.lengths[example])
                prefix[s, j, :length] = rows[start : start + length]
        batch.prefix = prefix
        return batch


def skipping(forward: Callable, skip: Callable[[], bool]) -> Callable:
    """``forward`` of a layer, or its input unchanged (in the layer's own form of output) while ``skip()``."""
    form: list[bool] = []

    def run(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        if skip():
            return (hidden_states,) if form and form[0] else hidden_states
        out = forward(hidden_states, *args, **kwargs)
        form[:] = [isinstance(out, tuple)]
        return out

    return run
