"""Threads for tokenizers and chat templates, so that streams flow on meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jaxserve.errors import RequestError
from jaxserve.server.errors import OverloadedError

TIMEOUT_SECONDS = 30.0
SHORT_BYTES = 16 * 1024
"""What takes milliseconds to tokenize."""
SHORT_THREADS = 4
LONG_THREADS = max(1, (os.cpu_count() or 1) // 4)
"""Few, because each takes a core from the engine where that computes on cores."""


class TextThreads:
    """Short texts have threads of their own, and never wait for long ones."""

    def __init__(self) -> None:
        # Tokenizers then work in the thread that calls them, without Python's lock; else in a pool that all share.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._short = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="short-texts")
        self._long = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="long-texts")

    async def run[Result](self, work: Callable[[], Result], num_bytes: int) -> Result:
        """The result of ``work`` on a text of about ``num_bytes``. Raises RequestError when it takes longer than
        TIMEOUT_SECONDS, and OverloadedError when it has not begun by then.
        """
        future = (self._short if num_bytes <= SHORT_BYTES else self._long).submit(work)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if future.cancel() or future.cancelled():
                raise OverloadedError(f"no thread was free to tokenize within {TIMEOUT_SECONDS:g} s") from None
            raise RequestError(f"prompt must tokenize within {TIMEOUT_SECONDS:g} s, got no result") from None
