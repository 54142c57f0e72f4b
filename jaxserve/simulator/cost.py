"""How long one batch takes: a roofline of every operator of a transformer under tensor and pipeline parallelism.

Each operator takes the longer of computing and of moving its bytes (Williams et al., 2009), and never less than a
kernel does. What that leaves out: waves of thread blocks, clocks that fall under load, memory that layouts waste.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.step_time import BatchShape, StepTimeModel, num_seen_keys
from jaxserve.simulator.devices import TILE_ROWS, Device

DTYPE_BYTES = 2
"""bfloat16 or float16."""
NUM_SMALL_KERNELS = 6
"""Of a layer besides matmuls and attention: two norms, rotation, activation, two additions."""


class Span(Protocol):
    """What a Chunk costs depends on: tokens [start, start + num_tokens) of one request."""

    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def samples(self) -> bool: ...
    @property
    def num_drafts(self) -> int: ...


class Tokens(NamedTuple):
    """A Span without a request, to ask what a batch would cost."""

    start: int
    num_tokens: int
    samples: bool
    num_drafts: int = 0


def decodes(num_requests: int, context: int) -> list[Tokens]:
    """A batch of decodes, each the last token of ``context``."""
    return [Tokens(context - 1, 1, True)] * num_requests


class CostModel(Protocol):
    @property
    def num_stages(self) -> int: ...

    def stage_seconds(self, spans: Iterable[Span], num_rows: int = 0) -> Sequence[float]:
        """Time of one batch in each pipeline stage, handing its activations on included.

        ``num_rows``, where it is more than the tokens: what the batch is padded to.
        """
        ...


@dataclass(frozen=True)
class HostTime:
    """What the engine does between batches while the device waits, in each stage."""

    batch_seconds: float = 0.0
    request_seconds: float = 0.0
    """For each request of the batch."""


OVERLAPPED = HostTime()
"""jaxserve prepares the next batch while the device works; where it measures the device's wait, it is 0 ms a step."""


def authors_host_time(tensor: int) -> HostTime:
    """The engine of arXiv 2403.02310, whose host works between batches, and over Ray with more than one GPU.

    Vidur's profiles (data/profiling/a100/cpu_overheads.csv), medians of schedule, sampler, prepare_inputs,
    process_model_outputs and ray_comm summed: Llama-2-7B on one GPU 2.1, 4.9, 8.1 ms for 8, 32, 64 requests; on two
    5.5, 8.5, 15.1 ms; Llama-2-70B on four 5.6, 10.4, 17.7 ms. The lines through the first and the last.
    """
    if tensor == 1:
        return HostTime(1.3e-3, 0.106e-3)
    return HostTime(4.1e-3, 0.172e-3) if tensor == 2 else HostTime(3.9e-3, 0.216e-3)


class _LayerKind(NamedTuple):
    window: int | None
    sparse: bool
    """A mixture of experts."""


class RooflineCost:
    """Batches of one model on ``tensor`` x ``pipeline`` devices.

    Tensor parallelism splits heads, MLPs and the vocabulary evenly; KV heads are copied where there are fewer of them
    than devices. Pipeline stages hold equal numbers of layers, the first ones one more where they don't divide.
    """

    def __init__(
        self, model: ModelConfig, device: Device, *, tensor: int = 1, pipeline: int = 1, host: HostTime = OVERLAPPED
    ) -> None:
        self.model = model
        self.device = device
        self.tensor = tensor
        self.host = host
        sparse = model.experts.layers if model.experts is not None else ()
        kinds = [_LayerKind(model.layer_window(layer), layer in sparse) for layer in range(model.num_layers)]
        share, extra = divmod(model.num_layers, pipeline)
        first = [stage * share + min(stage, extra) for stage in range(pipeline + 1)]
        self.stages = [Counter(kinds[begin:end]) for begin, end in pairwise(first)]
        self._handover = device.link(tensor * pipeline)
        self._flops_per_second = device.peak_flops_per_second * device.compute_share
        self._attention_flops_per_second = device.peak_flops_per_second * device.attention_share
        self._bytes_per_second = device.memory_bytes_per_second * device.memory_share
        # Where attention and MLP run side by side, their sum is reduced once.
        self._reduces_per_layer = 1 if model.num_parallel_norms else 2

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def kv_heads(self) -> int:
        """On one device."""
        return max(1, self.model.num_kv_heads // self.tensor)

    @property
    def kv_bytes_per_token(self) -> int:
        """On one device, in the stage with the most layers."""
        return self.kv_heads * self.model.kv_width * DTYPE_BYTES * max(s.total() for s in self.stages)

    @property
    def weight_bytes(self) -> float:
        """On one device, in the largest stage."""
        return max(self._stage_weight_bytes(index) for index in range(self.num_stages))

    def stage_seconds(self, spans: Iterable[Span], num_rows: int = 0) -> list[float]:
        spans = list(spans)
        return [sum(self.breakdown(spans, stage, num_rows).values()) for stage in range(self.num_stages)]

    def breakdown(self, spans: Sequence[Span], stage: int = 0, num_rows: int = 0) -> dict[str, float]:
        """Seconds by operator in one stage. Padding takes no part in attention, and is not sampled."""
        model, device = self.model, self.device
        rows = max(num_rows, sum(span.num_tokens for span in spans))
        layers = self.stages[stage]
        num_layers = layers.total()
        hidden_bytes = rows * model.hidden_size * DTYPE_BYTES
        seconds = {
            "projections": num_layers * sum(self._matmul_seconds(rows, *sizes) for sizes in self._attention_matrices()),
            "mlp": sum(count * self._mlp_seconds(rows, kind.sparse) for kind, count in layers.items()),
            "prefill attention": sum(n * self._prefill_seconds(spans, kind.window) for kind, n in layers.items()),
            "decode attention": sum(n * self._decode_seconds(spans, kind.window) for kind, n in layers.items()),
            "small kernels": num_layers * self._small_seconds(rows),
            "all-reduce": num_layers * self._reduces_per_layer * device.all_reduce_seconds(hidden_bytes, self.tensor),
            "host": self.host.batch_seconds + self.host.request_seconds * len(spans),
        }
        if stage == self.num_stages - 1:
            sampled = sum(span.samples * (1 + span.num_drafts) for span in spans)
            seconds["lm_head"] = self._matmul_seconds(sampled, model.hidden_size, model.vocab_size / self.tensor)
        else:
            seconds["send"] = self._handover.send_seconds(hidden_bytes)
        return seconds

    def _attention_matrices(self) -> list[tuple[float, float]]:
        """Inputs and outputs of what a layer's attention multiplies rows by, on one device."""
        model, heads = self.model, self.model.num_heads / self.tensor
        hidden, latent = model.hidden_size, model.latent
        if latent is None:
            return [(hidden, (heads + 2 * self.kv_heads) * model.head_dim), (heads * model.head_dim, hidden)]
        query_rank = latent.query_rank or 0
        return [
            (hidden, query_rank + model.head_dim),
            (query_rank or hidden, heads * (model.head_dim - latent.rank + latent.key_dim)),
            (latent.key_dim, heads * latent.rank),
            (latent.rank, heads * latent.value_dim),
            (heads * latent.value_dim, hidden),
        ]

    def _matmul_seconds(self, rows: float, inner: float, outer: float) -> float:
        if not rows:
            return 0.0
        flops = 2 * math.ceil(rows / TILE_ROWS) * TILE_ROWS * inner * outer
        num_bytes = DTYPE_BYTES * (inner * outer + rows * (inner + outer))
        return self.device.kernel_seconds + max(flops / self._flops_per_second, num_bytes / self._bytes_per_second)

    def _mlp_seconds(self, rows: int, sparse: bool) -> float:
        model, matrices = self.model, 2 if self.model.gated_mlp else 1
        if not sparse or model.experts is None:
            outer = model.intermediate_size / self.tensor
            return self._matmul_seconds(rows, model.hidden_size, matrices * outer) + self._matmul_seconds(
                rows, outer, model.hidden_size
            )
        # Rows spread evenly over the experts that at least one row is expected to choose.
        experts = model.experts
        active = experts.count * (1 - (1 - experts.per_token / experts.count) ** rows)
        outer, each = experts.intermediate_size / self.tensor, rows * experts.per_token / active
        return (
            active
            * (
                self._matmul_seconds(each, model.hidden_size, matrices * outer)
                + self._matmul_seconds(each, outer, model.hidden_size)
                - 2 * self.device.kernel_seconds  # all experts in one grouped kernel
            )
            + 2 * self.device.kernel_seconds
        )

    def _prefill_seconds(self, spans: Sequence[Span], window: int | None) -> float:
        chunks = [span for span in spans if span.num_tokens - span.num_drafts > 1]
        if not chunks:
            return 0.0
        pairs = sum(num_seen_keys(span.start, span.num_tokens, window) for span in chunks)
        keys = sum(_keys(span, window) for span in chunks)
        flops = 4 * pairs * self.model.num_heads / self.tensor * self.model.head_dim
        return self.device.kernel_seconds + max(flops / self._attention_flops_per_second, self._kv_read_seconds(keys))

    def _decode_seconds(self, spans: Sequence[Span], window: int | None) -> float:
        # Every draft reads the keys again, as our kernels do.
        keys = sum(_keys(s, window) * s.num_tokens for s in spans if s.num_tokens - s.num_drafts == 1)
        return self.device.kernel_seconds + self._kv_read_seconds(keys) if keys else 0.0

    def _kv_read_seconds(self, keys: int) -> float:
        return keys * self.kv_heads * self.model.kv_width * DTYPE_BYTES / self._bytes_per_second

    def _small_seconds(self, rows: int) -> float:
        """Norms and additions read and write the hidden state, the activation the MLP's, the rotation the heads."""
        model = self.model
        inner = (3 if model.gated_mlp else 2) * model.intermediate_size / self.tensor
        rotated = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim / self.tensor
        values = rows * (10 * model.hidden_size + inner + rotated)
        return NUM_SMALL_KERNELS * self.device.kernel_seconds + values * DTYPE_BYTES / self._bytes_per_second

    def _stage_weight_bytes(self, stage: int) -> float:
        model, matrices = self.model, 3 if self.model.gated_mlp else 2
        attention = sum(inner * outer for inner, outer in self._attention_matrices())
        parameters = 0.0
        for kind, count in self.stages[stage].items():
            inner = model.intermediate_size
            if kind.sparse and model.experts is not None:
                inner = model.experts.count * model.experts.intermediate_size
            parameters += count * (attention + matrices * model.hidden_size * inner / self.tensor)
        embedding = model.vocab_size * model.hidden_size / self.tensor
        last = stage == self.num_stages - 1
        tied = model.tie_word_embeddings and self.num_stages == 1
        parameters += embedding * ((stage == 0) + (last and not tied))
        return parameters * DTYPE_BYTES


def _keys(span: Span, window: int | None) -> int:
    """Keys that any query of the span sees."""
    keys = span.start + span.num_tokens
    return keys if window is None else min(keys, window - 1 + span.num_tokens)


class FittedCost:
    """Steps of one device as they were measured (scripts/profile_steps.py); ``window`` as in StepTimeModel's fit."""

    num_stages = 1

    def __init__(self, step_time: StepTimeModel, window: int | None = None) -> None:
        self.step_time = step_time
        self.window = window
        self._buckets = sorted(step_time.base_seconds)

    def stage_seconds(self, spans: Iterable[Span], num_rows: int = 0) -> list[float]:
        num_decodes = num_kv_tokens = num_prefill_tokens = num_pairs = 0
        for span in spans:
            keys = num_seen_keys(span.start, span.num_tokens, self.window)
            if span.num_tokens - span.num_drafts == 1:
                num_decodes += span.num_tokens
                num_kv_tokens += keys
            else:
                num_prefill_tokens += span.num_tokens
                num_pairs += keys
        rows = max(num_rows, num_decodes + num_prefill_tokens)
        padded = next((bucket for bucket in self._buckets if bucket >= rows), rows)
        return [self.step_time.predict(BatchShape(padded, num_decodes, num_kv_tokens, num_prefill_tokens, num_pairs))]
