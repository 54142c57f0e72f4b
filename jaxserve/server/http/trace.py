"""A trace of an engine's next steps, taken while it serves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.metrics import StepRecord
    from jaxserve.engine.tracing import TracedStep
    from jaxserve.scheduler import Chunk

MAX_TRACED_STEPS, DEFAULT_TRACED_STEPS = 512, 100
WAIT_SECONDS = 10.0
"""For steps: an idle engine has none."""


async def trace_next_steps(engine: Engine, num_steps: int) -> bytes:
    """In Chrome's trace-event format, up to ``num_steps``, as many as there are within WAIT_SECONDS.

    The engine's thread only keeps what it has made anyway; events are made of it in a thread of its own.
    """
    from jaxserve.engine.tracing import trace_of

    loop, all_seen = asyncio.get_running_loop(), asyncio.Event()
    seen: list[TracedStep] = []

    def see(record: StepRecord, chunks: list[Chunk]) -> None:
        if len(seen) < num_steps:
            seen.append((record, chunks))
            if len(seen) == num_steps:
                loop.call_soon_threadsafe(all_seen.set)

    # The engine's thread may be going through the list, so it is not changed.
    engine.on_step = [*engine.on_step, see]
    try:
        await asyncio.wait_for(all_seen.wait(), WAIT_SECONDS)
    except TimeoutError:
        pass
    finally:
        engine.on_step = [observe for observe in engine.on_step if observe is not see]
    return await asyncio.to_thread(trace_of, seen.copy())
