"""Loading a checkpoint with transformers: safetensors only, no remote code, quietly, with errors in one line."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from clients.models.base import with_dropout
from fl.errors import ConfigError, ShoalError

# A checkpoint may lack these: they are drawn or set when the model is made for its task.
HEADS = ("classifier", "score", "classification_head")
MAY_BE_MISSING = (*HEADS, "pooler", "pre_classifier", "pre_dropout", "sequence_summary")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports in the block (an unused pooler is no news)."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first sentence of an error's text, on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises about the checkpoint ``name`` into one `ShoalError` with a way out."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if isinstance(error, ShoalError):
            raise
        text = one_line(error)
        if "trust_remote_code" in text or "custom code" in text:
            way_out = "Shoal never runs code from a checkpoint; use an architecture that transformers has."
        elif "safetensors" in text:
            way_out = (
                "Shoal reads safetensors only, never pickled weights; convert the checkpoint, then use its folder."
            )
        elif os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            way_out = "HF_HUB_OFFLINE is set: unset it, or give a local folder."
        else:
            way_out = "Check the name and revision, go online, or give a local folder with a transformers model."
        raise ShoalError(f"model {name!r} can't be loaded: {text.rstrip('.')}. {way_out}") from error


def load_config(name: str, revision: str | None = None) -> Any:
    """The transformers configuration of a hub name or local folder."""
    with clear_errors(name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a hub name or local folder; its end token pads where it has no padding token."""
    with clear_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ShoalError(f"the tokenizer of {name!r} has neither a padding nor an end token; add one and save it.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_weights(
    auto_class: Any,
    name: str,
    *,
    dropout: float,
    dtype: torch.dtype,
    attention: str,
    revision: str | None = None,
    num_labels: int | None = None,
) -> nn.Module:
    """``auto_class.from_pretrained(name)`` with dropout set (see `with_dropout`).

    Raises `ShoalError` if the checkpoint lacks weights other than a head or pooler: they would be random.
    """
    config = with_dropout(load_config(name, revision), dropout)
    options: dict[str, Any] = {}
    if num_labels is not None:
        config.num_labels = num_labels
        options["ignore_mismatched_sizes"] = True
    elif auto_class.__name__ == "AutoModel" and _has_pooler(config):
        options["add_pooling_layer"] = False
    with clear_errors(name):
        try:
            module, info = auto_class.from_pretrained(
                name,
                config=config,
                revision=revision,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except ValueError as error:
            if "attention" in str(error) and attention in str(error):
                raise ConfigError("engine.attention", attention, one_line(error)) from error
            raise
    lost = [k for k in sorted(info["missing_keys"]) if not any(part in MAY_BE_MISSING for part in k.split("."))]
    if lost:
        raise ShoalError(
            f"the checkpoint {name!r} lacks {len(lost)} weights of {type(module).__name__}, such as {lost[0]}: "
            "they would be random. Give a checkpoint of this architecture."
        )
    return module


def is_folder(name: str) -> bool:
    """Whether ``name`` is a local folder with a transformers model."""
    return (Path(name).expanduser() / "config.json").is_file()


def _has_pooler(config: Any) -> bool:
    cls: Any = MODEL_MAPPING.get(type(config), None)
    return inspect.isclass(cls) and "add_pooling_layer" in inspect.signature(cls).parameters
