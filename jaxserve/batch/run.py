"""One run over the lines of a batch that have no result yet."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from jaxserve.batch.answer import Answer, BatchServer
from jaxserve.batch.lines import BatchInput, BatchLine
from jaxserve.batch.results import ResultFile, result_key
from jaxserve.engine.call_thread import CallThread
from jaxserve.progress import progress_bar


@dataclass
class BatchSummary:
    """What one run did. Skipped are the lines that had a result before; tokens are those of requests that succeeded."""

    num_skipped: int = 0
    num_succeeded: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompts', those that the prefix cache had."""
    num_output_tokens: int = 0
    elapsed_seconds: float = 0.0
    budget_use: float | None = None
    """See BatchServer."""

    def add(self, answer: Answer) -> None:
        if answer.body is None:
            self.num_errors += 1
            return
        self.num_succeeded += 1
        usage = answer.body.get("usage") or {}
        # /v1/responses has other names for the same.
        self.num_prompt_tokens += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self.num_output_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.num_cached_tokens += details.get("cached_tokens") or 0

    def __str__(self) -> str:
        parts = [
            f"{self.num_succeeded + self.num_errors} requests, {self.num_errors} errors, {self.num_skipped} skipped "
            f"in {self.elapsed_seconds:.1f} s: {self.num_prompt_tokens / self.elapsed_seconds:.1f} prompt tokens/s, "
            f"{self.num_output_tokens / self.elapsed_seconds:.1f} output tokens/s"
        ]
        if self.num_prompt_tokens:
            parts.append(f"{self.num_cached_tokens / self.num_prompt_tokens:.0%} of prompt tokens were cached")
        if self.budget_use is not None:
            parts.append(f"{self.budget_use:.0%} of the token budget was used")
        return ", ".join(parts)


class BatchRun:
    """Gives every line of ``source`` that has no result in ``results`` one. ``run`` may be called once."""

    def __init__(
        self, server: BatchServer, source: BatchInput, results: ResultFile, *, show_progress: bool = True
    ) -> None:
        self._server, self._source, self._results = server, source, results
        self._summary, self._show_progress = BatchSummary(), show_progress

    def run(self) -> BatchSummary:
        """Whatever stops it, the results of what has finished are on the disk, and nothing is left under way."""
        start_seconds, summary, hidden = time.monotonic(), self._summary, not self._show_progress
        num_lines, num_done = len(self._source), len(self._results.done)
        with progress_bar("serving", num_lines, "request", initial=num_done, disable=hidden) as bar:

            def show(num_results: int) -> None:
                rate = summary.num_output_tokens / (time.monotonic() - start_seconds)
                bar.set_postfix_str(f"{rate:.0f} output tokens/s", refresh=False)
                bar.update(num_results)

            CallThread().run(self._serve(), show)
        summary.elapsed_seconds, summary.budget_use = time.monotonic() - start_seconds, self._server.budget_use
        return summary

    def _serve(self) -> Generator[int | None]:
        """On the engine's thread; yields the number of new results, or None, after every step."""
        with closing(self._server.answers(self._to_serve())) as every:
            for answers in every:
                if answers:
                    self._results.append([answer.result() for answer in answers])
                for answer in answers:
                    self._summary.add(answer)
                yield len(answers) or None

    def _to_serve(self) -> Iterator[BatchLine]:
        for line in self._source:
            if result_key(line.id, line.custom_id) in self._results.done:
                self._summary.num_skipped += 1
            else:
                yield line
