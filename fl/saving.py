"""The adapter folder that a run leaves: what `peft` loads, a model card, and a probe to check a reload with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clients.cohort import Cohort
from clients.models.saved import FILE
from clients.trainer import Plan, Trainer
from clients.worker import Worker
from fl.experiment import BASE_SEED, Experiment
from fl.keys import generator

PROBE = "probe.safetensors"


def export(experiment: Experiment, vector: np.ndarray, folder: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Save the state ``vector`` ``(d,)`` as a PEFT adapter in ``folder``; returns its scores on the central test set.

    The scores are those of the saved adapter over the base in float32, whatever precision it was trained in, so that
    they are what a user of the adapter gets. ``card`` are values for the model card.
    """
    device = experiment.trainer.plan.device
    cohort = experiment.cohort(torch.float32, "sdpa", device)
    state = torch.tensor(np.asarray(vector, dtype=np.float32))
    # The evaluation forks before this process does any arithmetic of its own.
    found = _evaluate(experiment, cohort, vector)
    model = cohort.unstacked(state)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)  # type: ignore[operator]
    spec = {"model": card["model_settings"], "num_labels": experiment.num_labels, "seed": BASE_SEED}
    (folder / FILE).write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n")
    tokenizer = experiment.settings.model.tokenizer()
    tokenizer.save_pretrained(str(folder))
    save_file(_probe(model, tokenizer.vocab_size, device), str(folder / PROBE))
    name = cohort.model.peft_config["default"].base_model_name_or_path  # type: ignore[union-attr, index]
    (folder / "README.md").write_text(model_card({**card, "base_model": name, "scores": found}))
    return found


def _evaluate(experiment: Experiment, cohort: Cohort, vector: np.ndarray) -> dict[str, Any]:
    plan = experiment.trainer.plan
    worker = Worker(cohort, {"test": experiment.data.test}, experiment.settings.local, experiment.settings.seed)
    whole = Plan(plan.device, "float32", "sdpa", 1, plan.workers, plan.threads)
    trainer = Trainer(worker, whole)
    try:
        return experiment.central(trainer, vector)
    finally:
        trainer.close()


def _probe(model: nn.Module, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Made-up token ids (nobody's data) and the logits that the plain PEFT model gives for them."""
    ids = torch.from_numpy(generator("probe").integers(0, vocabulary, (4, 12)))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    return {"input_ids": ids, "attention_mask": mask, "logits": logits.float().cpu().contiguous()}


def model_card(card: Mapping[str, Any]) -> str:
    """The adapter's README.md: what it is, how it was made, what it promises, how to load it."""
    scores = ", ".join(f"{k} {v:.4f}" for k, v in card["scores"].items() if isinstance(v, float))
    return f"""---
base_model: {card["base_model"]}
library_name: peft
tags: [shoal, federated-learning]
---

# {card["name"]}: an adapter trained federatedly with Shoal

| | |
|---|---|
| Base model | `{card["base_model"]}` |
| Adapter | {card["adapter"]}, {card["trainable"]:,} trainable parameters |
| Data | {card["data"]}, dealt out to {card["clients"]} clients ({card["partition"]}) |
| Training | {card["rounds"]} rounds, seed {card["seed"]} |
| Test set | {scores} ({card["scores"]["examples"]} examples, float32) |

**Privacy.** {card["privacy"]}

**Licence.** That of the base model and of the data; this folder adds no terms of its own.

## Load it

```python
from clients.models import load_for_adapter
from peft import PeftModel

model = PeftModel.from_pretrained(load_for_adapter("THIS_FOLDER"), "THIS_FOLDER")
```

`{PROBE}` holds token ids and the logits that the server's model gave for them, to check a reload with.
"""
