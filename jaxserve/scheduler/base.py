"""What every batching policy shares: the queues, sequence slots, KV blocks, preemption."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, ClassVar

from jaxserve.request import FinishReason, Request, RequestStatus
from jaxserve.scheduler.batch import Batch, Chunk
from jaxserve.scheduler.blocks import BlockManager
from jaxserve.scheduler.prefix_cache import Hit
from jaxserve.scheduler.queue import WaitingQueue, by_rank
from jaxserve.scheduler.speculation import Speculation
from jaxserve.scheduler.step_time import Pace
from jaxserve.scheduler.swap_space import SwapSpace

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig

_new_chunk = partial(tuple.__new__, Chunk)
"""Chunk._make without its checks, a third of the time."""
_computed, _furthest = attrgetter("num_computed_tokens"), attrgetter("furthest_start")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a policy's batches. Lengths and budgets are in tokens.

    There is one class for all policies, so that who builds one need not know which it is: a policy reads the fields
    that it goes by. They are values only; the KV blocks change hands all the time, so the scheduler makes its own.
    """

    token_budget: int
    """Most tokens in one batch."""
    max_num_seqs: int
    """Most requests that run at once."""
    max_model_len: int
    """Of a request, prompt and output together."""
    num_blocks: int
    """KV blocks, the dummy one included."""
    block_size: int
    window: int | None = None
    """The model's widest attention window, where every layer has one."""
    pipeline_depth: int = 1
    """Stages of the pipeline, each at work on a batch of its own. With more than one, a request waits until its token
    has left the last stage (``Scheduler.sampled``), and a batch takes its share of the decodes, so that the next ones
    have as many."""
    chunk_budgets: Sequence[int] = ()
    """Of sarathi's stages of a prefill, the first one's first; none: one stage, of the whole budget."""
    pace: Pace | None = None
    """For the policies that need step times."""
    num_swap_blocks: int = 0
    """Blocks that the swap space of the prefix cache holds."""
    swap_blocks_at_once: int = 0
    """The most of them that are copied back before one step."""
    enable_prefix_caching: bool = False
    """Not for those that run whole prompts: they stand for engines that had no such cache."""
    speculation: Speculation | None = None

    def with_swap_space(self, num_blocks: int, *, copied_seconds: float, computed_seconds: float) -> Limits:
        """With a swap space of so many blocks, where a block's way there and back takes less time than computing it.

        Before a step no more of them are copied back than take as long as a step of the whole budget; the step does not
        wait for the others on their way there.
        """
        if copied_seconds >= computed_seconds:
            return self
        at_once = self.token_budget / self.block_size * computed_seconds / (copied_seconds / 2)
        return replace(self, num_swap_blocks=num_blocks, swap_blocks_at_once=max(1, int(at_once)))


class Scheduler(ABC):
    """Owns the requests that wait and run, first come first served; a policy fills each step's batch.

    ``waiting`` and ``running`` are in order of rank, which is that of arrival where all have one priority; who is later
    or earlier in what follows, is so by rank. When blocks run out the latest is preempted: it gives all its blocks
    back, returns to the queue, where its rank has kept its place, and is recomputed.

    With a window, a request gives back the blocks that it has left behind, so it needs only as many as its window and
    one chunk span, however long it is.
    """

    name: ClassVar[str]
    """As the option ``scheduler`` has it. What policies share, their bases, have none."""
    runs_whole_prompts: ClassVar[bool] = False
    """The budget must then hold the longest prompt."""
    needs_step_times: ClassVar[bool] = False
    """Whether ``Limits.pace`` must be given."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        caching = limits.enable_prefix_caching and not self.runs_whole_prompts
        swaps = caching and limits.num_swap_blocks > 0
        self.blocks = BlockManager(
            limits.num_blocks,
            limits.block_size,
            limits.max_num_seqs,
            limits.max_model_len,
            window=limits.window,
            prefix_caching=caching,
            swap_space=SwapSpace(limits.num_swap_blocks, limits.swap_blocks_at_once) if swaps else None,
        )
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._hit = Hit(0, [])
        """Of the request that ``_next_waiting`` returned last."""

    @staticmethod  # noqa: B027
    def check_options(config: EngineConfig) -> None:
        """Raise ConfigError where ``config`` sets this policy's own options to what cannot work, or for another policy.

        Every policy is asked, whichever ``config`` is of; most have no options of their own.
        """

    @abstractmethod
    def _fill(self, batch: Batch) -> None:
        """Choose the batch's chunks through ``_grant`` and its kin, and whom to ``_admit``."""

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Batch:
        """The next step's batch. Its requests count as computed from now on, so the next call can run ahead."""
        self._release_unseen()
        batch = Batch(self.limits.token_budget, *self._ready())
        self._fill(batch)
        chunks = batch.chunks
        if self.limits.speculation is not None:
            self.limits.speculation.grant(batch, self.blocks, len(self.running))
        for request, _, num_tokens, _, samples, num_drafts in chunks.values():
            request.num_computed_tokens += num_tokens - num_drafts
            request.num_unverified_tokens += num_drafts
            if samples:
                request.num_tokens += 1
        if self.limits.pipeline_depth > 1:
            for chunk in chunks.values():
                chunk.request.num_unsampled_tokens += chunk.samples
        for request in batch.decode_candidates:
            if request.request_id not in chunks and request.status is RequestStatus.RUNNING:
                request.metrics.num_stalls += 1
        return batch

    def sampled(self, batch: Iterable[Chunk]) -> None:
        """Note that a batch has left the last stage of the pipeline: its tokens exist, on the device at least.

        Nothing is left in the pipeline then that goes by what the device knows of a slot: if the request has lost it
        meanwhile, others may have it.
        """
        if self.limits.pipeline_depth > 1:
            for chunk in batch:
                chunk.request.num_unsampled_tokens -= chunk.samples
                if chunk.samples and chunk.request.slot < 0:
                    self._free_slots.append(chunk.slot)

    def verified(self, chunk: Chunk, num_verified: int, num_held: int) -> None:
        """Note how many of a chunk's drafts there were, and how many have turned out to be tokens."""
        request, speculation = chunk.request, self.limits.speculation
        assert speculation is not None
        request.num_unverified_tokens -= chunk.num_drafts
        request.num_tokens += num_held
        if request.status is RequestStatus.RUNNING:  # not where it was preempted since, and must compute all again
            request.num_computed_tokens += num_held
        request.acceptance.note(num_verified if speculation.absent_cost_nothing else chunk.num_drafts, num_held)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request wherever it is; its blocks are free at once, and so is its slot outside of a pipeline.

        A step that still computes for it has been launched before any step that reuses the blocks, so it does no harm:
        every stage of a pipeline, which has the blocks of its own layers, works on batches in the order of their launch
        too, and a batch carries the block tables of its launch through all of them.
        """
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason

    def _ready(self) -> tuple[list[Request], list[Request]]:
        """Running requests that may decode in the next batch, and those whose prefill is under way."""
        decodes, prefills = list[Request](), list[Request]()
        for request in self.running:
            if not request.exhausted:
                (decodes if request.decoding else prefills).append(request)
        if self.limits.pipeline_depth > 1:
            share = -(-len(self.running) // self.limits.pipeline_depth)
            decodes = [r for r in decodes if not r.num_unsampled_tokens][:share]
        return decodes, prefills

    def _grant_decodes(self, batch: Batch) -> None:
        """A token for each, as ``_grant`` would, but all at once: most of a large batch."""
        decodes, held_tokens = batch.decode_candidates[: batch.budget_left], self.blocks.held_tokens
        start_of = _computed if self.limits.speculation is None else _furthest
        for request in [r for r in decodes if start_of(r) >= held_tokens[r.slot]]:
            self._make_room(batch, request, start_of(request), 1)
        if batch.preempted:
            decodes = [r for r in decodes if r.slot >= 0]
        starts, slots = [start_of(r) for r in decodes], [r.slot for r in decodes]
        chunks = map(_new_chunk, zip(decodes, starts, repeat(1), slots, repeat(True), repeat(0)))
        batch.chunks.update(zip([r.request_id for r in decodes], chunks, strict=True))
        batch.num_tokens += len(decodes)

    def _grant(self, batch: Batch, request: Request, wanted: int) -> None:
        """Schedule up to ``wanted`` tokens of a running request, as far as budget and blocks go."""
        start = request.num_computed_tokens
        num_tokens = self._make_room(batch, request, start, min(wanted, batch.budget_left))
        if num_tokens:
            samples = start + num_tokens == request.num_tokens
            batch.add(Chunk(request, start, num_tokens, request.slot, samples))
            # It will not be preempted before the launch: who is granted blocks after it in this batch is later, or is
            # admitted now and has found a free one.
            self.blocks.show(request.slot, start + num_tokens)

    def _make_room(self, batch: Batch, request: Request, start: int, wanted: int) -> int:
        """Give a running request blocks for up to ``wanted`` tokens from ``start`` on; returns for how many.

        Where not even one token fits, later arrivals are preempted, the request itself last.
        """
        if wanted <= 0 or request.status is not RequestStatus.RUNNING:
            return 0
        while (num_tokens := min(wanted, self.blocks.room(request.slot) - start)) <= 0:
            if self._preempt_latest(batch) is request:
                return 0
        self.blocks.grow(request.slot, start + num_tokens)
        return num_tokens

    def _release_unseen(self) -> None:
        """Free the blocks out of every running request's window, before anyone is preempted for want of a block.

        A request's next row is at ``num_computed_tokens``; it and all later ones see keys from there - window + 1 on,
        and a recomputation starts over with new blocks. The step before may still have to read the freed ones, but the
        device runs steps in order, so it does before this step writes to them. Within this step each layer writes the
        rows of all requests before it attends, so a freed block may already hold another request's keys by then: that
        is harmless, for the rows of this request do not see what was freed, and its table entry is 0.
        """
        if self.limits.window is not None:
            for request in self.running:
                self.blocks.release_before(request.slot, request.num_computed_tokens - self.limits.window + 1)

    def _next_waiting(self, batch: Batch) -> Request | None:
        """The head of the queue, where a batch in which nobody was preempted and a free slot could take it.

        It counts as computed what the prefix cache has of it, for who decides about it now.

        A preempted request whose last token is still in a pipeline waits for it: its recomputation needs the token
        itself, and what a later step could feed back lies under the slot that it has lost.
        """
        if batch.preempted or not self._free_slots:
            return None
        head = self.waiting.head()
        if head is None or head.num_pending_tokens:
            return None
        self._hit = self.blocks.find(head)
        head.num_computed_tokens = self._hit.num_tokens
        return head

    def _has_room(self, batch: Batch, request: Request) -> bool:
        """Whether the head of the queue would be left alone for a while, if it were admitted now.

        Only those before it can have it preempted, since later arrivals are preempted first. So the blocks that it and
        they may take while the prefills among them are computed must be free, or a long prompt would be thrown out
        half-way and begun again (vLLM's scheduler_reserve_full_isl, and what outputs take in the meantime). Each
        preemption doubles the time, at last to where everybody before it has ended. So a request is preempted, and
        recomputed, at most ``1 + log2(max_model_len)`` times, rounded up, and once for each admission of a request that
        comes after it and overtakes it.
        """
        if not self.running:
            return True
        prefill_tokens = request.num_uncomputed_tokens + sum(r.num_uncomputed_tokens for r in batch.prefill_candidates)
        left_tokens = self.limits.token_budget - len(self.running)
        num_steps = -(-prefill_tokens // left_tokens) << request.metrics.num_preemptions
        wanted, free = self._most_blocks(request, num_steps), self.blocks.num_free
        if self.limits.window is None:
            wanted -= self.blocks.num_in_use(self._hit)
        else:
            # A shared block that one leaves behind is not free, but the block that it goes on to is taken.
            free -= self.blocks.num_repeats
        if wanted > free:
            return False

        def growth(running: Request) -> int:
            return max(0, self._most_blocks(running, num_steps) - self.blocks.num_held(running.slot))

        # A bound first, which spares a look at every decode while memory is plenty.
        decodes = len(self.running) * -(-num_steps // self.blocks.block_size)
        if wanted + decodes + sum(map(growth, batch.prefill_candidates)) <= free:
            return True
        return wanted + sum(map(growth, self.running)) <= free

    def _most_blocks(self, request: Request, num_steps: int) -> int:
        """Blocks that the request may hold until ``num_steps`` from now; nobody caches a last token."""
        last = min(request.num_tokens + num_steps, request.num_prompt_tokens + request.max_tokens) - 1
        num_blocks = self.blocks.num_for(last)
        if self.limits.window is not None:
            # Window and chunk span most blocks where the window begins with the last token of one.
            chunk = min(request.num_uncomputed_tokens, self.limits.token_budget)
            num_blocks = min(num_blocks, 1 + self.blocks.num_for(self.limits.window + chunk - 2))
        return num_blocks

    def _admit(self, batch: Batch, request: Request) -> None:
        """Move the head of the queue to the running ones."""
        self.waiting.remove(request)
        request.status = RequestStatus.RUNNING
        request.slot = self._free_slots.pop()
        self.blocks.admit(request.slot, request, self._hit)
        if not request.metrics.num_preemptions:
            request.metrics.num_cached_tokens = self._hit.num_tokens
        insort(self.running, request, key=by_rank)
        batch.prefill_candidates.append(request)

    def _preempt_latest(self, batch: Batch) -> Request:
        victim = self.running.pop()
        batch.drop(victim)
        batch.preempted.append(victim)
        self._release(victim)
        victim.status = RequestStatus.WAITING
        victim.num_computed_tokens = 0
        victim.metrics.num_preemptions += 1
        self.waiting.put_back(victim)
        return victim

    def _release(self, request: Request) -> None:
        self.blocks.release(request.slot)
        if not request.num_unsampled_tokens:  # else see ``sampled``
            self._free_slots.append(request.slot)
        request.slot = -1
