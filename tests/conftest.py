"""Runs before jax and triton are imported anywhere.

Eight virtual CPU devices, to test meshes without accelerators; GPU kernels run in their interpreters. What is compiled
for GPUs is compiled in processes of its own.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRITON_INTERPRET"] = "1"

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tokenizers

if TYPE_CHECKING:
    from jaxserve import LLM


@pytest.fixture(autouse=True, scope="session")
def small_kv_caches() -> Iterator[None]:
    """Engines that are not told the number of their blocks fill a gigabyte with zeros otherwise."""
    from jaxserve.engine import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "CPU_KV_CACHE_BYTES", 2**28)
        yield


@pytest.fixture(autouse=True, scope="module")
def memory_given_back(small_kv_caches: None) -> Iterator[None]:
    """Jax keeps what it has traced and compiled for as long as the process runs; files share nothing of it."""
    yield
    import jax

    from jaxserve.engine.memory import return_freed_memory

    jax.clear_caches()
    gc.collect()
    return_freed_memory()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of the 96 tokens that the tiny checkpoints of tests/golden have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"<{i}>": i for i in range(96)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def session_llm() -> Iterator[LLM]:
    from jaxserve import LLM

    with LLM(model="smollm2-135m", token_budget=256, max_num_seqs=16, max_model_len=2048) as llm:
        yield llm


@pytest.fixture
def llm(session_llm: LLM) -> Iterator[LLM]:
    """The embedded model. Afterwards its engine must be idle, with every KV block back."""
    yield session_llm
    engine = session_llm.engine
    while engine.has_unfinished():
        engine.step()
    engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert engine.compiles.count == 0
