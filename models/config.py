"""The shape of a model, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from jaxserve.errors import ModelError

NORMS = ("rms", "rms_plus_one", "layer", "layer_no_bias")
NORM_PLACES = ("before", "after", "around")
QK_NORMS = ("head", "all_heads", "unweighted")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROUTERS = ("softmax", "sigmoid", "grouped_sigmoid", "sparse_mixer")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings and how they are stretched (models/rope.py)."""

    theta: float
    dim: int
    """Rotated dimensions of each head, its first ones."""
    kind: str = "default"
    """One of rope.ROPE_KINDS, Hugging Face's names."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the kind takes, under Hugging Face's names."""
    interleaved: bool = False
    """Whether the checkpoint's rows have the two values that are rotated together next to each other. They are loaded
    as all models have them here, half a head apart (models/reshape.py)."""

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ModelError(f"rotary embeddings need an even number of dimensions, got {self.dim}")


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Queries grow with their position: by ``1 + strength * log(1 + (position + offset) // step_tokens)``
    (arXiv 2501.19399)."""

    strength: float
    step_tokens: int
    offset: int
    layers: tuple[int, ...]
    """The layers whose queries do."""


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An MLP that every token goes through, beside the experts that it chooses."""

    intermediate_size: int
    gated: bool
    """Whether the token says, by a sigmoid, how much of it is added."""


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """gpt-oss's gate, ``(up + 1) * gate * sigmoid(alpha * gate)``, of values that are clamped (arXiv 2508.10925)."""

    alpha: float
    limit: float
    """Of ``gate`` from above, of ``up`` from both sides."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP."""

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool
    """Scale the chosen experts' weights to sum 1."""
    layers: tuple[int, ...]
    """The layers that have one; the others keep a dense MLP."""
    router: str = "softmax"
    """One of ROUTERS (models/routing.py)."""
    scale: float = 1.0
    """Of the chosen experts' weights."""
    num_groups: int = 1
    """Of the routers softmax and grouped_sigmoid: experts are in groups, one after the other."""
    groups_per_token: int = 1
    """From how many of them a token's experts are chosen."""
    choice_bias: bool = False
    """Of the router grouped_sigmoid: choose by scores with a bias."""
    jitter: float = 0.0
    """Of the router sparse_mixer: how near to the best score those are that share its weight."""
    weighs_inputs: bool = False
    """Scale what an expert takes by its weight, in place of what it gives."""
    shared: SharedExpert | None = None
    bias: bool = False
    """Of the router, and of the experts' matrices."""
    gate: ClampedSwiGLU | None = None
    """In place of the model's activation."""

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise ModelError(f"experts per token must be in [1, {self.count}], got {self.per_token}")
        if self.router not in ROUTERS:
            raise ModelError(f"router {self.router!r} is not supported; supported: {', '.join(ROUTERS)}")
        if self.router == "sparse_mixer" and self.per_token != 2:
            raise ModelError(f"experts per token must be 2 with the router sparse_mixer, got {self.per_token}")
        if self.count % self.num_groups or not 1 <= self.groups_per_token <= self.num_groups:
            raise ModelError(
                f"{self.count} experts in {self.num_groups} groups, {self.groups_per_token} of them a token, is not "
                "possible: groups must be equal, and a token's no more than there are"
            )
        chosen_from = self.count // self.num_groups * self.groups_per_token
        if self.per_token > chosen_from:
            raise ModelError(
                f"experts per token must be at most {chosen_from}, its groups' experts, got {self.per_token}"
            )


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """Layers whose memory of a sequence does not grow, in place of attention (kernels/recurrent.py)."""

    kind: str
    """One of models/hybrid.py's."""
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    layers: tuple[int, ...]
    conv_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise ModelError(
                f"value heads of recurrent layers must be a multiple of their key heads, got {self.num_value_heads} "
                f"and {self.num_key_heads}"
            )

    @property
    def values_per_key(self) -> int:
        """Value heads that share a key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def value_rows(self) -> int:
        """Of a key head, the width of all its values."""
        return self.values_per_key * self.value_dim

    @property
    def num_channels(self) -> int:
        """Of a key head, what goes through the convolution: query, key and values."""
        return 2 * self.key_dim + self.value_rows


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434, models/latent.py): a token has one key for all heads, its rotated
    part (``rope.dim``) and a latent from which every head would make the rest of its key, and its value."""

    rank: int
    """Of the latent."""
    query_rank: int | None
    """Of what queries are made from; None: they are made from the hidden state."""
    key_dim: int
    """Of a head's key, as far as it is not rotated."""
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class LocalHeads:
    """Keys and values of layers that have a window, where they are of another shape than those of the others."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class OwnEmbedding:
    """Every layer has an embedding of tokens of its own, beside the model's (Gemma 4)."""

    vocab_size: int
    dim: int


class Memory(Enum):
    """What a layer keeps of a sequence."""

    PAGES = "pages"
    LOCAL_PAGES = "pages of LocalHeads"
    STATE = "a state that does not grow"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions and kinds of a decoder-only transformer; names follow Hugging Face's config.json where it has one."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    norm: str = "rms"
    """One of NORMS; rms_plus_one stores weights around 0."""
    norm_places: str = "before"
    """One of NORM_PLACES: where the norms of attention and of the MLP are."""
    residual_scale: float = 1.0
    """Of what attention and MLP add."""
    activation: str = "silu"
    """One of ACTIVATIONS."""
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    """One of QK_NORMS, before queries and keys are rotated: of every head; of all heads together; of every head and
    without weights, in the layers that rotate."""
    value_norm: bool = False
    """Of every head, without weights."""
    values_are_keys: bool = False
    """Whether layers without a window make values as they make keys, and norm either in its own way."""
    rope: Rope | None = None
    """None: positions are learned embeddings."""
    local_rope: Rope | None = None
    """Of the layers that have a window, where theirs differs."""
    local_heads: LocalHeads | None = None
    """The same."""
    num_kv_shared_layers: int = 0
    """The last ones, which keep nothing of a sequence: each reads keys and values of the last layer before them that
    sees as far as it does."""
    shared_mlp_factor: int = 1
    """How many times as wide the MLPs of those are."""
    own_embedding: OwnEmbedding | None = None
    chunk_tokens: int | None = None
    """Layers that rotate see chunks of the sequence of so many tokens, each by itself."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers that know nothing of positions (NoPE, arXiv 2305.19466)."""
    temperature: Temperature | None = None
    windows: tuple[int | None, ...] = ()
    """Each layer's attention window in tokens, the query's own included; None sees everything. () is all None."""
    attention_scale: float | None = None
    """Of the scores; head_dim ** -0.5 by default."""
    attention_softcap: float | None = None
    attention_sinks: bool = False
    """Every head has the score of a key without a value that all queries see (kernels/attention.py)."""
    attention_gate: bool = False
    """Whether what a head reads is multiplied by the sigmoid of a projection of its own."""
    latent: Latent | None = None
    """In place of keys and values: ``num_kv_heads`` is 1 and ``head_dim`` what is kept of a token."""
    recurrent: Recurrent | None = None
    logits_softcap: float | None = None
    logits_scale: float = 1.0
    head_bias: bool = False
    embedding_scale: float = 1.0
    experts: Experts | None = None
    num_parallel_norms: int = 0
    """Where attention and MLP run side by side: one norm for both, or one each. 0: they follow each other."""
    tie_word_embeddings: bool = False
    num_probes: int = 0
    """Embeddings beside the vocabulary's, which no checkpoint has: -1 is the first one's id, -2 the second one's. They
    are for what a model draws behind them (speculative ppd)."""
    tensor_parallel: int = 1
    """Devices among which every layer is divided."""
    expert_parallel: bool = False
    """Whether they have experts of their own, instead of a share of each."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("norm", self.norm, NORMS),
            ("norm_places", self.norm_places, NORM_PLACES),
            ("qk_norm", self.qk_norm, (None, *QK_NORMS)),
        ):
            if value not in known:
                raise ModelError(f"{name} {value!r} is not supported; supported: {', '.join(map(str, known))}")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers",
            "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ModelError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_held_kv_heads:
            raise ModelError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_held_kv_heads}"
            )
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ModelError(f"rotary dimensions must not exceed head_dim {self.head_dim}, got {self.rope.dim}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelError(f"layer types must be given for each of {self.num_layers} layers, got {len(self.windows)}")
        for window in self.windows:
            if window is not None and window < 1:
                raise ModelError(f"sliding_window must be at least 1, got {window}")
        keep = range(self.num_layers - self.num_kv_shared_layers)
        unlike = {self.layer_window(i) for i in range(self.num_layers)} - {self.layer_window(i) for i in keep}
        if unlike:
            raise ModelError(
                f"num_kv_shared_layers must leave layers of every kind, got {self.num_kv_shared_layers} of "
                f"{self.num_layers}"
            )
        self.of_kind(local=True)  # has checks of its own

    @property
    def kv_copies(self) -> int:
        """How often each KV head is held, one copy after the other, so that every device has one."""
        return max(1, self.tensor_parallel // self.num_kv_heads)

    @property
    def num_held_kv_heads(self) -> int:
        """KV heads with all their copies: what parameters and KV cache are made for."""
        return self.num_kv_heads * self.kv_copies

    @property
    def group_size(self) -> int:
        """Query heads that share one copy of a KV head."""
        return self.num_heads // self.num_held_kv_heads

    @property
    def has_values(self) -> bool:
        """Whether the KV cache has values beside keys."""
        return self.latent is None

    @property
    def kv_width(self) -> int:
        """How many numbers a layer keeps of a token, for each KV head."""
        return 2 * self.head_dim if self.has_values else self.head_dim

    @property
    def window(self) -> int | None:
        """The widest attention window when every layer has one, else None: keys further back are never read again."""
        found = [window for window in self.windows if window is not None]
        return max(found) if found and len(found) == self.num_layers else None

    @property
    def widest_mlp(self) -> int:
        return self.intermediate_size * (self.shared_mlp_factor if self.num_kv_shared_layers else 1)

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer's memory of a sequence is a state, and not keys and values."""
        return self.recurrent is not None and layer in self.recurrent.layers

    def kv_layer(self, layer: int) -> int:
        """Whose keys and values a layer reads, its own or an earlier one's."""
        first_shared = self.num_layers - self.num_kv_shared_layers
        if layer < first_shared:
            return layer
        return max(i for i in range(first_shared) if self.layer_window(i) == self.layer_window(layer))

    def memory(self, layer: int) -> Memory:
        """What the layer keeps whose keys and values a layer reads."""
        if self.is_recurrent(layer):
            return Memory.STATE
        return Memory.LOCAL_PAGES if self.local_heads and self.layer_window(layer) else Memory.PAGES

    def cache_layer(self, layer: int) -> int:
        """The number of the layer that it reads among those that keep the same of a sequence."""
        source = self.kv_layer(layer)
        return sum(self.memory(earlier) is self.memory(source) for earlier in range(source))

    def by_memory(self, layers: Iterable[int]) -> Mapping[Memory, Sequence[int]]:
        """Those of some layers that keep something, by what it is."""
        keep = [layer for layer in layers if self.kv_layer(layer) == layer]
        return {memory: [layer for layer in keep if self.memory(layer) is memory] for memory in Memory}

    def of_kind(self, *, local: bool) -> ModelConfig:
        """The model with the heads of its layers that have a window, or of the others, in all layers."""
        if not local or self.local_heads is None:
            return self
        heads, rope = self.local_heads, self.local_rope or self.rope
        return replace(
            self, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, rope=rope, local_rope=None, local_heads=None
        )

    def of_layer(self, layer: int) -> ModelConfig:
        """The model as if all its layers were as wide as this one."""
        found = self.of_kind(local=self.memory(layer) is Memory.LOCAL_PAGES)
        if self.kv_layer(layer) == layer or self.shared_mlp_factor == 1:
            return found
        return replace(found, intermediate_size=self.shared_mlp_factor * self.intermediate_size, shared_mlp_factor=1)

    def layer_window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None
