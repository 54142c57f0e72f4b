"""Shapes of real models, without jax."""

from jaxserve.models.config import Experts, ModelConfig, Rope

MISTRAL_7B = ModelConfig(
    architecture="MistralForCausalLM", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=32768, norm_eps=1e-5,
    rope=Rope(theta=1e4, dim=128), windows=(4096,) * 32,
)  # fmt: skip
YI_34B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=64000, hidden_size=7168, intermediate_size=20480, num_layers=60,
    num_heads=56, num_kv_heads=8, head_dim=128, max_position_embeddings=200000, norm_eps=1e-5,
    rope=Rope(theta=1e7, dim=128),
)  # fmt: skip
LLAMA2_70B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80,
    num_heads=64, num_kv_heads=8, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5,
    rope=Rope(theta=1e4, dim=128),
)  # fmt: skip
FALCON_180B = ModelConfig(
    architecture="FalconForCausalLM", vocab_size=65024, hidden_size=14848, intermediate_size=4 * 14848, num_layers=80,
    num_heads=232, num_kv_heads=8, head_dim=64, max_position_embeddings=2048, norm_eps=1e-5, norm="layer",
    gated_mlp=False, activation="gelu", num_parallel_norms=2, rope=Rope(theta=1e4, dim=64),
)  # fmt: skip
MIXTRAL_8X7B = ModelConfig(
    architecture="MixtralForCausalLM", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=32768, norm_eps=1e-5,
    rope=Rope(theta=1e6, dim=128),
    experts=Experts(count=8, per_token=2, intermediate_size=14336, normalise=True, layers=tuple(range(32))),
)  # fmt: skip
