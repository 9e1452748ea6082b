"""The folder that a run leaves: a PEFT adapter or a whole model, a model card, and a probe to check a reload with.

Three contents, of which the card says which it is and how to load it:

* the adapter as it was trained, where PEFT reloads it as it is;
* else a plain LoRA adapter of the total weight change (`fl.total_change`): where the rules changed the base, where the
  adapter has a core between its factors, or where `saving.rank` cuts it;
* with ``saving.form=merged`` the whole model, with the change merged into its weights.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clients.adapters.base_change import Change
from clients.cohort import Cohort
from clients.models.saved import FILE, save_merged
from clients.trainer import Plan, Trainer
from clients.worker import Worker
from fl import total_change
from fl.errors import ShoalError
from fl.experiment import BASE_SEED, Experiment
from fl.keys import generator
from fl.state import ServerState

PROBE = "probe.safetensors"
# A merged model rounds otherwise than one with an adapter beside it; what differs by more is another model.
MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Saved:
    """What was saved, and how well it does.

    ``scores`` are those of the saved model on the central test set. ``rank`` is the largest of a module's change (None:
    the method has none, or the change was merged whole), ``relative_error`` the part of the change that is left out, in
    Frobenius norm over all modules. ``server`` are the scores of the server's own model where that is another one.
    """

    scores: dict[str, Any]
    form: str = "adapter"
    total: bool = False  # whether it is the total change, not the adapter as it was trained
    rank: int | None = None
    relative_error: float = 0.0
    needed: int | None = None  # the rank of the whole change
    server: dict[str, Any] | None = None
    auto_class: str | None = None  # the transformers class that reloads a merged model; None: Shoal's own function

    def record(self) -> dict[str, Any]:
        """For run.json."""
        out = {"form": self.form, "total": self.total, "rank": self.rank, "relative_error": self.relative_error}
        return out if self.server is None else {**out, "server": self.server}


def export(experiment: Experiment, server: ServerState, folder: Path, card: Mapping[str, Any]) -> Saved:
    """Save the model of ``server`` in ``folder``, in the form that ``saving`` asks for; says what it saved.

    The scores are those of what was saved, over the base in float32, whatever precision it was trained in, so that they
    are what a user gets; those of a merged model are taken before the merge, which changes them by rounding alone.
    ``card`` are values for the model card. Raises `ShoalError` where PEFT can't merge the adapter.
    """
    settings, device = experiment.settings, experiment.trainer.plan.device
    asked = settings.saving
    ranks = [module.rank for module in server.space.modules]
    cut = asked.rank is not None and max(ranks, default=0) > asked.rank
    if total_change.reloads(server) and not cut:
        cohort = experiment.cohort(torch.float32, "sdpa", device)
        vector = np.asarray(server.vector, dtype=np.float32)
        saved = Saved(_evaluate(experiment, cohort, vector), asked.form, rank=max(ranks, default=None))
    else:
        merges_all = asked.form == "merged" and asked.rank is None
        total = total_change.stacked(server) if merges_all else total_change.total(server, asked.rank)
        base = experiment.shared.base(settings.model, experiment.num_labels, torch.float32, "sdpa", device)
        attached = total_change.attach(base, total.changes, server, settings.adapter.train_head)
        cohort = Cohort(attached, base.task, device)
        vector = cohort.initial.numpy()
        saved = Saved(
            _evaluate(experiment, cohort, vector),
            asked.form,
            total=True,
            rank=None if merges_all else total.rank,
            relative_error=total.relative_error,
            needed=total.needed,
            server=_own(experiment, server) if total.truncated else None,
        )
    model = cohort.unstacked(torch.tensor(vector))
    name = cohort.model.peft_config["default"].base_model_name_or_path  # type: ignore[union-attr, index]
    tokenizer = settings.model.tokenizer()
    probe = _probe(model, tokenizer.vocab_size, device)
    spec = {"model": card["model_settings"], "num_labels": experiment.num_labels, "seed": BASE_SEED}
    if asked.form == "merged":
        config = folder.parent / "config.yaml"
        model = merge(model, config)
        adapted, probe = probe["logits"], _probe(model, tokenizer.vocab_size, device)
        if (probe["logits"] - adapted).abs().max() > MERGE_TOLERANCE * adapted.abs().max():
            raise _unmergeable(config, "merged, the model gives other logits")
        saved = dataclasses.replace(saved, auto_class=save_merged(model, folder, spec))
    else:
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)  # type: ignore[operator]
        (folder / FILE).write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n")
    tokenizer.save_pretrained(str(folder))
    save_file(probe, str(folder / PROBE))
    (folder / "README.md").write_text(model_card({**card, "base_model": name}, saved))
    return saved


def _own(experiment: Experiment, server: ServerState) -> dict[str, Any]:
    """The scores of the server's own model, in float32."""
    cohort = experiment.cohort(torch.float32, "sdpa", experiment.trainer.plan.device)
    return _evaluate(experiment, cohort, server.vector, server.base)


def _evaluate(experiment: Experiment, cohort: Cohort, vector: np.ndarray, base: Change | None = None) -> dict[str, Any]:
    plan = experiment.trainer.plan
    worker = Worker(cohort, experiment.tests, experiment.settings.local, experiment.settings.seed)
    whole = Plan(plan.device, "float32", "sdpa", 1, plan.workers, plan.threads)
    trainer = Trainer(worker, whole, experiment.settings.engine.forks)
    try:
        return experiment.central(trainer, vector, base or {})
    finally:
        trainer.close()


def merge(model: nn.Module, config: Path) -> nn.Module:
    """The base of the PEFT ``model`` with the adapter in its weights and the trained head in place.

    What PEFT writes into gets a copy first: the base's tensors are shared with other runs, and an embedding's may be
    those of the output layer too. ``config`` is the file that the way out names. Raises `ShoalError`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        for layer in [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:
            for owner in layer.get_base_layer().modules():
                for name, parameter in list(owner.named_parameters(recurse=False)):
                    setattr(owner, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    except (ValueError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
        raise _unmergeable(config, " ".join(str(error).split())[:200]) from error
    return merged.eval()


def _unmergeable(config: Path, reason: str) -> ShoalError:
    return ShoalError(
        f"PEFT can't merge this adapter ({reason}). Set saving.form to adapter in {config} and go on with --resume."
    )


def _probe(model: nn.Module, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Made-up token ids (nobody's data) and the logits that the plain PEFT model gives for them."""
    ids = torch.from_numpy(generator("probe").integers(0, vocabulary, (4, 12)))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    return {"input_ids": ids, "attention_mask": mask, "logits": logits.float().cpu().contiguous()}


def model_card(card: Mapping[str, Any], saved: Saved) -> str:
    """The folder's README.md: what is in it, how it was made, what it promises, how to load it."""
    merged = saved.form == "merged"
    what = "a model trained" if merged else "an adapter trained"
    rows = [("Base model", f"`{card['base_model']}`")]
    rows += [("Adapter", f"{card['adapter']}, {card['trainable']:,} trainable parameters")]
    rows += [("Saved", _content(saved))] if merged or saved.total else []
    rows += [("Data", f"{card['data']}, dealt out to {card['clients']} clients ({card['partition']})")]
    rows += [("Training", f"{card['rounds']} rounds, seed {card['seed']}")]
    rows += [("Test set", f"{_scores(saved.scores)} ({saved.scores['examples']} examples, float32)")]
    rows += [("Untruncated", f"{_scores(saved.server)}: the server's own model")] if saved.server is not None else []
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    origin = "server's" if saved.server is None else "saved"
    return f"""---
base_model: {card["base_model"]}
library_name: {"transformers" if merged else "peft"}
tags: [shoal, federated-learning]
---

# {card["name"]}: {what} federatedly with Shoal

| | |
|---|---|
{table}

**Privacy.** {card["privacy"]}

**Licence.** That of the base model and of the data; this folder adds no terms of its own.

## Load it

```python
{_loading(saved)}
```

`{PROBE}` holds token ids and the logits that the {origin} model gave for them, to check a reload with.
"""


def _scores(scores: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if isinstance(v, float))


def _content(saved: Saved) -> str:
    """What the folder holds, where it is not the adapter as it was trained."""
    text = "the total weight change" if saved.total else "the adapter"
    text += ", merged into the base's weights" if saved.form == "merged" else " as one plain LoRA adapter"
    if saved.server is not None:
        return (
            f"{text}, cut to rank {saved.rank} (of {saved.needed}), which leaves out {saved.relative_error:.2e} of it "
            "(Frobenius norm, all modules)"
        )
    return f"{text} of rank {saved.rank}" if saved.total and saved.rank is not None else text


def _loading(saved: Saved) -> str:
    """The lines that load the folder ``THIS_FOLDER`` into ``model``."""
    if saved.form != "merged":
        return """from clients.models import load_for_adapter
from peft import PeftModel

model = PeftModel.from_pretrained(load_for_adapter("THIS_FOLDER"), "THIS_FOLDER")"""
    if saved.auto_class is None:
        return """from clients.models.saved import load_merged

model = load_merged("THIS_FOLDER")"""
    return f"""from transformers import {saved.auto_class}

model = {saved.auto_class}.from_pretrained("THIS_FOLDER")"""
