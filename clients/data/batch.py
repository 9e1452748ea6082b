"""One batch of samples, padded on the right to its longest sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """n samples of at most T tokens, on the CPU.

    ``input_ids`` and ``attention_mask`` are ``(n, T)`` int64 (mask 1 at real tokens, 0 at padding). ``labels`` is
    ``(n,)`` int64 for classification. For a causal language model it is ``(n, T)``: the token itself where it counts,
    -100 at padding and in a prompt; the loss does the shift by one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]
