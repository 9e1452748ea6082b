"""Any transformers model: a name on the Hugging Face hub, or a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from clients.data.fetch import file_hash
from clients.models.base import CAUSAL_LM, CLASSIFICATION, Base, ModelSpec, digest, frozen, label_count
from clients.models.pooled import PooledClassifier
from clients.models.pretrained import HEADS, is_folder, load_config, load_tokenizer, load_weights
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import seeded_globals


@dataclass(frozen=True)
class HubModel(ModelSpec):
    """``name`` as a classifier or a causal language model. Safetensors only; no code from the checkpoint is run.

    ``pooling=native`` is the architecture's own classification head (new heads are drawn from the seed),
    ``pooling=mean`` is mean pooling with a linear head that starts at zero. Give a ``revision`` (a commit) so that a
    hub name always means the same weights.
    """

    name: str | None = setting(None, help="hub name, or a local folder")
    task: str = setting(CLASSIFICATION, choices=(CLASSIFICATION, CAUSAL_LM), help="what to make of the model")
    revision: str | None = setting(None, help="branch, tag or commit on the hub")
    pooling: str = setting("native", choices=("native", "mean"), help="the model's own head, or the mean of its tokens")

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("model.name", self.name, "a name is needed", "Give model.name=ORG/NAME or a folder.")

    @property
    def where(self) -> str:
        """The local folder if there is one, else the hub name."""
        name = str(self.name)
        return str(Path(name).expanduser()) if is_folder(name) else name

    @property
    def zero_head(self) -> bool:
        return self.pooling == "mean" and super().zero_head

    @property
    def target_modules(self) -> list[str]:
        kind = load_config(self.where, self.revision).model_type
        names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if not isinstance(names, list):
            raise ConfigError(
                "adapter.target_modules",
                None,
                f"there is no default for a {kind} model",
                "Give the ends of module names, such as adapter.target_modules=[q_proj,v_proj].",
            )
        return list(names)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.where, self.revision)

    def weights_id(self) -> str:
        """Hashes of the files of a local folder; the commit of a hub name."""
        if is_folder(self.where):
            files = sorted(p for p in Path(self.where).iterdir() if p.suffix in (".json", ".safetensors"))
            return digest([(p.name, file_hash(p)) for p in files])
        commit = getattr(load_config(self.where, self.revision), "_commit_hash", None)
        return f"{self.name}@{commit or self.revision}"

    def fingerprint(self) -> str:
        return digest("HubModel", self.task, self.pooling, self.dropout, self.weights_id())

    def load(
        self,
        num_labels: int | None,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        device: str | torch.device = "cpu",
    ) -> Base:
        tokenizer = self.tokenizer()
        options: dict[str, Any] = {
            "dropout": self.dropout,
            "dtype": dtype,
            "attention": attention,
            "revision": self.revision,
        }
        head, count = None, None
        if self.task == CAUSAL_LM:
            module = load_weights(AutoModelForCausalLM, self.where, **options)
        elif self.pooling == "mean":
            count, head = label_count(num_labels), "classifier"
            encoder = load_weights(AutoModel, self.where, **options)
            module = PooledClassifier(encoder, count, self.head_std, seed)
        else:
            count = label_count(num_labels)
            # transformers draws a new head from torch's global generator.
            with seeded_globals(seed, "head"):
                module = load_weights(AutoModelForSequenceClassification, self.where, num_labels=count, **options)
            head = next((name for name, _ in module.named_children() if name in HEADS), None)
            if head is None:
                raise ShoalError(
                    f"{type(module).__name__} has no head among {', '.join(HEADS)}; use model.pooling=mean."
                )
        return frozen(self, module.to(device=device, dtype=dtype), tokenizer, head, str(self.name), seed, count)
