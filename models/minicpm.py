"""MiniCPM3: attention over latents, with scaled embeddings, residuals and logits (arXiv 2404.06395)."""

from __future__ import annotations

import math
from functools import partial

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.deepseek import read_latent
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.latent import LatentDecoder, latent_weights


def read(raw: RawConfig) -> ModelConfig:
    hidden, depth = raw.size("hidden_size"), math.sqrt(raw.count("num_hidden_layers"))
    return read_latent(
        raw,
        embedding_scale=raw.number("scale_emb"),
        residual_scale=raw.number("scale_depth", depth) / depth,
        logits_scale=raw.size("dim_model_base", hidden) / hidden,
    )


_DEFAULTS = llama.DEFAULTS | {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": True, "kv_lora_rank": 256,
    "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rope_interleave": False, "scale_emb": 12,
    "scale_depth": 1.4, "dim_model_base": 256,
}  # fmt: skip

MINICPM3 = Family(
    models="MiniCPM3",
    read=read,
    weights=partial(llama.weights, attention=latent_weights),
    model=LatentDecoder,
    defaults=_DEFAULTS,
)
