"""What the policies share that never cut a prompt."""

from __future__ import annotations

from typing import ClassVar

from jaxserve.request import Request
from jaxserve.scheduler.base import Scheduler
from jaxserve.scheduler.batch import Batch


class WholePromptScheduler(Scheduler):
    """A prompt runs in one step, and after a preemption so does its recomputation with the outputs so far.

    Either is of fewer than ``max_model_len`` tokens: a prompt leaves room for output, and whoever may still make a
    token is short of the limit. The queue is first come first served, so while its head does not fit nobody is
    admitted, the running requests end one by one, and in the end it has the whole budget and all blocks to itself.
    A ``token_budget`` of ``max_model_len - 1`` thus keeps every request from starving, even where decodes share the
    batch; configurations must have ``max_model_len`` (config.py).
    """

    runs_whole_prompts = True
    reserves: ClassVar[bool] = False
    """Blocks for ``max_model_len`` tokens are taken at admission and held, so nobody is ever preempted. A window
    gives back the blocks left behind, and those ahead stay reserved."""

    def _admit_whole(self, batch: Batch) -> None:
        """Admit requests with their whole prompts while budget, slots and blocks last."""
        while (request := self._next_waiting(batch)) is not None:
            num_tokens = request.num_uncomputed_tokens
            if num_tokens > batch.budget_left or not self._has_room(batch, request):
                break
            self._admit(batch, request)
            if self.reserves:
                self.blocks.grow(request.slot, self.limits.max_model_len)
            self._grant(batch, request, num_tokens)

    def _has_room(self, batch: Batch, request: Request) -> bool:
        if self.reserves:
            return self.blocks.num_free >= self.blocks.num_for(self.limits.max_model_len)
        # All of it at once, also where a window will give most of it back, and a block for each running request.
        whole = self.blocks.num_for(request.num_uncomputed_tokens)
        return self.blocks.num_free >= len(self.running) + whole and super()._has_room(batch, request)
