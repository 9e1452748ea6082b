"""What PEFT makes of an initialisation on one layer that is not square, and what the weight then is.

PEFT computes these in float32 and refuses float64, so its answers hold to about 1e-5.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

OUT, IN = 7, 10


class Net(nn.Module):
    """One linear layer ``(OUT, IN)``, or GPT-2's layer that stores its weight the other way."""

    def __init__(self, weight: Tensor, conv: bool = False):
        super().__init__()
        self.layer = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, bias=False)
        self.layer.weight.data = (weight.T if conv else weight).float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass
class Made:
    """A, B, the change of the base weight, all (out, in) whatever the storage."""

    a: Tensor
    b: Tensor
    base: Tensor


def config(rank: int, alpha: float, init: Any, **more: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], init_lora_weights=init, **more)


def attach(
    weight: Tensor, chosen: LoraConfig, prepare: Callable[[Net], None] | None = None, conv: bool = False
) -> Made:
    """The adapter that PEFT attaches, after ``prepare`` has let the method see its data."""
    net = Net(weight, conv)
    if prepare is not None:
        prepare(net)
    chosen.fan_in_fan_out = conv
    return _read(get_peft_model(net, chosen), weight, conv)


def _read(model: nn.Module, weight: Tensor, conv: bool = False) -> Made:
    layer = model.base_model.model.layer
    base = layer.base_layer.weight.detach().double()
    a, b = (getattr(layer, n)["default"].weight.detach().double() for n in ("lora_A", "lora_B"))
    return Made(a, b, (base.T if conv else base) - weight.float())


def plain(weight: Tensor, rank: int, alpha: float, init: Any, conv: bool = False) -> Made:
    return attach(weight, config(rank, alpha, init), conv=conv)


def corda(weight: Tensor, inputs: Tensor, rank: int, alpha: float, mode: str, conv: bool = False) -> Made:
    """``inputs`` ``(tokens, IN)`` are seen in one call."""
    # PEFT's module wants ``attr.dataclass``, of a package that PEFT does not require; the standard one serves as well.
    missing = {} if importlib.util.find_spec("attr") else {"attr": SimpleNamespace(dataclass=dataclasses.dataclass)}
    with mock.patch.dict(sys.modules, missing):
        from peft.tuners.lora.corda import preprocess_corda
    chosen = config(rank, alpha, "corda", corda_config=CordaConfig(corda_method=mode))

    def prepare(net: Net) -> None:
        preprocess_corda(net, chosen, run_model=lambda: net(inputs.float()[None]))

    return attach(weight, chosen, prepare, conv)


def lora_ga(weight: Tensor, gradient: Tensor, rank: int, alpha: float, direction: str, scale: str) -> Made:
    """``gradient`` ``(OUT, IN)`` is the mean gradient that PEFT sees, over two calls."""
    chosen = config(
        rank, alpha, "lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    )

    def prepare(net: Net) -> None:
        def step() -> None:
            for share in (0.5, 1.5):
                # Inputs that need a gradient, or PEFT's backward hook, which counts the calls, would not fire.
                x = torch.eye(IN, requires_grad=True)
                (net(x) * (share * gradient.T).float()).sum().backward()

        preprocess_loraga(net, chosen, step)

    return attach(weight, chosen, prepare)


def eva(weight: Tensor, inputs: Tensor, rank: int, alpha: float) -> Made:
    """``inputs`` ``(tokens, IN)`` are one batch; ranks are not redistributed."""
    model = get_peft_model(Net(weight), config(rank, alpha, "eva", eva_config=EvaConfig(rho=1.0)))
    initialize_lora_eva_weights(
        model,
        [{"x": inputs.float()}],
        forward_fn=lambda net, batch: net(batch["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return _read(model, weight)
