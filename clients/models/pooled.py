"""A classifier on the mean of an encoder's token vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from fl.keys import torch_generator


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sample's real tokens: ``sum_t m_t h_t / sum_t m_t``.

    ``hidden`` (n, T, d), ``mask`` (n, T) -> (n, d). Summed in float32 whatever the dtype of ``hidden``; a sample
    without tokens gives zeros.
    """
    weights = mask.unsqueeze(-1).float()
    total = (hidden.float() * weights).sum(dim=1)
    return (total / weights.sum(dim=1).clamp(min=1.0)).to(hidden.dtype)


class PooledClassifier(nn.Module):
    """``classifier(masked_mean(backbone(input_ids)))``, with a head of weights N(0, std^2) and zero biases.

    A zero head (``std`` 0) gives every class the same probability at the start whatever the seed, as in the
    linear-probe literature, and its first gradient doesn't depend on a random head. But until it has moved, no gradient
    reaches the layers below. The draw comes from the key (``seed``, "head").
    """

    def __init__(self, backbone: nn.Module, num_labels: int, std: float = 0.0, seed: int = 0):
        super().__init__()
        self.backbone = backbone
        config: Any = backbone.config
        config.num_labels = num_labels
        self.config = config
        # nn.Linear alone would draw from the global generator.
        self.classifier = nn.utils.skip_init(nn.Linear, config.hidden_size, num_labels)
        drawn = std * torch.randn(self.classifier.weight.shape, generator=torch_generator(seed, "head"))
        self.classifier.weight.data.copy_(drawn)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits ``(n, labels)``; with ``labels`` also their mean cross-entropy. PEFT's other arguments are unused."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(masked_mean(hidden, attention_mask))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
