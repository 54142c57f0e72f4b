"""Random weights in a model's shape (--load-format dummy)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, ModelError
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.presets import PRESETS
from jaxserve.models.registry import family_of
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters
from tests.models.golden import Golden


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        # As the hub counts them in the published checkpoints.
        ("mistral-7b", 7_241_732_096),
        ("yi-34b", 34_388_917_248),
        ("llama2-70b", 68_976_648_192),
        ("falcon-180b", 179_522_565_120 - 65024 * 14848),  # whose files hold the tied head a second time
        ("deepseek-v2-lite", 15_706_484_224),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    config = open_checkpoint(name, "dummy").config
    _, state = abstract_model(family_of(config.architecture).model, config, max_len=64, dtype=jnp.dtype("bfloat16"))
    abstract = abstract_parameters(state, make_mesh())
    assert sum(math.prod(spec.shape) for spec in abstract.values()) == num_parameters


def test_weights_are_seeded_and_sharded() -> None:
    checkpoint = open_checkpoint(str(Golden("qwen3_moe").checkpoint), "dummy")
    family = family_of(checkpoint.config.architecture)
    _, state = abstract_model(family.model, checkpoint.config, max_len=64, dtype=jnp.dtype("float32"))
    one, two = (checkpoint.load(abstract_parameters(state, make_mesh(tensor)), {}) for tensor in (1, 2))
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])
    assert len(two["layers.0.mlp.down"].sharding.device_set) == 2
    assert np.asarray(one["layers.0.attention.q_norm.weight"]).tolist() == [1.0] * checkpoint.config.head_dim
    assert 0.015 < np.std(one["embedding"]) < 0.025


def test_generation_without_weights_and_tokenizer(tmp_path: Path) -> None:
    raw = json.loads((Golden("mistral_full").checkpoint / "config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with LLM(
        model=str(tmp_path), load_format="dummy", token_budget=16, max_num_seqs=2, max_model_len=32, show_progress=False
    ) as llm:
        (output,) = llm.generate("caf\u00e9", SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(output.prompt_token_ids) == 5
        assert len(output.outputs[0].token_ids) == 4
        assert llm.engine.tokenizer.decode(output.prompt_token_ids) == "caf\u00e9"


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=f"load_format dummy needs a folder with config.json, or one of {next(iter(PRESETS))}"
    ):
        open_checkpoint(str(tmp_path), "dummy")
    with pytest.raises(ModelError, match=r"unknown model 'yi-34b': .* its shape alone is known, for load_format dummy"):
        open_checkpoint("yi-34b")
    with pytest.raises(ConfigError, match="load_format must be one of auto, dummy, got 'random'"):
        EngineConfig(load_format="random")
