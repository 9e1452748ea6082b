"""Layers that hold S copies ("slots") of their trainable tensors over one frozen base.

A slot's rows of the batch see that slot's tensors and no other, so the gradient of the sum of all slots' losses is
every slot's own gradient. Three ways to compute the same thing, tried in this order:

* `StackedLoRA`, `StackedLinear`: batched matrix products (LoRA on a linear layer; a linear head);
* `StackedLayer`, vmap: ``torch.func.vmap(functional_call)`` over this one layer, for any other PEFT method;
* `StackedLayer`, loop: slot by slot, where vmap refuses (custom autograd functions, in-place index writes).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from clients.dropout import DropoutKeys, KeyedDropout

log = logging.getLogger(__name__)


@dataclass
class Slots:
    """What the stacked layers read during one forward pass: the slots' tensors and the dropout keys.

    What does not train is in ``shared``, once for all slots; a module's ``gains`` are the slots' own scales over the
    layer's, by the name of the tensor that is scaled; ``base`` is added to the frozen weight, by the name of B.
    """

    number: int = 1
    tensors: dict[str, Tensor] = field(default_factory=dict)  # canonical name -> (slots, *shape)
    shared: dict[str, Tensor] = field(default_factory=dict)  # canonical name -> shape
    gains: dict[str, Tensor] = field(default_factory=dict)  # canonical name -> (slots, 1, 1)
    base: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # (out, p), (p, in); or (out, in)
    dropout: DropoutKeys = field(default_factory=DropoutKeys)
    prefix: Tensor | None = None  # (slots * batch, tokens, hidden): see clients.prefix


class Stacked(nn.Module):
    """A layer whose trainable tensors are taken, stacked, from `Slots`.

    ``names`` maps the layer's own parameter names to canonical ones. The layer itself is kept out of the module tree,
    so that the wrapped model has no trainable parameter of its own.
    """

    def __init__(self, layer: nn.Module, names: dict[str, str], slots: Slots):
        super().__init__()
        self.hidden = [layer]
        self.names = names
        self.slots = slots

    @property
    def layer(self) -> nn.Module:
        return self.hidden[0]

    def tensor(self, name: str) -> Tensor:
        """The layer's own tensor ``name``: ``(slots, *shape)``, or its shape where it is shared."""
        canonical = self.names[name]
        found = self.slots.tensors.get(canonical)
        return self.slots.shared[canonical] if found is None else found

    def stacked(self, name: str) -> Tensor:
        """The same with a first axis of slots in any case."""
        canonical = self.names[name]
        if canonical in self.slots.tensors:
            return self.slots.tensors[canonical]
        shared = self.slots.shared[canonical]
        return shared.expand(self.slots.number, *shared.shape)


class StackedLinear(Stacked):
    """``y_s = x_s W_s^T + b_s`` for S linear layers: W ``(S, out, in)``, b ``(S, out)``, x ``(S*B, ..., in)``.

    Computed in the tensors' own precision whatever the input's: a head is small, and its loss is sensitive.
    """

    def __init__(self, layer: nn.Linear, names: dict[str, str], slots: Slots):
        super().__init__(layer, names, slots)
        self.weight_name = next(n for n in names if n.endswith("weight"))
        self.bias_name = next((n for n in names if n.endswith("bias")), None)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.stacked(self.weight_name)
        rows = x.to(weight.dtype).reshape(self.slots.number, -1, x.shape[-1])  # (slots, rows, in)
        if self.bias_name is None:
            out = torch.bmm(rows, weight.transpose(1, 2))
        else:
            out = torch.baddbmm(self.stacked(self.bias_name).unsqueeze(1), rows, weight.transpose(1, 2))
        return out.reshape(*x.shape[:-1], weight.shape[1])


class StackedLoRA(Stacked):
    """``y_s = base(x_s) + scaling * dropout(x_s) A_s^T [R_s^T] B_s^T``: A ``(rank, in)``, B ``(out, rank)``, and the
    core ``R`` ``(rank, rank)`` or gate ``(rank,)`` where the adapter has one (`clients.adapters.core.Core`).

    The base product is shared by all slots; the factors are batched products beside it, or one product where a factor
    is the same in all slots. Works for ``nn.Linear`` and for GPT-2's ``Conv1D``, since PEFT keeps A and B as linear
    layers in both. Equation: Hu et al., LoRA, eq. 3.
    """

    def __init__(self, layer: nn.Module, names: dict[str, str], slots: Slots, adapter: str = "default"):
        super().__init__(layer, names, slots)
        self.base_layer = layer.base_layer
        self.scaling = float(layer.scaling[adapter])  # type: ignore[index]
        self.lora_dropout: nn.Module = layer.lora_dropout[adapter]  # type: ignore[index, assignment]
        self.b_name = f"lora_B.{adapter}.weight"
        self.core_name = next((n for n in names if n.startswith(f"lora_A.{adapter}.core")), None)
        self.a_name = f"lora_A.{adapter}.weight" if self.core_name is None else f"lora_A.{adapter}.down.weight"

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)  # type: ignore[operator]
        b_name = self.names[self.b_name]
        if b_name in self.slots.base:
            y = y + _times(x, *self.slots.base[b_name])
        slots = self.slots.number
        rows = self.lora_dropout(x).reshape(slots, -1, x.shape[-1])  # (slots, rows, in)
        low = _through(rows, self.tensor(self.a_name).to(x.dtype))  # (slots, rows, rank)
        if self.core_name is not None:
            core = self.tensor(self.core_name).to(x.dtype)
            gate = core.dim() - (self.names[self.core_name] in self.slots.tensors) == 1
            low = low * (core.unsqueeze(1) if core.dim() == 2 else core) if gate else _through(low, core)
        gain = self.slots.gains.get(self.names[self.core_name or self.b_name])
        if gain is not None:
            low = (low * gain).to(low.dtype)
        b = self.tensor(self.b_name).to(x.dtype)
        flat = y.reshape(slots, -1, y.shape[-1])
        if b.dim() == 3:
            out = torch.baddbmm(flat, low, b.transpose(1, 2), alpha=self.scaling)
        else:
            out = torch.addmm(flat.flatten(0, 1), low.flatten(0, 1), b.T, alpha=self.scaling)
        return out.reshape(y.shape)


def _through(rows: Tensor, weight: Tensor) -> Tensor:
    """``x_s W_s^T``: rows ``(S, n, in)`` and W ``(S, out, in)``, or ``(out, in)`` for all slots."""
    return torch.bmm(rows, weight.transpose(1, 2)) if weight.dim() == 3 else rows @ weight.T


def _times(x: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """``x (left right)^T``, or ``x left^T``."""
    return x @ left.to(x.dtype).T if right is None else (x @ right.to(x.dtype).T) @ left.to(x.dtype).T


class StackedLayer(Stacked):
    """Any layer with trainable tensors: vmap over the slots, or a loop over them where vmap refuses.

    The output has the precision of the input, or of the frozen weights where the input is token ids.
    """

    def __init__(self, layer: nn.Module, names: dict[str, str], slots: Slots):
        super().__init__(layer, names, slots)
        # A dropout inside vmap can't know its slot, so such a layer is looped over.
        self.loop = any(isinstance(m, KeyedDropout) and m.p > 0 for m in layer.modules())
        base: nn.Module = getattr(layer, "get_base_layer", lambda: layer)()
        self.dtype = next((p.dtype for p in base.parameters()), torch.float32)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        slots = self.slots.number
        rows = x.reshape(slots, -1, *x.shape[1:])  # (slots, batch, ...)
        tensors = {local: self.stacked(local) for local in self.names}
        dtype = x.dtype if x.is_floating_point() else self.dtype
        if not self.loop:
            try:
                out = vmap(lambda t, r: functional_call(self.layer, t, (r, *args), kwargs))(tensors, rows)
                return out.reshape(-1, *out.shape[2:]).to(dtype)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                log.info("%s: vmap refused (%s); looping over slots", type(self.layer).__name__, str(error)[:80])
                self.loop = True
        outs = []
        for slot in range(slots):
            with self.slots.dropout.only(slot):
                mine = {local: t[slot] for local, t in tensors.items()}
                outs.append(functional_call(self.layer, mine, (rows[slot], *args), kwargs))
        return torch.cat(outs).to(dtype)


def stack_layer(layer: nn.Module, names: dict[str, str], slots: Slots) -> Stacked:
    """The fastest `Stacked` that computes ``layer`` exactly; ``names`` as in `Stacked`."""
    if _plain_lora(layer, names):
        return StackedLoRA(layer, names, slots)
    if isinstance(layer, nn.Linear) and set(names) == {n for n, _ in layer.named_parameters()}:
        return StackedLinear(layer, names, slots)
    return StackedLayer(layer, names, slots)


def _plain_lora(layer: nn.Module, names: Sequence[str] | dict[str, str], adapter: str = "default") -> bool:
    from peft.tuners.lora.layer import Linear as LoraLinear

    return (
        type(layer) is LoraLinear
        and adapter not in layer.lora_variant
        and set(names)
        in (
            {f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"},
            {f"lora_A.{adapter}.down.weight", f"lora_A.{adapter}.core", f"lora_B.{adapter}.weight"},
        )
        and not layer.lora_bias[adapter]
    )
