"""One replica to simulate: a model on devices, and how its engine is configured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxserve.errors import ConfigError
from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler import POLICIES, Limits, Pace, Speculation
from jaxserve.scheduler.speculation import most_step_drafts
from jaxserve.scheduler.step_time import StepTimeModel
from jaxserve.simulator.cost import OVERLAPPED, CostModel, HostTime, RooflineCost, Tokens, decodes
from jaxserve.simulator.devices import GIB, Device
from jaxserve.simulator.simulator import SimulatedRun, Simulator


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """``tensor`` x ``pipeline`` devices that serve one model. Raises ConfigError."""

    model: ModelConfig
    device: Device
    tensor: int = 1
    pipeline: int = 1
    scheduler: str = "sarathi"
    pace: Pace | None = None
    """For schedulers that need step times."""
    token_budget: int = 512
    max_num_seqs: int = 128
    max_model_len: int = 16384
    """Prompt and output together; the model's own limit is not asked."""
    block_size: int = 64
    memory_share: float = 0.9
    """Of a device's memory, for weights and KV cache."""
    swap_space_bytes: int = 0
    """Of the host's memory."""
    host: HostTime = OVERLAPPED
    lock_step: bool = False
    """Stages move together, as our engine's do (TickPipeline)."""
    num_speculative_tokens: int = 7
    """Most drafts of a sequence in a step, with an acceptance."""
    speculative_acceptance: float | None = None
    """How likely a draft is to hold if those before it do; None: there are none. Drafts cost what their rows do."""
    measured: CostModel | None = None
    """Step times in place of the roofline's, which then only says what fits into memory."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "token_budget", "max_num_seqs", "max_model_len", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.scheduler not in POLICIES:
            raise ConfigError(f"scheduler must be one of {', '.join(POLICIES)}, got {self.scheduler!r}")
        if POLICIES[self.scheduler].needs_step_times and self.pace is None:
            raise ConfigError(f"scheduler {self.scheduler} needs a pace: a TBT objective and step times")
        if self.max_num_seqs > self.token_budget:
            raise ConfigError(
                f"max_num_seqs must not exceed token_budget, got {self.max_num_seqs} > {self.token_budget}"
            )
        if self.model.num_heads % self.tensor:
            raise ConfigError(f"tensor must divide the model's {self.model.num_heads} heads, got {self.tensor}")
        if self.pipeline > self.model.num_layers:
            raise ConfigError(
                f"pipeline must not exceed the model's {self.model.num_layers} layers, got {self.pipeline}"
            )
        if self.speculative_acceptance is not None:
            if not 0 <= self.speculative_acceptance <= 1:
                raise ConfigError(f"speculative_acceptance must be in [0, 1], got {self.speculative_acceptance:g}")
            if self.pipeline > 1:
                raise ConfigError(f"pipeline must be 1 with a speculative_acceptance, got {self.pipeline}")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share must be in (0, 1], got {self.memory_share:g}")
        if self.measured is not None and self.measured.num_stages != self.pipeline:
            raise ConfigError(f"pipeline must be the measured {self.measured.num_stages}, got {self.pipeline}")
        if self.swap_space_bytes < 0 or (self.swap_space_bytes and self.pipeline > 1):
            raise ConfigError(
                f"swap_space_bytes must be at least 0, and 0 with a pipeline, got {self.swap_space_bytes} with "
                f"pipeline {self.pipeline}"
            )
        if self.num_blocks < 2:
            raise ConfigError(
                f"weights of {self.roofline.weight_bytes / GIB:.1f} GiB a device leave no room for a KV cache in "
                f"{self.memory_share:g} of the {self.device.name}'s {self.device.memory_bytes / GIB:.0f} GiB: "
                f"tensor x pipeline of {self.tensor} x {self.pipeline} is too small"
            )

    @property
    def num_devices(self) -> int:
        return self.tensor * self.pipeline

    @cached_property
    def roofline(self) -> RooflineCost:
        return RooflineCost(self.model, self.device, tensor=self.tensor, pipeline=self.pipeline, host=self.host)

    @property
    def cost(self) -> CostModel:
        return self.roofline if self.measured is None else self.measured

    @property
    def num_blocks(self) -> int:
        """KV blocks, the dummy one included; every stage holds its layers' part of each."""
        room = self.memory_share * self.device.memory_bytes - self.roofline.weight_bytes
        return int(room // (self.roofline.kv_bytes_per_token * self.block_size))

    @property
    def speculation(self) -> Speculation | None:
        """What the scheduler goes by: steps of decodes and drafts alone, at a medium context."""
        if self.speculative_acceptance is None:
            return None
        max_drafts = most_step_drafts(self.num_speculative_tokens, self.max_num_seqs)
        largest = self.max_num_seqs + max_drafts
        sizes = sorted({*(2**power for power in range(largest.bit_length())), largest})
        context = min(1024, self.max_model_len)
        seconds = {rows: sum(self.cost.stage_seconds(decodes(rows, context))) for rows in sizes}
        step_time = StepTimeModel(seconds, 0.0, 0.0, interpolates=True)
        pace = Pace(self.pace.step_seconds if self.pace is not None else math.inf, step_time)
        return Speculation(num_speculative_tokens=self.num_speculative_tokens, max_drafts=max_drafts, pace=pace)

    @property
    def swapped_block_seconds(self) -> float:
        """A block's way to the swap space and back: every device has its share of it, and a link of its own."""
        return 2 * self.device.pcie.send_seconds(self.roofline.kv_bytes_per_token * self.block_size)

    def _with_swap_space(self, limits: Limits) -> Limits:
        step_seconds = self.cost.stage_seconds([Tokens(0, self.token_budget, False)])[0]
        return limits.with_swap_space(
            self.swap_space_bytes // (self.roofline.kv_bytes_per_token * self.block_size * self.tensor),
            copied_seconds=self.swapped_block_seconds,
            computed_seconds=step_seconds / self.token_budget * self.block_size,
        )

    def simulate(self, workload: Sequence[WorkloadRequest]) -> SimulatedRun:
        limits = Limits(
            token_budget=self.token_budget,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            window=self.model.window,
            pace=self.pace,
            # Where there is nothing to share, as the paper's engines: they had no cache.
            enable_prefix_caching=bool(self.swap_space_bytes) or any(request.num_shared_tokens for request in workload),
            speculation=self.speculation,
        )
        if self.swap_space_bytes:
            limits = self._with_swap_space(limits)
        simulator = Simulator(
            POLICIES[self.scheduler],
            limits,
            self.cost,
            lock_step=self.lock_step,
            copy_seconds=self.swapped_block_seconds / 2,
            acceptance=self.speculative_acceptance or 0.0,
        )
        return simulator.run(workload)
