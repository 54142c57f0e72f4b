"""A model's sampling defaults through a real engine: LLM, batch files, the log, and generation_config none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig, Rope
from jaxserve.models.decoder import Decoder
from jaxserve.models.loading import orbax
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters
from tests.batch.echo import run, write

PROMPT = "The capital of France is"
CHAT = [{"role": "user", "content": "hi"}]
LIMIT = 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of one narrow layer and random weights, which wants greedy outputs of five tokens."""
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=49152, hidden_size=16, intermediate_size=16, num_layers=1,
        num_heads=2, num_kv_heads=2, head_dim=8, max_position_embeddings=LIMIT, norm_eps=1e-5,
        rope=Rope(theta=1e4, dim=8),
    )  # fmt: skip
    _, state = abstract_model(Decoder, config, max_len=LIMIT, dtype=jnp.float32)
    random = np.random.default_rng(0)
    parameters = {
        name: jax.device_put(random.normal(size=spec.shape).astype(np.float32))
        for name, spec in abstract_parameters(state, make_mesh()).items()
    }
    orbax.save(
        tmp_path / "model",
        parameters,
        config,
        eos_token_ids=(),
        sampling_defaults={"temperature": 0, "max_tokens": 5},
        tokenizer=open_checkpoint("smollm2-135m").tokenizer(),
    )
    return tmp_path / "model"


def start(model: Path, generation_config: str, chat_template: Path | None = None) -> LLM:
    return LLM(
        model=str(model),
        token_budget=64,
        max_num_seqs=2,
        max_model_len=LIMIT,
        generation_config=generation_config,
        chat_template=None if chat_template is None else str(chat_template),
        show_progress=False,
    )


def test_requests_that_say_nothing_get_the_models_own(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="jaxserve")
    with start(model, "auto") as llm:
        wanted = SamplingParams(temperature=0, max_tokens=5)
        assert llm.get_default_sampling_params() == wanted
        line = "sampling defaults: temperature 0, top_p 1.0, top_k 0, min_p 0.0, max_tokens 5; of the model: "
        assert f"{line}temperature, max_tokens" in caplog.messages

        (output,) = llm.generate(PROMPT, use_tqdm=False)
        token_ids = output.outputs[0].token_ids
        assert len(token_ids) == 5
        assert token_ids == llm.generate(PROMPT, wanted, use_tqdm=False)[0].outputs[0].token_ids
        assert len(llm.chat(CHAT, use_tqdm=False)[0].outputs[0].token_ids) == 5
        short, cut = llm.generate([[7] * 3, [7] * (LIMIT - 2)], use_tqdm=False)
        assert [len(one.outputs[0].token_ids) for one in (short, cut)] == [5, 2], "cut to what max_model_len leaves"

        (given,) = llm.generate(PROMPT, SamplingParams(seed=1), use_tqdm=False)
        assert len(given.outputs[0].token_ids) == 16, "the caller's are taken as they are"

        entry = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": PROMPT}}
        run(llm.engine, write(tmp_path / "in", entry), tmp_path / "out")
        body = json.loads((tmp_path / "out").read_text())["response"]["body"]
        assert body["choices"][0]["text"] == output.outputs[0].text


def test_none_and_bad_values(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And a chat template in place of the tokenizer's own."""
    caplog.set_level(logging.INFO, logger="jaxserve")
    config = model / orbax.CONFIG
    config.write_text(config.read_text().replace('"temperature": 0', '"temperature": -1'))
    with pytest.raises(ModelError, match=r"jaxserve_config\.json: temperature must be in \[0, 100\], got -1"):
        start(model, "auto")
    template = tmp_path / "template.jinja"
    template.write_text("Q: {{ messages[0].content }} A:")
    with start(model, "none", template) as llm:
        (chat,) = llm.chat(CHAT, use_tqdm=False)
        assert chat.prompt_token_ids == llm.engine.tokenizer.encode("Q: hi A:")
        assert llm.get_default_sampling_params() == SamplingParams()
        assert len(llm.generate([7, 8, 9], use_tqdm=False)[0].outputs[0].token_ids) == 16
    line = "sampling defaults: temperature 1.0, top_p 1.0, top_k 0, min_p 0.0, max_tokens 16; of the model: none"
    assert line in caplog.messages
