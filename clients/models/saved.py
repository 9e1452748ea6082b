"""The base model that a saved adapter belongs to, and models that are saved whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from clients.models.base import CAUSAL_LM, ModelSpec
from clients.models.pooled import PooledClassifier
from clients.models.pretrained import load_weights, one_line, quiet
from fl.config import build
from fl.errors import ShoalError

FILE = "shoal.json"
HEAD_FILE = "head.safetensors"  # of a classifier on the mean of the token vectors, which transformers doesn't have
ENCODER = "AutoModel"


def load_for_adapter(folder: str | Path) -> nn.Module:
    """The bare base model of the adapter in ``folder``, in float32 on the CPU, for ``PeftModel.from_pretrained``::

        model = PeftModel.from_pretrained(load_for_adapter("adapter"), "adapter")

    ``folder/shoal.json`` holds ``model`` (its settings as `fl.config.build` takes them), ``num_labels`` and ``seed``.
    A trained head comes back with PEFT's ``modules_to_save``. Raises `ShoalError` where the file is missing or broken.
    """
    saved = _read(folder, merged=False)
    spec: ModelSpec = build(saved["model"], "model", ModelSpec)
    module = spec.load(saved["num_labels"], saved["seed"]).module
    _use_cache(module)
    return module


def save_merged(module: nn.Module, folder: Path, spec: dict[str, Any]) -> str | None:
    """Write the whole model ``module`` into ``folder``, as transformers does; ``spec`` is that of `load_for_adapter`.

    Returns the name of the transformers class that loads the folder; None where `load_merged` has to, since the head
    is Shoal's own.
    """
    _use_cache(module)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = module
    if isinstance(module, PooledClassifier):
        auto_class, model = ENCODER, module.backbone
        save_file({k: v.contiguous() for k, v in module.classifier.state_dict().items()}, str(folder / HEAD_FILE))
    else:
        causal = build(spec["model"], "model", ModelSpec).task == CAUSAL_LM
        auto_class = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    with quiet():
        model.save_pretrained(str(folder))
    about = json.dumps({**spec, "merged": auto_class}, indent=1, sort_keys=True)
    (folder / FILE).write_text(about + "\n", encoding="utf-8")
    return None if auto_class == ENCODER else auto_class


def load_merged(folder: str | Path) -> nn.Module:
    """The whole model that a run with ``saving.form=merged`` left in ``folder``: in float32, on the CPU, in eval mode.

    Raises `ShoalError` where the folder holds none, or a broken one.
    """
    saved = _read(folder, merged=True)
    options: dict[str, Any] = {"dropout": saved["model"].get("dropout", 0.0), "dtype": torch.float32}
    module = load_weights(getattr(transformers, saved["merged"]), str(folder), attention="sdpa", **options)
    if saved["merged"] == ENCODER:
        module = PooledClassifier(module, saved["num_labels"])
        path = Path(folder) / HEAD_FILE
        try:
            module.classifier.load_state_dict(load_file(str(path)))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ShoalError(f"{path} can't be read ({one_line(error)}); take it from the run's folder.") from error
    return module.eval()


def _read(folder: str | Path, merged: bool) -> dict[str, Any]:
    path = Path(folder) / FILE
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = saved["model"], saved["num_labels"], saved["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShoalError(
            f"{path} can't be read ({type(error).__name__}: {error}); give the adapter folder of a run, "
            f"which has a {FILE} with model, num_labels and seed."
        ) from error
    whole = "merged" in saved
    if whole != merged:
        found, way_out = ("a whole model", "load_merged") if whole else ("an adapter", "load_for_adapter")
        raise ShoalError(f"{folder} holds {found}; load it with clients.models.saved.{way_out}.")
    return saved


def _use_cache(module: nn.Module) -> None:
    """Undo what loading for training does: generating text is slow without the cache of keys and values."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True
