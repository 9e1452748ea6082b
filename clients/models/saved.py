"""The base model that a saved adapter belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from clients.models.base import ModelSpec
from fl.config import build
from fl.errors import ShoalError

FILE = "shoal.json"


def load_for_adapter(folder: str | Path) -> nn.Module:
    """The bare base model of the adapter in ``folder``, in float32 on the CPU, for ``PeftModel.from_pretrained``::

        model = PeftModel.from_pretrained(load_for_adapter("adapter"), "adapter")

    ``folder/shoal.json`` holds ``model`` (its settings as `fl.config.build` takes them), ``num_labels`` and ``seed``.
    A trained head comes back with PEFT's ``modules_to_save``. Raises `ShoalError` where the file is missing or broken.
    """
    path = Path(folder) / FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        settings, num_labels, seed = saved["model"], saved["num_labels"], saved["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShoalError(
            f"{path} can't be read ({type(error).__name__}: {error}); give the adapter folder of a run, "
            f"which has a {FILE} with model, num_labels and seed."
        ) from error
    spec: ModelSpec = build(settings, "model", ModelSpec)
    module = spec.load(num_labels, seed).module
    config: Any = getattr(module, "config", None)
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True
    return module
