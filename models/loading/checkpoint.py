"""A checkpoint of any supported format, opened: its dimensions, its tokenizer, its parameters on demand."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig
from jaxserve.models.fields import Fields
from jaxserve.models.loading import (
    assemble,
    codes,
    eos,
    generation,
    gguf_tokenizer,
    head,
    hf,
    hf_tokenizer,
    kv_scales,
    mxfp4,
    orbax,
)
from jaxserve.models.loading.dummy import random_parameters
from jaxserve.models.loading.files import read_json
from jaxserve.models.loading.gguf import GGUFSource
from jaxserve.models.loading.hub import resolve
from jaxserve.models.loading.quantised.detect import quantisation
from jaxserve.models.loading.quantised.source import QuantisedSource, named_by_module
from jaxserve.models.matrix import MatrixLayout, QuantisedMatrix
from jaxserve.models.presets import PRESETS
from jaxserve.models.registry import family_of, read_config
from jaxserve.models.weights import Weight
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Checkpoint(ABC):
    """Opening one reads headers only, but for heads (see head.settle); ``load`` reads the weights."""

    path: Path
    config: ModelConfig
    declared_eos: eos.Declared
    """What the model's files say ends an output; its tokenizer's files may say more."""

    def eos_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an output unless the request ignores them."""
        return eos.union(self.path, self.declared_eos, tokenizer, self.config.vocab_size)

    @property
    def kv_scales(self) -> np.ndarray | None:
        """``float32[layers, 2]``, of an fp8 KV cache's keys and values, where the files have some; see KVCache.scales.

        Raises ModelError.
        """
        return None

    @property
    @abstractmethod
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of SamplingParams as the model's author wants them; read, and warned about, only when asked for.

        Raises ModelError for values that SamplingParams refuses.
        """

    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def check(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> None:
        """Raise one ModelError that names everything missing, unexpected and mis-shaped; reads headers only."""

    def planned_codes(
        self,
        abstract: Mapping[str, jax.ShapeDtypeStruct],
        weights: Mapping[str, Weight],
        layouts: Mapping[str, MatrixLayout],
    ) -> dict[str, QuantisedMatrix]:
        """Of the parameters ``abstract`` those that may stay codes in memory, as ``load_codes`` takes them, by headers.

        Raises ModelError as ``check`` does.
        """
        self.check(abstract, weights)
        return {} if self._codes is None else codes.plan(self._codes, abstract, weights, layouts)

    def load_codes(
        self, planned: Mapping[str, QuantisedMatrix], weights: Mapping[str, Weight]
    ) -> Iterator[tuple[str, QuantisedMatrix]]:
        """The matrices of ``planned_codes``, each when it is asked for. Raises ModelError."""
        assert self._codes is not None, "planned"
        return codes.load(self._codes, planned, weights)

    @property
    def _codes(self) -> codes.CodeSource | None:
        """The weights, if some are quantised."""
        return None

    @abstractmethod
    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> dict[str, jax.Array]:
        """The parameters of ``abstract``, which ``check`` has passed, with its shapes, types and shardings.

        ``weights`` says how they are built. Raises ModelError for files that cannot be read.
        """


class _Opened(NamedTuple):
    """Safetensors files."""

    source: head.EditableSource
    coded: codes.CodeSource | None
    """The same, where some are quantised."""
    kv_scales: np.ndarray | None


class HuggingFaceCheckpoint(Checkpoint):
    """A folder of config.json, tokenizer.json and safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        raw = read_json(folder / "config.json")
        self.config = read_config(raw, str(folder / "config.json"))
        self._packs_experts = mxfp4.packs_experts(Fields(raw, folder / "config.json"))
        self._format = None if self._packs_experts else quantisation(folder, raw)
        if self._format is not None:
            logger.info("quantised: %s", self._format)
        if self.config.tie_word_embeddings:
            self.config = head.settle(self._source, self.config, family_of(self.config.architecture))
        self.declared_eos = _declared_eos(folder, raw)

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        return generation.from_hf(self.path / "generation_config.json")

    def tokenizer(self) -> Tokenizer:
        return hf_tokenizer.load(self.path)

    @property
    def kv_scales(self) -> np.ndarray | None:
        return self._opened.kv_scales

    @property
    def _source(self) -> head.EditableSource:
        return self._opened.source

    @property
    def _codes(self) -> codes.CodeSource | None:
        return self._opened.coded

    @cached_property
    def _opened(self) -> _Opened:
        family = family_of(self.config.architecture)
        name_of = family.names_for(self.config)
        if self._format is None:
            tensors = (
                mxfp4.Mxfp4Source(self.path, name_of)
                if self._packs_experts
                else hf.SafetensorsSource(self.path, name_of, divide=family.divide)
            )
            return _Opened(tensors, None, kv_scales.take(tensors, self.config.num_layers))
        tensors = hf.SafetensorsSource(self.path, named_by_module(name_of, self._format.suffixes), hf.DTYPES)
        # Before modules are put together, for some of these scales have a name of theirs.
        scales = kv_scales.take(tensors, self.config.num_layers)
        source = QuantisedSource(tensors, self._format)
        return _Opened(source, source, scales)

    def check(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> None:
        assemble.check(self.path, self._source, abstract, weights)

    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> dict[str, jax.Array]:
        return assemble.assemble(self._source, abstract, weights)


class GGUFCheckpoint(Checkpoint):
    """One .gguf file, or the parts of one that llama-gguf-split divided, by any of their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = GGUFSource(path)
        self.config = self._source.config
        self.declared_eos = gguf_tokenizer.declared_eos(self._source.file.metadata, path)

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        return generation.from_gguf(self.path, self._source.file.metadata)

    @property
    def _codes(self) -> codes.CodeSource:
        return self._source

    def tokenizer(self) -> Tokenizer:
        return gguf_tokenizer.load(self._source.file.metadata, self.path)

    def check(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> None:
        assemble.check(self.path, self._source, abstract, weights)

    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> dict[str, jax.Array]:
        return assemble.assemble(self._source, abstract, weights)


class OrbaxCheckpoint(Checkpoint):
    """A folder that scripts/convert.py wrote. Its parameters are stored assembled, so ``weights`` may be empty."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config, self.declared_eos = orbax.read_config(folder)
        family_of(self.config.architecture)

    @property
    def kv_scales(self) -> np.ndarray | None:
        return orbax.kv_scales(self.path, self.config.num_layers)

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        return orbax.sampling_defaults(self.path)

    def tokenizer(self) -> Tokenizer:
        return hf_tokenizer.load(self.path)

    def check(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> None:
        orbax.check(self.path, abstract)

    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> dict[str, jax.Array]:
        return orbax.restore(self.path, abstract)


class DummyCheckpoint(Checkpoint):
    """Random weights in the shape of a preset, or of a folder's config.json, whose tokenizer and defaults it has then.

    Without a tokenizer.json every byte is a token.
    """

    def __init__(self, model: str) -> None:
        self.path = Path(model) if model in PRESETS else resolve(model, weights=False)
        if not (model in PRESETS or (self.path / "config.json").is_file()):
            known = ", ".join(PRESETS)
            raise ModelError(f"load_format dummy needs a folder with config.json, or one of {known}; got {model!r}")
        raw = PRESETS.get(model) or read_json(self.path / "config.json")
        self.config = read_config(raw, model)
        self.declared_eos = _declared_eos(self.path, raw)

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        return generation.from_hf(self.path / "generation_config.json")

    def tokenizer(self) -> Tokenizer:
        return hf_tokenizer.load(self.path) if (self.path / "tokenizer.json").is_file() else Tokenizer.of_bytes()

    def check(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> None:
        """Everything fits."""

    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]) -> dict[str, jax.Array]:
        return random_parameters(abstract)


def open_checkpoint(model: str, load_format: str = "auto") -> Checkpoint:
    """Open ``model``: smollm2-135m, a local folder or .gguf file, or a Hugging Face hub id. Raises ModelError.

    With ``load_format`` dummy only its config.json is read, and ``model`` may name one of presets.PRESETS.
    """
    if load_format == "dummy":
        return DummyCheckpoint(model)
    path = resolve(model)
    if path.is_file():
        return GGUFCheckpoint(path)
    if (path / orbax.CONFIG).is_file():
        return OrbaxCheckpoint(path)
    if (path / "config.json").is_file():
        return HuggingFaceCheckpoint(path)
    files = ", ".join(sorted(file.name for file in path.glob("*.gguf")))
    raise ModelError(
        f"{path}: neither config.json (Hugging Face) nor {orbax.CONFIG} (Orbax) in this folder"
        + (f"; name one of its GGUF files instead: {files}" if files else "")
    )


def _declared_eos(folder: Path, raw: Mapping[str, Any]) -> eos.Declared:
    """Of generation_config.json and of ``raw``, config.json's object, which may hold the language model's part."""
    path = folder / "generation_config.json"
    config = Fields(raw, folder / "config.json")
    found = (Fields(read_json(path), path), config, config.fields("text_config"))
    return tuple(one for fields in found for one in eos.declared(fields))
