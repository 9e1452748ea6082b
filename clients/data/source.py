"""A source of text: how it becomes a training set and a test set, tokenised once."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.data.cache import cache_root, stored_folder
from clients.data.tokenise import Examples, tokenise, tokenizer_id
from clients.data.tokens import TokenData
from clients.models.base import CLASSIFICATION, ModelSpec, digest
from fl.config import setting
from fl.errors import ConfigError
from fl.keys import generator

# Part of the key of what is cached; raised when tokenising changes.
FORMAT = 1


@dataclass(frozen=True)
class Source(ABC):
    """The settings that all sources share.

    A source without a test set of its own is split at random by ``split_seed``, not by the run's seed, so that runs
    with different seeds share their test set.
    """

    max_length: int = setting(64, ge=2, help="tokens of a sample at most")
    max_train: int | None = setting(None, ge=1, help="training samples at most, drawn at random; null is all")
    max_test: int | None = setting(None, ge=1, help="test samples at most; null is all")
    test_fraction: float = setting(0.2, gt=0, lt=1, help="share of the samples for the central test set")
    client_test_fraction: float = setting(0.1, ge=0, lt=1, help="share of each client's samples held out to test it")
    public: int = setting(0, ge=0, help="training samples set aside as public data, which the server holds")
    split_seed: int = setting(0, ge=0, help="seed of the split and of the draws above, apart from the run's seed")

    @abstractmethod
    def origin(self) -> Any:
        """What names the content of the source (a hash, a version), as JSON; cheap, and without tokenising."""

    @abstractmethod
    def examples(self, task: str) -> tuple[Examples, Examples | None]:
        """The examples, and those of the test set if the source has one of its own."""

    def chunked(self, task: str) -> bool:
        """Whether long texts are cut into several samples."""
        return False

    def keep(self, samples: TokenData) -> np.ndarray:
        """The samples of a chunked set to keep before it is split; all of them."""
        return np.arange(len(samples))

    def load(self, spec: ModelSpec) -> tuple[TokenData, TokenData]:
        """Training and test set for the model ``spec``, from the cache if they were tokenised before.

        The key of the cache covers the tokenizer, the source's content, the task and these settings. Raises
        `ConfigError` if the source doesn't suit the model, `ShoalError` if it can't be read.
        """
        tokenizer = spec.tokenizer()
        settings = {
            k: v for k, v in asdict(self).items() if k not in ("client_test_fraction", "public", "path", "test_path")
        }
        key = digest(FORMAT, type(self).__name__, settings, self.origin(), spec.task, tokenizer_id(tokenizer))
        folder = cache_root() / "tokens" / key
        stored_folder(folder, lambda out: self._make(out, tokenizer, spec.task, key))
        try:
            return TokenData.open(folder / "train"), TokenData.open(folder / "test")
        except (OSError, EOFError, ValueError, KeyError):
            # Someone deleted or cut short a part of the cache.
            shutil.rmtree(folder, ignore_errors=True)
            stored_folder(folder, lambda out: self._make(out, tokenizer, spec.task, key))
        return TokenData.open(folder / "train"), TokenData.open(folder / "test")

    def _make(self, out: Path, tokenizer: Any, task: str, key: str) -> None:
        train, test = self.examples(task)
        if task == CLASSIFICATION and train.labels is None:
            raise ConfigError(
                "data",
                type(self).__name__.lower(),
                "it has no labels, and the model is a classifier",
                "Choose a causal language model (model=smollm2, tiny-decoder), or data with labels.",
            )
        options: dict[str, Any] = {"task": task, "max_length": self.max_length, "chunk": self.chunked(task)}
        if test is None and options["chunk"]:
            samples = tokenise(train, tokenizer, fingerprint=key, **options)
            samples = samples.select(self.keep(samples), key)
            for name, part in zip(("train", "test"), self._split(len(samples)), strict=True):
                samples.select(part, f"{key}/{name}").save(out / name)
            return
        if test is None:
            mine, held_out = self._split(len(train))
            train, test = train.take(mine), train.take(held_out)
        else:
            train = train.take(self._some(len(train), self.max_train, "train"))
            test = test.take(self._some(len(test), self.max_test, "test"))
        tokenise(train, tokenizer, fingerprint=f"{key}/train", **options).save(out / "train")
        tokenise(test, tokenizer, fingerprint=f"{key}/test", **options).save(out / "test")

    def _split(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted indices of the training and test samples of n; the caps don't move a sample across."""
        order = generator(self.split_seed, "split").permutation(n)
        test = min(max(1, round(self.test_fraction * n)), n - 1)
        if test < 1:
            raise ConfigError("data", f"{n} samples", "at least 2 are needed, to train and to test on")
        return np.sort(order[test:][: self.max_train]), np.sort(order[:test][: self.max_test])

    def _some(self, n: int, at_most: int | None, name: str) -> np.ndarray:
        return np.sort(generator(self.split_seed, "split", name).permutation(n)[:at_most])
