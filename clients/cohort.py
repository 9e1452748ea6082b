"""The cohort: S clients' adapters trained in one forward and backward pass over one frozen base.

A state is a row of d scalars (see `clients.layout`); the states of a cohort are a matrix ``(S, d)``. The batch holds
B samples for each slot, padded to one length; padding samples have weight zero. For slot s

    loss_s = sum_j w_sj l(theta_s; x_sj),    w_sj = 1/n_s for its n_s real samples, 0 for padding,

and since no slot touches another's tensors, the gradient of ``sum_s loss_s`` is ``(d loss_s / d theta_s)_s``.
A private batch is a cohort of one-sample slots: a client's row is repeated over its samples, and the same pass gives
per-sample gradients. Samples are then independent, so they are laid out by length, without padding samples.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients import dropout, independence
from clients.adapters.base_change import Change
from clients.adapters.space import Module, Space
from clients.data.batch import Batch
from clients.layout import Layout
from clients.stacked import Slots, Stacked, StackedLoRA, stack_layer
from fl.errors import ConfigError
from fl.keys import Part

# Scalars of per-sample gradients that are held at a time: 256 MiB in float32, and about three times that at the peak.
SAMPLE_SCALARS = 1 << 26
# Samples below this share of a piece's longest begin a new one; not before this many tokens, which keep products fast.
LIKE, PIECE_TOKENS = 0.75, 512


@dataclass
class CohortBatch:
    """B samples for each of S slots, padded to T tokens. ``keys`` name the slots' dropout masks (None: no dropout)."""

    input_ids: Tensor  # (S, B, T) int64
    attention_mask: Tensor  # (S, B, T) int64
    labels: Tensor  # (S, B) or (S, B, T) int64
    weights: Tensor  # (S, B) float64; a slot's weights sum to 1
    counts: list[int]  # real samples of each slot
    keys: list[tuple[Part, ...] | None] | None = None
    offsets: list[int] | None = None  # place of each slot's first sample in its own batch, for the dropout keys
    prefix: Tensor | None = None  # (S, B, T, H): hidden states that enter the first adapted layer

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        keys: list[tuple[Part, ...] | None] | None = None,
        device: str | torch.device = "cpu",
        pad_id: int = 0,
    ) -> CohortBatch:
        """Pad the slots' batches to one shape: the longest sample and the largest batch among them.

        ``pad_id`` is the model's own padding token: some decoders with a classification head find a sample's last
        token by it.
        """
        slots = len(batches)
        # Poisson sampling may give a slot no sample at all; tensors without rows are what models can't take.
        rows = max(1, *(b.input_ids.shape[0] for b in batches))
        width = max(1, *(b.input_ids.shape[1] for b in batches))
        causal = batches[0].labels.dim() == 2
        ids = torch.full((slots, rows, width), pad_id)
        mask = torch.zeros(slots, rows, width, dtype=torch.long)
        labels = torch.full((slots, rows, width), -100) if causal else torch.zeros(slots, rows, dtype=torch.long)
        weights = torch.zeros(slots, rows, dtype=torch.float64)
        # A padding row attends to its first (padding) token, so that no softmax is over nothing.
        mask[:, :, 0] = 1
        for s, b in enumerate(batches):
            n, t = b.input_ids.shape
            ids[s, :n, :t], mask[s, :n, :t] = b.input_ids, b.attention_mask
            if causal:
                labels[s, :n, :t] = b.labels
            else:
                labels[s, :n] = b.labels
            weights[s, :n] = 1 / max(n, 1)
        counts = [b.input_ids.shape[0] for b in batches]
        return cls(ids.to(device), mask.to(device), labels.to(device), weights.to(device), counts, keys)

    def samples(self, most: int) -> Iterator[tuple[Tensor, Tensor, CohortBatch]]:
        """Pieces of at most ``most`` real samples, each a slot of its own: (slots, places in them, the piece).

        The longest come first, and a piece is as wide as its longest: a new one begins where samples have become
        shorter than `LIKE` times that, once there are `PIECE_TOKENS` tokens for an efficient pass.
        """
        slots, places = torch.nonzero(self.weights > 0, as_tuple=True)
        # Up to the last token that counts: a mask may have gaps.
        ends = (self.attention_mask[slots, places] * torch.arange(1, self.input_ids.shape[2] + 1).to(slots)).amax(-1)
        order = torch.argsort(ends, descending=True, stable=True)
        for low, high, width in _like_pieces(ends[order].tolist(), most):
            at = (slots[order[low:high]], places[order[low:high]])
            keys, offsets = None, None
            if self.keys is not None:
                begin = self.offsets or [0] * len(self.counts)
                keys = [self.keys[s] for s in at[0].tolist()]
                offsets = [begin[s] + j for s, j in zip(at[0].tolist(), at[1].tolist(), strict=True)]
            labels = self.labels[at]
            yield (
                *at,
                CohortBatch(
                    self.input_ids[at][:, None, :width], self.attention_mask[at][:, None, :width],
                    labels[:, None, :width] if self.labels.dim() == 3 else labels[:, None],
                    self.weights.new_ones(high - low, 1), [1] * (high - low), keys, offsets,
                    None if self.prefix is None else self.prefix[at][:, None, :width],
                ),
            )  # fmt: skip

    def split(self, parts: int) -> list[CohortBatch]:
        """The batch in ``parts`` pieces along its samples; losses and gradients of the pieces add up."""
        rows = self.input_ids.shape[1]
        cuts = [rows * i // parts for i in range(parts + 1)]
        pieces = []
        for low, high in itertools.pairwise(cuts):
            if low == high:
                continue
            counts = [max(0, min(n, high) - low) for n in self.counts]
            prefix = None if self.prefix is None else self.prefix[:, low:high]
            part = slice(low, high)
            pieces.append(
                CohortBatch(
                    self.input_ids[:, part], self.attention_mask[:, part], self.labels[:, part], self.weights[:, part],
                    counts, self.keys, [o + low for o in self.offsets or [0] * len(counts)], prefix,
                )
            )  # fmt: skip
        return pieces


def _like_pieces(lengths: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """``(first, end, width)`` of the pieces of samples whose ``lengths`` fall: see `CohortBatch.samples`."""
    low = 0
    while low < len(lengths):
        width, high = max(1, lengths[low]), low + 1
        while high < min(len(lengths), low + most) and (
            lengths[high] >= LIKE * width or (high - low) * width < PIECE_TOKENS
        ):
            high += 1
        yield low, high, width
        low = high


Swap = tuple[nn.Module, str, Stacked]  # where a stacked layer goes: its parent, the attribute, the layer


class Cohort:
    """A PEFT model whose adapted layers hold S slots.

    ``model`` is what `clients.adapters.base.Adapter.attach` returned. After construction the layers are stacked;
    `unstacked` gives the plain PEFT model back (to save it, or to compare). ``space`` says what the tensors of a state
    are, with PEFT's own names; ``initial`` is the state ``(d,)`` that the adapter began with. ``layout`` is that of the
    stacked states: all tensors of the space, or inside `training` those that train.
    """

    def __init__(self, model: nn.Module, task: str, device: str | torch.device = "cpu", space: Space | None = None):
        self.model, self.task, self.device = model, task, torch.device(device)
        self.slots = Slots()
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigError("adapter", None, "at least one trainable tensor")
        self.layout = Layout.of(trainable)
        self.space = space or Space(self.layout)
        self.gains: dict[str, Tensor] = {}  # of the clients in training: see `Slots.gains`
        self.initial = self.layout.flatten({n: p.detach().float() for n, p in trainable.items()}).cpu()
        installed = dropout.install(model, self.slots)
        self.functional: dropout.FunctionalDropout | None = dropout.FunctionalDropout(self.slots)
        self.has_dropout = True  # until the check has seen whether there is any
        self.swaps = self._find_layers(model, trainable)
        model.to(self.device)
        self._stack()
        independence.check(self, trainable)
        if not self.functional.found:
            self.functional = None
        self.has_dropout = installed > 0 or self.functional is not None

    def _find_layers(self, model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[Swap]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        canonical = {id(p): n for n, p in trainable.items()}
        covered: set[str] = set()
        swaps: list[Swap] = []
        inside: tuple[str, ...] = ()
        for path, module in model.named_modules():
            tuner, saved = isinstance(module, BaseTunerLayer), isinstance(module, ModulesToSaveWrapper)
            if not (tuner or saved) or path.startswith(inside):
                continue
            layer = module.get_submodule("modules_to_save.default") if saved else module
            names = {
                n: canonical[id(p)] for n, p in layer.named_parameters(remove_duplicate=False) if id(p) in canonical
            }
            if not names:
                continue
            parent, _, attribute = path.rpartition(".")
            swaps.append((model.get_submodule(parent), attribute, stack_layer(layer, names, self.slots)))
            # The layer that leaves the tree: a ModulesToSaveWrapper goes as a whole.
            swaps[-1][2].hidden.append(module)
            covered |= set(names.values())
            inside = (*inside, path + ".")
        missing = sorted(set(trainable) - covered)
        if missing:
            raise ConfigError("adapter", missing[:3], "trainable tensors inside PEFT layers or the head")
        return swaps

    def _stack(self) -> None:
        for parent, attribute, stacked in self.swaps:
            setattr(parent, attribute, stacked)

    def unstacked(self, state: Tensor) -> nn.Module:
        """The plain PEFT model with ``state`` ``(d,)`` in its tensors. Call `restack` before the cohort works again."""
        for parent, attribute, stacked in self.swaps:
            setattr(parent, attribute, stacked.hidden[-1])
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self.layout.views(state).items():
                parameters[name].copy_(value)
        return self.model

    def restack(self) -> None:
        self._stack()

    @contextlib.contextmanager
    def training(self, groups: Sequence[str], start: Tensor, clients: Sequence[int | None] = ()) -> Iterator[None]:
        """Inside the block states hold the tensors of ``groups`` alone; the others are those of ``start`` ``(d,)``.

        ``clients`` are the slots' clients, whose scales may differ.
        """
        whole, views = self.layout, self.layout.views(start.to(self.device))
        layout = self.space.sublayout(groups)
        trained = set(layout.names)
        self.gains = self._gains(trained, clients, start.dtype)
        self.layout = layout
        self.slots.shared = {n: v.detach() for n, v in views.items() if n not in trained}
        try:
            yield
        finally:
            self.layout, self.slots.shared, self.gains = whole, {}, {}

    def _gains(self, trained: set[str], clients: Sequence[int | None], dtype: torch.dtype) -> dict[str, Tensor]:
        gains = {}
        for module in self.space.modules if self.space.scales else ():
            values = [self.space.scale(module, c) / module.scale for c in clients]
            # A factor that does not train is in the server's scale (`Space`).
            if module.scaled in trained and any(v != 1 for v in values):
                self._need_linear(module)
                gains[module.scaled] = torch.tensor(values, dtype=dtype, device=self.device).reshape(-1, 1, 1)
        return gains

    def _need_linear(self, module: Module) -> None:
        """Only `StackedLoRA` reads the slots' gains and the base's change."""
        if not any(isinstance(s, StackedLoRA) and module.b in s.names.values() for _, _, s in self.swaps):
            raise ConfigError(
                "adapter.target_modules",
                module.name,
                "linear layers alone, where clients' scales differ or the base changes",
            )

    def load_base(self, change: Change) -> None:
        """From now on the base's weights are those that were loaded plus ``change``.

        Raises `ConfigError` where a module with a change is no linear layer.
        """
        modules = {m.name: m for m in self.space.modules}
        for name in change:
            self._need_linear(modules[name])
        self.slots.base = {
            modules[name].b: tuple(  # type: ignore[misc]
                None if part is None else torch.tensor(part, device=self.device) for part in (piece.left, piece.right)
            )
            for name, piece in change.items()
        }

    def losses(self, states: Tensor, batch: CohortBatch) -> Tensor:
        """``(S,)``: each slot's loss, the weighted sum over its own samples, at ``states`` ``(S, d)``."""
        return (self.sample_losses(self.layout.views(states), batch) * batch.weights).sum(1)

    def gradients(self, states: Tensor, batch: CohortBatch, accumulate: int = 1) -> tuple[Tensor, Tensor]:
        """Losses ``(S,)`` and their gradients ``(S, d)`` at ``states`` ``(S, d)``.

        ``accumulate`` > 1 splits each slot's batch into that many parts, one pass each: less memory, same gradient.
        """
        leaves = {n: v.detach().requires_grad_() for n, v in self.layout.views(states).items()}
        total_loss, total_grad = None, None
        for part in batch.split(accumulate) if accumulate > 1 else [batch]:
            losses = (self.sample_losses(leaves, part) * part.weights).sum(1)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
            flat = torch.cat(
                [
                    (torch.zeros_like(leaf) if g is None else g).reshape(len(states), -1)
                    for g, leaf in zip(grads, leaves.values(), strict=True)
                ],
                dim=1,
            )
            total_loss = losses.detach() if total_loss is None else total_loss + losses.detach()
            total_grad = flat if total_grad is None else total_grad.add_(flat)
        assert total_loss is not None and total_grad is not None
        return total_loss, total_grad

    def each_sample(
        self, states: Tensor, batch: CohortBatch, parts: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
        """Per-sample gradients of the real samples of ``batch`` at ``states`` ``(S, d)``, some samples at a time.

        Yields the slots ``(n,)`` and places in them ``(n,)`` of n samples, their losses ``(n,)`` and the gradients of
        these ``(n, *shape)``, by tensor. A piece holds at most `SAMPLE_SCALARS` / d samples, and one of ``parts`` of
        what the batch has room for.
        """
        views, gains = self.layout.views(states.detach()), self.gains
        room = batch.weights.numel()
        most = max(1, min(SAMPLE_SCALARS // max(1, self.layout.size), -(-room // parts)))
        for slots, places, piece in batch.samples(most):
            leaves = {n: v[slots].requires_grad_() for n, v in views.items()}
            self.gains = {name: gain[slots] for name, gain in gains.items()}
            try:
                losses = self.sample_losses(leaves, piece)[:, 0]
            finally:
                self.gains = gains
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
            found = {
                n: torch.zeros_like(leaf) if g is None else g
                for (n, leaf), g in zip(leaves.items(), grads, strict=True)
            }
            yield slots, places, losses.detach(), found

    def sample_gradients(self, states: Tensor, batch: CohortBatch) -> tuple[Tensor, Tensor]:
        """Losses ``(S, B)`` and gradients ``(S, B, d)`` of each sample by itself (weight one); 0 for padding."""
        losses = states.new_zeros(batch.weights.shape)
        grads = states.new_zeros(*batch.weights.shape, states.shape[-1])
        for slots, places, loss, grad in self.each_sample(states, batch):
            losses[slots, places] = loss.to(losses)
            grads[slots, places] = self.layout.flatten(grad, lead=1)
        return losses, grads

    def sample_losses(self, tensors: dict[str, Tensor], batch: CohortBatch) -> Tensor:
        """``(S, B)``: every sample's own loss: cross-entropy, or the mean over its own target tokens (causal LM)."""
        logits = self.logits(tensors, batch)
        return (
            classification_loss(logits, batch.labels)
            if self.task == "classification"
            else causal_loss(logits, batch.labels)
        )

    def logits(self, tensors: dict[str, Tensor], batch: CohortBatch) -> Tensor:
        """``(S, B, classes)`` or ``(S, B, T, vocabulary)`` from stacked tensors ``(S, *shape)``."""
        slots, rows, width = batch.input_ids.shape
        self.slots.number, self.slots.tensors = slots, tensors
        self.slots.gains = {name: gain[:slots] for name, gain in self.gains.items()}
        mode: contextlib.AbstractContextManager = contextlib.nullcontext()
        if batch.keys is not None and self.has_dropout:
            lengths = batch.attention_mask.sum(-1)
            offsets = batch.offsets or [0] * slots
            self.slots.dropout = dropout.DropoutKeys.of(batch.keys, batch.counts, offsets, lengths, width)
            mode = self.functional or mode
        self.slots.prefix = None if batch.prefix is None else batch.prefix.reshape(slots * rows, width, -1)
        try:
            with mode:
                out = self.model(
                    input_ids=batch.input_ids.reshape(-1, width), attention_mask=batch.attention_mask.reshape(-1, width)
                ).logits
        finally:
            # Nothing of this pass may reach the next, which may be the plain model's own.
            self.slots.tensors, self.slots.dropout, self.slots.prefix = {}, dropout.DropoutKeys(), None
        # The loss is taken in float32 at least: bfloat16 logits would round it to three digits.
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return out.reshape(slots, rows, *out.shape[1:])


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits ``(S, B, C)``, labels ``(S, B)`` -> ``(S, B)``."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy, averaged over each sample's own targets: ``(S, B, T, V)``, ``(S, B, T)`` -> ``(S, B)``.

    Never the batch-wide token mean: with it one sample's length would change another's weight, which breaks the
    sensitivity that differential privacy relies on.
    """
    targets = labels[..., 1:]
    nll = F.cross_entropy(
        logits[..., :-1, :].flatten(0, 2), targets.flatten(), reduction="none", ignore_index=-100
    ).reshape(targets.shape)
    count = (targets != -100).sum(-1)
    return nll.sum(-1) / count.clamp(min=1)
