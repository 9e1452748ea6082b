"""Networks with random weights, made from a configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization

from fl.keys import torch_generator


def from_config(
    auto_class: Any,
    config: Any,
    seed: int,
    *,
    dtype: torch.dtype,
    attention: str,
    device: str | torch.device = "cpu",
    **options: Any,
) -> nn.Module:
    """A network built on ``device`` in ``dtype``, with weights drawn from the key ``seed``.

    Matrices are N(0, 1 / last dimension), biases 0 and norms 1. Each tensor has its own key, is drawn in float32 on
    the device and then rounded, so the memory needed beyond the network is that of its largest tensor.
    """
    with initialization.no_init_weights(), torch.device(device):
        module = auto_class.from_config(config, dtype=dtype, attn_implementation=attention, **options)
    # Part of the initialisation that was left out above.
    module.tie_weights()
    for name, tensor in module.named_parameters():
        with torch.no_grad():
            if tensor.ndim < 2:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            draw = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
            key = torch_generator(seed, "weights", name, device=str(tensor.device))
            tensor.copy_(draw.normal_(std=tensor.shape[-1] ** -0.5, generator=key))
    return module
