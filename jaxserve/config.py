"""Configuration: frozen dataclasses, and every check at the door.

A field is declared once, with its help and choices; cli.py makes a flag of it, and a setting of the YAML file.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxserve.errors import ConfigError
from jaxserve.sampling_params import MAX_LOGPROBS
from jaxserve.scheduler import POLICIES, Limits, Pace, Scheduler, Speculation
from jaxserve.scheduler.speculation import most_step_drafts

ATTENTION_BACKENDS = ("auto", "xla", "native", "triton", "pod", "mosaic")
KV_CACHE_DTYPES = ("auto", "fp8_e4m3")
GEMM_BACKENDS = ("auto", "no_split_k", "cublaslt")
QUANTIZATION = ("auto", "none", "codes")
ACTIVATIONS = ("auto", "int8")
GENERATION_CONFIGS = ("auto", "none")
LOAD_FORMATS = ("auto", "dummy")
SPECULATIVE = ("off", "ngram", "suffix", "draft", "ppd")
AUTO_TOKEN_BUDGET = 2048
"""The largest that token_budget auto tries: the paper's budget under relaxed objectives."""
DTYPES = ("auto", "float32", "bfloat16", "float16")

Headings = Mapping[str, str]
"""What the fields of a configuration are about, in --help and docs/settings.md: from the named one to the next."""


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


def check_readable(config: object, *names: str) -> None:
    """Raise ConfigError for a field that names a file which is not there, or nobody may read."""
    for name in names:
        path = getattr(config, name)
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"{name} must be a file that can be read, got {path!r}")


def cache_dir() -> Path:
    """Where weights and compiled programs are kept: $JAXSERVE_CACHE, else the user's cache folder."""
    root = os.environ.get("JAXSERVE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxserve"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one engine serves one model. Lengths and budgets are in tokens. Raises ConfigError."""

    HEADINGS: ClassVar[Headings] = {
        "model": "model", "token_budget": "batching", "attention_backend": "memory and kernels",
        "speculative": "speculation", "tensor_parallel": "parallelism", "compilation_cache": "operations",
        "trace": "observability",
    }  # fmt: skip

    model: str = option("smollm2-135m", "smollm2-135m, a local folder or .gguf file, or a Hugging Face hub id")
    load_format: str = option(
        "auto",
        "dummy: random weights in the shape of a folder's or hub id's config.json, or of mistral-7b, yi-34b, "
        "llama2-70b, falcon-180b, deepseek-v2-lite or qwen3-30b-a3b",
        LOAD_FORMATS,
    )
    tokenizer: str | None = option(None, "folder or hub id of the tokenizer; the model's own by default")
    chat_template: str | None = option(None, "file of a chat template (Jinja) in place of the tokenizer's own")
    dtype: str = option("auto", "weights and activations; auto: float32 on CPUs, bfloat16 on GPUs", DTYPES)
    quantization: str = option(
        "auto",
        "quantised weights in memory; none: as dtype, codes: as they are stored, which takes less memory; auto: codes "
        "where a CPU multiplies by them natively",
        QUANTIZATION,
    )
    activations: str = option(
        "auto",
        "what weights that are codes are multiplied by, on CPUs; auto: dtype, int8: rounded to 8 bits, which is faster "
        "and less precise",
        ACTIVATIONS,
    )
    max_model_len: int | None = option(None, "longest prompt + output; the model's own limit by default")
    generation_config: str = option(
        "auto",
        "sampling defaults; auto: the model's, as in generation_config.json, none: the engine's own (vLLM's 'vllm')",
        GENERATION_CONFIGS,
    )
    seed: int = option(0, "seed of the sampled requests that bring none")
    token_budget: int | Literal["auto"] = option(
        256,
        "most tokens in one step, decodes and prefill chunks together; auto: the most that meets slo_tbt_seconds, or, "
        "without that, that the memory takes",
    )
    max_num_seqs: int = option(16, "most sequences that run at once")
    scheduler: str = option("sarathi", "batching policy", tuple(POLICIES))
    chunk_schedule: str | None = option(
        None,
        "sarathi's budget in the stages of a prefill, falling as its chunks read more keys: 512,384,256 for the three "
        "thirds of max_model_len",
    )
    slo_tbt_seconds: float | None = option(
        None, "objective for the time between tokens; token_budget auto and the scheduler adaptive go by it"
    )
    profile: str | None = option(
        None,
        "step times from profile_steps.py, for token_budget auto and adaptive; measured at start by default",
    )
    attention_backend: str = option(
        "auto",
        "attention kernels; auto: native on CPUs with a C++ compiler, in float32 and bfloat16, triton on GPUs, or xla; "
        "pod: triton with one launch for hybrid batches; mosaic: triton with a prefill kernel for Hopper",
        ATTENTION_BACKENDS,
    )
    gemm_backend: str = option(
        "auto",
        "matrix products on GPUs; auto: what XLA measures to be fastest of cuBLAS, cuBLASLt and Triton; no_split_k: "
        "the same without products split along their inner dimension; cublaslt: of cuBLASLt alone, soon tuned",
        GEMM_BACKENDS,
    )
    kv_cache_dtype: str = option(
        "auto", "type of the KV cache; auto: that of the weights; fp8_e4m3 holds twice as many tokens", KV_CACHE_DTYPES
    )
    block_size: int | None = option(None, "tokens in one KV-cache block; 16 on CPUs, 64 on GPUs by default")
    num_blocks: int | None = option(None, "KV-cache blocks; by default what the memory holds")
    enable_prefix_caching: bool = option(
        True,
        "keep the KV of earlier requests while there is room, and compute only what a prompt adds to them; not with "
        "schedulers that run whole prompts",
    )
    swap_space_bytes: int = option(
        0,
        "host memory for blocks that the prefix cache has no room for, where they come back faster than they are "
        "computed; a CPU's is better used for more num_blocks",
    )
    gpu_memory_utilization: float = option(0.92, "share of the GPU's memory for weights, KV cache and steps")
    speculative: str = option(
        "off",
        "guess the next tokens and verify them in rows that a step has free, which changes no output; ngram: what "
        "followed the last tokens before; suffix: the same, also in the outputs of other requests; draft: what "
        "draft_model draws; ppd: what the model draws behind ppd_probes (arXiv 2405.18628)",
        SPECULATIVE,
    )
    num_speculative_tokens: int = option(7, "most guesses of one sequence in a step")
    suffix_decoding_max_cached_tokens: int = option(
        100_000, "of outputs that speculative suffix keeps in the host's memory, some 500 bytes each"
    )
    draft_model: str | None = option(None, "as model, a smaller one with its vocabulary, which speculative draft needs")
    ppd_probes: str | None = option(
        None, "file that scripts/train_ppd.py writes, which speculative ppd needs; one for each guess, at least"
    )
    tensor_parallel: int = option(1, "devices that share every layer: heads, MLPs and the vocabulary are divided")
    enable_expert_parallel: bool = option(
        False, "give each of the tensor_parallel devices experts of its own, instead of a share of every expert"
    )
    pipeline_parallel: int = option(
        1, "stages, on tensor_parallel devices each, that the layers are divided into; each works on a batch of its own"
    )
    compilation_cache: str | None = option(None, "folder of compiled programs; in the user's cache folder by default")
    warmup: bool = option(
        True, "compile and run every program before serving; without it, for development, each when it is first needed"
    )
    max_logprobs: int = option(
        MAX_LOGPROBS, "most alternatives that logprobs and prompt_logprobs may ask for; -1: the vocabulary"
    )
    trace: str | None = option(None, "write a Perfetto/Chrome trace of the steps to this file")

    def __post_init__(self) -> None:
        for name in (
            "max_model_len", "token_budget", "max_num_seqs", "tensor_parallel", "pipeline_parallel", "block_size",
            "num_blocks", "num_speculative_tokens", "suffix_decoding_max_cached_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None or (name == "token_budget" and value == "auto"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if not self.model:
            raise ConfigError("model must not be empty")
        check_readable(self, "chat_template")
        if self.token_budget != "auto" and self.max_num_seqs > self.token_budget:
            raise ConfigError(
                f"max_num_seqs must not exceed token_budget (every running decode is in every batch), "
                f"got {self.max_num_seqs} > {self.token_budget}"
            )
        if self.block_size is not None and (self.block_size & (self.block_size - 1) or not 8 <= self.block_size <= 128):
            raise ConfigError(f"block_size must be a power of two in [8, 128], got {self.block_size}")
        for name, allowed in (
            ("load_format", LOAD_FORMATS),
            ("scheduler", tuple(POLICIES)),
            ("dtype", DTYPES),
            ("quantization", QUANTIZATION),
            ("activations", ACTIVATIONS),
            ("attention_backend", ATTENTION_BACKENDS),
            ("gemm_backend", GEMM_BACKENDS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("generation_config", GENERATION_CONFIGS),
            ("speculative", SPECULATIVE),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not isinstance(self.max_logprobs, int) or isinstance(self.max_logprobs, bool) or self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs must be an integer of at least -1, got {self.max_logprobs!r}")
        self._check_objective()
        self._check_switches()
        self._check_swap_space()
        for name, kind in (("draft_model", "draft"), ("ppd_probes", "ppd")):
            value = getattr(self, name)
            if (self.speculative == kind) != (value is not None):
                raise ConfigError(
                    f"{name} must be given with speculative {kind} and with no other, got {value!r} with "
                    f"{self.speculative}"
                )
        if self.draft_model is not None and self.pipeline_parallel > 1:
            raise ConfigError(
                f"pipeline_parallel must be 1 with a draft_model, which has no stages, got {self.pipeline_parallel}"
            )
        if self.quantization == "codes" and self.pipeline_parallel > 1:
            raise ConfigError(f"pipeline_parallel must be 1 with quantization codes, got {self.pipeline_parallel}")
        if self.activations == "int8":
            if self.quantization == "none":
                raise ConfigError("quantization must be auto or codes with activations int8, got none")
            for name in ("tensor_parallel", "pipeline_parallel"):
                if getattr(self, name) > 1:
                    raise ConfigError(f"{name} must be 1 with activations int8, got {getattr(self, name)}")
        for policy in POLICIES.values():
            policy.check_options(self)
        if not 0.1 <= self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in [0.1, 1], got {self.gpu_memory_utilization!r}")
        if not 0 <= self.seed <= 2**31 - 1:
            raise ConfigError(f"seed must be in [0, {2**31 - 1}], got {self.seed}")

    @property
    def policy(self) -> type[Scheduler]:
        """The class that ``scheduler`` names."""
        return POLICIES[self.scheduler]

    @property
    def needs_step_times(self) -> bool:
        return (self.token_budget == "auto" and self.slo_tbt_seconds is not None) or self.policy.needs_step_times

    def _check_objective(self) -> None:
        if self.slo_tbt_seconds is not None and not 0 < self.slo_tbt_seconds < math.inf:
            raise ConfigError(f"slo_tbt_seconds must be positive and finite, got {self.slo_tbt_seconds}")
        if self.policy.needs_step_times and self.slo_tbt_seconds is None:
            raise ConfigError(f"slo_tbt_seconds must be given for scheduler {self.scheduler}, got none")
        user = "token_budget auto" if self.token_budget == "auto" else f"scheduler {self.scheduler}"
        if self.needs_step_times and self.pipeline_parallel > 1:
            raise ConfigError(
                f"pipeline_parallel must be 1 for {user}, whose step times are of one batch at a time, "
                f"got {self.pipeline_parallel}"
            )
        if self.token_budget == "auto" and self.policy.runs_whole_prompts:
            raise ConfigError(
                f"scheduler {self.scheduler} runs whole prompts: token_budget must be at least max_model_len, got auto"
            )

    def _check_switches(self) -> None:
        for name in ("warmup", "enable_prefix_caching", "enable_expert_parallel"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not self.warmup and self.token_budget == "auto" and self.needs_step_times:
            raise ConfigError("warmup must be true for token_budget auto, which times every program, got false")

    def _check_swap_space(self) -> None:
        num_bytes = self.swap_space_bytes
        if not isinstance(num_bytes, int) or isinstance(num_bytes, bool) or num_bytes < 0:
            raise ConfigError(f"swap_space_bytes must be an integer of at least 0, got {num_bytes!r}")
        if not num_bytes:
            return
        if not self.enable_prefix_caching or self.policy.runs_whole_prompts:
            raise ConfigError(f"swap_space_bytes must be 0 without a prefix cache, got {num_bytes}")
        if self.pipeline_parallel > 1:
            raise ConfigError(f"swap_space_bytes must be 0 with pipeline_parallel above 1, got {num_bytes}")

    @property
    def chunk_budgets(self) -> tuple[int, ...]:
        """The stages of chunk_schedule."""
        return tuple(int(stage) for stage in self.chunk_schedule.split(",")) if self.chunk_schedule else ()

    def with_policy(self, policy: str) -> EngineConfig:
        """Under another scheduler; one that runs prompts whole gets a budget of max_model_len. Raises ConfigError."""
        budget = self.token_budget
        if POLICIES[policy].runs_whole_prompts:
            if self.max_model_len is None:
                raise ConfigError(
                    f"max_model_len must be given to compare with {policy}, which runs whole prompts, got none"
                )
            budget = self.max_model_len
        # A chunk_schedule is for the policy that it was given with.
        schedule = self.chunk_schedule if policy == self.scheduler else None
        return dataclasses.replace(self, scheduler=policy, token_budget=budget, chunk_schedule=schedule)

    def resolve(self, *, model_max_len: int, on_gpu: bool) -> ResolvedConfig:
        """Fill in what depends on the model and the platform: max_model_len, block_size and dtype.

        An automatic token_budget becomes the largest one that is tried.
        """
        max_model_len = self.max_model_len or model_max_len
        if max_model_len > model_max_len:
            raise ConfigError(
                f"max_model_len must not exceed the model's {model_max_len} positions, got {max_model_len}"
            )
        block_size = self.block_size or (64 if on_gpu else 16)
        # A step of more tokens than the longest prompt would rarely fill.
        most = min(AUTO_TOKEN_BUDGET, max(max_model_len, self.max_num_seqs))
        token_budget = self.token_budget if isinstance(self.token_budget, int) else most
        if self.policy.runs_whole_prompts and token_budget < max_model_len:
            raise ConfigError(
                f"scheduler {self.scheduler} runs whole prompts: token_budget must be at least max_model_len, "
                f"got {token_budget} < {max_model_len}"
            )
        # One block is the dummy page; the rest must hold at least one request of full length, or it could never run.
        needed = 1 + -(-max_model_len // block_size)
        if self.num_blocks is not None and self.num_blocks < needed:
            raise ConfigError(
                f"num_blocks must be at least {needed} for max_model_len {max_model_len} at block_size {block_size}, "
                f"got {self.num_blocks}"
            )
        dtype = self.dtype if self.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(EngineConfig)}
        settings |= {"max_model_len": max_model_len, "token_budget": token_budget}
        return ResolvedConfig(**settings | {"block_size": block_size, "dtype": dtype})


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig with nothing left open that depends on the model or the platform."""

    max_model_len: int
    token_budget: int
    block_size: int

    @property
    def blocks_per_seq(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    def num_logprobs(self, vocab_size: int) -> int:
        """What max_logprobs is for a vocabulary."""
        return vocab_size if self.max_logprobs == -1 else min(self.max_logprobs, vocab_size)

    @property
    def max_seq_drafts(self) -> int:
        """Drafts of one sequence in a step, at most; with ppd as many guesses and probes."""
        if self.speculative == "off":
            return 0
        return 2 * self.num_speculative_tokens if self.speculative == "ppd" else self.num_speculative_tokens

    @property
    def max_drafts(self) -> int:
        """Drafts in a step, at most."""
        return most_step_drafts(self.max_seq_drafts, self.max_num_seqs) if self.max_seq_drafts else 0

    def limits(
        self,
        num_blocks: int,
        *,
        window: int | None = None,
        pace: Pace | None = None,
        draft_pace: Pace | None = None,
    ) -> Limits:
        """What the scheduler is made with: these settings, and what only the model and the device tell."""
        speculation = None
        if self.speculative != "off":
            speculation = Speculation(
                num_speculative_tokens=self.max_seq_drafts,
                max_drafts=self.max_drafts,
                num_ahead=self.max_seq_drafts if self.speculative == "draft" else 0,
                pace=draft_pace,
            )
        return Limits(
            token_budget=self.token_budget,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            num_blocks=num_blocks,
            block_size=self.block_size,
            window=window,
            pipeline_depth=self.pipeline_parallel,
            chunk_budgets=self.chunk_budgets,
            pace=pace,
            enable_prefix_caching=self.enable_prefix_caching,
            speculation=speculation,
        )
