"""An adapter folder and the base model that it is put on again."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from clients.models import TinyDecoder, TinyEncoder, load_for_adapter
from fl.errors import ShoalError
from fl.keys import generator, seeded_globals


def saved_adapter(spec, num_labels, folder):
    """An adapter with random values in every trained tensor, as a run would leave it, and the model it came from."""
    base = spec.load(num_labels, 3)
    with seeded_globals("adapter"):
        config = LoraConfig(
            r=2,
            target_modules=spec.target_modules,
            modules_to_save=[base.head] if base.head else None,
            task_type="SEQ_CLS" if base.head else "CAUSAL_LM",
        )
        model = get_peft_model(base.module, config)
    draw = generator("adapter")
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(torch.from_numpy(draw.normal(size=tuple(p.shape)) * 0.3))
    model.save_pretrained(folder)
    target = f"clients.models.{type(spec).__name__}"
    about = {"model": {"_target_": target, "layers": 2}, "num_labels": num_labels, "seed": 3}
    (folder / "shoal.json").write_text(json.dumps(about))
    return model.eval(), base.tokenizer


@pytest.mark.parametrize(("spec", "labels"), [(TinyEncoder(), 3), (TinyDecoder(), None)], ids=str)
def test_an_adapter_folder_gives_back_the_same_logits(tmp_path, spec, labels):
    model, tokenizer = saved_adapter(spec, labels, tmp_path)
    again = PeftModel.from_pretrained(load_for_adapter(tmp_path), tmp_path).eval()
    encoded = tokenizer(
        ["the ferry was bright", "we found the map very plain today"], padding=True, return_tensors="pt"
    )
    text = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    with torch.no_grad():
        expected, found = model(**text).logits, again(**text).logits
    assert expected.abs().max() > 0.01 and torch.equal(expected, found)


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}', "[]"])
def test_a_folder_that_is_no_adapter_of_a_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "shoal.json").write_text(content)
    with pytest.raises(ShoalError, match=r"shoal\.json"):
        load_for_adapter(tmp_path)
